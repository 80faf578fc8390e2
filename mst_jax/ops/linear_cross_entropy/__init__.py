"""LM head and cross entropy without whole logits."""

from mst_jax.ops.linear_cross_entropy.api import (
    LOGITS_BYTES,
    choose_implementation,
    linear_cross_entropy,
    loss_chunk_size,
    token_log_probs,
)

__all__ = [
    "LOGITS_BYTES",
    "choose_implementation",
    "linear_cross_entropy",
    "loss_chunk_size",
    "token_log_probs",
]
