"""cuDNN's flash attention, forward and backward as two calls.

JAX exposes the pair only as one differentiable function, which decides by itself what
it keeps. The memory engine decides that, so the backward primitive is bound here: the
one place that reads JAX's private cuDNN module (JAX 0.10.2 to 0.12).
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused


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
    options = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias
        "mask_type": _mask_type(causal),
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    rule = inspect.signature(fused._dot_product_attention_bwd_rule)
    if "score_mod" in rule.parameters:  # from JAX 0.12
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


def _mask_type(causal):
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
