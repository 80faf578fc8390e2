"""The scripts of benchmarks/ as modules."""

import importlib.util
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# They import each other. At the end: trace is also a module of the standard library.
sys.path.append(str(BENCHMARKS))


def load(name):
    """Return a fresh module of a script, by its path below benchmarks/ without .py."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
