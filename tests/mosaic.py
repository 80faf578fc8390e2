"""What the tests of the Hopper kernels share: interpreted here, compiled for an H200.

On a CPU the kernels run in Pallas's interpreter, whose fresh memory is NaN: an element
that is read and was not written shows. The interpreter knows no limits of TMA and of
shared memory: the programs compiled for an H200 show those.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.gpus import GPUS
from mst_jax.ops.matmul import OLDEST_JAX
from mst_jax.ops.matmul import mosaic_gpu as core

ROOT = Path(__file__).parents[1]
ON_GPU = jax.default_backend() == "gpu"
needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason="needs JAX 0.11.2"
)


def sometimes(cases, always):
    """Cases for parametrize: the default suite has those in `always` only.

    In the interpreter each takes seconds, so the others have the marker `interpreted`.
    """
    marker = pytest.mark.interpreted
    return [
        pytest.param(*case, marks=() if case in always else marker) for case in cases
    ]


def jit_reference(fn, **options):
    """Jit a reference in f32: on a GPU its matrix products are cuBLAS's.

    XLA would time every Triton kernel that it could write for each of them instead.
    """
    if ON_GPU:
        options["compiler_options"] = {"xla_gpu_enable_triton_gemm": False}
    return jax.jit(fn, **options)


def _read_and_add(tile, accs, extra, outs):
    for i in range(tile.num_parts):
        value = accs[0][:, tile.columns(i)] + tile.read(i).astype(jnp.float32)
        tile.write(extra[0], i, value, i)


@contextmanager
def interpreted():
    """Run kernels as they are on a GPU, in the interpreter elsewhere.

    It has no reduction in TMA. There the tiles that the kernel adds to are read, added
    to and written instead, as for a 16-bit sum: all else is the kernel's own.
    """
    if ON_GPU:
        yield
        return
    import jax.experimental.pallas.mosaic_gpu as plgpu

    kernel = core.tiled_matmul

    def tiled_matmul(a, bs, epilogue, *, tiles, **options):
        if epilogue is core._add:
            epilogue, options["reads"] = _read_and_add, True
            parts = tiles.tile_n // core.part_columns(options["dtype"])
            tiles = replace(tiles, stages=2, tile_k=64, slots=parts)
        return kernel(a, bs, epilogue, tiles=tiles, **options)

    params = plgpu.InterpretGPUParams(uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params), pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "tiled_matmul", tiled_matmul)
        yield


@jax.jit
def norms(got, want):
    """Return the norms of the difference and of `want`, in f32 on the device."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()), jnp.linalg.norm(want.ravel())


def errors(got, want):
    """Return the relative error of each leaf, of the norms; in f64 but on a GPU.

    There it is f32 on the device: an LM head's gradient would take the host minutes.
    """

    def error(a, b):
        if jax.default_backend() == "gpu":
            difference, norm = map(float, norms(a, b))
            return difference / (norm or 1)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)

    return jax.tree.leaves(jax.tree.map(error, got, want))


PRELUDE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
topology = topologies.get_topology_desc(
    platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
place = SingleDeviceSharding(topology.devices[0])
def array(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
"""


def compile_for_h200(program, **env):
    """Run a program that compiles for an H200, in a process of its own.

    It finds jax, jnp and `array(shape, dtype)`, an argument on that H200.

    Returns:
        What it printed; compilers write there too if `env` asks them to.
    """
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false", **env,
    }  # fmt: skip
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # a kernel from there says nothing
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], input=GPUS["h200"].target,
        text=True, capture_output=True, timeout=300, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
