"""LM head and cross entropy over token chunks, gradients in the forward pass.

    logits = softcap(hidden @ weight)          [T, V], one chunk [C, V] at a time
    loss_t = lse_t - (1 - s) logits[t, y_t] - s mean_v logits[t, v] + z lse_t^2

The loss is a sum, so its gradient is known as soon as a chunk's logits are: the forward
scan turns them into dlogits, adds x^T dlogits to an f32 weight gradient and keeps
dlogits W^T. That is three matrix products; differentiating a recomputing scan
needs four. Memory: O(T V) -> O(C V), and [D, V] in f32 for the gradient.

Luo et al. 2024 (arXiv 2407.15892) chunk the head; Liger Kernel (arXiv 2410.10989) and
Cut Cross-Entropy (arXiv 2411.09009) compute gradients in the forward pass.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mst_jax.mini_sequence import mini_sequence, split_length, to_chunks

LOGITS_BYTES = 2**31
"""Budget of one chunk's f32 logits when no chunk size is given."""


@dataclass(frozen=True)
class _Options:
    z_loss: float
    logit_softcap: float | None
    label_smoothing: float


def linear_cross_entropy(
    hidden: Float[Array, "*tokens D"],
    weight: Float[Array, "D V"],
    labels: Int[Array, "*tokens"],
    *,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    token_weights: Num[Array, "*tokens"] | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum the cross entropy of a linear head over tokens, without whole logits.

    Labels are those of the same position: shift them before. The mean loss is
    `total / jnp.maximum(count, 1)`, with both summed over micro-batches and devices
    first. Do not call it inside `jax.checkpoint`: that would compute it twice.

    Args:
        hidden: [..., D] activations. The last token axis is the one that is chunked.
        weight: [D, V] head, used in hidden's dtype; its gradient, summed in f32, comes
            in its own. If it is not differentiated, its gradient costs nothing.
        labels: [...] in [0, V), or `ignore_index`. Any other value gives NaN.
        chunk_size: tokens of a chunk along the last token axis; None keeps a chunk's
            f32 logits below 2 GiB.
        ignore_index: label of tokens that do not count.
        token_weights: [...] factors of the tokens' losses, 1 if None. Differentiable.
        z_loss: factor z of lse^2 (PaLM, arXiv 2204.02311).
        logit_softcap: logits become cap * tanh(logits / cap) (Gemma 2).
        label_smoothing: s, as in torch.nn.functional.cross_entropy.
        implementation: 'xla' or None for the fastest that there is.

    Returns:
        (sum of weight * loss, sum of weight) over the tokens that count, f32. Both 0
        if none does.

    Raises:
        ValueError: shapes that do not fit, or an option outside its range.
        NotImplementedError: an implementation that does not exist.
    """
    options = _check(
        hidden, weight, labels, token_weights,
        z_loss, logit_softcap, label_smoothing, implementation,
    )  # fmt: skip
    hidden, labels, weights = _flatten(hidden, labels, token_weights, ignore_index)
    B, T, _ = hidden.shape
    num_chunks, size = split_length(
        T, chunk_size or loss_chunk_size(B, weight.shape[1])
    )
    pad = num_chunks * size - T
    weights = jnp.pad(weights, ((0, 0), (0, pad)))
    chunks = to_chunks((hidden, labels), num_chunks, size, 1)
    weights = to_chunks(weights, num_chunks, size, 1)
    total = _weighted_sum(options, chunks[0], weight, chunks[1], weights)
    return cast(jax.Array, total), weights.sum()


def token_log_probs(
    hidden: Float[Array, "*tokens D"],
    weight: Float[Array, "D V"],
    labels: Int[Array, "*tokens"],
    *,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Return each token's loss and its label's log-probability, without whole logits.

    For preference and policy losses, which weigh tokens by what is only known later:
    the backward pass recomputes the logits (four matrix products).

    Args:
        hidden: [..., D] activations.
        weight: [D, V] head.
        labels: [...] in [0, V), or `ignore_index`.
        chunk_size: as in `linear_cross_entropy`, like the other options.

    Returns:
        (losses, log-probabilities), f32 [...], 0 where the label is ignored.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    options = _check(
        hidden, weight, labels, None, z_loss, logit_softcap, label_smoothing, None
    )
    shape = labels.shape
    hidden, labels, weights = _flatten(hidden, labels, None, ignore_index)

    def chunk(weight, x):
        hidden, labels, weights = x
        _, lse, label_logit, losses = _losses(options, hidden, weight, labels)
        keep = weights > 0
        return jnp.where(keep, losses, 0), jnp.where(keep, label_logit - lse, 0)

    size = chunk_size or loss_chunk_size(hidden.shape[0], weight.shape[1])
    losses, log_probs = mini_sequence(
        chunk, weight, (hidden, labels, weights), chunk_size=size
    )
    return losses.reshape(shape), log_probs.reshape(shape)


def loss_chunk_size(batch: int, vocab_size: int) -> int:
    """Return the tokens a sequence whose f32 logits, times batch, fill the budget."""
    return max(1, LOGITS_BYTES // (4 * batch * vocab_size))


def _check(
    hidden, weight, labels, token_weights, z_loss, softcap, smoothing, implementation
) -> _Options:
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[0]:
        raise ValueError(f"{hidden.shape=} must be [..., D] and {weight.shape=} [D, V]")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{labels.shape=} must be {hidden.shape=} without D")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"{token_weights.shape=} must be {labels.shape=}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"logit_softcap={softcap} must be positive or None")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing} must be in [0, 1)")
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"{implementation=}: there is only 'xla'")
    return _Options(z_loss, softcap, smoothing)


def _flatten(hidden, labels, token_weights, ignore_index):
    T, D = hidden.shape[-2:]
    weights = (labels != ignore_index).astype(jnp.float32)
    if token_weights is not None:
        weights = jnp.where(weights > 0, token_weights.astype(jnp.float32), 0)
    labels = jnp.where(labels == ignore_index, 0, labels)
    return hidden.reshape(-1, T, D), labels.reshape(-1, T), weights.reshape(-1, T)


def _losses(options: _Options, x, weight, labels):
    """[B, C, D] -> f32 logits [B, C, V], lse, label logit and loss [B, C]."""
    logits = jnp.einsum(
        "BCD,DV->BCV", x, weight.astype(x.dtype), preferred_element_type=jnp.float32
    )
    if cap := options.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    label_logit = jnp.take_along_axis(logits, labels[..., None], -1, mode="fill")[
        ..., 0
    ]
    loss = lse - (1 - options.label_smoothing) * label_logit
    if options.label_smoothing:
        loss -= options.label_smoothing * logits.mean(-1)
    return logits, lse, label_logit, loss + options.z_loss * lse**2


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(options: _Options, x_MBCD, weight, labels_MBC, weights_MBC) -> Any:
    weight = weight.astype(x_MBCD.dtype)

    def body(total, chunk):
        x, labels, weights = chunk
        losses = _losses(options, x, weight, labels)[-1]
        return total + _masked(losses, weights).sum(), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, zero, (x_MBCD, labels_MBC, weights_MBC))[0]


def _masked(losses, weights):
    return jnp.where(weights == 0, 0, losses * weights)


def _forward(options: _Options, x_MBCD, weight, labels_MBC, weights_MBC):
    wants_x, wants_weight = x_MBCD.perturbed, weight.perturbed
    # An empty array carries the dtype in which the weight's gradient is due.
    dtype = jnp.zeros((0,), weight.value.dtype)
    x_MBCD, weight = x_MBCD.value, weight.value.astype(x_MBCD.value.dtype)
    D, V = weight.shape

    def body(carry, chunk):
        total, dweight = carry
        x, labels, weights = chunk
        logits, lse, _, losses = _losses(options, x, weight, labels)
        one_hot = labels[..., None] == jnp.arange(V)
        dlogits = jnp.exp(logits - lse[..., None])
        dlogits *= (1 + 2 * options.z_loss * lse)[..., None]
        smoothing = options.label_smoothing
        dlogits -= jnp.where(one_hot, 1 - smoothing, 0) + smoothing / V
        if cap := options.logit_softcap:
            dlogits *= 1 - (logits / cap) ** 2
        dlogits = jnp.where(weights[..., None] == 0, 0, dlogits * weights[..., None])
        dlogits = dlogits.astype(x.dtype)
        dx = jnp.einsum("BCV,DV->BCD", dlogits, weight) if wants_x else None
        if wants_weight:
            dweight += jnp.einsum(
                "BCD,BCV->DV", x, dlogits, preferred_element_type=jnp.float32
            )
        dx = None if dx is None else dx.astype(x.dtype)
        return (total + _masked(losses, weights).sum(), dweight), (dx, losses)

    dweight = jnp.zeros((D, V), jnp.float32) if wants_weight else None
    (total, dweight), (dx_MBCD, losses_MBC) = jax.lax.scan(
        body,
        (jnp.zeros((), jnp.float32), dweight),
        (x_MBCD, labels_MBC.value, weights_MBC.value),
    )
    return total, (dx_MBCD, dweight, dtype, losses_MBC, weights_MBC.value)


def _backward(options: _Options, residuals: Any, g):
    del options
    dx_MBCD, dweight, dtype, losses_MBC, weights_MBC = residuals
    if dx_MBCD is not None:
        dx_MBCD = (g * dx_MBCD).astype(dx_MBCD.dtype)
    if dweight is not None:
        # Without the barrier XLA keeps the f32 sum alive until the update and casts it
        # there: 1 GiB more at the peak for Llama3-8B.
        dweight = jax.lax.optimization_barrier((g * dweight).astype(dtype.dtype))
    return dx_MBCD, dweight, None, g * jnp.where(weights_MBC == 0, 0, losses_MBC)


_weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)
