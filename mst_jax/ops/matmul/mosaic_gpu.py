"""The matrix product that the Hopper kernels of this package are built on.

    acc_i = sum_j A_j B_ji   f32, one tile [2 wg_tile_m, tile_n] of C a thread block
    epilogue(acc_0, ...)     what becomes of them: written, combined, added in place

A persistent grid of clusters walks the tiles of C in a snake, so that the blocks that
run together read the same rows and columns through L2. In a block one warpgroup loads
tiles of A and B (TMA) and two multiply (wgmma), one above the other; the blocks of a
cluster share the tiles of B (TMA multicast): `pipeline.py`. Most have one A, and one or
two B; both may be given transposed.
Sizes need not be multiples of the tiles, only of 8 rows and 64 columns, the units in
which TMA moves them: it reads zeros beyond the ends and does not write there.

The accumulators never leave the registers before the epilogue has seen them, in f32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops.matmul.epilogue import (
    Barriers,
    Epilogue,
    pallas,
    part_columns,
    swizzled,
)
from mst_jax.ops.matmul.pipeline import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    Pipeline,
)
from mst_jax.ops.matmul.tiles import Tiles

OLDEST_JAX = (0, 11, 2)
H200_SMS = 132


def obstacle(*arrays: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Return why the kernels cannot multiply such matrices on any GPU, or None."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"JAX {jax.__version__} is older than 0.11.2"
    for a in arrays:
        if a.dtype != jnp.bfloat16:
            return f"takes bfloat16, not {a.dtype}"
        if a.shape[-2] % 8 or a.shape[-1] % 64:
            return f"a matrix of {a.shape[-2:]} is not of multiples of 8 and 64"
    return None


def device_obstacle(capability: tuple[int, int] | None = None) -> str | None:
    """Return why a GPU cannot run the kernels, or None.

    `capability` is that of another GPU than this process's.
    """
    capability = capability or compute_capability()
    if capability is None:
        return f"there is no GPU ({jax.default_backend()})"
    if capability != (9, 0):
        major, minor = capability
        return f"compute capability {major}.{minor} is not 9.0 (Hopper)"
    return None


def compute_capability() -> tuple[int, int] | None:
    """Return this process's GPU's, or None if there is none."""
    if jax.default_backend() != "gpu":
        return None
    major, minor = jax.local_devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def tiled_matmul(
    a: jax.Array,
    bs: tuple[jax.Array, ...],
    epilogue: Callable[..., None],
    *,
    name: str,
    also: tuple[tuple[jax.Array, tuple[jax.Array, ...]], ...] = (),
    extra: tuple[Any, ...] = (),
    out_type: tuple[jax.ShapeDtypeStruct, ...] = (),
    dtype: Any = jnp.bfloat16,
    reads: bool = False,
    transpose_a: bool = False,
    transpose_b: bool = False,
    tiles: Tiles,
    approx_math: bool = True,
) -> Any:
    """Multiply A with each B and hand the f32 accumulators of a tile to `epilogue`.

    Args:
        a: [M, K], or [K, M] if `transpose_a`.
        bs: [K, N] each, or [N, K] if `transpose_b`; all of one shape.
        epilogue: `epilogue(tile, accs, extra, outs)`: an `Epilogue`, a list of f32
            arrays [wg_tile_m, tile_n / len(bs)], and references to `extra` and to the
            results in global memory.
        name: of the kernel, in traces.
        also: more (A, Bs), whose products are added to the same accumulators. Their
            depth may be another.
        extra: arrays [M, N] that the epilogue reads, or references that it changes.
        out_type: of the results, [M, N] each.
        dtype: of what the epilogue stages: of all results and of what it reads.
        reads: whether it calls `Epilogue.read`, for the tile of `extra[0]`.
        transpose_a, transpose_b: see above.
        tiles: see `Tiles`.
        approx_math: whether the epilogue's exp and tanh may be the fast ones.

    Returns:
        A tuple of the results.
    """
    pl, plgpu = pallas()
    pairs = [(a, *bs), *((left, *rights) for left, rights in also)]
    operands, each = [x for pair in pairs for x in pair], 1 + len(bs)
    M, N = a.shape[transpose_a], bs[0].shape[not transpose_b]
    width = tiles.tile_n // len(bs)
    grid = pl.cdiv(M, tiles.cluster_tile_m), pl.cdiv(N, width)
    pipeline = Pipeline(
        tiles=tiles, transpose_a=transpose_a, transpose_b=transpose_b, width=width,
        depths=tuple(
            pl.cdiv(left.shape[not transpose_a], tiles.tile_k) for left, *_ in pairs
        ),
    )  # fmt: skip
    num_tiles = grid[0] * grid[1]
    clusters = min(num_tiles, num_sms() // tiles.cluster)
    staged = (2, tiles.slots, tiles.wg_tile_m, part_columns(dtype))

    def kernel(*refs):
        gmems, rest = refs[: len(operands)], refs[len(operands) :]
        pair_gmems = [gmems[i : i + each] for i in range(0, len(gmems), each)]
        extra_gmems, out_gmems = rest[: len(extra)], rest[len(extra) :]

        def for_tiles(body):
            @plgpu.nd_loop((num_tiles,), collective_axes="cluster_grid")
            def _tile(info):
                walk = 0 if tiles.snake_m else 1
                mc, ni = plgpu.planar_snake(info.index[0], grid, walk, tiles.snake)
                mi = mc * tiles.cluster + lax.axis_index("cluster")
                body(info.local_index, mi, ni)

        @partial(
            pl.run_scoped,
            buffers=pipeline.allocations(len(bs)),
            smem=plgpu.SMEM(staged, dtype, transforms=swizzled(dtype)),
            arrived=plgpu.Barrier(num_barriers=2 * tiles.slots) if reads else None,
            collective_axes="wg",
        )
        def _scope(buffers, smem, arrived):
            wg = lax.axis_index("wg")

            @pl.when(wg == 2)
            def _load():
                plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
                for_tiles(lambda *where: pipeline.load(pair_gmems, *where, **buffers))
                rest = num_tiles - lax.axis_index("cluster_grid")
                pipeline.drain(pl.cdiv(rest, clusters), buffers["used"])

            @pl.when(wg != 2)
            def _multiply():
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

                @for_tiles
                def _tile(index, mi, ni):
                    row = mi * tiles.cta_tile_m + wg * tiles.wg_tile_m
                    tile = Epilogue(
                        tiles, width, dtype,
                        row=pl.multiple_of(row, tiles.wg_tile_m),
                        column=pl.multiple_of(ni * width, width),
                        smem=smem.at[wg],
                        arrived=Barriers(arrived, wg * tiles.slots),
                    )  # fmt: skip
                    fetch = partial(tile.fetch, extra_gmems[0]) if reads else None
                    accs = pipeline.multiply(index, wg, fetch, **buffers)
                    epilogue(tile, accs, extra_gmems, out_gmems)

                plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(clusters,),
        grid_names=("cluster_grid",),
        cluster=(tiles.cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
    )(*operands, *extra)


def matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    also: tuple[tuple[jax.Array, jax.Array], ...] = (),
    total: jax.Array | None = None,
    dtype: Any = None,
    squares: bool = False,
    tiles: Tiles | None = None,
) -> Any:
    """Return A B in `dtype`, or `total` + A B in total's.

    Args:
        a: bf16 [M, K], or [K, M] if `transpose_a`.
        b: bf16 [K, N], or [N, K] if `transpose_b`.
        transpose_a, transpose_b: which operands are given transposed.
        also: more (A, B), whose products are added before anything is rounded.
        total: [M, N], f32 or bf16. One in f32 is added to in its own memory where XLA
            has no other use of it, as in the carry of a loop.
        dtype: without `total`, bf16 or f32; None is A's.
        squares: without `total`, whether to return (A B, the f32 sum of its squares).
        tiles: see `Tiles`; None for its defaults, with the slots that the sum takes.

    Raises:
        NotImplementedError: see `obstacle`.
    """
    shape = a.shape[transpose_a], b.shape[not transpose_b]
    operands = [x for pair in ((a, b), *also) for x in pair]
    if reason := obstacle(*operands, jax.ShapeDtypeStruct(shape, a.dtype)):
        raise NotImplementedError(f"Mosaic GPU matmul: {reason}")
    name = f"matmul_{'nt'[transpose_a]}{'nt'[transpose_b]}"

    def run(a, b, *also, epilogue, tiles, **options):
        also = [(a, (b,)) for a, b in zip(also[::2], also[1::2], strict=True)]
        return tiled_matmul(
            a, (b,), epilogue, also=tuple(also), tiles=tiles, transpose_a=transpose_a,
            transpose_b=transpose_b, **options,
        )  # fmt: skip

    if total is not None and total.dtype == jnp.float32:
        return in_place(
            lambda ref, *operands: run(
                *operands, epilogue=_add, name=f"{name}_add_f32", extra=(ref,),
                dtype=total.dtype, tiles=tiles or Tiles(),
            ),
            total, *operands,
        )[0]  # fmt: skip
    if total is not None:
        (c,) = run(
            *operands, epilogue=_read_and_add, name=f"{name}_add", extra=(total,),
            out_type=(jax.ShapeDtypeStruct(shape, total.dtype),), dtype=total.dtype,
            reads=True, tiles=tiles or Tiles(stages=3, slots=4),
        )  # fmt: skip
        return c
    out = jax.ShapeDtypeStruct(shape, dtype or a.dtype)
    tiles = tiles or Tiles()
    out_type = [out]
    if squares:  # of each row of each tile
        rows = -(-shape[0] // tiles.cluster_tile_m) * tiles.cluster_tile_m
        by_row = -(-shape[1] // tiles.tile_n), rows
        out_type.append(jax.ShapeDtypeStruct(by_row, jnp.float32))
    c, *sums = run(
        *operands, epilogue=_store, out_type=tuple(out_type), dtype=out.dtype,
        name=f"{name}_f32" if out.dtype == jnp.float32 else name, tiles=tiles,
    )  # fmt: skip
    return (c, sums[0].sum()) if squares else c


def in_place(
    kernel: Callable[..., Any], changed: jax.Array, *operands: Any
) -> tuple[jax.Array, Any]:
    """Run `kernel(ref, *operands)`, which changes an array; return (array, results).

    XLA would put a slice that an operand is, or one that the array is written to, into
    one fusion with the kernel, and a fusion does not say that it works in place: with
    another buffer for its result the kernel would change what nobody has written.
    """
    operands = lax.optimization_barrier(operands)
    ref = jax.new_ref(changed)
    results = kernel(ref, *operands)
    return lax.optimization_barrier(jax.freeze(ref)), results


def _store(tile, accs, extra, outs):
    pl, _ = pallas()
    out, *squares = outs
    total = 0.0
    for i in range(tile.num_parts):
        part = accs[0][:, tile.columns(i)]
        tile.write(out, i, part, i)
        if squares:
            total = total + (part * part).sum(1) if i else (part * part).sum(1)
    if squares:
        rows = pl.ds(tile.row, tile.tiles.wg_tile_m)
        squares[0][tile.column // tile.width, rows] = total


def _add(tile, accs, extra, outs):
    # TMA adds in L2, so the sum so far is not waited for. Each element once: no race.
    for i in range(tile.num_parts):
        tile.write(extra[0], i, accs[0][:, tile.columns(i)], i, add=True)


def _read_and_add(tile, accs, extra, outs):
    # Not by TMA: it would round the product to 16 bits before it adds. Nor in place: a
    # kernel that works in place has its result copied to where it belongs.
    for i in range(tile.num_parts):
        value = accs[0][:, tile.columns(i)] + tile.read(i).astype(jnp.float32)
        tile.write(outs[0], i, value, i)


def num_sms() -> int:
    """Return the multiprocessors of this GPU, or of an H200 where there is none."""
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else H200_SMS
