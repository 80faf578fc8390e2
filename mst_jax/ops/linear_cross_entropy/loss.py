"""What one token's loss is made of."""

from dataclasses import dataclass
from typing import NamedTuple

import jax


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
    """Columns of the head's gradient at a time; None sums it over chunks of tokens."""

    @property
    def head(self) -> str:
        """Its axes, for einsum."""
        return "VD" if self.transposed else "DV"

    @property
    def vocab_axis(self) -> int:
        """Which axis of the head is V."""
        return self.head.index("V")


class Statistics(NamedTuple):
    """What the losses and their gradients need of all logits of a token: f32 [...]."""

    lse: jax.Array
    label_logit: jax.Array
    """NaN where the label is outside the vocabulary."""
    logit_sum: jax.Array | None
    """None without label smoothing."""


def token_losses(
    options: Options, statistics: Statistics, vocab_size: int
) -> jax.Array:
    """Return the losses, f32 [...]; NaN where the label is outside the vocabulary."""
    lse, label_logit, logit_sum = statistics
    smoothing = options.label_smoothing
    loss = lse - (1 - smoothing) * label_logit
    if logit_sum is not None:
        loss -= smoothing / vocab_size * logit_sum
    return loss + options.z_loss * lse**2
