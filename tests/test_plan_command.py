"""`mst-jax plan`: its output, its command, what it refuses."""

import re
import shlex
import subprocess
import sys

import pytest
import tyro
from test_planner import H200, LLAMA, ROOT, search

from mst_jax import cli, compile_only, plan_report
from mst_jax.config import Config
from mst_jax.gpus import find_gpu
from mst_jax.planner import default_budget, fastest_plan
from mst_jax.prediction import predict


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mst-jax", "plan", *map(str, args)])
    return cli.main()


@search
def test_command(monkeypatch, capsys, tmp_path):
    png = tmp_path / "plan.png"
    recipe = ROOT / "configs" / "llama3_8b.py"
    status = run(
        monkeypatch, "--config", recipe, "--gpu", "a100-80gb",
        "--host-memory", "120GiB", "--out", png,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert "The longest sequence is" in out and "host memory (120.0 GiB)" in out
    assert "| tokens | plan | head groups | device GiB | host GiB | tokens/s |" in out
    line = out[out.index("XLA_PYTHON_CLIENT_MEM_FRACTION") :].replace("\\\n", "")
    command = shlex.split(line.splitlines()[0])
    assert command[1:5] == ["python", "train.py", "--config", str(recipe)]
    cfg = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(Config),
        default=cli.load_recipe(recipe), args=command[5:],
    )  # fmt: skip
    p = predict(cfg, LLAMA, find_gpu("a100-80gb"))
    assert p.peak_device <= default_budget(find_gpu("a100-80gb"))
    assert f"| {cfg.data.seq_len} | {cfg.train.plan} |" in out
    assert cfg.train.memory_budget is None  # or the trainer would plan again
    assert png.read_bytes().startswith(b"\x89PNG")


def test_command_for_one_length(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args, "--seq-len", 65536) == 0
    out = capsys.readouterr().out
    assert "The fastest plan for 65536 tokens" in out and "\n| 65536 |" in out


def test_command_takes_the_options_of_the_run(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    args += ["--seq-len", 8192, "--data.no-packing", "--optim.name", "sgd"]
    args += ["--optim.moment_dtype=float32", "--out_dir", "my runs/a"]
    assert run(monkeypatch, *args) == 0
    out = capsys.readouterr().out.replace("\\\n", "")
    command = shlex.split(out[out.index("python train.py") :].splitlines()[0])
    recipe, options = cli._split_config(command[2:])
    cfg = cli._override(cli.load_recipe(recipe), options, "", "")
    assert (cfg.optim.name, cfg.data.packing) == ("sgd", False)
    assert cfg.out_dir == "my runs/a"
    p = predict(cfg, LLAMA, H200)
    assert f"A step takes {p.step_seconds:.2f} s" in out


@pytest.mark.parametrize("wrong", ["--optim.nam=sgd", "--data.batch-size=0"])
def test_command_refuses_what_the_run_would(monkeypatch, capsys, wrong):
    recipe = ROOT / "configs" / "llama3_8b.py"
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", recipe, "--gpu", "h200", wrong)
    name = "optim.nam" if "nam" in wrong else "batch_size=0 must be positive"
    assert name in capsys.readouterr().err


def test_export_has_no_other_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mst-jax", "export", "a", "b", "--dtyp", "x"])
    assert cli.main() == 1
    assert "mst-jax export has no option '--dtyp'" in capsys.readouterr().err


def test_command_refuses(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "t4", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args) == 1
    error = capsys.readouterr().err
    assert "error: 1024 tokens do not fit Tesla T4" in error
    assert "saves" in error and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--out", "/nowhere/x.png"), "'/nowhere/x.png' is in a directory that is not"),
        (("--out", "x.html"), "'x.html' must end in one of"),
        (("--device-memory", "200GiB"), "'200GiB': a process can hold 75.7 GiB of NV"),
        (("--host-memory", "1.2.3GiB"), "'1.2.3GiB' is no size"),
        (("--data.seq_len=9",), "--data.seq-len is what the plan chooses: give --seq-"),
        (("--train.no-prefetch",), "--train.no-prefetch is what the plan chooses: lea"),
        (("--optim.freeze", "nolayers"), "freeze='nolayers' names no parameter"),
    ],
)
def test_command_refuses_before_any_work(monkeypatch, capsys, wrong, message):
    def work(*args):
        raise AssertionError

    monkeypatch.setattr(plan_report, "longest_sequence", work)
    recipe = ROOT / "configs" / "llama3_8b.py"
    assert run(monkeypatch, "--config", recipe, "--gpu", "h100", *wrong) == 1
    assert message in capsys.readouterr().err


def test_lengths_of_the_table():
    for longest in (1, 2, 7, 100, 511, 512, 1023, 1024, 5000, 2**17):
        found = plan_report.lengths(longest, 9)
        assert found == sorted(set(found)) and found[-1] == longest and found[0] > 0


def test_command_for_a_short_length(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args, "--seq-len", 100) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if re.match(r"\| \d", x)]
    assert len(rows) == 1 and rows[0].startswith("| 100 |")


def test_lengths_that_do_not_fit_are_left_out(monkeypatch, capsys, tmp_path):
    def some_fit(cfg, *args):
        if 1024 < cfg.data.seq_len < 65536:
            raise ValueError("does not fit")
        return fastest_plan(cfg, *args)

    monkeypatch.setattr(plan_report, "fastest_plan", some_fit)
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args, "--seq-len", 65536) == 0
    assert "\n| 65536 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [RuntimeError("ptxas died"), subprocess.TimeoutExpired("python", 600)]
)
def test_a_plan_that_does_not_compile_is_printed(monkeypatch, capsys, tmp_path, error):
    def compile_step(*args):
        raise error

    monkeypatch.setattr(compile_only, "compile_step", compile_step)
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args, "--seq-len", 8192, "--verify") == 1
    out, err = capsys.readouterr()
    assert "The fastest plan for 8192 tokens" in out
    assert f"error: the plan above is not verified: {error}" in err
