"""mst_jax: exact long-sequence training on one GPU with mini-sequences."""

from mst_jax.mini_sequence import mini_sequence, mini_sequence_sum
from mst_jax.ops.linear_cross_entropy import linear_cross_entropy, token_log_probs

__all__ = [
    "linear_cross_entropy",
    "mini_sequence",
    "mini_sequence_sum",
    "token_log_probs",
]
