"""Attention: one signature, the best that the GPU has, XLA flash elsewhere."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
from jaxtyping import Array, Float, Int

from mst_jax.ops.attention import cudnn, mosaic_gpu, packed, xla
from mst_jax.ops.attention.packed import Documents, both_forms
from mst_jax.ops.matmul import compute_capability

IMPLEMENTATIONS = "mosaic_gpu", "cudnn", "xla"
"""Fastest first."""


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
        segment_ids: [B, T]; tokens see only those with their own id. Unless ids rise
            along a row, or fall to 0 at its end (padding), a batch is computed as 'xla'
            does; with 'cudnn' also one with very many documents of a few tokens (see
            `packed`). `find_documents` does once what every call needs of them.
        softcap: scores become cap * tanh(scores / cap).
        implementation: 'mosaic_gpu', kernels of our own for Hopper, whose last bits of
            dq differ from run to run (forward in cuDNN where that is faster); 'cudnn';
            'xla'; or None for the first that can here (see `choose_implementation`).

    Raises:
        ValueError: shapes that do not fit, a softcap or window that is not positive.
        NotImplementedError: one that cannot, by name, or an unknown implementation.
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
    ids = segment_ids.ids if isinstance(segment_ids, Documents) else segment_ids
    if ids is not None and ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids of {ids.shape} do not fit {q.shape=}: [B, T]")
    mask = _Mask(causal, sliding_window, ids is not None, softcap)
    if implementation is None:
        implementation, _ = _first(q, mask, None)
    elif implementation not in IMPLEMENTATIONS:
        raise NotImplementedError(f"{implementation=} is none of {IMPLEMENTATIONS}")
    elif obstacle := _obstacle(implementation, q, mask, compute_capability()):
        raise NotImplementedError(f"{implementation=}: {obstacle}; use 'xla'")
    return _How(implementation, causal, sliding_window, softcap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, q, k, v, segment_ids) -> Any:
    if how.implementation == "cudnn" and segment_ids is None:
        return cudnn.forward_only(q, k, v, causal=how.causal, window=how.window)
    return _forward(how, q, k, v, segment_ids)[0]


def _forward(how: _How, q, k, v, segment_ids) -> tuple[jax.Array, jax.Array]:
    options = {"causal": how.causal, "window": how.window}
    ids, documents = both_forms(segment_ids)
    kernel = how.implementation == "mosaic_gpu"
    if how.implementation == "xla":
        return xla.flash_forward(q, k, v, ids, softcap=how.softcap, **options)
    if documents is not None:
        return packed.forward(q, k, v, documents, kernel=kernel, **options)
    if kernel and mosaic_gpu.has_fast_forward(q.shape[-1]):
        return mosaic_gpu.flash_forward(q, k, v, window=how.window)
    return cudnn.flash_forward(q, k, v, **options)


def _forward_rule(how: _How, q, k, v, segment_ids):
    out, lse = _forward(how, q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, out, lse)


def _backward(how: _How, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    options = {"causal": how.causal, "window": how.window}
    ids, documents = both_forms(segment_ids)
    kernel = how.implementation == "mosaic_gpu"
    if how.implementation == "xla":
        dq, dk, dv = xla.flash_backward(
            q, k, v, ids, out, lse, d_out, softcap=how.softcap, **options
        )
    elif documents is not None:
        arrays = q, k, v, documents, out, lse, d_out
        dq, dk, dv = packed.backward(*arrays, kernel=kernel, **options)
    elif kernel:
        arrays = q, k, v, out, lse, d_out
        dq, dk, dv = mosaic_gpu.flash_backward(*arrays, window=how.window)
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
    sliding_window: int | None = None,
    shape: tuple[int, int, int] = (1, 8, 1),
    capability: tuple[int, int] | None = None,
    asked: str | None = None,
) -> tuple[str, str]:
    """Return what computes causal attention here for (B, T, N), and why.

    Args:
        head_size, dtype: of q, k and v.
        segmented, softcap, sliding_window: if there are documents; see `attention`.
        shape: B, T and N.
        capability: that of another GPU, to choose as it would be there.
        asked: an implementation by name, if there is no choice.

    Raises:
        NotImplementedError: `asked` cannot, and why.
    """
    q = jax.ShapeDtypeStruct((*shape, head_size), dtype)
    mask = _Mask(True, sliding_window, segmented, softcap)
    if asked is None:
        return _first(q, mask, capability)
    if obstacle := _obstacle(asked, q, mask, capability or compute_capability()):
        raise NotImplementedError(obstacle)
    return asked, "as asked for" + mosaic_gpu.forward_note(asked, q, segmented)


@dataclass(frozen=True)
class _Mask:
    causal: bool = True
    window: int | None = None
    segmented: bool = False
    softcap: float | None = None


def _first(q, mask: _Mask, capability) -> tuple[str, str]:
    """Return the first implementation that can, and why none before it."""
    why, capability = "this GPU has it", capability or compute_capability()
    for name in IMPLEMENTATIONS:
        obstacle = _obstacle(name, q, mask, capability)
        if obstacle is None and name == "mosaic_gpu":
            obstacle = mosaic_gpu.not_by_default(q, **vars(mask))
        if obstacle is None:
            return name, why + mosaic_gpu.forward_note(name, q, mask.segmented)
        why = f"not {name}: {obstacle}"
    raise AssertionError("xla always can")


def _obstacle(name: str, q, mask: _Mask, capability) -> str | None:
    """Return why an implementation cannot on such a GPU, or None."""
    if name == "xla":
        return None
    kernels = mosaic_gpu if name == "mosaic_gpu" else cudnn
    if reason := kernels.obstacle(q, **vars(mask)):
        return reason
    if capability is None:
        return f"there is no GPU ({jax.default_backend()})"
    return kernels.device_obstacle(capability, q.shape[-1], segmented=mask.segmented)
