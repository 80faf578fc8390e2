"""Attention: one signature, cuDNN where it can, XLA flash elsewhere."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mst_jax.ops.attention import cudnn, packed, xla
from mst_jax.ops.attention.packed import Documents, both_forms


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "B T"] | Documents | None = None,
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
        segment_ids: [B, T]; tokens see only those with their own id. 'cudnn' is at its
            best with ids that rise along a row, or fall to 0 at its end (padding); a
            batch with others, or with very many documents of a few tokens, is right,
            but computed as 'xla' does (see `packed`). `find_documents` of them does
            once what every call needs of them.
        softcap: scores become cap * tanh(scores / cap).
        implementation: 'cudnn', 'xla', or None for `choose_implementation`'s.

    Raises:
        ValueError: shapes that do not fit, a softcap or window that is not positive.
        NotImplementedError: 'cudnn' where it cannot, or an unknown implementation.
    """
    how = _choose(q, k, v, causal, sliding_window, segment_ids, softcap, implementation)
    return cast(jax.Array, _attention(how, q, k, v, segment_ids))


def attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | Documents | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return causal attention's output and the logsumexp of each query's scores (f32).

    With `attention_backward` the two halves of `attention`, for callers that decide
    themselves what is kept in between. Arguments and errors are those of `attention`.
    """
    how = _choose(q, k, v, True, sliding_window, segment_ids, None, implementation)
    return _forward(how, q, k, v, segment_ids)


def attention_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    *,
    segment_ids: Int[Array, "B T"] | Documents | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return (dq, dk, dv) from what `attention_forward` took and returned."""
    how = _choose(q, k, v, True, sliding_window, segment_ids, None, implementation)
    dq, dk, dv, _ = _backward(how, (q, k, v, segment_ids, out, lse), d_out)
    return dq, dk, dv


@dataclass(frozen=True)
class _How:
    implementation: str
    causal: bool
    window: int | None
    softcap: float | None


def _choose(q, k, v, causal, sliding_window, segment_ids, softcap, implementation):
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
    segmented = segment_ids is not None
    obstacle = _cudnn_obstacle(
        q, segmented=segmented, softcap=softcap,
        window_two_sided=sliding_window is not None and not causal,
    )  # fmt: skip
    if implementation is None or (segmented and _capability()):
        obstacle = obstacle or _device_obstacle(q, segmented=segmented)
    if implementation is None:
        implementation = "xla" if obstacle else "cudnn"
    if implementation not in ("cudnn", "xla"):
        raise NotImplementedError(f"{implementation=} is not 'cudnn' or 'xla'")
    if implementation == "cudnn" and obstacle:
        raise NotImplementedError(f"cuDNN attention: {obstacle}; use 'xla'")
    return _How(implementation, causal, sliding_window, softcap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, q, k, v, segment_ids) -> Any:
    if how.implementation == "cudnn" and segment_ids is None:
        return cudnn.forward_only(q, k, v, causal=how.causal, window=how.window)
    return _forward(how, q, k, v, segment_ids)[0]


def _forward(how: _How, q, k, v, segment_ids) -> tuple[jax.Array, jax.Array]:
    options = {"causal": how.causal, "window": how.window}
    ids, documents = both_forms(segment_ids)
    if how.implementation == "xla":
        return xla.flash_forward(q, k, v, ids, softcap=how.softcap, **options)
    if documents is not None:
        return packed.forward(q, k, v, documents, **options)
    return cudnn.flash_forward(q, k, v, **options)


def _forward_rule(how: _How, q, k, v, segment_ids):
    out, lse = _forward(how, q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, out, lse)


def _backward(how: _How, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    options = {"causal": how.causal, "window": how.window}
    ids, documents = both_forms(segment_ids)
    if how.implementation == "xla":
        dq, dk, dv = xla.flash_backward(
            q, k, v, ids, out, lse, d_out, softcap=how.softcap, **options
        )
    elif documents is not None:
        dq, dk, dv = packed.backward(q, k, v, documents, out, lse, d_out, **options)
    else:
        dq, dk, dv = cudnn.flash_backward(q, k, v, out, lse, d_out, **options)
    return dq, dk, dv, None


_attention.defvjp(_forward_rule, _backward)


def choose_implementation(
    head_size: int,
    dtype,
    *,
    segmented: bool,
    softcap: float | None = None,
    shape: tuple[int, int, int] = (1, 1, 1),
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return ('cudnn' or 'xla', why), as `attention` chooses here for (B, T, N).

    `capability` is that of another GPU, to choose as it would be there.
    """
    q = jax.ShapeDtypeStruct((*shape, head_size), dtype)
    obstacle = _cudnn_obstacle(
        q, segmented=segmented, softcap=softcap, window_two_sided=False
    ) or _device_obstacle(q, segmented=segmented, capability=capability)
    return ("xla", obstacle) if obstacle else ("cudnn", "this GPU has it")


def _cudnn_obstacle(q, *, segmented, softcap, window_two_sided) -> str | None:
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
    if window_two_sided:
        return "has a sliding window only with causal"
    return None


def _device_obstacle(q, *, segmented, capability=None) -> str | None:
    capability = capability or _capability()
    if capability is None:
        return f"there is no GPU ({jax.default_backend()})"
    if capability < (8, 0):
        return f"compute capability {_dotted(capability)} is below 8.0"
    if capability < (9, 0) and q.shape[-1] > 128:
        return f"head size {q.shape[-1]} needs compute capability 9.0"
    if capability < (9, 0) and segmented:
        return (
            "packed documents need compute capability 9.0, "
            f"this is {_dotted(capability)}"
        )
    return None


def _capability() -> tuple[int, int] | None:
    if jax.default_backend() != "gpu":
        return None
    major, minor = jax.local_devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
