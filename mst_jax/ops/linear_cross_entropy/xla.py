"""The LM head's loss in XLA, f32 logits: a chunk of the tokens, or of the columns."""

import jax
import jax.numpy as jnp

from mst_jax.ops.linear_cross_entropy.loss import Options, Statistics, token_losses


def prepare(options: Options, weight):
    """Return the head as the chunks take it."""
    del options
    return weight


def finish(options: Options, dweight, vocab_size: int):
    """Return the gradient of what `prepare` was given."""
    del options, vocab_size
    return dweight


def compute_logits(options: Options, x, weight):
    """[..., D] -> f32 [..., V]."""
    spec = f"...D,{options.head}->...V"
    logits = jnp.einsum(
        spec, x, weight.astype(x.dtype), preferred_element_type=jnp.float32
    )
    if cap := options.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    return logits


def find_statistics(options: Options, logits, labels) -> Statistics:
    """Return what the losses need of f32 logits [..., V]."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    # Beyond V "fill" gives 0; below 0 it would count from the end.
    labels = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
    label_logit = jnp.take_along_axis(logits, labels, -1, mode="fill", fill_value=0)
    logit_sum = logits.sum(-1) if options.label_smoothing else None
    return Statistics(lse, label_logit[..., 0], logit_sum)


def find_dlogits(options: Options, logits, lse, labels, weights, vocab_size: int):
    """Return the gradient of weights * losses to logits, their product with x before.

    Args:
        options: of the loss.
        logits: f32 [..., columns].
        lse, labels, weights: [...]; labels count from the first of the columns.
        vocab_size: V, of which the columns may be a part.
    """
    one_hot = labels[..., None] == jnp.arange(logits.shape[-1])
    dlogits = jnp.exp(logits - lse[..., None])
    dlogits *= (1 + 2 * options.z_loss * lse)[..., None]
    smoothing = options.label_smoothing
    dlogits -= jnp.where(one_hot, 1 - smoothing, 0) + smoothing / vocab_size
    if cap := options.logit_softcap:
        dlogits *= 1 - (logits / cap) ** 2
    return jnp.where(weights[..., None] == 0, 0, dlogits * weights[..., None])


def chunk_losses(options: Options, x, weight, labels, vocab_size: int):
    """[B, C, D] -> losses [B, C], f32."""
    logits = compute_logits(options, x, weight)
    statistics = find_statistics(options, logits, labels)
    return token_losses(options, statistics, labels, vocab_size)


def chunk_gradients(
    options: Options, x, weight, labels, weights, dweight, wants_x, vocab_size: int
):
    """Return (losses [B, C], dx [B, C, D], dweight with this chunk's added).

    dweight of None stays None, and dx is None unless `wants_x`.
    """
    logits = compute_logits(options, x, weight)
    statistics = find_statistics(options, logits, labels)
    losses = token_losses(options, statistics, labels, vocab_size)
    dlogits = find_dlogits(
        options, logits, statistics.lse, labels, weights, vocab_size
    ).astype(x.dtype)
    dx = None
    if wants_x:
        dx = jnp.einsum(f"BCV,{options.head}->BCD", dlogits, weight).astype(x.dtype)
    if dweight is not None:
        spec = f"BCD,BCV->{options.head}"
        dweight += jnp.einsum(spec, x, dlogits, preferred_element_type=jnp.float32)
    return losses, dx, dweight


def columns_statistics(options: Options, x, weight, labels, columns: int) -> Statistics:
    """Return the statistics [R] of some columns' logits, labels counted from there."""
    del columns
    return find_statistics(options, compute_logits(options, x, weight), labels)


def columns_gradients(
    options: Options, x, weight, labels, weights, statistics, dx, dtype, columns: int,
    vocab_size: int,
):  # fmt: skip
    """Return (dx [R, D] with the columns' part added in f32, their dweight in `dtype`).

    dx of None stays None; dweight is None if `dtype` is. `statistics` are those of all
    columns.
    """
    del columns
    logits = compute_logits(options, x, weight)
    dlogits = find_dlogits(
        options, logits, statistics.lse, labels, weights, vocab_size
    ).astype(x.dtype)
    if dx is not None:
        spec = f"RV,{options.head}->RD"
        dx += jnp.einsum(spec, dlogits, weight, preferred_element_type=jnp.float32)
    dweight = None
    if dtype is not None:
        spec = f"RD,RV->{options.head}"
        dweight = jnp.einsum(spec, x, dlogits, preferred_element_type=jnp.float32)
        dweight = dweight.astype(dtype)
    return dx, dweight
