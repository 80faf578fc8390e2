"""Softmax attention without a T x T array."""

from mst_jax.ops.attention.api import (
    attention,
    attention_backward,
    attention_forward,
    choose_implementation,
)
from mst_jax.ops.attention.packed import Documents, find_documents
from mst_jax.ops.attention.reference import reference_attention

__all__ = [
    "Documents",
    "attention",
    "attention_backward",
    "attention_forward",
    "choose_implementation",
    "find_documents",
    "reference_attention",
]
