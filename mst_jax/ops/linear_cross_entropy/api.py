"""LM head and cross entropy over token chunks: one signature, XLA or Mosaic GPU.

    logits = softcap(hidden @ weight)          [T, V], one chunk [C, V] at a time
    loss_t = lse_t - (1 - s) logits[t, y_t] - s mean_v logits[t, v] + z lse_t^2

The loss is a sum, so its gradient is known as soon as a chunk's logits are: `chunks.py`
computes it in the forward pass. Memory: O(T V) -> O(C V), and [D, V] in f32 for the
gradient, which `vocabulary.py` does without, for one more matrix product.

Luo et al. 2024 (arXiv 2407.15892) chunk the head; Liger Kernel (arXiv 2410.10989) and
Cut Cross-Entropy (arXiv 2411.09009) compute gradients in the forward pass.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from mst_jax.mini_sequence import mini_sequence, split_length, to_chunks
from mst_jax.ops.linear_cross_entropy import mosaic_gpu, xla
from mst_jax.ops.linear_cross_entropy.chunks import varying, weighted_sum
from mst_jax.ops.linear_cross_entropy.loss import Options, token_losses
from mst_jax.ops.matmul import device_obstacle

LOGITS_BYTES = 2**31
"""Budget of one chunk's logits when no chunk size is given."""


def linear_cross_entropy(
    hidden: Float[Array, "*tokens D"],
    weight: Float[Array, "D V"] | Float[Array, "V D"],
    labels: Int[Array, "*tokens"],
    *,
    transposed: bool = False,
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
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
    first. Do not call it inside `jax.checkpoint`: that would compute it twice. With the
    tokens sharded, call it inside `jax.shard_map`, each device on its own.

    Args:
        hidden: [..., D] activations. The last token axis is the one that is chunked.
        weight: [D, V] head, used in hidden's dtype; its gradient, summed in f32, comes
            in its own. If it is not differentiated, its gradient costs nothing.
        transposed: whether weight is [V, D]: a tied embedding as it is. Its `.T` is a
            copy in some versions of XLA, for the length of the program.
        labels: [...] integers in [0, V), or `ignore_index`. Others make the sum NaN.
        chunk_size: tokens of a chunk along the last token axis; None keeps a chunk's
            logits below 2 GiB: f32 in XLA, two bytes each in Mosaic GPU.
        vocab_chunk_size: columns of weight's gradient that are made at a time, from all
            tokens: nothing is summed in f32, and four matrix products in place of
            three. Their logits, [..., vocab_chunk_size], are there as a chunk's are.
            None sums it over the chunks.
        ignore_index: label of tokens that do not count.
        token_weights: [...] factors of the tokens' losses, 1 if None. Differentiable.
        z_loss: factor z of lse^2 (PaLM, arXiv 2204.02311), like the next two a number
            of Python's.
        logit_softcap: logits become cap * tanh(logits / cap) (Gemma 2).
        label_smoothing: s, as in torch.nn.functional.cross_entropy.
        implementation: 'xla', 'mosaic_gpu' (Hopper, bf16), or None for
            `choose_implementation`'s.

    Returns:
        (sum of weight * loss, sum of weight) over the tokens that count, f32. Both 0
        if none does.

    Raises:
        ValueError: shapes that do not fit, or an option outside its range.
        NotImplementedError: 'mosaic_gpu' where it cannot, or an unknown implementation.
    """
    hidden, weight, labels = map(jnp.asarray, (hidden, weight, labels))
    options = _check(
        hidden, weight, labels, token_weights,
        z_loss, logit_softcap, label_smoothing, implementation, transposed,
        vocab_chunk_size,
    )  # fmt: skip
    hidden, labels, weights = _flatten(hidden, labels, token_weights, ignore_index)
    B, T, _ = hidden.shape
    if chunk_size is None:
        V = weight.shape[options.vocab_axis]
        chunk_size = loss_chunk_size(B, V, options.implementation)
    num_chunks, size = split_length(T, chunk_size)
    pad = num_chunks * size - T
    weights = jnp.pad(weights, ((0, 0), (0, pad)))
    chunks = to_chunks((hidden, labels), num_chunks, size, 1)
    weights = to_chunks(weights, num_chunks, size, 1)
    arrays = chunks[0], weight, chunks[1], weights
    total = weighted_sum(options, *(varying(a, *arrays) for a in arrays))
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
    the backward pass recomputes the logits (four matrix products). In XLA.

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
    hidden, weight, labels = map(jnp.asarray, (hidden, weight, labels))
    options = _check(
        hidden, weight, labels, None, z_loss, logit_softcap, label_smoothing, "xla"
    )
    shape = labels.shape
    hidden, labels, weights = _flatten(hidden, labels, None, ignore_index)

    V = weight.shape[1]

    def chunk(weight, x):
        hidden, labels, weights = x
        logits = xla.compute_logits(options, hidden, weight)
        found = xla.find_statistics(options, logits, labels)
        losses = token_losses(options, found, V)
        log_probs = found.label_logit - found.lse
        keep = weights > 0
        return jnp.where(keep, losses, 0), jnp.where(keep, log_probs, 0)

    if chunk_size is None:
        chunk_size = loss_chunk_size(hidden.shape[0], V)
    losses, log_probs = mini_sequence(
        chunk, weight, (hidden, labels, weights), chunk_size=chunk_size
    )
    return losses.reshape(shape), log_probs.reshape(shape)


def loss_chunk_size(batch: int, vocab_size: int, implementation: str = "xla") -> int:
    """Return the tokens a sequence whose logits, times batch, fill the budget."""
    itemsize = 2 if implementation == "mosaic_gpu" else 4
    size = LOGITS_BYTES // (itemsize * batch * vocab_size)
    return max(1, min(size, 2**20 // batch))  # a kernel's grid has its limits too


def choose_implementation(
    width: int,
    dtype,
    *,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return ('xla' or 'mosaic_gpu', why), as `linear_cross_entropy` chooses here.

    Args:
        width: D of the hidden states.
        dtype: of the hidden states.
        logit_softcap: as in `linear_cross_entropy`.
        label_smoothing: as in `linear_cross_entropy`.
        capability: that of another GPU, to choose as it would be there.
    """
    options = Options(0.0, logit_softcap, label_smoothing, "mosaic_gpu")
    obstacle = mosaic_gpu.obstacle(options, width, dtype)
    obstacle = obstacle or device_obstacle(capability)
    return ("xla", obstacle) if obstacle else ("mosaic_gpu", "this GPU has it")


def _check(
    hidden, weight, labels, token_weights, z_loss, softcap, smoothing, implementation,
    transposed=False, vocab_chunk_size=None,
) -> Options:  # fmt: skip
    D_axis = int(transposed)
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[D_axis]:
        raise ValueError(
            f"{hidden.shape=} must be [..., D] and {weight.shape=} "
            + ("[V, D]" if transposed else "[D, V]")
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{labels.shape=} must be {hidden.shape=} without D")
    if not hidden.size or not weight.size:
        raise ValueError(f"{hidden.shape=} or {weight.shape=} is empty")
    for name, array, kind in (
        ("hidden", hidden, jnp.floating), ("weight", weight, jnp.floating),
        ("labels", labels, jnp.integer),
    ):  # fmt: skip
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} must be {kind.__name__}, not {array.dtype}")
    if token_weights is not None and jnp.shape(token_weights) != labels.shape:
        raise ValueError(
            f"token_weights of shape {jnp.shape(token_weights)} must be {labels.shape=}"
        )
    if any(isinstance(a, Tracer) for a in (z_loss, softcap, smoothing)):
        raise ValueError(
            "z_loss, logit_softcap and label_smoothing must be Python numbers: they "
            "are compiled in, and not differentiated"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"logit_softcap={softcap} must be positive or None")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing} must be in [0, 1)")
    D, dtype = hidden.shape[-1], hidden.dtype
    if implementation is None:
        implementation, _ = choose_implementation(
            D, dtype, logit_softcap=softcap, label_smoothing=smoothing
        )
    if implementation not in ("xla", "mosaic_gpu"):
        raise NotImplementedError(f"{implementation=} is not 'xla' or 'mosaic_gpu'")
    if vocab_chunk_size is not None and vocab_chunk_size < 1:
        raise ValueError(f"{vocab_chunk_size=} must be positive or None")
    options = Options(
        z_loss, softcap, smoothing, implementation, transposed, vocab_chunk_size
    )
    if implementation == "mosaic_gpu":
        obstacle = mosaic_gpu.obstacle(options, D, dtype) or device_obstacle()
        if obstacle:
            raise NotImplementedError(
                f"implementation='mosaic_gpu': {obstacle}; use 'xla'"
            )
    return options


def _flatten(hidden, labels, token_weights, ignore_index):
    T, D = hidden.shape[-2:]
    labels = labels.astype(jnp.int32)  # an ignore_index of -100 is none in uint8
    weights = (labels != ignore_index).astype(jnp.float32)
    if token_weights is not None:
        weights = jnp.where(weights > 0, jnp.asarray(token_weights, jnp.float32), 0)
    labels = jnp.where(labels == ignore_index, 0, labels)
    return hidden.reshape(-1, T, D), labels.reshape(-1, T), weights.reshape(-1, T)
