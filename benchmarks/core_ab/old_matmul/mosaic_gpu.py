"""The matrix product that the Hopper kernels of this package are built on.

    acc_i = A B_i            f32, one tile [2 wg_tile_m, tile_n] of C a thread block
    epilogue(acc_0, ...)     what becomes of them: written, combined, added in place

A persistent grid of clusters walks the tiles of C in a snake, so that the blocks that
run together read the same rows and columns through L2. In a block one warpgroup loads
tiles of A and B (TMA) and two multiply (wgmma), one above the other; the blocks of a
cluster share the tiles of B (TMA multicast). A and B may each be given transposed.
Sizes need not be multiples of the tiles, only of 8 rows and 64 columns, the units in
which TMA moves them: it reads zeros beyond the ends and does not write there.

The accumulators never leave the registers before the epilogue has seen them, in f32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops.matmul.tiles import ROW_BYTES, Tiles

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


def device_obstacle() -> str | None:
    """Return why this process's device cannot run the kernels, or None."""
    if jax.default_backend() != "gpu":
        return f"there is no GPU ({jax.default_backend()})"
    capability = jax.local_devices()[0].compute_capability
    if capability != "9.0":
        return f"compute capability {capability} is not 9.0 (Hopper)"
    return None


@dataclass(frozen=True)
class Epilogue:
    """What an epilogue sees of its tile; it runs in each of the two warpgroups."""

    tiles: Tiles
    width: int
    """Columns of one accumulator."""
    dtype: Any
    """Of everything that is staged: the results, and the operands that are read."""
    row: Any
    """First row of the warpgroup's tile in the results."""
    column: Any
    """First column."""
    smem: Any
    """[slots, wg_tile_m, part], this warpgroup's own."""
    arrived: Any
    """A barrier for each slot, or None if nothing is read."""

    @property
    def part(self) -> int:
        """Columns that are staged at once."""
        return part_columns(self.dtype)

    @property
    def num_parts(self) -> int:
        """Parts of an accumulator."""
        return self.width // self.part

    def columns(self, i: int) -> slice:
        """Return the columns of part i in an accumulator."""
        return slice(i * self.part, (i + 1) * self.part)

    def read(self, gmem: Any) -> list[jax.Array]:
        """Return this tile of an array, in parts. Needs a slot for each."""
        _, plgpu = pallas()
        if self.num_parts > self.tiles.slots:
            raise ValueError(
                f"{self.tiles}: reads {self.num_parts} parts, has fewer slots"
            )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(self.num_parts):
            plgpu.copy_gmem_to_smem(
                self._tile(gmem, i), self.smem.at[i], self.arrived.at[i]
            )
        parts = []
        for i in range(self.num_parts):
            plgpu.barrier_wait(self.arrived.at[i])
            parts.append(plgpu.load(self.smem.at[i], layout=plgpu.Layout.WGMMA))
        return parts

    def write(self, gmem: Any, i: int, value: jax.Array, turn: int, *, add=False):
        """Write part i of this tile, or add it to what is there.

        `turn` counts the writes of the tile; a write waits for the one that had its
        slot before.
        """
        _, plgpu = pallas()
        slots = self.tiles.slots
        # At a tile's first write nothing may be left: the tile before need not have
        # ended on the last slot.
        plgpu.wait_smem_to_gmem(min(turn, slots - 1), wait_read_only=True)
        slot = self.smem.at[turn % slots]
        slot[...] = value.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            slot, self._tile(gmem, i), reduction_op="add" if add else None
        )

    def _tile(self, gmem, i):
        pl, _ = pallas()
        rows = pl.ds(self.row, self.tiles.wg_tile_m)
        return gmem.at[rows, pl.ds(self.column + i * self.part, self.part)]


def part_columns(dtype: Any) -> int:
    """Return the columns of a part: `ROW_BYTES` of them."""
    return ROW_BYTES // jnp.dtype(dtype).itemsize


def tiled_matmul(
    a: jax.Array,
    bs: tuple[jax.Array, ...],
    epilogue: Callable[..., None],
    *,
    name: str,
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
        extra: arrays [M, N] that the epilogue reads, or references that it changes.
        out_type: of the results, [M, N] each.
        dtype: of what the epilogue stages: of all results and of what it reads.
        reads: whether it calls `Epilogue.read`.
        transpose_a, transpose_b: see above.
        tiles: see `Tiles`.
        approx_math: whether the epilogue's exp and tanh may be the fast ones.

    Returns:
        A tuple of the results.
    """
    pl, plgpu = pallas()
    M, K = a.shape[::-1] if transpose_a else a.shape
    N = bs[0].shape[0 if transpose_b else 1]
    width = tiles.tile_n // len(bs)
    cta_m, tile_k, wg_m = tiles.cta_tile_m, tiles.tile_k, tiles.wg_tile_m
    m_iters, n_iters = pl.cdiv(M, tiles.cluster_tile_m), pl.cdiv(N, width)
    staged = (tiles.slots, wg_m, part_columns(dtype))
    if tiles.cluster > 1:
        consumed = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2)
    else:
        consumed = plgpu.Barrier(num_arrivals=2)
    barriers = {"consumed": consumed}
    if reads:
        barriers["arrived"] = plgpu.Barrier(num_barriers=2 * tiles.slots)

    def kernel(a_gmem, *rest):
        b_gmems, rest = rest[: len(bs)], rest[len(bs) :]
        extra_gmems, out_gmems = rest[: len(extra)], rest[len(extra) :]

        def pipeline(step, compute_context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(pl.cdiv(K, tile_k),),
                memory_registers=40,
                in_specs=[
                    _operand(transpose_a, (cta_m, tile_k), shared=False),
                    *[
                        _operand(
                            not transpose_b, (width, tile_k), shared=tiles.cluster > 1
                        )
                        for _ in bs
                    ],
                ],
                wg_axis="wg",
                num_compute_wgs=2,
                max_concurrent_steps=tiles.stages,
                compute_context=compute_context,
            )

        def nothing(*_, **__):
            return None

        @partial(
            pl.run_scoped,
            allocations=pipeline(nothing, nothing).get_allocations(a_gmem, *b_gmems),
            smem=plgpu.SMEM((2, *staged), dtype, transforms=swizzled(dtype)),
            collective_axes="wg",
            **barriers,
        )
        def _scope(allocations, smem, consumed, arrived=None):
            wg, cta = lax.axis_index("wg"), lax.axis_index("cluster")

            @plgpu.nd_loop((m_iters * n_iters,), collective_axes="cluster_grid")
            def _tile(info):
                mc, ni = plgpu.planar_snake(
                    info.index[0],
                    (m_iters, n_iters),
                    0 if tiles.snake_m else 1,
                    tiles.snake,
                )
                mi = mc * tiles.cluster + cta
                tile = Epilogue(
                    tiles, width, dtype,
                    row=pl.multiple_of(mi * cta_m + wg * wg_m, wg_m),
                    column=pl.multiple_of(ni * width, width),
                    smem=smem.at[wg],
                    arrived=_Barriers(arrived, wg * tiles.slots) if reads else None,
                )  # fmt: skip

                def compute(run):
                    def products(*accs):
                        run(accs)
                        return [acc[...] for acc in accs]

                    acc = plgpu.ACC((wg_m, width), jnp.float32)
                    accs = pl.run_scoped(products, *[acc] * len(bs))
                    plgpu.barrier_arrive(consumed)
                    epilogue(tile, accs, extra_gmems, out_gmems)

                def step(_, a_smem, *rest):
                    *b_smems, accs = rest
                    own = pl.ds(pl.multiple_of(wg * wg_m, wg_m), wg_m)
                    if transpose_a:
                        left = a_smem.at[:, own].transpose((1, 0))
                    else:
                        left = a_smem.at[own]
                    for acc, b in zip(accs, b_smems, strict=True):
                        right = b.transpose((1, 0)) if transpose_b else b
                        plgpu.wgmma(acc, left, right)
                    plgpu.wgmma_wait(len(bs))
                    return accs

                rows = pl.ds(mi * cta_m, cta_m)
                columns = pl.ds(ni * width, width)
                pipeline(step, compute)(
                    a_gmem.at[:, rows] if transpose_a else a_gmem.at[rows, :],
                    *[
                        b.at[columns, :] if transpose_b else b.at[:, columns]
                        for b in b_gmems
                    ],
                    allocations=allocations,
                )

                # The pipeline releases a step when the next one has begun, the last
                # one never: the next tile's loads would overwrite it while it is read.
                @pl.when(wg == 2)
                def _wait():
                    plgpu.barrier_wait(consumed)

        plgpu.wait_smem_to_gmem(0)

    clusters = min(m_iters * n_iters, num_sms() // tiles.cluster)
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
    )(a, *bs, *extra)


def matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    total: jax.Array | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Return A B in A's dtype, or `total` + A B in total's.

    Args:
        a: bf16 [M, K], or [K, M] if `transpose_a`.
        b: bf16 [K, N], or [N, K] if `transpose_b`.
        transpose_a, transpose_b: which operands are given transposed.
        total: [M, N], f32 or bf16. It is added to in its own memory where XLA has no
            other use of it, as in the carry of a loop.
        tiles: see `Tiles`; None for its defaults, with the slots that the sum takes.

    Raises:
        NotImplementedError: see `obstacle`.
    """
    shape = a.shape[transpose_a], b.shape[not transpose_b]
    if reason := obstacle(a, b, jax.ShapeDtypeStruct(shape, a.dtype)):
        raise NotImplementedError(f"Mosaic GPU matmul: {reason}")
    name = f"matmul_{'nt'[transpose_a]}{'nt'[transpose_b]}"
    if total is None:
        (c,) = tiled_matmul(
            a, (b,), _store, name=name, tiles=tiles or Tiles(),
            out_type=(jax.ShapeDtypeStruct(shape, a.dtype),),
            transpose_a=transpose_a, transpose_b=transpose_b,
        )  # fmt: skip
        return c
    if total.dtype == jnp.float32:
        options: dict[str, Any] = {
            "epilogue": _add,
            "name": f"{name}_add_f32",
            "tiles": Tiles(),
        }
    else:
        options = {
            "epilogue": _read_and_add, "name": f"{name}_add", "reads": True,
            "tiles": Tiles(stages=3, slots=4),
        }  # fmt: skip
    options |= {"tiles": tiles or options["tiles"], "dtype": total.dtype}

    def add(ref, a, b):
        return tiled_matmul(
            a, (b,), extra=(ref,), transpose_a=transpose_a, transpose_b=transpose_b,
            **options,
        )  # fmt: skip

    return in_place(add, total, a, b)[0]


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
    for i in range(tile.num_parts):
        tile.write(outs[0], i, accs[0][:, tile.columns(i)], i)


def _add(tile, accs, extra, outs):
    # TMA adds in L2, so the sum so far is not waited for. Each element once: no race.
    for i in range(tile.num_parts):
        tile.write(extra[0], i, accs[0][:, tile.columns(i)], i, add=True)


def _read_and_add(tile, accs, extra, outs):
    # Not by TMA: it would round the product to 16 bits before it adds.
    for i, part in enumerate(tile.read(extra[0])):
        value = accs[0][:, tile.columns(i)] + part.astype(jnp.float32)
        tile.write(extra[0], i, value, i)


def num_sms() -> int:
    """Return the multiprocessors of this GPU, or of an H200 where there is none."""
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else H200_SMS


@dataclass(frozen=True)
class _Barriers:
    """One warpgroup's share of an array of barriers."""

    all: Any
    first: Any

    @property
    def at(self):
        return self

    def __getitem__(self, i):
        return self.all.at[self.first + i]


def _operand(depth_first: bool, sizes: tuple[int, int], *, shared: bool) -> Any:
    """Describe the tiles [outer, depth] of an operand, or [depth, outer]."""
    _, plgpu = pallas()
    return plgpu.BlockSpec(
        sizes[::-1] if depth_first else sizes,
        (lambda k: (k, 0)) if depth_first else (lambda k: (0, k)),
        transforms=swizzled(jnp.bfloat16),
        memory_space=plgpu.SMEM,
        delay_release=1,
        collective_axes=("cluster",) if shared else (),
    )


def swizzled(dtype: Any) -> tuple[Any, ...]:
    """Return the transforms of shared memory in rows of `ROW_BYTES`, for wgmma."""
    _, plgpu = pallas()
    tiling = plgpu.TilingTransform((8, part_columns(dtype)))
    return tiling, plgpu.SwizzleTransform(ROW_BYTES)


def pallas() -> tuple[Any, Any]:
    """Return Pallas and its Mosaic GPU part.

    Not at the top of a file: JAX 0.10 has another API, and a CPU has no need of it.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return pl, plgpu
