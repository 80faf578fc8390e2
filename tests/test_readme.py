"""What the README shows runs, and its options are there."""

import re
from pathlib import Path

import numpy as np
import pytest
import tyro

from mst_jax.cli import Plan, train_main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_before_and_after_are_the_same():
    names = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.S)[0], names)
    assert names["before"] > 1
    np.testing.assert_allclose(names["after"], names["before"], rtol=1e-5)
    assert names["count"] == names["labels"].size > 1024


def test_every_option_exists(capsys):
    with pytest.raises(SystemExit):
        train_main(ROOT, ["--config", str(ROOT / "configs" / "tiny.py"), "--help"])
    with pytest.raises(SystemExit):
        tyro.cli(Plan, args=["--help"])
    option = r"--[a-z][a-z.-]+[a-z]"
    known = {*re.findall(option, capsys.readouterr().out), "--config", "--measure"}
    named = {*re.findall(option, README)}
    assert len(named) > 15 and named <= known, named - known
