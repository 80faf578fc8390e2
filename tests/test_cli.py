"""Command lines: what is refused, how it is said, what --help shows."""

from pathlib import Path

import pytest

from mst_jax.checkpoint import SaveError
from mst_jax.cli import Export, export, train_main

ROOT = Path(__file__).parents[1]


def test_export_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a run's directory"):
        export(Export(checkpoint=tmp_path, out=tmp_path / "out"))


def test_what_stops_a_run_is_one_line(tmp_path, monkeypatch, capsys):
    def full(cfg):
        raise OSError(28, "No space left on device", cfg.out_dir)

    def not_saved(cfg):
        raise SaveError("checkpoint of step 2 not saved")

    def interrupted(cfg):
        raise KeyboardInterrupt

    args = ["--config", str(ROOT / "configs" / "tiny.py"), "--out-dir", "OUT"]
    monkeypatch.setattr("mst_jax.trainer.train", full)
    assert train_main(ROOT / "configs", args) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: [Errno 28] No space left on device: 'OUT'\n"
    monkeypatch.setattr("mst_jax.trainer.train", not_saved)
    assert train_main(ROOT / "configs", args) == 1
    assert capsys.readouterr().err == "error: checkpoint of step 2 not saved\n"
    monkeypatch.setattr("mst_jax.trainer.train", interrupted)
    assert train_main(ROOT / "configs", args) == 130
    assert "nothing was saved" in capsys.readouterr().err


def test_help_lists_the_recipes(capsys):
    assert train_main(ROOT / "configs", ["--help"]) == 0
    assert "configs/llama3_8b.py" in capsys.readouterr().out
    assert train_main(ROOT / "configs", []) == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config", "configs/nope.py"], "no recipe configs/nope.py"),
        (["--config"], "--config needs a recipe"),
        (["--config", "TINY", "--data.source", "/no/such"], "/no/such"),
        (["--config", "TINY", "--mesh.fsdp", "3"], "must be a multiple"),
        (["--config", "TINY", "--mesh.data", "64", "--data.batch-size", "64"], "64"),
        (["--config", "TINY", "--optim.learning-rate", "-1"], "learning_rate=-1"),
        (["--config", "TINY", "--init-from", "/x"], "both a model and init_from"),
        (["--config", "TINY", "--out-dir", __file__], "test_cli.py is a file"),
        (["--config", "TINY", "--out-dir", f"{__file__}/x"], "cannot hold a run"),
        (["--config", "TINY", "--compile-cache", f"{__file__}/x"], "compile_cache='"),
        (["--config", "TINY", "--train.command-buffers", "all"], "command-buffers"),
        (
            ["--config", "TINY", "--train.memory-budget", "4GiB", "--train.plan=full"],
            "--train.plan is what the planner chooses, within train.memory_budget='4G",
        ),
    ],
)
def test_bad_commands(args, message, capsys, tmp_path):
    tiny = str(ROOT / "configs" / "tiny.py")
    args = [tiny if a == "TINY" else a for a in args]
    if "--config" in args and len(args) > 2 and "--out-dir" not in args:
        args += ["--out-dir", str(tmp_path / "out")]
    try:
        status = train_main(ROOT / "configs", args)
    except SystemExit as error:  # tyro's, for what it builds from the options
        status = error.code
    assert status in (1, 2)
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_mistyped_option_is_suggested(capsys):
    tiny = str(ROOT / "configs" / "tiny.py")
    with pytest.raises(SystemExit):
        train_main(ROOT / "configs", ["--config", tiny, "--train.stepz", "3"])
    captured = capsys.readouterr()
    assert "--train.steps" in captured.err + captured.out


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.md", "", "is no recipe: a .py file"),
        ("a.py", "x = 1", "has no get_config"),
        ("a.py", "def get_config(:", "SyntaxError"),
        (
            "a.py",
            "from mst_jax.config import DataConfig\n"
            "def get_config():\n    return DataConfig(seq_length=4)",
            "got an unexpected keyword argument 'seq_length'",
        ),
    ],
)
def test_what_is_no_recipe(name, text, message, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(text)
    assert train_main(tmp_path, ["--config", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_recipe_need_not_say_what_it_is(tmp_path, capsys):
    (tmp_path / "plain.py").write_text("x = 1")
    assert train_main(tmp_path, ["--help"]) == 0
    assert "plain.py" in capsys.readouterr().out
