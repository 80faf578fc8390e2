"""How benchmarks write their rows down: a CSV and a dated markdown.

A row is a dictionary from column to value. The markdown says above its table what made
the numbers: GPU, versions, commit, command.
"""

import csv
import datetime
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FAILURES = "error", "failed"
"""Columns that come last, whichever row has them first."""


def write(
    out: Path,
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    gpu: str,
    packages: Sequence[str],
    notes: Sequence[str],
    commit: str | None = None,
    suffix: str = "",
) -> Path:
    """Write today's files, in place of those that there are.

    Args:
        out: directory, made if need be.
        name, suffix: of the files: name-DATEsuffix.csv and .md.
        title: of the markdown.
        rows: the columns are their keys, in the order in which they come.
        gpu: what the rows ran on.
        packages: whose versions are said.
        notes: what else is said above the table, a line each.
        commit: None asks git.

    Returns:
        The markdown's path.
    """
    date = datetime.date.today().isoformat()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda column: column in FAILURES)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}-{date}{suffix}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"# {title}, {date}",
        "",
        f"- GPU: {gpu}",
        f"- versions: {versions(*packages)}; commit {commit or checkout()}",
        f"- command: `python {' '.join(sys.argv)}`",
        *[f"- {note}" for note in notes],
        "",
        *table(columns, rows),
    ]
    path = out / f"{name}-{date}{suffix}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def table(columns: Sequence[str], rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows],
    ]


def cell(value: object) -> str:
    """Return a value as a cell of a markdown table; None is empty."""
    text = "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "/")


def versions(*packages: str) -> str:
    """Name the versions of Python and of packages."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def checkout() -> str:
    """Return the checkout's commit, or 'unknown'."""
    if shutil.which("git") is None:
        return "unknown"
    query = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(query, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
