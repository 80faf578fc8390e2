"""The loop over chunks of the vocabulary: all tokens, some columns of the head.

    forward     the statistics of all columns, chunk by chunk     `loss.merge`
    backward    dlogits of a chunk, from the logits again and those statistics
                dW of its columns = x^T dlogits, whole and in the head's own dtype
                dx += dlogits W^T, in f32

No [D, V] is summed in f32, which for tokens fewer than V is most of what `chunks.py`
takes. The price is one matrix product more: four.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops.linear_cross_entropy.chunks import find_implementation, varying
from mst_jax.ops.linear_cross_entropy.loss import (
    Options,
    Statistics,
    merge,
    token_losses,
)
from mst_jax.ops.linear_cross_entropy.mosaic_gpu import to_rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(options: Options, x_BTD, weight, labels_BT, weights_BT) -> Any:
    """Return the f32 sum of weight * loss over all tokens.

    Args:
        options: of the loss.
        x_BTD: hidden states.
        weight: [D, V] head, or [V, D] (`options.transposed`).
        labels_BT: labels; any where the weight is 0.
        weights_BT: f32 factors of the losses.
    """
    x, labels, weights = to_rows(x_BTD, labels_BT, weights_BT)
    _, losses = _losses(options, x, weight, labels)
    return jnp.where(weights == 0, 0, losses * weights).sum()


def _forward(options: Options, x_BTD, weight, labels_BT, weights_BT):
    # What is wanted, in the structure: a residual is an array.
    wants = tuple(() if a.perturbed else None for a in (x_BTD, weight))
    arrays = [a.value for a in (x_BTD, weight, labels_BT, weights_BT)]
    x, labels, weights = to_rows(arrays[0], *arrays[2:])
    statistics, losses = _losses(options, x, arrays[1], labels)
    total = jnp.where(weights == 0, 0, losses * weights).sum()
    return total, (wants, arrays, statistics, losses)


def _backward(options: Options, residuals: Any, g):
    (wants_x, wants_weight), arrays, statistics, losses = residuals
    x_BTD, weight, labels_BT, weights_BT = arrays
    how = find_implementation(options)
    x, labels, weights = to_rows(x_BTD, labels_BT, weights_BT)
    axis = options.head.index("V")
    V = weight.shape[axis]

    def zeros(a, dtype):
        return varying(jnp.zeros(a.shape, dtype), x)

    dx = None if wants_x is None else zeros(x, jnp.float32)
    dweight: Any = None if wants_weight is None else zeros(weight, weight.dtype)

    def body(carry, start, size):
        dx, dweight = carry
        dx, part = how.columns_gradients(
            options, x, _columns(options, weight, start, size, x.dtype),
            labels - start, g * weights, statistics, dx,
            None if dweight is None else dweight.dtype, size, V,
        )  # fmt: skip
        if dweight is not None:
            part: Any = how.finish(options, part, size)
            dweight = lax.dynamic_update_slice_in_dim(dweight, part, start, axis)
        return dx, dweight

    if dx is not None or dweight is not None:
        dx, dweight = _for_columns(options, V, body, (dx, dweight))
    if dx is not None:
        dx = dx[: labels_BT.size].reshape(x_BTD.shape).astype(x_BTD.dtype)
    losses = losses[: labels_BT.size].reshape(labels_BT.shape)
    return dx, dweight, None, g * losses


weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _losses(options: Options, x, weight, labels):
    """Return statistics and losses [R], f32."""
    how = find_implementation(options)
    V = weight.shape[options.head.index("V")]

    def body(found, start, size):
        part = _columns(options, weight, start, size, x.dtype)
        return merge(
            found, how.columns_statistics(options, x, part, labels - start, size)
        )

    zeros = jnp.zeros(labels.shape, jnp.float32)
    nothing = Statistics(
        lse=jnp.full_like(zeros, -jnp.inf),
        label_logit=zeros,
        logit_sum=zeros if options.label_smoothing else None,
    )
    nothing = jax.tree.map(lambda a: varying(a, x), nothing)
    statistics = _for_columns(options, V, body, nothing)
    return statistics, token_losses(options, statistics, labels, V)


def _for_columns(options: Options, vocab_size: int, body, carry):
    """Run `body(carry, start, size)` on each chunk, the last one shorter or not."""
    size = min(options.vocab_chunk_size or vocab_size, vocab_size)
    num_chunks, rest = divmod(vocab_size, size)
    carry = lax.fori_loop(0, num_chunks, lambda i, c: body(c, i * size, size), carry)
    return body(carry, num_chunks * size, rest) if rest else carry


def _columns(options: Options, weight, start, size: int, dtype):
    """Return some of the head's columns, as the chunks take them."""
    axis = options.head.index("V")
    part = lax.dynamic_slice_in_dim(weight, start, size, axis).astype(dtype)
    return find_implementation(options).prepare(options, part)
