"""The LM head's loss in XLA, f32 logits: of a chunk of tokens, or of columns."""

import jax
import jax.numpy as jnp

from mst_jax.ops.linear_cross_entropy.loss import Options, Statistics, token_losses


def prepare(options: Options, weight):
    """Return the head, or some of its columns, as the chunks take it."""
    del options
    return weight


def finish(options: Options, dweight, vocab_size: int):
    """Return the gradient of what `prepare` was given."""
    del options, vocab_size
    return dweight


def compute_logits(options: Options, x, weight):
    """[..., D] -> f32 [..., V]."""
    spec = f"...D,{options.head}->...V"
    weight = weight.astype(x.dtype)
    logits = jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)
    if cap := options.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    return logits


def find_statistics(options: Options, logits, labels) -> Statistics:
    """Return what the losses need of f32 logits [..., V]."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    # Beyond V "fill" gives NaN; below 0 it would count from the end.
    labels = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
    label_logit = jnp.take_along_axis(logits, labels, -1, mode="fill")[..., 0]
    logit_sum = logits.sum(-1) if options.label_smoothing else None
    return Statistics(lse, label_logit, logit_sum)


def chunk_losses(options: Options, x, weight, labels, vocab_size: int):
    """[B, C, D] -> losses [B, C], f32."""
    logits = compute_logits(options, x, weight)
    return token_losses(options, find_statistics(options, logits, labels), vocab_size)


def chunk_gradients(
    options: Options, x, weight, labels, weights, dweight, wants_x, vocab_size: int
):
    """Return (losses, their statistics [B, C], dx [B, C, D], dweight with its part).

    dweight is the f32 sum so far, 0.0 for an only chunk. None stays None, and dx is
    None unless `wants_x`.
    """
    logits = compute_logits(options, x, weight)
    statistics = find_statistics(options, logits, labels)
    losses = token_losses(options, statistics, vocab_size)
    dlogits = _dlogits(options, logits, statistics, labels, weights, vocab_size)
    dlogits, dx = dlogits.astype(x.dtype), None
    if wants_x:
        dx = jnp.einsum(f"BCV,{options.head}->BCD", dlogits, weight).astype(x.dtype)
    if dweight is not None:
        spec = f"BCD,BCV->{options.head}"
        dweight += jnp.einsum(spec, x, dlogits, preferred_element_type=jnp.float32)
    return losses, statistics, dx, dweight


def columns_gradient(
    options: Options, x, weight, labels, weights, statistics, columns: int, dtype,
    vocab_size: int,
):  # fmt: skip
    """Return the gradient of some columns of the head, in `dtype`.

    Args:
        options: of the loss.
        x: [R, D], all tokens.
        weight: the columns, [D, S] or [S, D].
        labels, weights: [R]; labels are counted from the first of the columns.
        statistics: [R], of the logits of the whole vocabulary.
        columns: how many of weight's count.
        dtype: of the gradient.
        vocab_size: V.
    """
    del columns
    logits = compute_logits(options, x, weight)
    dlogits = _dlogits(options, logits, statistics, labels, weights, vocab_size)
    spec = f"RD,RV->{options.head}"
    dlogits = dlogits.astype(x.dtype)
    dweight = jnp.einsum(spec, x, dlogits, preferred_element_type=jnp.float32)
    return dweight.astype(dtype)


def _dlogits(options: Options, logits, statistics, labels, weights, vocab_size: int):
    """Return the f32 gradient of weights * losses to what the head's product gave."""
    lse = statistics.lse
    one_hot = labels[..., None] == jnp.arange(logits.shape[-1])
    dlogits = jnp.exp(logits - lse[..., None])
    dlogits *= (1 + 2 * options.z_loss * lse)[..., None]
    smoothing = options.label_smoothing
    dlogits -= jnp.where(one_hot, 1 - smoothing, 0) + smoothing / vocab_size
    if cap := options.logit_softcap:
        dlogits *= 1 - (logits / cap) ** 2
    return jnp.where(weights[..., None] == 0, 0, dlogits * weights[..., None])
