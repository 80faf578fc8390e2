"""Attention: one signature, cuDNN where it can, XLA flash elsewhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mst_jax.ops.attention.xla import flash_attention


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Self-attention, softmax(q k^T / sqrt(H)) v, in O(T) memory.

    Args:
        q: [B, T, N, H] queries.
        k: [B, T, K, H] keys; K divides N (grouped-query attention).
        v: [B, T, K, H] values.
        causal: whether a token sees only itself and those before it.
        sliding_window: number of tokens that a token sees to its left, itself
            included (and to its right, if not causal).
        segment_ids: [B, T]; tokens see only their own segment.
        softcap: scores become cap * tanh(scores / cap).
        implementation: 'cudnn', 'xla', or None for `choose_implementation`'s.

    Raises:
        ValueError: shapes that do not fit, a softcap or window that is not positive.
        NotImplementedError: 'cudnn' where it cannot, or an unknown implementation.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{q.shape=} {k.shape=} {v.shape=} do not fit [B, T, heads, H]"
        )
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{k.shape=}: K must divide N, and H be that of {q.shape=}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{sliding_window=} must be at least 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be positive or None")
    obstacle = _cudnn_obstacle(
        q, segmented=segment_ids is not None, softcap=softcap,
        window_two_sided=sliding_window is not None and not causal,
    )  # fmt: skip
    if implementation is None:
        implementation = "xla" if obstacle or _device_obstacle(q) else "cudnn"
    if implementation == "cudnn":
        if obstacle:
            raise NotImplementedError(f"cuDNN attention: {obstacle}; use 'xla'")
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=window,
            implementation="cudnn",
        )  # fmt: skip
    if implementation != "xla":
        raise NotImplementedError(f"{implementation=} is not 'cudnn' or 'xla'")
    return flash_attention(
        q, k, v, segment_ids, causal=causal, window=sliding_window, softcap=softcap
    )


def choose_implementation(
    head_size: int, dtype, *, segmented: bool, softcap: float | None = None
) -> tuple[str, str]:
    """Return ('cudnn' or 'xla', why), as `attention` chooses on this device."""
    q = jax.ShapeDtypeStruct((1, 1, 1, head_size), dtype)
    obstacle = _cudnn_obstacle(
        q, segmented=segmented, softcap=softcap, window_two_sided=False
    ) or _device_obstacle(q)
    return ("xla", obstacle) if obstacle else ("cudnn", "this GPU has it")


def _cudnn_obstacle(q, *, segmented, softcap, window_two_sided) -> str | None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is no multiple of 8 or above 256"
    if segmented:
        return "has no segment ids (packed documents)"
    if softcap:
        return "has no softcap"
    if window_two_sided:
        return "has a sliding window only with causal"
    return None


def _device_obstacle(q) -> str | None:
    if jax.default_backend() != "gpu":
        return f"there is no GPU ({jax.default_backend()})"
    capability = float(jax.local_devices()[0].compute_capability)
    if capability < 8.0:
        return f"compute capability {capability} is below 8.0"
    if q.shape[-1] > 128 and capability < 9.0:
        return f"head size {q.shape[-1]} needs compute capability 9.0"
    return None
