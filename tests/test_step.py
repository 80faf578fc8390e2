"""benchmarks/step.py: its rows, its comparison of two checkpoints, its plain read."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from scripts import load

from mst_jax.plan import PRESETS, parse_plan

step = load("step")


@pytest.mark.parametrize("name", step.ROWS)
def test_every_row_says_its_tokens_and_its_plan(name):
    tokens, plan, _ = step.ROWS[name]
    assert name.startswith(str(tokens))
    parse_plan(plan, 32)
    if " " not in name:
        assert parse_plan(plan, 32) == parse_plan(PRESETS["save_attention"], 32)
    assert set(step.TARGETS) <= set(step.ROWS)


def checkpoint(directory, **changed):
    """Two files, bf16 and f32, with tensors replaced; None leaves one out."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b": rng.normal(size=(4,)).astype(np.float32),
        "c": np.zeros((2, 2), ml_dtypes.bfloat16),
    }
    tensors = {k: v for k, v in (tensors | changed).items() if v is not None}
    first = {k: v for k, v in tensors.items() if k == "a"}
    save_file(first, directory / "one.safetensors")
    rest = {k: v for k, v in tensors.items() if k != "a"}
    save_file(rest, directory / "two.safetensors")
    return directory


def test_any_bit_is_a_difference(tmp_path):
    one = checkpoint(tmp_path / "one")
    bytes_of_all = 3 * 5 * 2 + 4 * 4 + 4 * 2
    assert step.different(one, checkpoint(tmp_path / "same")) == (set(), bytes_of_all)
    minus_zero = np.array([[-0.0, 0], [0, 0]], ml_dtypes.bfloat16)  # == 0, not its bits
    other = checkpoint(
        tmp_path / "other", c=minus_zero, b=None, d=np.zeros(1, np.float32)
    )
    assert step.different(one, other)[0] == {"b", "c", "d"}
    reshaped = checkpoint(tmp_path / "shape", b=np.zeros((2, 2), np.float32))
    assert step.different(one, reshaped)[0] == {"b"}


def test_a_plain_read_reads_all(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "one")
    monkeypatch.setattr(step, "PIECE", 7)  # many pieces, the last one short
    read = []
    monkeypatch.setattr(
        step, "ThreadPoolExecutor", lambda _: Recorder(read), raising=True
    )
    step.drop_from_memory(directory)
    assert step.plain_read(directory) > 0
    assert sum(read) == sum(p.stat().st_size for p in directory.iterdir())


class Recorder:
    """A pool of one that notes what its tasks return."""

    def __init__(self, results):
        self.results = results

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, fn, items):
        self.results += map(fn, items)
        return self.results
