"""Packed documents: each one costs what its own length costs.

Hopper's own kernels take documents as they are; cuDNN takes offsets and lengths. A call
of it is compiled for S documents of at most L tokens, and its memory grows as S L
whatever they are. So there is a call for each of a few levels of length, L_j = T / r^j:
of n tokens fewer than S_j = r^(j + 1) B = r n / L_j documents can be longer than
L_(j+1). Level j runs those of L_(j+1) < length <= L_j, and S_j L_j is r n at every
level; a level without documents does not run. The last level has no such bound for its
short documents: a batch with more than S of them runs on XLA flash instead, in a branch
of the program. So does, whatever the kernel, one whose ids do not rise.

Memory of the levels, beside a dense call's: r times its workspace, and out (or dq, dk,
dv) twice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mst_jax.ops.attention import cudnn, mosaic_gpu, xla

RATIO = 2
"""r. Smaller is less memory, larger fewer calls."""
SMALLEST = 16
"""Tokens that the last level's documents are cut down to, at the least."""


class Documents(NamedTuple):
    """Where the documents of B rows are, the rows in one sequence of n tokens."""

    ids: jax.Array
    """Int [B, T], the ids they were found by."""
    level: jax.Array
    """Int [n], the level of each token's document; -1 in none, after a row's end."""
    slot: jax.Array
    """Int [n], the document's number among those of its level."""
    inside: jax.Array
    """Int [n], the token's place in its document."""
    starts: jax.Array
    """Int [sum of all S_j], the documents' first tokens; n where there is none."""
    sizes: jax.Array
    """Int, their tokens; 0 where there is none."""
    regular: jax.Array
    """Bool, whether no document comes back."""
    held: jax.Array
    """Bool, whether the levels hold all documents."""


def level_lengths(T: int, ratio: int, smallest: int) -> list[int]:
    """Return L_0 >= T, the length of a padded row, L_0 / r, L_0 / r^2, ..."""
    count = 0
    while T // ratio ** (count + 1) >= smallest:
        count += 1
    last = -(-T // ratio**count)
    return [last * ratio**j for j in range(count, -1, -1)]


def find_documents(ids: jax.Array) -> Documents:
    """Find the runs of equal ids, int [B, T]: some 25 small kernels, once a step."""
    lengths = level_lengths(ids.shape[1], RATIO, SMALLEST)
    B, T = ids.shape
    width = lengths[0]
    t = jnp.arange(B * width)
    in_row = t % width
    flat = jnp.pad(ids, ((0, 0), (0, width - T))).ravel()
    first = (in_row == 0) | (in_row == T) | (flat != jnp.roll(flat, 1))
    start = jax.lax.cummax(jnp.where(first, t, 0))
    following = jax.lax.cummin(jnp.where(first, t, t.size), reverse=True)
    size = jnp.append(following[1:], t.size) - start
    level = sum((size <= most).astype(jnp.int32) for most in lengths) - 1
    level = jnp.where(in_row < T, level, -1)

    of_level = level == jnp.arange(len(lengths))[:, None]
    number = jnp.cumsum(of_level & first, axis=1) - 1  # [levels, n]
    slot = jnp.where(of_level, number, 0).sum(0)
    capacities = [_capacity(B, lengths, i) for i in range(len(lengths))]
    bases = jnp.array([sum(capacities[:i]) for i in range(len(lengths))])
    total = sum(capacities)
    fits = slot < jnp.array(capacities)[level]
    target = jnp.where(first & fits & (level >= 0), bases[level] + slot, total)
    starts = jnp.full(total, t.size).at[target].set(t, mode="drop")
    sizes = jnp.zeros_like(starts).at[target].set(size, mode="drop")
    inside = t - start
    return Documents(
        ids, level, slot, inside, starts, sizes, regular=_rises(ids), held=fits.all()
    )


def _rises(ids):
    """Whether each row's ids never fall, 0 last or first: no document comes back."""
    padding = jax.lax.cummax((ids != 0).astype(jnp.int32), axis=1, reverse=True) == 0
    keys = jnp.where(padding, jnp.iinfo(ids.dtype).max, ids)
    zero_twice = padding.any(1) & ((ids == 0) & ~padding).any(1)
    return (keys[:, 1:] >= keys[:, :-1]).all() & ~zero_twice.any()


def _capacity(B, lengths, level):
    """S, the documents that a level's call takes."""
    return RATIO * B * lengths[0] // lengths[level]


def forward(q, k, v, documents: Documents, *, causal, window, kernel=False):
    """Return (out, logsumexp) as `cudnn.flash_forward`, each document for itself.

    `kernel`: whether this package's own kernel, which needs no levels, takes their
    place. It is causal.
    """
    B, T, N, _ = q.shape
    lengths = level_lengths(T, RATIO, SMALLEST)
    options = {"causal": causal, "window": window}

    def one_level(level, carry, q, k, v):
        out, lse = carry
        own, segments = _segments(documents, level, B, lengths)
        part, stats = cudnn.segments_forward(q, k, v, *segments, **options)
        where = documents.slot, slice(None), documents.inside
        part_lse = stats.at[where].get(mode="clip")  # [n, N]
        part_lse = part_lse.reshape(*own.shape, N).swapaxes(1, 2)
        out = jnp.where(own[..., None, None], part, out)
        return out, jnp.where(own[:, None], part_lse, lse)

    def by_level(q, k, v):
        q, k, v = (_pad(a, lengths) for a in (q, k, v))
        empty = jnp.zeros_like(q), jnp.zeros((B, N, lengths[0]), jnp.float32)
        out, lse = _for_levels(documents, lengths, one_level, empty, q, k, v)
        return out[:, :T], lse[..., :T]

    def by_kernel(*arrays):
        ids = documents.ids
        return mosaic_gpu.flash_forward(*arrays, segment_ids=ids, window=window)

    def by_blocks(q, k, v):
        return xla.flash_forward(q, k, v, documents.ids, softcap=None, **options)

    ways = by_kernel if kernel else by_level, by_blocks
    shapes = q.shape, (B, N, T)
    return _either(_is_regular(documents, kernel), *ways, (q, k, v), shapes)


def backward(
    q, k, v, documents: Documents, out, lse, d_out, *, causal, window, kernel=False
):
    """Return (dq, dk, dv) from what `forward` took and returned; `kernel` as there."""
    B, T, N, _ = q.shape
    lengths = level_lengths(T, RATIO, SMALLEST)
    options = {"causal": causal, "window": window}

    def one_level(level, carry, q, k, v, out, lse, d_out):
        own, segments = _segments(documents, level, B, lengths)
        starts, _, size = segments
        tokens = starts[:, None] + jnp.arange(size)
        stats = lse.at[:, tokens].get(mode="clip").swapaxes(0, 1)  # [S, N, L]
        new = cudnn.segments_backward(
            q, k, v, out, stats, d_out, *segments, **options
        )  # fmt: skip
        return [
            jnp.where(own[..., None, None], a, b)
            for a, b in zip(new, carry, strict=True)
        ]

    def by_level(q, k, v, out, lse, d_out):
        arrays = [_pad(a, lengths) for a in (q, k, v, out, d_out)]
        q, k, v, out, d_out = arrays
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, lengths[0] - T)))
        lse = lse.swapaxes(0, 1).reshape(N, -1)
        empty = [jnp.zeros_like(a) for a in (q, k, v)]
        gradients = _for_levels(
            documents, lengths, one_level, empty, q, k, v, out, lse, d_out
        )
        return tuple(a[:, :T] for a in gradients)

    def by_kernel(*arrays):
        ids = documents.ids
        return mosaic_gpu.flash_backward(*arrays, segment_ids=ids, window=window)

    def by_blocks(q, k, v, out, lse, d_out):
        return xla.flash_backward(
            q, k, v, documents.ids, out, lse, d_out, softcap=None, **options
        )

    ways = by_kernel if kernel else by_level, by_blocks
    arrays, shapes = (q, k, v, out, lse, d_out), (q.shape, k.shape, v.shape)
    return _either(_is_regular(documents, kernel), *ways, arrays, shapes)


def _is_regular(documents, kernel):
    return documents.regular if kernel else documents.regular & documents.held


def _either(regular, regularly, by_blocks, arrays, shapes):
    """Run one of two functions of `arrays`, with results of these shapes.

    [B, T, N, H] goes in and out as [B, T, N H]. Of the four XLA takes the layout that
    its flash attention likes, heads first, and transposes what cuDNN reads and writes.
    """

    def flat(a):
        return a.reshape(*a.shape[:2], -1) if a.ndim == 4 else a

    def branch(fn):
        def run(*flats):
            whole = [a.reshape(b.shape) for a, b in zip(flats, arrays, strict=True)]
            return tuple(flat(a) for a in fn(*whole))

        return run

    # The barriers keep XLA from moving the reshapes into the branches.
    flats = jax.lax.optimization_barrier(tuple(map(flat, arrays)))
    found = jax.lax.cond(regular, branch(regularly), branch(by_blocks), *flats)
    found = jax.lax.optimization_barrier(found)
    return tuple(a.reshape(shape) for a, shape in zip(found, shapes, strict=True))


def _for_levels(documents, lengths, one_level, carry, *arrays):
    """Fold one_level(level, carry, *arrays) over the levels that have documents."""
    count = len(lengths)
    has_any = (documents.level == jnp.arange(count)[:, None]).any(1)
    (used,) = jnp.nonzero(has_any, size=count, fill_value=0)

    def branch(level):
        return lambda carry: one_level(level, carry, *arrays)

    branches = [branch(level) for level in range(count)]

    def body(i, carry):
        return jax.lax.switch(used[i], branches, carry)

    return jax.lax.fori_loop(0, has_any.sum(), body, carry)


def _segments(documents, level, B, lengths):
    """Return which tokens are a level's, bool [B, L_0], and its (starts, sizes, L)."""
    capacities = [_capacity(B, lengths, i) for i in range(level + 1)]
    part = slice(sum(capacities[:-1]), sum(capacities))
    own = (documents.level == level).reshape(B, -1)
    return own, (documents.starts[part], documents.sizes[part], lengths[level])


def _pad(a, lengths):
    return jnp.pad(a, ((0, 0), (0, lengths[0] - a.shape[1]), (0, 0), (0, 0)))


def both_forms(segment_ids: Any) -> tuple[Any, Documents | None]:
    """Return (ids, documents) of either, or of None."""
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, Documents):
        return segment_ids.ids, segment_ids
    return segment_ids, find_documents(segment_ids)
