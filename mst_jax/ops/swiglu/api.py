"""Gated MLP on mini-sequences: (act(x W_gate) * (x W_up)) W_down (arXiv 2002.05202).

The chunk loop of `mini_sequence`, with the backward pass written out so that each
chunk's weight gradients are matrix products that accumulate in f32 in place;
differentiating the chunk would round every chunk's product to the weights' dtype and
add it in a pass of its own. Nothing wider than D is saved: gate and up are recomputed,
11 matrix products in all. Memory: O(T F) -> O(C F).
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mst_jax.mini_sequence import (
    auto_chunk_size,
    from_chunks,
    split_length,
    to_chunks,
)
from mst_jax.ops.matmul import device_obstacle
from mst_jax.ops.swiglu import mosaic_gpu, xla

_HOW = {"xla": xla, "mosaic_gpu": mosaic_gpu}


def swiglu(
    x: Float[Array, "B T D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    *,
    activation: str = "silu",
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """Apply the gated MLP to every token.

    Args:
        x: [B, T, D].
        w_gate: [D, F].
        w_up: [D, F].
        w_down: [F, D].
        activation: 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU).
        chunk_size: most tokens of a chunk; None by byte budget; 0 does not chunk and
            saves gate and up for the backward pass.
        implementation: 'xla', 'mosaic_gpu' (Hopper), or None for the one that
            `choose_implementation` names.

    Raises:
        ValueError: an unknown activation or a negative chunk size.
        NotImplementedError: an implementation that cannot, or does not exist.
    """
    weights = (w_gate, w_up, w_down)
    if chunk_size == 0:
        if implementation == "mosaic_gpu":
            raise NotImplementedError(f"{implementation=} has no {chunk_size=}")
        _choose(implementation, activation, x, w_gate)
        return _unchunked(activation, x, *weights)
    if chunk_size is None:
        chunk_size = mlp_chunk_size(x.shape[0], w_gate.shape[1], x.dtype)
    B, length, D = x.shape
    num_chunks, size = split_length(length, chunk_size)
    chunk = jax.ShapeDtypeStruct((B, size, D), x.dtype)
    how = _choose(implementation, activation, chunk, w_gate)
    y_MBCD = _chunked(how, activation, to_chunks(x, num_chunks, size, 1), *weights)
    return from_chunks(cast(jax.Array, y_MBCD), length, 1)


def mlp_chunk_size(batch: int, ffn_size: int, dtype: jnp.dtype) -> int:
    """Return the chunk size that None stands for: gate, up and their gradients fit."""
    return auto_chunk_size(4 * batch * ffn_size * jnp.dtype(dtype).itemsize)


def mlp_forward(
    x: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    *,
    residual: jax.Array | None = None,
    keep: bool = False,
    activation: str = "silu",
    implementation: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Apply the MLP to one chunk [B, C, D], for callers with loops of their own.

    Returns:
        (y [B, C, D] with `residual` added, (gate, up) [B, C, F] if `keep` or None).
    """
    how = _choose(implementation, activation, x, weights[0])
    return _HOW[how].forward(activation, x, weights, residual, keep)


def mlp_backward(
    x: jax.Array,
    gate_up: tuple[jax.Array, jax.Array] | None,
    dy: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    totals: Any,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array] | None]:
    """Differentiate one chunk, its weight gradients added to those so far.

    Args:
        x: [B, C, D] the chunk.
        gate_up: x W_gate and x W_up [B, C, F], or None to compute them again.
        dy: [B, C, D].
        weights: gate, up and down.
        totals: f32 gradients of the weights so far; None if this is the first chunk.
        activation, implementation: as in `swiglu`.

    Returns:
        (dx without `residual`'s, totals, their f32 sums of squares or None).
    """
    how = _choose(implementation, activation, x, weights[0])
    return _HOW[how].backward(activation, x, gate_up, dy, weights, totals)


def choose_implementation(
    dtype: Any, hidden_size: int, ffn_size: int, *, rows: int,
    activation: str = "silu", capability: Any = None,
) -> tuple[str, str]:  # fmt: skip
    """Return ('xla' or 'mosaic_gpu', why), as `swiglu` chooses for a chunk here.

    `rows` is B C; `capability`: of another GPU.
    """
    x = jax.ShapeDtypeStruct((rows, hidden_size), dtype)
    w_gate = jax.ShapeDtypeStruct((hidden_size, ffn_size), dtype)
    reason = mosaic_gpu.obstacle(activation, x, w_gate) or device_obstacle(capability)
    return ("xla", reason) if reason else ("mosaic_gpu", "this GPU has it")


def _choose(implementation, activation, x, w_gate) -> str:
    if activation not in xla.ACTIVATIONS:
        raise ValueError(f"{activation=} is not one of {tuple(xla.ACTIVATIONS)}")
    reason = mosaic_gpu.obstacle(activation, x, w_gate) or device_obstacle()
    if implementation is None:
        return "xla" if reason else "mosaic_gpu"
    if implementation not in _HOW:
        raise NotImplementedError(f"{implementation=} is not one of {tuple(_HOW)}")
    if implementation == "mosaic_gpu" and reason:
        raise NotImplementedError(
            f"implementation='mosaic_gpu': {reason}; use 'xla', or None"
        )
    return implementation


def _unchunked(activation, x, w_gate, w_up, w_down):
    return xla.gated(activation, x @ w_gate, x @ w_up) @ w_down


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(how, activation, x_MBCD, *weights) -> Any:
    def one(x):
        return _HOW[how].forward(activation, x, weights, None, False)[0]

    return jax.lax.map(one, x_MBCD)


def _forward(how, activation, x_MBCD, *weights):
    return _chunked(how, activation, x_MBCD, *weights), (x_MBCD, weights)


def _backward(how, activation, residuals, dy_MBCD):
    x_MBCD, weights = residuals

    def body(totals, chunk):
        x, dy = chunk
        dx, totals, _ = _HOW[how].backward(activation, x, None, dy, weights, totals)
        return totals, dx

    zeros = [jnp.zeros(w.shape, jnp.promote_types(w.dtype, "float32")) for w in weights]
    totals, dx_MBCD = jax.lax.scan(body, zeros, (x_MBCD, dy_MBCD))
    dweights = (t.astype(w.dtype) for t, w in zip(totals, weights, strict=True))
    return dx_MBCD.astype(x_MBCD.dtype), *dweights


_chunked.defvjp(_forward, _backward)
