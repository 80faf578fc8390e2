"""The LM head's loss in Mosaic GPU kernels: a chunk of the tokens, or of the columns.

For Hopper and bf16.

    logits kernel      l = x W in f32 accumulators; per row and tile t of 256 columns
                       m_t = max l,  p = 2^15 exp(l - m_t) in f16,  s_t = sum p in f32
    gradient kernel    p -> dlogits, over the same memory, in bf16

Logits are never in memory. With lse = log sum_t 2^-15 s_t exp(m_t), as from f32 ones,

    dlogits = p * (2^-15 a exp(m_t - lse)) - b        a, b: f32, one of each a row

p is at most 2^15 and has f16's 11 significant bits down to 2^-29 of the tile's maximum.
Its rounding adds 1/64 to the variance of the rounding to bf16 that every implementation
does. bf16 logits would add an error that grows with |logit|; f32 logits cost twice the
memory. The label's own entry, where 1 is subtracted, comes from the f32 logit.

Statistics are [tiles, rows]: a tile's rows lie together. Memory: 2 C V bytes, and 12 to
16 C V / 256 of statistics. Rows and columns beyond C and V are TMA's: read as zero,
not written.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops import matmul as mm
from mst_jax.ops.linear_cross_entropy.loss import Options, Statistics, token_losses
from mst_jax.ops.matmul import Tiles, in_place, matmul, tiled_matmul

TILE_N = 256
"""Columns of a tile of statistics."""
PART_N = mm.part_columns(jnp.bfloat16)
"""Columns that move through shared memory at once."""
GRADIENT_M = 64
"""Rows of a thread block of the gradient kernel."""
SHIFT = 15
"""p is scaled by 2^SHIFT: the top of f16's range, for the sake of its bottom."""
LOG2_E = 1.4426950408889634
FINITE_MIN = -1e30
"""Stands in for the maximum of a tile that is all -inf."""
TILES = Tiles(tile_n=TILE_N)
"""A tile of statistics is one of the product's."""


def obstacle(options: Options, width: int, dtype) -> str | None:
    """Return why the kernels cannot compute this loss, whatever the GPU, or None."""
    if width % 64:
        return f"D={width} is no multiple of 64"
    if reason := mm.obstacle(jax.ShapeDtypeStruct((8, width), dtype)):
        return reason
    if options.logit_softcap and options.label_smoothing:
        return "has no label smoothing together with a softcap"
    return None


def prepare(options: Options, weight):
    """[D, V] -> [D, V rounded up to 64]: TMA moves 64 columns at a time."""
    weight = weight.T if options.transposed else weight
    return jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % 64)))


def finish(options: Options, dweight, vocab_size: int):
    """Return the gradient of what `prepare` was given."""
    dweight = dweight[:, :vocab_size]
    return dweight.T if options.transposed else dweight


def chunk_losses(options: Options, x, weight, labels, vocab_size: int):
    """[B, C, D] -> losses [B, C], f32, with no more than statistics in memory."""
    shape = labels.shape
    x, labels = _rows(x, labels)
    tiles = logits_kernel(x, weight, labels, vocab_size, options, write=False)
    losses = token_losses(options, _reduce(tiles, labels, vocab_size), vocab_size)
    return losses[: prod(shape)].reshape(shape)


def chunk_gradients(
    options: Options, x, weight, labels, weights, dweight, wants_x, vocab_size: int
):
    """As `xla.chunk_gradients`."""
    shape, count = x.shape, labels.size
    x, flat, weights = _rows(x, labels, weights)
    *tiles, p = logits_kernel(x, weight, flat, vocab_size, options, write=True)
    rows = _reduce(tiles, flat, vocab_size)
    losses = token_losses(options, rows, vocab_size)
    dlogits = _dlogits(options, tiles[0], p, rows, flat, weights, vocab_size)
    dx = None
    if wants_x:
        dx = matmul(dlogits, weight, transpose_b=True)[:count].reshape(shape)
    if dweight is not None:
        total = None if isinstance(dweight, float) else dweight
        dweight = matmul(x, dlogits, transpose_a=True, total=total, dtype=jnp.float32)
    losses, statistics = jax.tree.map(
        lambda a: a[:count].reshape(labels.shape), (losses, rows)
    )
    return losses, statistics, dx, dweight


def columns_gradient(
    options: Options, x, weight, labels, weights, statistics, columns: int, dtype,
    vocab_size: int,
):  # fmt: skip
    """As `xla.columns_gradient`; the columns as `prepare` returns them, [D, S]."""
    lse, label_logit, _ = statistics
    x, labels, weights, lse, label_logit = _rows(x, labels, weights, lse, label_logit)
    m, *_, p = logits_kernel(x, weight, labels, columns, options, write=True)
    rows = Statistics(lse, label_logit, None)
    dlogits = _dlogits(options, m, p, rows, labels, weights, vocab_size)
    narrow = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return matmul(x, dlogits, transpose_a=True, dtype=narrow).astype(dtype)


def _rows(x, *tokens):
    """Return x as [R, D], the others as [R], R rounded up to what TMA moves at once."""
    x = x.reshape(-1, x.shape[-1])
    pad = -x.shape[0] % 8
    tokens = [jnp.pad(a.reshape(-1), (0, pad)) for a in tokens]
    return jnp.pad(x, ((0, pad), (0, 0))), *tokens


def _reduce(tiles, labels, vocab_size: int) -> Statistics:
    """Statistics of tiles [t, R or more], labels [R] -> those of each row [R]."""
    m, s, label_logits, *sums = (a[:, : labels.shape[0]] for a in tiles)
    valid = (labels >= 0) & (labels < vocab_size)
    tile = jnp.where(valid, labels // TILE_N, 0)
    top = m.max(0)
    lse = top + jnp.log((2.0**-SHIFT * s * jnp.exp(m - top)).sum(0))
    label_logit = jnp.take_along_axis(label_logits, tile[None], 0)[0]
    logit_sum = sums[0].sum(0) if sums else None
    return Statistics(lse, jnp.where(valid, label_logit, jnp.nan), logit_sum)


def _dlogits(options: Options, m, p, statistics, labels, weights, vocab_size: int):
    """Turn p [R, S] into dlogits, in its memory.

    Args:
        options: of the loss.
        m: [t, R or more], the tiles' maxima.
        p: [R, S], of all columns or of some.
        statistics: [R], of all columns.
        labels, weights: [R]; labels are counted from the first of the columns. None of
            the others is there.
        vocab_size: V.
    """
    pad = m.shape[1] - labels.shape[0]
    labels, weights, lse, label_logit = (
        jnp.pad(a, (0, pad)) for a in (labels, weights, *statistics[:2])
    )
    scale, smooth, at_label = _coefficients(
        options, m, lse, label_logit, weights, vocab_size
    )
    return in_place(gradient_kernel, p, scale, smooth, at_label, labels)[0]


def _coefficients(options: Options, m, lse, label_logit, weights, vocab_size: int):
    """Return scale [t, R], smooth [R], the label's own dlogits [R]; 0 at weight 0."""
    smoothing = options.label_smoothing
    slope = 1 + 2 * options.z_loss * lse
    scale = 2.0**-SHIFT * weights * slope * jnp.exp(m - lse)
    smooth = weights * (smoothing / vocab_size)
    at_label = weights * (slope * jnp.exp(label_logit - lse) - (1 - smoothing)) - smooth
    if cap := options.logit_softcap:
        at_label *= 1 - (label_logit / cap) ** 2
    return [jnp.where(weights == 0, 0, a) for a in (scale, smooth, at_label)]


def logits_kernel(
    x, weight, labels, vocab_size: int, options: Options, *, write: bool,
    tiles: Tiles = TILES,
):  # fmt: skip
    """Return m, s, label logits and, with smoothing, sums [t, R]; p [C, V] if `write`.

    R is C rounded up to clusters. A label logit is there in its own tile alone, and
    nothing elsewhere. p holds f16 in bf16's dtype, times the softcap's derivative.

    Args:
        x: [C, D] bf16.
        weight: [D, V] bf16, V a multiple of 64.
        labels: [C].
        vocab_size: columns of weight that count.
        options: of the loss.
        write: whether p is wanted.
        tiles: of the matrix product; a tile of statistics is one of its tiles.
    """
    C, V = x.shape[0], weight.shape[1]
    rows = -(-C // tiles.cluster_tile_m) * tiles.cluster_tile_m
    num_tiles = -(-V // TILE_N)
    labels = jnp.pad(labels, (0, rows - C), constant_values=-1)
    hit = _hits(labels, tiles.wg_tile_m, num_tiles)
    statistic = jax.ShapeDtypeStruct((num_tiles, rows), jnp.float32)
    out_type = [statistic] * (4 if options.label_smoothing else 3)
    if write:
        out_type.append(jax.ShapeDtypeStruct((C, V), jnp.bfloat16))
    return tiled_matmul(
        x, (weight,), partial(_statistics, options, vocab_size, write),
        name="logits", extra=(labels, hit), out_type=tuple(out_type), tiles=tiles,
        # Hopper's approximate tanh has an error of 2^-11; its exp2 has one of 2^-22.
        approx_math=not options.logit_softcap,
    )  # fmt: skip


def _statistics(options, vocab_size, write, tile, accs, extra, outs):
    """The epilogue of the logits' product."""
    pl, plgpu = mm.pallas()
    (logits,), (labels_gmem, hit_gmem) = accs, extra
    m_gmem, s_gmem, label_gmem, *outs = outs
    softcap, shape = options.logit_softcap, logits.shape
    own_rows = pl.ds(tile.row, shape[0])
    t = tile.column // TILE_N
    if softcap:
        logits = softcap * jnp.tanh(logits * (1 / softcap))
    layout = plgpu.Layout.WGMMA
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    counts = column < vocab_size - tile.column
    has_tail = vocab_size % TILE_N != 0
    if options.label_smoothing:
        sum_gmem = outs.pop(0)
        kept = jnp.where(counts, logits, 0.0) if has_tail else logits
        sum_gmem[t, own_rows] = kept.sum(1)
    if has_tail:
        logits = jnp.where(counts, logits, -jnp.inf)
    m = jnp.maximum(logits.max(1), FINITE_MIN)
    m_gmem[t, own_rows] = m

    @pl.when(hit_gmem[tile.row // shape[0], t] != 0)
    def _label():
        label = plgpu.load(
            labels_gmem.at[own_rows], layout=layout.reduce(1), optimized=False
        )
        label = lax.broadcast_in_dim(label - tile.column, shape, (0,))
        own = jnp.where(column == label, logits, 0.0)
        label_gmem[t, own_rows] = own.sum(1)

    total = 0.0
    m = lax.broadcast_in_dim(m, (shape[0], tile.part), (0,))
    for i in range(tile.num_parts):
        part = logits[:, tile.columns(i)]
        p = jnp.exp2((part - m) * LOG2_E + SHIFT)
        total = total + p.sum(1) if i else p.sum(1)
        if write:
            if softcap:
                c = part * (1 / softcap)
                p *= jnp.maximum(1 - c * c, 0.0)  # c of -inf: 0
            p = lax.bitcast_convert_type(p.astype(jnp.float16), jnp.bfloat16)
            tile.write(outs[0], i, p, i)
    s_gmem[t, own_rows] = total


def _hits(labels, rows: int, n_iters: int):
    """Return int32 [R / rows, t]: whether a row of the block has its label there."""
    tile = jnp.where(labels < 0, n_iters, labels // TILE_N)
    hit = jnp.zeros((labels.shape[0] // rows, n_iters), jnp.int32)
    return hit.at[jnp.arange(labels.shape[0]) // rows, tile].set(1, mode="drop")


def gradient_kernel(p_ref, scale, smooth, at_label, labels) -> None:
    """Overwrite p with dlogits: p * scale - smooth, and `at_label` at the label.

    Args:
        p_ref: [C, V] f16 in bf16's dtype; bf16 afterwards. V is a multiple of 64.
        scale: [t, R] f32; where it is 0, p counts as 0 whatever it is.
        smooth: [R] f32.
        at_label: [R] f32.
        labels: [R] int32.
    """
    pl, plgpu = mm.pallas()
    C, V = p_ref.shape
    block = (GRADIENT_M, PART_N)
    # No part beyond V = 64: Mosaic drops a dimension of size 1 together with its index.
    parts = min(TILE_N, V) // PART_N
    transforms = mm.swizzled(jnp.bfloat16)

    def gradient_kernel(
        p_gmem, scale_gmem, smooth_gmem, at_label_gmem, labels_gmem, p_smem, arrived
    ):
        mi, ni = lax.axis_index("m"), lax.axis_index("n")
        rows = pl.ds(pl.multiple_of(mi * GRADIENT_M, GRADIENT_M), GRADIENT_M)

        def p_part(i):
            return p_gmem.at[rows, pl.ds(ni * TILE_N + i * PART_N, PART_N)]

        for i in range(parts):
            plgpu.copy_gmem_to_smem(p_part(i), p_smem.at[i], arrived.at[i])

        def by_row(ref):
            layout = plgpu.Layout.WGMMA.reduce(1)
            value = plgpu.load(ref, layout=layout, optimized=False)
            return lax.broadcast_in_dim(value, block, (0,))

        scale, smooth = by_row(scale_gmem.at[ni, rows]), by_row(smooth_gmem.at[rows])
        at_label = by_row(at_label_gmem.at[rows])
        label = by_row(labels_gmem.at[rows]) - ni * TILE_N
        column = plgpu.broadcasted_iota(jnp.int32, block, 1, layout=plgpu.Layout.WGMMA)
        for i in range(parts):
            plgpu.barrier_wait(arrived.at[i])
            p = plgpu.load(p_smem.at[i], layout=plgpu.Layout.WGMMA)
            p = lax.bitcast_convert_type(p, jnp.float16).astype(jnp.float32)
            dlogits = jnp.where(scale == 0, 0.0, p * scale) - smooth
            dlogits = jnp.where(column + i * PART_N == label, at_label, dlogits)
            p_smem[i] = dlogits.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(p_smem.at[i], p_part(i))
        plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        gradient_kernel,
        grid=(pl.cdiv(C, GRADIENT_M), pl.cdiv(V, TILE_N)),
        grid_names=("m", "n"),
        scratch_types=[
            plgpu.SMEM((parts, *block), jnp.bfloat16, transforms=transforms),
            plgpu.Barrier(num_barriers=parts),
        ],
    )(p_ref, scale, smooth, at_label, labels)
