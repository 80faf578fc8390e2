"""Gated MLP: (act(x W_gate) * (x W_up)) W_down (arXiv 2002.05202).

This is how one chunk is computed; `mini_sequence` cuts the sequence.
"""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def swiglu(
    x: Float[Array, "*batch D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    *,
    activation: str = "silu",
) -> Float[Array, "*batch D"]:
    """Apply the gated MLP to every token.

    Args:
        x: [..., D].
        w_gate: [D, F].
        w_up: [D, F].
        w_down: [F, D].
        activation: 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU).

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{activation=} is not one of {tuple(_ACTIVATIONS)}")
    return (_ACTIVATIONS[activation](x @ w_gate) * (x @ w_up)) @ w_down
