"""One chunk of the gated MLP in XLA's matrix products."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return act(gate) * up, in f32 inside, which a fused kernel has for free."""
    product = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up
    return product.astype(up.dtype)


def forward(activation: str, x, weights, residual, keep: bool):
    """As `api.mlp_forward`."""
    w_gate, w_up, w_down = weights
    gate, up = x @ w_gate, x @ w_up
    y = gated(activation, gate, up) @ w_down
    y = y if residual is None else residual + y
    return y, ((gate, up) if keep else None)


def backward(activation: str, x, gate_up, dy, weights, totals: Any):
    """As `api.mlp_backward`; what accumulates is a GEMM with beta = 1, in f32."""
    w_gate, w_up, w_down = weights
    gate, up = gate_up or (x @ w_gate, x @ w_up)
    hidden, vjp = jax.vjp(partial(gated, activation), gate, up)
    dgate, dup = vjp(jnp.einsum("BCD,FD->BCF", dy, w_down))
    dx = jnp.einsum("BCF,DF->BCD", dgate, w_gate)
    dx += jnp.einsum("BCF,DF->BCD", dup, w_up)
    found = [_outer(*pair) for pair in ((x, dgate), (x, dup), (hidden, dy))]
    return dx, jax.tree.map(jnp.add, totals, found) if totals else found, None


def _outer(a, b):
    return jnp.einsum("BCI,BCO->IO", a, b, preferred_element_type=jnp.float32)
