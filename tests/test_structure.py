"""The house keeps its shape: imports run one way, files stay short, few to open."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mst_jax"
# A module imports from lower ranks, or from its own where a rank is a folder.
RANKS = {
    "plan": 0,
    "mini_sequence": 0,
    "chunk_loop": 1,
    "model_config": 0,
    "presets": 1,
    "config": 2,
    "ops": 2,
    "low_precision": 2,
    "host_memory": 2,
    "model": 3,
    "layer": 3,
    "layer_state": 3,
    "loss": 4,
    "stack": 4,
    "optim": 4,
    "sharding": 4,
    "gradients": 5,
    "layerwise": 6,
    "step_memory": 6,
    "train_step": 7,
    "prediction": 7,
    "compile_only": 8,
    "planner": 8,
    "memory": 9,
    "description": 9,
    "plan_report": 9,
    "trainer": 10,
    "cli": 11,
}
# A leaf imports config, and the leaves named here.
LEAVES = {
    "hf_config": (),
    "hf": ("hf_config",),
    "checkpoint": (),
    "documents": (),
    "data": ("documents",),
    "metrics": (),
    "compile_cache": (),
    "gpus": ("metrics",),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Beside each stands an XLA form of the same maths: a reader of the model reads that.
KERNELS = ("cudnn", "packed", "mosaic_gpu")
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module):
    """(module, name or None) of every import from the package, in functions too."""
    path = MODULES[module]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else parent(module)
                for _ in range(node.level - 1):
                    package = parent(package)
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = whole in MODULES
                found.append((whole, None) if is_module else (base, alias.name))
    return [(m, name) for m, name in found if m in MODULES]


def parent(module):
    return module.rpartition(".")[0]


def opened(module, name=None):
    """Follow a name through the __init__.py that only passes it on."""
    if MODULES[module].name == "__init__.py" and name is not None:
        for source, passed_on in imports(module):
            if passed_on == name:
                return opened(source, name)
    return module


def reached(module):
    """The module and all that it imports, but for kernels: XLA has the same maths."""
    seen, todo = set(), [module]
    while todo:
        module = todo.pop()
        if module not in seen and module.rpartition(".")[2] not in KERNELS:
            seen.add(module)
            todo += [opened(*found) for found in imports(module)]
    return seen


def unit(module):
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_place():
    units = {unit(module) for module in MODULES} - {"", "__main__"}
    assert units <= {*RANKS, *LEAVES}, "name its place in RANKS or LEAVES"


@pytest.mark.parametrize("module", [m for m in MODULES if unit(m) in RANKS])
def test_imports_run_one_way(module):
    for imported, _ in imports(module):
        below, own = unit(imported), unit(module)
        if below in LEAVES:
            assert own in ("trainer", "description", "cli") or below == "gpus", (
                f"{module} imports the leaf {imported}"
            )
        elif below != own or own not in ("ops",):
            assert below in RANKS and RANKS[below] < RANKS[own], (
                f"{module} imports {imported}, which is not below it"
            )


@pytest.mark.parametrize("module", [m for m in MODULES if unit(m) in LEAVES])
def test_leaves_import_only_config_and_leaves_they_name(module):
    allowed = {"config", *LEAVES[unit(module)]}
    assert {unit(imported) for imported, _ in imports(module)} <= allowed


@pytest.mark.parametrize(
    "module", ["mst_jax.plan", "mst_jax.model_config", "mst_jax.mini_sequence"]
)
def test_the_ground_imports_nothing_of_the_package(module):
    assert imports(module) == []


def test_few_files_to_open_from_the_model():
    files = reached("mst_jax.model")
    lines = {m: len(MODULES[m].read_text().splitlines()) for m in sorted(files)}
    assert len(lines) <= 9, lines
    assert sum(lines.values()) <= 1500, (sum(lines.values()), lines)


def test_no_long_file():
    paths = [p for p in ROOT.rglob("*.py") if is_ours(p)]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def is_ours(path):
    folder = path.relative_to(ROOT).parts[0]
    ours = ("mst_jax", "tests", "configs", "benchmarks", "train.py")
    return folder in ours and "__pycache__" not in path.parts


def test_readme_tree_names_every_module():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    blocks = re.findall(r"^```.*?\n(.*?)^```", readme.read_text(), re.M | re.S)
    trees = [block for block in blocks if "mst_jax/" in block and "model.py" in block]
    assert trees, "README.md has no file tree in a code block"
    words = set(re.findall(r"[\w.]+", "\n".join(trees)))
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert modules <= words, f"missing in the file tree: {sorted(modules - words)}"
