"""What both kernels are made of.

Pallas's interpreter has none of `multiply`, `accumulate` and `add`; tests replace them
here.
"""

import math
from typing import Any

import jax.numpy as jnp

from mst_jax.ops import matmul as mm

ROWS = 64
"""Of a warpgroup's tile."""
LOG2_E = math.log2(math.e)


def smem(*shape: int, dtype: Any = jnp.bfloat16, row_bytes: int = 128) -> Any:
    """Describe shared memory that TMA fills and wgmma reads, in rows of so many bytes.

    Both operands of a product need the same.
    """
    _, plgpu = mm.pallas()
    return plgpu.SMEM(shape, dtype, transforms=mm.swizzled(dtype, row_bytes))


def multiply(acc, a, b, free) -> None:
    """Add a b to an accumulator, `a` in registers.

    `free` is shared memory like `a` that nothing is in.
    """
    _, plgpu = mm.pallas()
    plgpu.wgmma(acc, a, b)


def accumulate(products, start, *shapes):
    """Run products(*accumulators), the first of which has `start` in it.

    Returns:
        What they are when all is done: f32, of `start`'s shape and of `shapes`.
    """
    pl, plgpu = mm.pallas()
    zeros = [
        plgpu.layout_cast(jnp.zeros(s, jnp.float32), plgpu.Layout.WGMMA) for s in shapes
    ]
    accs = tuple(plgpu.ACC.init(a) for a in (start, *zeros))
    return pl.run_state(lambda refs: products(*refs))(accs)


def add(smem, gmem) -> None:
    """Add a tile in shared memory to global memory."""
    _, plgpu = mm.pallas()
    plgpu.copy_smem_to_gmem(smem, gmem, reduction_op="add")
