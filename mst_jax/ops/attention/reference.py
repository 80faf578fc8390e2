"""Attention as the formula says it, in f32, with the T x T array. For tests."""

import jax
import jax.numpy as jnp


def reference_attention(
    q, k, v, *, causal=True, sliding_window=None, segment_ids=None, softcap=None
):
    """Return softmax(q k^T / sqrt(H) + mask) v, f32 [B, T, N, H]."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, groups, axis=2) for a in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
    scores /= q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
    mask = jnp.ones_like(distance, bool)[None]
    if causal:
        mask &= distance >= 0
    if sliding_window:
        mask &= (distance < sliding_window) & (distance > -sliding_window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
