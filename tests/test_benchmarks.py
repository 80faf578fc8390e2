"""Benchmarks answer --help, and refuse wrong arguments before they do anything."""

import re
import sys

import jax
import pytest
import scripts
from scripts import BENCHMARKS

COMMANDS = [
    path.stem
    for path in sorted(BENCHMARKS.glob("*.py"))
    if "\ndef main()" in path.read_text()
]


@pytest.fixture
def load(monkeypatch, tmp_path):
    """A function from a script's name and arguments to its module."""
    monkeypatch.chdir(tmp_path)

    def load(name, *args):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *args])
        return scripts.load(name)

    return load


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(load, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        load(name, "--help").main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py ")


UNKNOWN = r"argument {}: invalid choice: '?nope'? \(choose from "


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("attention", "--only nope", UNKNOWN.format("--only")),
        ("attention", "--tokens 7", r"--tokens: invalid choice: 7 \(choose .*32768"),
        ("dispatch", "--repeats 0", "--repeats: 0 is below 1"),
        ("implementations", "--repeats 0", "--repeats: 0 is below 1"),
        ("implementations", "--layers 0", "--layers: 0 is below 1"),
        ("max_seq_len", "--steps 0", "--steps: 0 is below 1"),
        ("max_seq_len", "--rows", "--rows: expected at least one"),
        ("ops", "--ops head nope", UNKNOWN.format("--ops")),
        ("ops", "--repeats 0", "--repeats: 0 is below 1"),
        ("ops", "--variants nope", r"--variants \['nope'\] is part of no name of \['"),
        ("optimizers", "--preset nope", UNKNOWN.format("--preset")),
        ("optimizers", "--steps 0", "--steps: 0 is below 1"),
        ("peers", "--preset nope", UNKNOWN.format("--preset")),
        ("peers", "--lengths 64 -1", "--lengths: -1 is below 1"),
        ("plans", "--preset nope", UNKNOWN.format("--preset")),
        ("plans", "--steps 0", "--steps: 0 is below 1"),
        ("plans", "--layers 0", "--layers: 0 is below 1"),
        ("step", "--work work --optimizer nope", UNKNOWN.format("--optimizer")),
        ("step", "--work work --preset nope", UNKNOWN.format("--preset")),
        ("step", "--work work --rows", "--rows: expected at least one"),
        ("trace", "--preset nope", UNKNOWN.format("--preset")),
        ("trace", "--implementation nope", UNKNOWN.format("--implementation")),
        ("tune_matmul", "--preset nope", UNKNOWN.format("--preset")),
        ("tune_matmul", "--rounds 0", "--rounds: 0 is below 1"),
    ],
)
def test_wrong_arguments_come_first(load, capsys, tmp_path, name, args, message):
    with pytest.raises(SystemExit) as stopped:
        load(name, *args.split()).main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert re.search(message, said.err), said.err
    assert not list(tmp_path.iterdir())


def test_a_trace_without_a_gpu_is_refused_first(load, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    # What main would set for its own process, it must not leave in this one.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    trace = load("trace", "--preset", "tiny", "--tokens", "64", "--keep", "kept")
    with pytest.raises(SystemExit, match=r"needs a GPU, there is none \(cpu\); --read"):
        trace.main()
    assert not list(tmp_path.iterdir())


def test_tiles_without_kernels_are_refused_first(load, monkeypatch, capsys):
    tune = load("tune_matmul")
    monkeypatch.setattr(tune, "device_obstacle", lambda: "capability 8.0 is not 9.0")
    with pytest.raises(SystemExit, match="cannot run here: capability 8.0 is not 9.0"):
        tune.main()
    assert not capsys.readouterr().out


def test_unknown_products_are_refused_first(load, monkeypatch, capsys):
    tune = load("tune_matmul", "--products", "down", "up")
    monkeypatch.setattr(tune, "device_obstacle", lambda: None)
    with pytest.raises(SystemExit):
        tune.main()
    said = capsys.readouterr()
    assert "no products ['up']; there are ['dh, gate_up" in said.err and not said.out


def test_attention_writes_no_empty_table(load, monkeypatch, capsys, tmp_path):
    attention = load("attention", "--only", "tokamax", "--out", "out")
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        attention.main()
    assert "no row has --only ['tokamax']" in capsys.readouterr().err
    attention = load("attention", "--out", "out")
    monkeypatch.setattr(attention, "run", lambda *_: ([], ["wrong, not timed: x"]))
    with pytest.raises(SystemExit, match="no row ran, .*\nwrong, not timed: x"):
        attention.main()
    assert not (tmp_path / "out").exists()
