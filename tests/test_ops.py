"""benchmarks/ops.py: the widths of its rows."""

from argparse import Namespace

import pytest
from scripts import load

from mst_jax.config import PRESETS

ops = load("ops")


def widths(**given):
    args = Namespace(**{"preset": None, "vocab": None, "ffn": None, "d_model": None})
    vars(args).update(given)
    ops.fill_in_widths(args)
    return args.d_model, args.ffn, args.vocab


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_widths_of_its_rows(name):
    model = PRESETS[name]
    want = model.hidden_size, [model.intermediate_size], [model.vocab_size]
    assert widths(preset=name) == want


def test_what_is_given_wins():
    assert widths(preset="llama31_70b", ffn=[64]) == (8192, [64], [128256])
    assert widths(vocab=[5]) == (4096, [14336], [5])
    with pytest.raises(SystemExit, match="no preset 'x'; .*llama31_70b"):
        widths(preset="x")
