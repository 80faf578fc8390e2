"""Eight virtual CPU devices, strict promotion, jaxtyping checked.

Tests, and the training processes that some of them start, share compiled programs
through a directory that lives as long as the session: compilation is most of the time.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="mst_jax-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
if "XLA_FLAGS" not in os.environ and (
    # On a GPU XLA's own settings: these would slow down its kernels too.
    os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi")
):
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8"
        # Compiled fast rather than to be fast: half the time, a quarter on JAX 0.10.
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    if version("jax").startswith("0.10."):  # later ones do not have the choice
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("mst_jax", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture
def untyped():
    """As for a user: arguments are not held to their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_xdist_auto_num_workers(config):
    """Up to four processes on a CPU; on a GPU none beside this one: it has one pool."""
    on_gpu = jax.default_backend() == "gpu"
    return 0 if on_gpu else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(config, items):
    on_gpu = jax.default_backend() == "gpu"
    plugin = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    for marker, there, needs in (
        ("gpu", on_gpu, "needs a CUDA GPU"),
        (
            "compiled",
            plugin and not on_gpu,
            "needs '.[cuda13]', and no GPU",
        ),
    ):
        for item in items:
            if marker in item.keywords and not there:
                item.add_marker(pytest.mark.skip(reason=needs))
