"""The stacked layers, forward and backward, under a residual plan.

Forward, a loop stacks what the plan keeps of each layer. Backward, a loop runs the
layers in reverse and hands each layer's gradients to `consume`, which stores them (the
ordinary step) or updates that layer's weights at once (the optimizer in the backward
pass: no whole gradient is ever held). Weights are read through `weights_at`, so both
may live in the loop's carry and change in place.

Layers are indexed by the loops' own counters: from an index that is linear in them XLA
knows where a slice lies. Kernels then read weights in their stack, and slices in host
memory are copied by DMA; from any other index they are copied, and by a kernel.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

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
        (y, what each group keeps: arrays [layers / every, ...] by name, those that are
        fetched ahead with an empty entry in front).
    """
    kept, start = [], 0
    for group in plan.groups:
        run = _layers if group.every == 1 else _blocks
        x, residuals = run(weights_at, x, ctx, start, group, _ahead(plan, group))
        kept.append(residuals)
        start += group.layers
    return x, kept


def _layers(weights_at, x, ctx, start, group, ahead=frozenset()):
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

    `jax.lax.scan` would fill the stacks with zeros and index the layers by an array.
    """

    def empty(name, a):
        stack = jax.lax.empty((count + (name in ahead), *a.shape), a.dtype)
        return _to_host(stack) if name in offloaded else stack

    def step(i, carry):
        x, stacks = carry
        x, kept = run(i, x)
        for name, a in kept.items():
            a = _to_host(a) if name in offloaded else a
            slot = i + (name in ahead)
            stack = jax.lax.dynamic_update_index_in_dim(stacks[name], a, slot, 0)
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

    Returns:
        (gradient of x, carry).
    """

    def one_layer(state, i, residuals):
        dx, carry = state
        *found, dx = layer_backward(weights_at(carry, i), residuals, dx, ctx)
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
            _ahead(plan, group),
        )  # fmt: skip
    return state


def _reversed(body, state, start, layers, every, residuals, ahead=frozenset()):
    """Fold body(state, layer, its residuals) from the last layer to the first.

    The residuals that `ahead` names are fetched while the layer before is computed.
    """
    count = layers // every

    @jax.named_scope("residuals")
    def fetch(names, i):
        return {
            name: _to_device(jax.lax.dynamic_index_in_dim(a, i, keepdims=False))
            for name, a in residuals.items()
            if name in names
        }

    def step(t, carry):
        state, own = carry
        i = count - 1 - t
        following = fetch(ahead, i)  # those of i - 1: an empty entry is in front
        own |= fetch(residuals.keys() - ahead, i)
        return body(state, start + i * every, own), following

    if not ahead:
        return jax.lax.fori_loop(0, count, step, (state, {}))[0]
    # The first layer's wait for dx: the head's own peak is before it.
    dx, carry = state
    dx, last = jax.lax.optimization_barrier((dx, jnp.int32(count)))
    first = (dx, carry), fetch(ahead, last)
    return jax.lax.fori_loop(0, count, step, first)[0]


def _ahead(plan: Plan, group: LayerGroup) -> frozenset[str]:
    return _arrays(group.offload) if plan.prefetch else frozenset()


def _arrays(names: Collection[str]) -> frozenset[str]:
    return frozenset(array for name in names for array in _ARRAYS[name])


def _to_host(a: jax.Array) -> jax.Array:
    return jax.device_put(a, jax.memory.Space.Host)


def _to_device(a: jax.Array) -> jax.Array:
    return jax.device_put(a, jax.memory.Space.Device)
