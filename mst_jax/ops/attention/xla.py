"""Flash attention in plain XLA: O(T) memory on any device.

Queries and keys are cut into blocks; a block pair's scores live alone, with the
running maximum and sum of the online softmax (arXiv 2205.14135). Block pairs that the
masks leave empty are skipped: causal costs half, and packed documents or a window cost
what their lengths cost. The backward pass keeps q, k, v, the output and the logsumexp,
[B, T, N] in f32, and recomputes the scores block by block.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

BLOCKS = 128, 512
"""Fewest and most queries and keys of a block: 32 heads of scores in f32 are 2 and 32
MiB. A quarter of the length in between, so that causal skips most of its empty half."""


@dataclass(frozen=True)
class _Mask:
    length: int
    block: int
    causal: bool
    window: int | None
    softcap: float | None

    def pairs(self, segments):
        """Bool [M, M]: block pairs in which some query sees some key."""
        start = jnp.arange(0, segments.shape[1], self.block)
        last = start + self.block - 1
        needed = jnp.broadcast_to(start[None] < self.length, (start.size, start.size))
        if self.causal:
            needed &= last[:, None] >= start[None]
        if self.window:
            needed &= start[:, None] - last[None] < self.window
            needed &= start[None] - last[:, None] < self.window
        blocks = segments.reshape(segments.shape[0], -1, self.block)
        low, high = blocks.min(-1), blocks.max(-1)
        overlap = (low[:, :, None] <= high[:, None]) & (
            high[:, :, None] >= low[:, None]
        )
        return needed & overlap.any(0)

    def scores(self, q, k, q_index, k_index, q_segment, k_segment):
        """[B, K, G, Cq, Ck] masked scores in f32 of scaled queries."""
        s = jnp.einsum("BKGQH,BKCH->BKGQC", q, k, preferred_element_type=jnp.float32)
        if self.softcap:
            s = self.softcap * jnp.tanh(s / self.softcap)
        distance = q_index[:, None] - k_index[None]
        # Pad queries see pad keys, themselves at least: a row without keys is NaN.
        mask = (k_index[None] < self.length) | (q_index[:, None] >= self.length)
        if self.causal:
            mask &= distance >= 0
        if self.window:
            mask &= (distance < self.window) & (distance > -self.window)
        mask = mask & (q_segment[:, :, None] == k_segment[:, None])
        return jnp.where(mask[:, None, None], s, -jnp.inf)


def flash_forward(q, k, v, segment_ids, *, block=None, **options):
    """Return (out, logsumexp).

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H], like v.
        v: the values.
        segment_ids: [B, T] or None.
        block: queries and keys of a block; None for a quarter of T within `BLOCKS`.
        **options: causal, window, softcap.

    Returns:
        out like q, and the logsumexp of each query's scores, f32 [B, N, T].
    """
    B, T, N, _ = q.shape
    mask, pad = _mask(q, block, options)
    arrays = _queries(q, k, pad), _keys(k, pad), _keys(v, pad)
    out, lse = _forward(mask, *arrays, _segments(segment_ids, T, pad))
    return _tokens_first(out, T), lse.reshape(B, N, -1)[..., :T]


def flash_backward(q, k, v, segment_ids, out, lse, d_out, *, block=None, **options):
    """Return (dq, dk, dv) from what `flash_forward` took and returned."""
    T = q.shape[1]
    mask, pad = _mask(q, block, options)
    arrays = _queries(q, k, pad), _keys(k, pad), _keys(v, pad)
    out, d_out = _queries(out, k, pad), _queries(d_out, k, pad)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, pad))).reshape(out.shape[:-1])
    segments = _segments(segment_ids, T, pad)
    gradients = _backward(mask, *arrays, segments, out, lse, d_out)
    dq, dk, dv = (_tokens_first(a, T) for a in gradients)
    return dq, dk, dv


def _mask(q, block, options):
    T = q.shape[1]
    if block is None:
        block = min(max(16 * -(-T // 64), BLOCKS[0]), BLOCKS[1])
    block = min(block, 16 * -(-T // 16))
    return _Mask(T, block, **options), -T % block


def _segments(ids, T, pad):
    ids = jnp.zeros((1, T), jnp.int32) if ids is None else ids
    # Pad rows repeat the last segment: they make no new block pairs.
    return jnp.pad(ids, ((0, 0), (0, pad)), mode="edge")


def _keys(x, pad):
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)


def _queries(x, k, pad):
    B, T, _, H = x.shape
    return _keys(x, pad).reshape(B, k.shape[2], -1, T + pad, H)


def _tokens_first(x, T):
    x = x.reshape(x.shape[0], -1, *x.shape[-2:])
    return x.swapaxes(1, 2)[:, :T]


def _block(x, i, size, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _ranges(needed):
    """First and one past the last needed block of each row."""
    first = jnp.argmax(needed, axis=1)
    past = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=1)
    return first, jnp.where(needed.any(1), past, first)


def _forward(mask, q, k, v, segments):
    C, H = mask.block, q.shape[-1]
    first, past = _ranges(mask.pairs(segments))
    index = jnp.arange(C)
    scale = H**-0.5

    def one_query_block(i, carry):
        out_all, lse_all = carry
        q_i = (_block(q, i, C, 3).astype(jnp.float32) * scale).astype(q.dtype)
        segment_i = _block(segments, i, C, 1)

        def one_key_block(j, carry):
            out, top, norm = carry
            k_j, v_j = _block(k, j, C, 2), _block(v, j, C, 2)
            segment_j = _block(segments, j, C, 1)
            s = mask.scores(
                q_i, k_j, i * C + index, j * C + index, segment_i, segment_j
            )
            new_top = jnp.maximum(top, s.max(-1))
            # A row without a key so far has top = -inf; its sums stay zero.
            safe = jnp.where(jnp.isneginf(new_top), 0, new_top)
            p = jnp.exp(s - safe[..., None])
            shrink = jnp.exp(top - safe)
            out = out * shrink[..., None] + jnp.einsum(
                "BKGQC,BKCH->BKGQH",
                p.astype(v.dtype),
                v_j,
                preferred_element_type=jnp.float32,
            )
            return out, new_top, norm * shrink + p.sum(-1)

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        carry = (zeros, jnp.full(q_i.shape[:-1], -jnp.inf), zeros[..., 0])
        out, top, norm = jax.lax.fori_loop(first[i], past[i], one_key_block, carry)
        out_all = _put(out_all, out / norm[..., None], i * C, 3)
        return out_all, _put(lse_all, top + jnp.log(norm), i * C, 3)

    # Zeros after q: XLA makes constant ones long before they are needed.
    zero, q = jax.lax.optimization_barrier((jnp.float32(0), q))
    empty = jnp.full(q.shape, zero.astype(q.dtype)), jnp.full(q.shape[:-1], zero)
    return jax.lax.fori_loop(0, q.shape[3] // C, one_query_block, empty)


def _backward(mask, q, k, v, segments, out, lse, d_out):
    C, H = mask.block, q.shape[-1]
    first, past = _ranges(mask.pairs(segments).T)
    index = jnp.arange(C)
    scale = H**-0.5
    delta = jnp.einsum(
        "BKGTH,BKGTH->BKGT", out, d_out, preferred_element_type=jnp.float32
    )

    def one_key_block(j, carry):
        dq, dk_all, dv_all = carry
        k_j, v_j = _block(k, j, C, 2), _block(v, j, C, 2)
        segment_j = _block(segments, j, C, 1)

        def one_query_block(i, carry):
            dq, dk, dv = carry
            q_i = (_block(q, i, C, 3).astype(jnp.float32) * scale).astype(q.dtype)
            d_out_i = _block(d_out, i, C, 3)
            s = mask.scores(
                q_i, k_j, i * C + index, j * C + index,
                _block(segments, i, C, 1), segment_j,
            )  # fmt: skip
            p = jnp.exp(s - _block(lse, i, C, 3)[..., None])
            dv += _f32("BKGQC,BKGQH->BKCH", p.astype(v.dtype), d_out_i)
            dp = _f32("BKGQH,BKCH->BKGQC", d_out_i, v_j)
            ds = p * (dp - _block(delta, i, C, 3)[..., None])
            if mask.softcap:
                ds *= jnp.where(p > 0, 1 - (s / mask.softcap) ** 2, 0)
            ds = ds.astype(q.dtype)
            dk += _f32("BKGQC,BKGQH->BKCH", ds, q_i)
            dq_i = _block(dq, i, C, 3) + _f32("BKGQC,BKCH->BKGQH", ds, k_j)
            return _put(dq, dq_i, i * C, 3), dk, dv

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(
            first[j], past[j], one_query_block, (dq, zeros, zeros)
        )
        return dq, _put(dk_all, dk, j * C, 2), _put(dv_all, dv, j * C, 2)

    # Zeros after q and d_out, not during the backward pass of a layer's MLP.
    zero, q, d_out = jax.lax.optimization_barrier((jnp.float32(0), q, d_out))
    empty = [jnp.full(a.shape, zero.astype(a.dtype)) for a in (k, v)]
    dq, dk, dv = jax.lax.fori_loop(
        0, k.shape[2] // C, one_key_block, (jnp.full(q.shape, zero), *empty)
    )
    return (dq * scale).astype(q.dtype), dk, dv


def _put(x, block, start, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis)


def _f32(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
