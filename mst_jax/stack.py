"""The stacked layers, forward and backward, under a residual plan.

Forward, a loop stacks what the plan keeps of each layer. Backward, a loop runs the
layers in reverse and hands each layer's gradients to `consume`, which stores them (the
ordinary step) or updates that layer's weights at once (the optimizer in the backward
pass: no whole gradient is ever held). Weights are read through `weights_at`, so both
may live in the loop's carry and change in place.

Layers are indexed by the loops' own counters: from an index that is linear in them XLA
knows where a slice lies. Kernels then read weights in their stack, and slices in host
memory are copied by DMA; from any other index they are copied, and by a kernel.

Copies to and from the host run beside the computation (`host_memory.py`): what is
fetched goes straight to the next turn of the loop.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.host_memory import after, get_rows, put_rows, to_device, to_host
from mst_jax.layer import Context, layer_backward, layer_forward
from mst_jax.plan import LayerGroup, Plan

_ARRAYS = {
    "input": ("input",),
    "qkv": ("q", "k", "v"),
    "attention": ("out", "lse"),
    "mlp_input": ("mlp_input",),
    "gate_up": ("gate", "up"),
}

WeightsAt = Callable[[Any], Any]
Beside = Callable[[Any, Any, jax.Array, int], tuple[Any, jax.Array]]


def nothing_beside(carry: Any, i: Any, x: jax.Array, half: int) -> tuple[Any, Any]:
    """Begin nothing: see `stack_backward`."""
    return carry, x


def stack_forward(
    plan: Plan, weights_at: WeightsAt, x: jax.Array, ctx: Context
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """Run all layers.

    Args:
        plan: what to keep, and where.
        weights_at: i -> the weights of layer i, whole and on the device.
        x: [B, T, D].
        ctx: what the layers share.

    Returns:
        (y, what each group keeps: arrays [layers / every, B, ...] by name, in host
        memory [layers / every * B, ...], the last layer's first or, if they are fetched
        ahead, behind B empty rows in order).
    """
    kept, start = [], 0
    for group in plan.groups:
        run = _layers if group.every == 1 else _blocks
        x, residuals = run(weights_at, x, ctx, start, group, plan.prefetch)
        kept.append(residuals)
        start += group.layers
    return x, kept


def _layers(weights_at, x, ctx, start, group, ahead=False):
    def run(i, x):
        return layer_forward(weights_at(start + i), x, ctx, group.kept)

    return _stacked(run, x, group.layers, _arrays(group.offload), ahead)


def _blocks(weights_at, x, ctx, start, group, ahead):
    """Keep the input of every k-th layer only."""

    def one(i, x):
        return layer_forward(weights_at(i), x, ctx)[0]

    def run(i, x):
        first = start + i * group.every
        return jax.lax.fori_loop(first, first + group.every, one, x), {"input": x}

    count = group.layers // group.every
    return _stacked(run, x, count, _arrays(group.offload), ahead)


def _stacked(run, x, count, offloaded, ahead):
    """Fold run(i, x) -> (x, kept) and stack what it keeps.

    `jax.lax.scan` would fill the stacks with zeros and index the layers by an array. In
    host memory no layer is put where the loop's counter points: the counter is advanced
    in place, and a copy there would have to be done before.
    """
    B = len(x)

    def empty(name, a):
        if name in offloaded:
            return to_host(jax.lax.empty(((ahead + count) * B, *a.shape[1:]), a.dtype))
        return jax.lax.empty((count, *a.shape), a.dtype)

    def step(i, carry):
        x, stacks = carry
        row = (1 + i if ahead else count - 1 - i) * B
        x = after(x, row, _only(offloaded, stacks))
        x, kept = run(i, x)
        for name, a in kept.items():
            if name in offloaded:
                stacks[name] = put_rows(stacks[name], to_host(a), row)
            else:
                stack = jax.lax.dynamic_update_index_in_dim(stacks[name], a, i, 0)
                stacks[name] = stack
        return x, stacks

    kept = jax.eval_shape(run, 0, x)[1]
    stacks = {name: empty(name, a) for name, a in kept.items()}
    return jax.lax.fori_loop(0, count, step, (x, stacks))


def stack_backward(
    plan: Plan,
    kept: list[dict[str, jax.Array]],
    dy: jax.Array,
    ctx: Context,
    carry: Any,
    *,
    weights_at: Callable[[Any, Any], Any],
    consume: Callable[[Any, Any, Any, Any], Any],
    beside: Beside = nothing_beside,
) -> tuple[jax.Array, Any]:
    """Differentiate all layers, the last one first.

    Args:
        plan: that of `stack_forward`.
        kept: what it returned.
        dy: gradient of its result.
        ctx: the same.
        carry: pytree that `weights_at` reads and `consume` rewrites.
        weights_at: (carry, i) -> the weights of layer i.
        consume: (carry, i, f32 gradients of layer i, the sums of squares that
            `layer_backward` has) -> carry.
        beside: (carry, i, dx, half) -> (carry, dx), called in front of layer i's MLP
            (half 0) and its attention (1): begins what shall run beside them.

    Returns:
        (gradient of x, carry).
    """

    def one_layer(state, i, residuals):
        dx, carry = state

        def between(dh):
            nonlocal carry
            carry, dh = beside(carry, i, dh, 1)
            return dh

        carry, dx = beside(carry, i, dx, 0)
        weights = weights_at(carry, i)
        *found, dx = layer_backward(weights, residuals, dx, ctx, between)
        return dx, consume(carry, i, *found)

    def one_block(group, state, first, residuals):
        inner = LayerGroup(layers=group.every, save=group.save | {"input"})
        _, inside = _layers(
            lambda i: weights_at(state[1], i), residuals["input"], ctx, first, inner
        )
        return _reversed(one_layer, state, first, inner.layers, 1, inside)

    state, start = (dy, carry), sum(group.layers for group in plan.groups)
    for group, residuals in zip(plan.groups[::-1], kept[::-1], strict=True):
        start -= group.layers
        body = one_layer if group.every == 1 else partial(one_block, group)
        state = _reversed(
            body, state, start, group.layers, group.every, residuals,
            _arrays(group.offload), plan.prefetch,
        )  # fmt: skip
    return state


def _reversed(
    body, state, start, layers, every, residuals, offloaded=frozenset(), ahead=False
):
    """Fold body(state, layer, its residuals) from the last layer to the first.

    Offloaded residuals are fetched while the layer after theirs is differentiated, if
    `ahead`, else with their own.
    """
    (dx, params), count = state, layers // every
    ahead, B = ahead and bool(offloaded), len(dx)
    here = _only(residuals.keys() - offloaded, residuals)
    away = _only(offloaded, residuals)

    @jax.named_scope("residuals")
    def fetch(row):
        return {
            name: to_device(get_rows(stack, row, B)) for name, stack in away.items()
        }

    @jax.named_scope("residuals")
    def read(i):
        return {
            name: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            for name, stack in here.items()
        }

    def step(t, carry):
        (dx, params), own = carry
        i = count - 1 - t
        row = (i if ahead else t) * B  # ahead, that of layer i - 1
        dx = after(dx, row, away)
        fetched = fetch(row)
        own = read(i) | (own if ahead else fetched)
        dx, params = body((dx, params), start + i * every, own)
        if not ahead:
            return (dx, params), {}
        dx, following = jax.lax.optimization_barrier((dx, fetched))
        return (dx, params), following

    own = {}
    if ahead:  # the first layer's wait for dx: the head's own peak is before it
        dx, last = jax.lax.optimization_barrier((dx, jnp.int32(count * B)))
        own = fetch(last)
    return jax.lax.fori_loop(0, count, step, ((dx, params), own))[0]


def _arrays(names: Collection[str]) -> frozenset[str]:
    return frozenset(array for name in names for array in _ARRAYS[name])


def _only(names: Collection[str], arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: a for name, a in arrays.items() if name in names}
