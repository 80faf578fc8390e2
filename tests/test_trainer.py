"""The run: resume, kill, signals, bad numbers, the command line, HF in and out."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file

from mst_jax import hf, trainer
from mst_jax.checkpoint import Checkpoints
from mst_jax.cli import Export, export, load_recipe, main
from mst_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.metrics import read_metrics
from mst_jax.model import init_params
from mst_jax.train_step import abstract_state
from mst_jax.trainer import NonFiniteLossError, train

ROOT = Path(__file__).parent.parent
STEPS = 8


def text_file(directory):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinsh"), 4)) for _ in range(50)]
    path = directory / "text.txt"
    path.write_text(" ".join(rng.choice(words, 8000)))
    return path


def config(directory, out="run", schedule="cosine", **train):
    options = {"steps": STEPS, "save_every": 2, "eval_every": 4, "eval_batches": 1}
    return Config(
        model=ModelConfig(
            hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
            num_kv_heads=1,
        ),
        out_dir=str(directory / out),
        data=DataConfig(source=str(text_file(directory)), seq_len=64, batch_size=2),
        optim=OptimConfig(warmup_steps=2, learning_rate=1e-2, schedule=schedule),
        train=TrainConfig(
            **{**options, "compute_dtype": "float32", "mlp_chunk_size": 24, **train}
        ),
    )  # fmt: skip


# At a constant rate the program does not depend on the number of steps.
in_process = partial(config, schedule="constant")


def recipe(cfg, path):
    values = json.dumps(dataclasses.asdict(cfg))
    path.write_text(
        "import json\nfrom mst_jax.config import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({values!r}))\n"
    )
    return path


def start(cfg, directory):
    """Run train.py on one CPU device in a process of its own."""
    path = recipe(cfg, directory / f"{Path(cfg.out_dir).name}.py")
    flags = os.environ["XLA_FLAGS"].split()
    flags = [f for f in flags if not f.startswith("--xla_force_host_platform")]
    # tensorboardX would import torch, three seconds in each of these processes.
    (directory / "without").mkdir(exist_ok=True)
    (directory / "without" / "torch.py").write_text("raise ImportError")
    paths = f"{directory / 'without'}{os.pathsep}{ROOT}"
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(path)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(cfg, directory):
    process = start(cfg, directory)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(cfg, step, process):
    path = Path(cfg.out_dir) / "metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline:
        if read_metrics(path) and read_metrics(path)[-1]["step"] >= step:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)
    raise AssertionError("no such step in time")


def kill_and_finish(cfg, saved, directory):
    """Kill a run once it has saved a step; return what the next one prints."""
    process = start(cfg, directory)
    wait_for_step(cfg, saved, process)
    while not (Path(cfg.out_dir) / "checkpoints" / str(saved)).exists():
        assert process.poll() is None
    process.kill()
    process.communicate()
    return finish(cfg, directory)


def losses(cfg):
    rows = read_metrics(Path(cfg.out_dir) / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return [(r["loss"], r["grad_norm"], r.get("eval_loss")) for r in rows]


def final_params(cfg):
    abstract = abstract_state(cfg, cfg.model)
    restored = Checkpoints(Path(cfg.out_dir) / "checkpoints", keep=9).restore(abstract)
    assert restored is not None
    return restored[0], jax.tree.map(np.asarray, restored[1]["params"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, in a process like the others."""
    directory = tmp_path_factory.mktemp("whole")
    cfg = config(directory)
    return cfg, finish(cfg, directory)


def assert_same_run(cfg, whole):
    assert losses(cfg) == losses(whole[0])
    (step, got), (want_step, want) = final_params(cfg), final_params(whole[0])
    assert step == want_step == STEPS
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_whole_run_leaves_everything(whole):
    cfg, output = whole
    out = Path(cfg.out_dir)
    assert "loss.png" in output and "mst-jax export" in output
    assert (out / "loss.png").stat().st_size > 5000
    assert json.loads((out / "config.json").read_text())["train"]["steps"] == STEPS
    assert list((out / "tensorboard").iterdir())
    first, last = losses(cfg)[0], losses(cfg)[-1]
    assert last[0] < first[0] and last[2] is not None
    assert Checkpoints(out / "checkpoints", keep=2).steps() == [6, 8]


@pytest.mark.parametrize("saved", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_kill_9_and_resume_is_bit_equal(saved, tmp_path, whole):
    cfg = config(tmp_path)
    assert "resumed from step" in kill_and_finish(cfg, saved, tmp_path)
    assert_same_run(cfg, whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_resumes(number, tmp_path, whole):
    cfg = config(tmp_path, save_every=100)
    process = start(cfg, tmp_path)
    wait_for_step(cfg, 1, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    steps = Checkpoints(Path(cfg.out_dir) / "checkpoints", keep=2).steps()
    assert steps and steps[-1] <= STEPS
    if steps[-1] < STEPS:
        assert "run the same command" in output
        assert f"resumed from step {steps[-1]}" in finish(cfg, tmp_path)
    assert_same_run(cfg, whole)


def test_corrupt_newest_checkpoint_uses_the_one_before(tmp_path, whole):
    cfg = config(tmp_path)
    shutil.copytree(whole[0].out_dir, cfg.out_dir)
    newest = Path(cfg.out_dir) / "checkpoints" / "8"
    files = [p for p in newest.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    output = finish(cfg, tmp_path)
    assert "resumed from step 6" in output and "not a whole checkpoint" in output
    assert_same_run(cfg, whole)


def test_non_finite_loss_names_step_and_checkpoint(tmp_path):
    cfg = config(tmp_path)
    optim = dataclasses.replace(
        cfg.optim, name="sgd", learning_rate=1e38, clip_norm=None, warmup_steps=0
    )
    cfg = dataclasses.replace(cfg, optim=optim)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss=.*checkpoint: "):
        train(cfg)


class StopAfter:
    """What `stop_signals` gives, with a signal after some steps."""

    def __init__(self, steps):
        self.left = steps

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_a_stopped_run_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    cfg = config(tmp_path, log_every=100, save_every=100, eval_every=100)
    optim = dataclasses.replace(
        cfg.optim, name="sgd", learning_rate=1e38, clip_norm=None, warmup_steps=0
    )
    cfg = dataclasses.replace(cfg, optim=optim)
    monkeypatch.setattr(trainer, "stop_signals", lambda: nullcontext(StopAfter(4)))
    with pytest.raises(NonFiniteLossError, match="last good checkpoint: none"):
        train(cfg)
    assert Checkpoints(Path(cfg.out_dir) / "checkpoints", keep=2).steps() == []


def test_evaluations_do_not_wait_for_a_logged_step(tmp_path):
    cfg = in_process(tmp_path, log_every=3, eval_every=2, save_every=0, steps=7)
    train(cfg)
    rows = read_metrics(Path(cfg.out_dir) / "metrics.jsonl")
    assert [r["step"] for r in rows if "eval_loss" in r] == [2, 4, 6, 7]
    assert [r["step"] for r in rows] == [2, 3, 4, 6, 7]


def test_golden_losses_of_the_tiny_recipe(tmp_path):
    # From the first three steps of this recipe on JAX 0.10.2; a change of the model,
    # the data order or the optimizer moves them by far more than rounding does.
    cfg = load_recipe(ROOT / "configs" / "tiny.py")
    cfg = dataclasses.replace(
        cfg,
        out_dir=str(tmp_path / "golden"),
        data=dataclasses.replace(cfg.data, source=str(text_file(tmp_path))),
        optim=dataclasses.replace(cfg.optim, warmup_steps=1),
        train=dataclasses.replace(cfg.train, steps=3, save_every=0, eval_batches=1),
    )
    train(cfg)
    rows = read_metrics(Path(cfg.out_dir) / "metrics.jsonl")
    np.testing.assert_allclose([r["loss"] for r in rows], GOLDEN, rtol=2e-4)


GOLDEN = [5.559364, 5.022158, 4.433039]


def test_sharded_run_is_the_single_device_run(tmp_path, whole):
    cfg = config(tmp_path)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(data=1, fsdp=2))
    train(cfg)
    got = [row[0] for row in losses(cfg)]
    want = [row[0] for row in losses(whole[0])]
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("optim", {"b2": 0.5}, "other settings: optim.b2 was 0.95, is 0.5; use"),
        ("model", {"num_layers": 3}, "other settings: model was"),
        ("data", {"seed": 5}, "other settings: data.seed was 0, is 5; use"),
        ("data", {"seq_len": 32}, "other settings: data.seq_len was 64, is 32; use"),
        ("train", {"seed": 5}, "other settings: train.seed was 0, is 5; use"),
        ("train", {"accumulate": 2}, "other settings: train.accumulate was 1, is 2"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(whole, part, change, message):
    new = dataclasses.replace(getattr(whole[0], part), **change)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(whole[0], **{part: new}))


def test_other_data_behind_the_same_name_is_refused(tmp_path):
    cfg = in_process(tmp_path, steps=3)
    train(cfg)
    path = Path(cfg.data.source)
    path.write_text(path.read_text() + " more")
    again = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=4))
    with pytest.raises(ValueError, match="training tokens of .*text.txt', which now"):
        train(again)


def test_a_run_of_another_version_is_told_apart(tmp_path, monkeypatch):
    cfg = in_process(tmp_path, steps=3)
    train(cfg)
    extra = Checkpoints.extra

    def other(self, step=None):
        found = extra(self, step)
        return found | {"config": found["config"] | {"mode": 1}}

    monkeypatch.setattr(Checkpoints, "extra", other)
    with pytest.raises(ValueError, match="another version.*mode.*another --out-dir"):
        train(cfg)


def test_hf_in_and_out(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "hf")
    cfg = config(tmp_path, steps=3)
    cfg = dataclasses.replace(
        cfg,
        model=None,
        init_from=str(tmp_path / "hf"),
        data=dataclasses.replace(cfg.data, tokenizer="bytes"),
        optim=OptimConfig(name="sgd", param_dtype="bfloat16", warmup_steps=1),
    )
    summary = train(cfg)
    export(Export(checkpoint=Path(cfg.out_dir), out=tmp_path / "back"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert model.dtype == torch.bfloat16
    from mst_jax.hf_config import model_config_from_hf

    shape = model_config_from_hf(tmp_path / "hf")
    abstract = abstract_state(cfg, shape)
    directory = Path(summary["checkpoint"]).parent
    _, state, _ = Checkpoints(directory, keep=2).restore(abstract)
    kernel = np.asarray(state["params"]["layers"]["mlp"]["w_gate"][1], np.float32)
    theirs = model.model.layers[1].mlp.gate_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel.T, theirs)
    with pytest.raises(FileExistsError, match="back"):
        export(Export(checkpoint=Path(cfg.out_dir), out=tmp_path / "back"))


def test_weights_are_checked_before_the_data_is_read(tmp_path, monkeypatch):
    cfg = config(tmp_path, steps=3)
    hf.export_hf(init_params(cfg.model, 0), cfg.model, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    cfg = dataclasses.replace(cfg, model=None, init_from=str(tmp_path / "hf"))
    monkeypatch.setattr(trainer, "load_data", lambda *_: pytest.fail("read the data"))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        train(cfg)


def test_the_tokenizer_that_is_exported_is_the_one_trained_with(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(40)} | {"[UNK]": 40}
    models = tokenizers.models
    for name, length in (("own", 100), ("other", 200)):
        raw = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, model_max_length=length
        ).save_pretrained(tmp_path / name)
    cfg = config(tmp_path, steps=3)
    hf.export_hf(init_params(cfg.model, 0), cfg.model, tmp_path / "own2")
    shutil.copytree(tmp_path / "own2", tmp_path / "own", dirs_exist_ok=True)
    base = dataclasses.replace(cfg, model=None, init_from=str(tmp_path / "own"))
    assert base.tokenizer == str(tmp_path / "own") and cfg.tokenizer == "bytes"
    for tokenizer, expected in ((None, "own"), ("other", "other"), ("bytes", None)):
        given = str(tmp_path / tokenizer) if tokenizer == "other" else tokenizer
        run = dataclasses.replace(
            base, out_dir=str(tmp_path / f"run-{expected}"),
            data=dataclasses.replace(
                cfg.data, tokenizer=given, packing=False, seq_len=16, batch_size=1
            ),
        )  # fmt: skip
        train(run)
        out = tmp_path / f"out-{expected}"
        export(Export(checkpoint=Path(run.out_dir), out=out))
        assert (out / "tokenizer.json").exists() == (expected is not None)
        if expected:
            theirs = (tmp_path / expected / "tokenizer_config.json").read_text()
            assert (out / "tokenizer_config.json").read_text() == theirs


def bytes_read():
    """Bytes of arrays that this process has read from files so far."""
    name = "/tensorstore/kvstore/file/bytes_read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    return sum(cell["value"] for metric in metrics for cell in metric["values"])


def test_export_reads_the_parameters_and_no_moments(tmp_path, whole):
    cfg, before = whole[0], bytes_read()
    _, params = final_params(cfg)
    of_state = bytes_read() - before
    export(Export(checkpoint=Path(cfg.out_dir), out=tmp_path / "out"))
    of_export = bytes_read() - before - of_state
    # AdamW holds two moments of each, and the indices are read either way.
    assert 0 < of_export < of_state / 2
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.size for t in tensors.values()) == cfg.model.num_params
    for layer in range(cfg.model.num_layers):
        got = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        want = params["layers"]["mlp"]["w_down"][layer]
        assert got.T.tobytes() == want.tobytes()
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.tobytes() == params["embed"]["embedding"].tobytes()


def test_export_speaks_of_tokenizers_and_does_not_overwrite(
    tmp_path, whole, monkeypatch, capsys
):
    command = ["mst-jax", "export", whole[0].out_dir, str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert "the tokens are bytes" in capsys.readouterr().out
    assert main() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "out is not empty" in message


def test_a_directory_has_one_run_at_a_time(tmp_path):
    cfg = in_process(tmp_path, steps=3)
    with trainer.alone(Path(cfg.out_dir)):
        with pytest.raises(ValueError, match="another process trains in .*run"):
            train(cfg)
    assert train(cfg)["step"] == 3


def test_a_finished_run_keeps_its_record(tmp_path, capsys):
    cfg = in_process(tmp_path, steps=3)
    summary = train(cfg)
    # No terminal: a line for each step that is logged.
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines if line.startswith("step ")][0] == "step 1/3"
    files = [Path(cfg.out_dir) / name for name in ("summary.json", "config.json")]
    before = [path.read_text() for path in files]
    other = dataclasses.replace(cfg.train, compute_dtype="bfloat16")
    assert train(dataclasses.replace(cfg, train=other)) == summary
    assert [path.read_text() for path in files] == before
    assert "already has all 3 steps" in capsys.readouterr().out


def test_damaged_manifests_are_not_another_version(tmp_path):
    cfg = in_process(tmp_path, steps=3)
    train(cfg)
    for path in Path(cfg.out_dir).glob("checkpoints/*/manifest.json"):
        path.write_text("{")
    with pytest.raises(ValueError, match="not a whole checkpoint") as caught:
        train(cfg)
    assert "another version" not in str(caught.value)


def test_a_signal_in_the_last_step_interrupts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "stop_signals", lambda: nullcontext(StopAfter(3)))
    summary = train(in_process(tmp_path, steps=3))
    assert summary["step"] == 3 and not summary["interrupted"]


@pytest.mark.parametrize("steps", [8, 4, 1])  # the last two end before three traced
def test_profile_writes_a_trace(tmp_path, steps):
    cfg = in_process(tmp_path, save_every=0, steps=steps)
    train(dataclasses.replace(cfg, profile=True))
    assert list((Path(cfg.out_dir) / "profile").rglob("*.xplane.pb"))


def test_accumulation_and_unpacked_rows_run(tmp_path):
    cfg = config(tmp_path, accumulate=2, steps=3, save_every=0)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=False))
    summary = train(cfg)
    assert summary["step"] == 3 and np.isfinite(summary["loss"])


def test_evaluation_weighs_every_token_the_same():
    sums = iter([(10.0, 1.0), (3.0, 3.0)])
    data = SimpleNamespace(eval_batches=lambda n: [{"labels": np.zeros(1)}] * 2)
    cfg = SimpleNamespace(train=TrainConfig())
    run = SimpleNamespace(cfg=cfg, _put=lambda batch: batch, data=data)
    assert trainer._Run.evaluate(run, lambda params, batch: next(sums), None) == 13 / 4
