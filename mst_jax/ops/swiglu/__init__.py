"""Gated MLP on mini-sequences."""

from mst_jax.ops.swiglu.api import (
    choose_implementation,
    mlp_backward,
    mlp_chunk_size,
    mlp_forward,
    swiglu,
)

__all__ = [
    "choose_implementation",
    "mlp_backward",
    "mlp_chunk_size",
    "mlp_forward",
    "swiglu",
]
