"""Gated MLP on mini-sequences: (act(x W_gate) * (x W_up)) W_down (arXiv 2002.05202).

The chunk loop of `mini_sequence`, with the backward pass written out so that each
chunk's weight gradients are matrix products that accumulate in f32 in place (a GEMM
with beta = 1); differentiating the chunk would round every chunk's product to the
weights' dtype and add it in a pass of its own. Nothing wider than D is saved: gate and
up are recomputed, 11 matrix products in all. Memory: O(T F) -> O(C F).
"""

from collections.abc import Callable
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

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def swiglu(
    x: Float[Array, "B T D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    *,
    activation: str = "silu",
    chunk_size: int | None = None,
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

    Raises:
        ValueError: an unknown activation or a negative chunk size.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{activation=} is not one of {tuple(_ACTIVATIONS)}")
    weights = (w_gate, w_up, w_down)
    if chunk_size == 0:
        return _mlp(activation, x, *weights)
    if chunk_size is None:
        chunk_size = mlp_chunk_size(x.shape[0], w_gate.shape[1], x.dtype)
    length = x.shape[1]
    num_chunks, size = split_length(length, chunk_size)
    y_MBCD = _chunked(activation, to_chunks(x, num_chunks, size, 1), *weights)
    return from_chunks(cast(jax.Array, y_MBCD), length, 1)


def mlp_chunk_size(batch: int, ffn_size: int, dtype: jnp.dtype) -> int:
    """Return the chunk size that None stands for: gate, up and their gradients fit."""
    return auto_chunk_size(4 * batch * ffn_size * jnp.dtype(dtype).itemsize)


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return act(gate) * up, in f32 inside, which a fused kernel has for free."""
    product = _ACTIVATIONS[activation](gate.astype(jnp.float32)) * up
    return product.astype(up.dtype)


def swiglu_backward(
    activation: str,
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    dy: jax.Array,
    weights: tuple[jax.Array, ...],
    totals: Any,
) -> tuple[jax.Array, list[jax.Array]]:
    """Differentiate one chunk, its weight gradients added to those so far.

    Args:
        activation: as in `swiglu`.
        x: [B, C, D] the chunk.
        gate: [B, C, F], x W_gate.
        up: [B, C, F], x W_up.
        dy: [B, C, D].
        weights: gate, up and down.
        totals: f32 gradients of the weights; the sum is a GEMM with beta = 1.

    Returns:
        (dx, totals).
    """
    w_gate, w_up, w_down = weights
    hidden, vjp = jax.vjp(partial(gated, activation), gate, up)
    dgate, dup = vjp(jnp.einsum("BCD,FD->BCF", dy, w_down))
    dx = jnp.einsum("BCF,DF->BCD", dgate, w_gate)
    dx += jnp.einsum("BCF,DF->BCD", dup, w_up)
    pairs = ((x, dgate), (x, dup), (hidden, dy))
    return dx, [t + _outer(*pair) for t, pair in zip(totals, pairs, strict=True)]


def _mlp(activation, x, w_gate, w_up, w_down):
    return gated(activation, x @ w_gate, x @ w_up) @ w_down


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(activation, x_MBCD, w_gate, w_up, w_down) -> Any:
    def one(x):
        return _mlp(activation, x, w_gate, w_up, w_down)

    return jax.lax.map(one, x_MBCD)


def _forward(activation, x_MBCD, *weights):
    return _chunked(activation, x_MBCD, *weights), (x_MBCD, weights)


def _backward(activation, residuals, dy_MBCD):
    x_MBCD, weights = residuals
    w_gate, w_up, _ = weights

    def body(total, chunk):
        x, dy = chunk
        gate, up = x @ w_gate, x @ w_up
        dx, total = swiglu_backward(activation, x, gate, up, dy, weights, total)
        return total, dx

    zeros = [jnp.zeros(w.shape, jnp.promote_types(w.dtype, "float32")) for w in weights]
    total, dx_MBCD = jax.lax.scan(body, zeros, (x_MBCD, dy_MBCD))
    dweights = (t.astype(w.dtype) for t, w in zip(total, weights, strict=True))
    return dx_MBCD, *dweights


def _outer(a, b):
    return jnp.einsum("BCI,BCO->IO", a, b, preferred_element_type=jnp.float32)


_chunked.defvjp(_forward, _backward)
