"""The scan over chunks of tokens, gradients in the forward pass.

The forward scan turns a chunk's logits into dlogits, adds x^T dlogits to an f32 weight
gradient and keeps dlogits W^T. That is three matrix products; differentiating a
recomputing scan needs four. With `vocab_chunk_size` the scan leaves the weight's
gradient to the backward pass, which makes it by columns: `vocabulary.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.ops.linear_cross_entropy import mosaic_gpu, vocabulary, xla
from mst_jax.ops.linear_cross_entropy.loss import Options


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(options: Options, x_MBCD, weight, labels_MBC, weights_MBC) -> Any:
    """Return the f32 sum of weight * loss over all tokens.

    Args:
        options: of the loss.
        x_MBCD: hidden states in chunks.
        weight: [D, V] head, or [V, D] (`options.transposed`).
        labels_MBC: labels; any where the weight is 0.
        weights_MBC: f32 factors of the losses.
    """
    how = _implementation(options)
    V = weight.shape[options.vocab_axis]
    weight = how.prepare(options, weight.astype(x_MBCD.dtype))

    def body(total, chunk):
        x, labels, weights = chunk
        losses = how.chunk_losses(options, x, weight, labels, V)
        return total + _masked(losses, weights).sum(), None

    zero = varying(jnp.zeros((), jnp.float32), x_MBCD)
    return jax.lax.scan(body, zero, (x_MBCD, labels_MBC, weights_MBC))[0]


def varying(a, *like):
    """Return `a`, inside shard_map varying over the mesh axes that `like` vary over.

    A scan's carry must be of one kind from its start.
    """
    axes = [jax.typeof(b).manual_axis_type.varying for b in (a, *like)]
    more = frozenset().union(*axes) - axes[0]
    return jax.lax.pcast(a, tuple(more), to="varying") if more else a


def _implementation(options: Options):
    return mosaic_gpu if options.implementation == "mosaic_gpu" else xla


def _masked(losses, weights):
    return jnp.where(weights == 0, 0, losses * weights)


def _forward(options: Options, x_MBCD, weight, labels_MBC, weights_MBC):
    how = _implementation(options)
    wants_x, wants_weight = x_MBCD.perturbed, weight.perturbed
    sums = wants_weight and options.vocab_chunk_size is None
    x_MBCD, given, labels_MBC, weights_MBC = (
        a.value for a in (x_MBCD, weight, labels_MBC, weights_MBC)
    )
    V = given.shape[options.vocab_axis]
    weight = how.prepare(options, given.astype(x_MBCD.dtype))

    def body(carry, chunk):
        total, dweight = carry
        x, labels, weights = chunk
        losses, statistics, dx, dweight = how.chunk_gradients(
            options, x, weight, labels, weights, dweight, wants_x, V
        )
        total += _masked(losses, weights).sum()
        return (total, dweight), (dx, losses, statistics)

    # Not a constant: XLA would compare the optimizer's f32 numbers with these zeros,
    # and hold them until then, 2 GiB of 8B's.
    zero = jax.lax.optimization_barrier(jnp.float32(0))

    def zeros(*shape):
        return varying(jnp.full(shape, zero), x_MBCD)

    chunks = x_MBCD, labels_MBC, weights_MBC
    if x_MBCD.shape[0] == 1:  # nothing to fill with zeros, nor to add to
        only = jax.tree.map(lambda a: a[0], chunks)
        (total, dweight), made = body((zeros(), 0.0 if sums else None), only)
        made = jax.tree.map(lambda a: a[None], made)
    else:
        carry = zeros(), zeros(*weight.shape) if sums else None
        (total, dweight), made = jax.lax.scan(body, carry, chunks)
    dx_MBCD, losses_MBC, statistics_MBC = made
    if dx_MBCD is not None and dweight is not None:
        # Of one chunk XLA would compute dx after the weight's update, from a copy of
        # the weight, with the logits there while the sum is rounded: 1 GiB of 8B's.
        dx_MBCD, dweight = jax.lax.optimization_barrier((dx_MBCD, dweight))
    # An empty array carries the dtype in which the weight's gradient is due.
    due = jnp.zeros((0,), given.dtype)
    dweight = None if dweight is None else (how.finish(options, dweight, V), due)
    columns = None
    if wants_weight and not sums:
        columns = x_MBCD, given, labels_MBC, weights_MBC, statistics_MBC
    return total, (dx_MBCD, dweight, columns, losses_MBC)


def _backward(options: Options, residuals: Any, g):
    dx_MBCD, dweight, columns, losses_MBC = residuals
    if dx_MBCD is not None:
        dx_MBCD = (g * dx_MBCD).astype(dx_MBCD.dtype)
    if dweight is not None:
        dweight, due = dweight
        # Without the barrier XLA keeps the f32 sum alive until the update and casts it
        # there: 1 GiB more at the peak for Llama3-8B.
        dweight = jax.lax.optimization_barrier((g * dweight).astype(due.dtype))
    if columns is not None:
        x_MBCD, weight, labels_MBC, weights_MBC, statistics_MBC = columns
        dweight = vocabulary.weight_gradient(
            options, x_MBCD, weight, labels_MBC, g * weights_MBC, statistics_MBC
        )
    return dx_MBCD, dweight, None, g * losses_MBC


weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)
