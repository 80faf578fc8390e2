"""cuDNN's flash attention, forward and backward as two calls.

JAX exposes the pair only as one differentiable function, which decides by itself what
it keeps. The memory engine decides that, so the primitives are bound here: the one
place that reads JAX's private cuDNN module (JAX 0.10.2 to 0.12).
"""

import inspect
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused


def obstacle(q, *, causal, window, segmented, softcap) -> str | None:
    """Return why cuDNN cannot compute attention of such a q on any GPU, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is no multiple of 8 or above 256"
    if segmented and prod(q.shape) >= 2**31 - 2**27:
        return (
            f"offsets of packed documents are 32 bits, too few for q of {q.shape}: "
            "take more head groups"
        )
    if softcap:
        return "has no softcap"
    if window and not causal:
        return "has a sliding window only with causal"
    return None


def device_obstacle(
    capability: tuple[int, int], head_size: int, *, segmented: bool
) -> str | None:
    """Return why a GPU of this compute capability cannot run it, or None."""
    found = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"compute capability {found} is below 8.0"
    if capability < (9, 0) and head_size > 128:
        return f"head size {head_size} needs compute capability 9.0"
    if capability < (9, 0) and segmented:
        return f"packed documents need compute capability 9.0, this is {found}"
    return None


def flash_forward(q, k, v, *, causal, window):
    """q [B, T, N, H], k and v [B, T, K, H] -> (out like q, logsumexp [B, N, T] f32)."""
    found: Any = fused.dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask_type=_mask_type(causal),
        sliding_window_length=window, return_residual=True,
    )  # fmt: skip
    out, lse = found
    return out, lse


def flash_backward(q, k, v, out, lse, d_out, *, causal, window):
    """Return (dq, dk, dv) from what `flash_forward` took and returned."""
    unused = jnp.zeros(0, q.dtype)
    options = _options(q, _mask_type(causal), window)
    if _has_score_mod():
        options["score_mod"] = None
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *[unused] * 7, lse, out, d_out, **options
    )[:3]
    return dq, dk, dv


def forward_only(q, k, v, *, causal, window):
    """Return out alone, for when nothing is differentiated."""
    window = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, local_window_size=window, implementation="cudnn"
    )


def segments_forward(q, k, v, starts, lengths, size, *, causal, window):
    """Run attention inside each of S segments, on compute capability 9.0 and later.

    Args:
        q: [B, T, N, H], its rows one sequence of n = B T tokens; n N H < 2^31.
        k: [B, T, K, H], like v.
        v: the values.
        starts: int32 [S], ascending, in tokens of that sequence; n where unused.
        lengths: int32 [S], 0 where unused.
        size: the most tokens of a segment; it divides n, and n / size divides S, which
            is at least 2 n / size.
        causal: as in `attention`.
        window: as in `attention`.

    Returns:
        out like q, undefined outside the segments, and the logsumexp f32 [S, N, size]
        of each segment's queries, undefined after its length.
    """
    arrays, operands = _segment_operands((q, k, v), starts, lengths, size)
    options = _segment_options(q, causal, window)
    out, stats = fused._dot_product_attention_fwd_p.bind(
        *arrays, *operands, is_training=True, **options
    )
    return out.reshape(q.shape), stats


def segments_backward(
    q, k, v, out, stats, d_out, starts, lengths, size, *, causal, window
):
    """Return (dq, dk, dv), undefined outside the segments.

    `stats` is the logsumexp as `segments_forward` returns it.
    """
    arrays, operands = _segment_operands((q, k, v), starts, lengths, size)
    shape = arrays[0].shape
    gradients = fused._dot_product_attention_bwd_p.bind(
        *arrays, *operands, stats, out.reshape(shape), d_out.reshape(shape),
        **_segment_options(q, causal, window),
    )  # fmt: skip
    return [a.reshape(b.shape) for a, b in zip(gradients[:3], (q, k, v), strict=True)]


def _segment_operands(qkv, starts, lengths, size):
    """Return q, k, v in rows of `size` tokens, and the operands that follow them.

    A row has M = S / rows segments as far as the shapes tell; which they are is in the
    offsets alone, in elements from the first row's start.
    """
    q, k, _ = qkv
    n = q.shape[0] * q.shape[1]
    arrays = [a.reshape(-1, size, *a.shape[2:]) for a in qkv]
    rows = n // size
    offsets = jnp.pad(starts, (0, rows), constant_values=n).reshape(rows, -1)
    offsets = offsets.astype(jnp.int32)
    lengths = lengths.astype(jnp.int32).reshape(rows, -1)
    elements = [offsets * (a.shape[2] * a.shape[3]) for a in (q, k)]
    unused = jnp.zeros(0, q.dtype)
    return arrays, (unused, lengths, lengths, *elements, unused, unused)


def _segment_options(q, causal, window):
    padded = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    options = _options(q, padded, window)
    if _has_score_mod():
        options |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return options


def _options(q, mask_type, window):
    return {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }


def _has_score_mod():
    """From JAX 0.12."""
    rule = inspect.signature(fused._dot_product_attention_bwd_rule)
    return "score_mod" in rule.parameters


def _mask_type(causal):
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
