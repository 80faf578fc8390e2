"""One chunk of the LM head's loss in XLA, f32 logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """What one loss is made of."""

    z_loss: float
    logit_softcap: float | None
    label_smoothing: float
    implementation: str
    transposed: bool = False
    """Whether the head is [V, D]."""

    @property
    def head(self) -> str:
        """Its axes, for einsum."""
        return "VD" if self.transposed else "DV"


def prepare(options: Options, weight):
    """Return the head as the chunks take it."""
    del options
    return weight


def finish(options: Options, dweight, vocab_size: int):
    """Return the gradient of what `prepare` was given."""
    del options, vocab_size
    return dweight


def logits_and_losses(options: Options, x, weight, labels):
    """[B, C, D] -> f32 logits [B, C, V], lse, label logit and loss [B, C]."""
    weight = weight.astype(x.dtype)
    spec = f"BCD,{options.head}->BCV"
    logits = jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)
    if cap := options.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # Beyond V "fill" gives NaN; below 0 it would count from the end.
    labels = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
    label_logit = jnp.take_along_axis(logits, labels, -1, mode="fill")[..., 0]
    loss = lse - (1 - options.label_smoothing) * label_logit
    if options.label_smoothing:
        loss -= options.label_smoothing * logits.mean(-1)
    return logits, lse, label_logit, loss + options.z_loss * lse**2


def chunk_losses(options: Options, x, weight, labels, vocab_size: int):
    """[B, C, D] -> losses [B, C], f32."""
    del vocab_size
    return logits_and_losses(options, x, weight, labels)[-1]


def chunk_gradients(
    options: Options, x, weight, labels, weights, dweight, wants_x, vocab_size: int
):
    """Return (losses [B, C], dx [B, C, D], dweight with this chunk's added).

    dweight of None stays None, and dx is None unless `wants_x`.
    """
    V = vocab_size
    logits, lse, _, losses = logits_and_losses(options, x, weight, labels)
    one_hot = labels[..., None] == jnp.arange(V)
    dlogits = jnp.exp(logits - lse[..., None])
    dlogits *= (1 + 2 * options.z_loss * lse)[..., None]
    smoothing = options.label_smoothing
    dlogits -= jnp.where(one_hot, 1 - smoothing, 0) + smoothing / V
    if cap := options.logit_softcap:
        dlogits *= 1 - (logits / cap) ** 2
    dlogits = jnp.where(weights[..., None] == 0, 0, dlogits * weights[..., None])
    dlogits = dlogits.astype(x.dtype)
    dx = None
    if wants_x:
        dx = jnp.einsum(f"BCV,{options.head}->BCD", dlogits, weight)
    if dweight is not None:
        spec = f"BCD,BCV->{options.head}"
        dweight += jnp.einsum(spec, x, dlogits, preferred_element_type=jnp.float32)
    return losses, None if dx is None else dx.astype(x.dtype), dweight
