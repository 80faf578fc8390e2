"""What one token's loss is made of, of all logits or of some columns at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """What one loss is made of, and how it is computed."""

    z_loss: float
    logit_softcap: float | None
    label_smoothing: float
    implementation: str
    transposed: bool = False
    """Whether the head is [V, D]."""
    vocab_chunk_size: int | None = None
    """Columns of a chunk of the vocabulary; None is chunks of tokens."""

    @property
    def head(self) -> str:
        """Its axes, for einsum."""
        return "VD" if self.transposed else "DV"


class Statistics(NamedTuple):
    """What the loss needs of each token's logits in some columns: f32 [...] each."""

    lse: jax.Array
    label_logit: jax.Array
    """0 where the label is none of the columns."""
    logit_sum: jax.Array | None
    """None without label smoothing."""


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of both sets of columns."""
    logit_sum = None
    if a.logit_sum is not None and b.logit_sum is not None:
        logit_sum = a.logit_sum + b.logit_sum
    lse = jnp.logaddexp(a.lse, b.lse)
    return Statistics(lse, a.label_logit + b.label_logit, logit_sum)


def token_losses(
    options: Options, statistics: Statistics, labels: jax.Array, vocab_size: int
) -> jax.Array:
    """Return the losses, f32 [...]; NaN where the label is outside the vocabulary."""
    lse, label_logit, logit_sum = statistics
    smoothing = options.label_smoothing
    loss = lse - (1 - smoothing) * mask_invalid(label_logit, labels, vocab_size)
    if logit_sum is not None:
        loss -= smoothing / vocab_size * logit_sum
    return loss + options.z_loss * lse**2


def mask_invalid(values: jax.Array, labels: jax.Array, vocab_size: int) -> jax.Array:
    """Return NaN where the label is outside the vocabulary."""
    return jnp.where((labels >= 0) & (labels < vocab_size), values, jnp.nan)
