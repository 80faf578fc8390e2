"""The head's gradient some columns at a time, all tokens at once.

    dlogits of the columns, from their logits again and the tokens' statistics
    dW of the columns = x^T dlogits: whole, in the head's own dtype, written once

So no [D, V] is summed in f32 over chunks of tokens, which is most of what `chunks.py`
takes. The price is one matrix product more.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops.linear_cross_entropy import mosaic_gpu, xla
from mst_jax.ops.linear_cross_entropy.loss import Options, Statistics


def weight_gradient(
    options: Options,
    x_BTD: jax.Array,
    weight: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    statistics_BT: Statistics,
) -> jax.Array:
    """Return the gradient of the sum of weight * loss to the head, in its dtype.

    Args:
        options: of the loss.
        x_BTD: hidden states, [..., D] like the others.
        weight: the head as it was given.
        labels_BT: labels; any where the weight is 0.
        weights_BT: f32 factors of the losses.
        statistics_BT: of the logits.
    """
    how = mosaic_gpu if options.implementation == "mosaic_gpu" else xla
    axis = options.vocab_axis
    V = weight.shape[axis]
    x = x_BTD.reshape(-1, x_BTD.shape[-1])
    labels, weights, statistics = jax.tree.map(
        jnp.ravel, (labels_BT, weights_BT, statistics_BT)
    )

    def write(start, size, dweight):
        columns = lax.dynamic_slice_in_dim(weight, start, size, axis)
        part = how.columns_gradient(
            options, x, how.prepare(options, columns.astype(x.dtype)),
            labels - start, weights, statistics, size, weight.dtype, V,
        )  # fmt: skip
        part = how.finish(options, part, size)
        return lax.dynamic_update_slice_in_dim(dweight, part, start, axis)

    size = min(options.vocab_chunk_size or V, V)
    num_chunks, rest = divmod(V, size)
    dweight = lax.fori_loop(
        0, num_chunks, lambda i, dw: write(i * size, size, dw), jnp.zeros_like(weight)
    )
    return write(num_chunks * size, rest, dweight) if rest else dweight
