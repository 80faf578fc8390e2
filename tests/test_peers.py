"""benchmarks/peers.py: one model in both frameworks, and rows that fail are rows."""

import csv
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from scripts import BENCHMARKS, load

from mst_jax.hf import _tensors
from mst_jax.model_config import ModelConfig


def test_both_frameworks_make_the_same_weights():
    weights = load("peers/weights")
    cfg = ModelConfig(hidden_size=64, intermediate_size=96, num_layers=2)
    params = flatten_dict(jax.jit(lambda: weights.jax_params(cfg))(), sep="/")
    for hf, name, layer, shape in _tensors(cfg):
        made = torch.empty(shape, dtype=torch.bfloat16)
        weights.fill_torch(made, hf, cfg.initializer_range)
        ours = np.asarray(params[name.path].astype("float32"))
        ours = ours if layer is None else ours[layer]
        np.testing.assert_array_equal(ours.T if name.transposed else ours, made.float())
        if len(shape) == 2:
            assert abs(ours.std() - cfg.initializer_range) < 1e-3
            assert abs(ours.mean()) < 1e-3
    first, second = (params["layers/mlp/w_up"][i] for i in (0, 1))
    assert (first != second).mean() > 0.9  # every tensor has a seed of its own


def test_long_tensors_are_filled_piece_by_piece():
    weights = load("peers/weights")
    weights.PIECE = 2**11
    whole = torch.empty((6, 2**10), dtype=torch.bfloat16)
    weights.fill_torch(whole, "name", 1.0)  # two rows at a time
    part = torch.empty((4, 2**10), dtype=torch.bfloat16)
    weights.fill_torch(part, "name", 1.0)
    assert torch.equal(whole[:4], part)
    assert not torch.equal(whole[0], whole[2])


def run(out):
    """Return the script's CSV on the tiny model, by entry and length."""
    command = [
        sys.executable, str(BENCHMARKS / "peers.py"), "--preset", "tiny",
        "--lengths", "96", "64", "--steps", "2", "--out", str(out),
        "--entries", "ours-attention", "hf-ckpt", "liger", "mini-s",
        "--mini-s", str(out),
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("peers-*.md"))) == len(list(out.glob("peers-*.png"))) == 1
    (path,) = out.glob("peers-*.csv")
    found = csv.DictReader(path.open())
    return {(row["entry"], int(row["tokens"])): row for row in found}


@pytest.mark.slow
def test_ours_and_hugging_face_compute_the_same_and_what_cannot_says_why(tmp_path):
    rows = run(tmp_path)  # a minute: one test for all that it shows
    for tokens in (64, 96):
        ours, theirs = rows["ours-attention", tokens], rows["hf-ckpt", tokens]
        for row in (ours, theirs):
            assert not row["error"]
            assert float(row["last_loss"]) < float(row["first_loss"])
        assert abs(float(ours["first_loss"]) - float(theirs["first_loss"])) < 2e-3
        # Stochastic rounding against rounding to nearest: close, not the same.
        assert abs(float(ours["last_loss"]) - float(theirs["last_loss"])) < 0.1
        assert float(ours["ours_over_it"]) == 1
    assert "has no minis/mini_sequence.py" in rows["mini-s", 64]["error"]
    if find_spec("liger_kernel") is None:
        assert rows["liger", 96]["error"] == "not installed: liger_kernel"
    assert not rows["mini-s", 64]["tokens_per_second"]


def test_a_row_that_hangs_is_stopped(monkeypatch, tmp_path):
    peers = load("peers")
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    script = tmp_path / "benchmarks" / "peers" / "with_torch.py"
    script.write_text(
        "import time; print('ROW {\"step_s\": 1}', flush=True); time.sleep(99)"
    )
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    worker = peers.Worker({"entry": "hf", "budget_GiB": 1.0}, 0.0)
    assert worker.row(30) == {"step_s": 1}
    assert worker.row(0.2) == {"error": "stopped after 0 s"}
    worker.stop(0)
    assert worker.process.returncode == -9


def test_a_process_that_dies_leaves_its_last_line(monkeypatch, tmp_path):
    peers = load("peers")
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    script = tmp_path / "benchmarks" / "peers" / "with_jax.py"
    script.write_text("raise MemoryError('not enough')")
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    worker = peers.Worker({"entry": "ours@30", "budget_GiB": 1.0}, 0.0)
    assert worker.row(30) == {"error": "exit 1: MemoryError: not enough"}
    worker.stop(5)


def test_ratios_are_to_the_best_and_other_losses_do_not_count():
    peers = load("peers")
    row = {"tokens": 8, "fastest_s": 1.0, "steps": 2, "peak_GiB": 1.0}
    rows = peers.table([
        row | {"entry": "ours", "step_s": 0.01, "losses": [5.0, 4.0]},
        row | {"entry": "ours@30", "step_s": 0.04, "losses": [5.001, 4.0]},
        row | {"entry": "hf-ckpt", "step_s": 0.02, "losses": [5.002, 4.0]},
        row | {"entry": "liger", "step_s": 0.016, "losses": [5.003, 4.0]},
        row | {"entry": "compile", "step_s": 0.001, "losses": [5.02, 4.0]},
        row | {"entry": "mini-s", "step_s": 0.001, "losses": [float("nan")] * 2},
        {"tokens": 8, "entry": "hf", "error": "out of memory"},
    ])  # fmt: skip
    assert [r.get("ours_over_it") for r in rows] == [1, 4, 2, 1.6, 0.1, 0.1, None]
    marked = [r["entry"] for r in rows if r["error"].startswith(peers.OTHER_LOSS)]
    assert marked == ["compile", "mini-s"]
    (line,) = peers.conclusions(rows)
    assert "ours 800 tokens/s, best peer liger 500: **1.60x**" in line
    assert "checkpointed peer hf-ckpt 400 tokens/s, 1.0 GiB" in line
    assert "in no more memory ours 800: 2.00x" in line


def test_every_peer_has_its_settings():
    peers = load("peers")
    text = (BENCHMARKS / "peers" / "with_torch.py").read_text()
    for entry in peers.ENTRIES:
        assert peers.is_ours(entry) or f'"{entry}": Peer(' in text
