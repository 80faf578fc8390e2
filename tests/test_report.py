"""benchmarks/report.py: what made the numbers, and every row's every column."""

import csv
import sys

import pytest
from scripts import load

report = load("report")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes rows into a directory that is not there yet."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--tokens", "8"])

    def write(rows, **options):
        return report.write(
            tmp_path / "new" / "out", "x", "The x", rows,
            gpu="a GPU", packages=["jax", "no-such-package"], **options,
        )  # fmt: skip

    return write


def test_markdown_says_what_made_the_numbers(written):
    path = written([{"ms": 1}], notes=["one", "two"], commit="abc", suffix="-a")
    assert path.name.startswith("x-20") and path.name.endswith("-a.md")
    date = path.name.removeprefix("x-").removesuffix("-a.md")
    versions = report.versions("jax")
    assert f"jax {report.version('jax')}" in versions and versions.startswith("Python ")
    assert path.read_text().splitlines() == [
        f"# The x, {date}",
        "",
        "- GPU: a GPU",
        f"- versions: {versions}, no-such-package not installed; commit abc",
        "- command: `python benchmarks/x.py --tokens 8`",
        "- one",
        "- two",
        "",
        "| ms |",
        "| --- |",
        "| 1 |",
    ]


def test_rows_may_lack_columns_and_failures_come_last(written):
    rows = [
        {"how": "a", "error": "line one\n  of a | b"},
        {"how": "b", "ms": 1.5, "window": None, "failed": ""},
    ]
    path = written(rows, notes=[])
    columns = ["how", "ms", "window", "error", "failed"]
    assert path.read_text().splitlines()[-4:] == [
        f"| {' | '.join(columns)} |",
        "| --- | --- | --- | --- | --- |",
        "| a |  |  | line one of a / b |  |",
        "| b | 1.5 |  |  |  |",
    ]
    with path.with_suffix(".csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == columns
    assert found[0]["error"] == rows[0]["error"] and found[1]["ms"] == "1.5"


def test_todays_files_are_replaced(written):
    written([{"a": 1}, {"a": 2}], notes=[])
    path = written([{"a": 3}], notes=[])
    assert path.read_text().endswith("| --- |\n| 3 |\n")
    assert len(list(path.parent.iterdir())) == 2


def test_a_machine_without_git_does_not_know_the_commit(monkeypatch):
    assert report.checkout()
    monkeypatch.setattr(report.shutil, "which", lambda name: None)
    assert report.checkout() == "unknown"
