"""The stacked layers, forward and backward, under a residual plan.

Forward, a scan stacks what the plan keeps of each layer. Backward, a loop runs the
layers in reverse and hands each layer's gradients to `consume`, which stores them (the
ordinary step) or updates that layer's weights at once (the optimizer in the backward
pass: no whole gradient is ever held). Weights are read through `weights_at`, so both
may live in the loop's carry and change in place.
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
        (y, what each group keeps: arrays [layers / every, ...] by name).
    """
    kept, start = [], 0
    for group in plan.groups:
        if group.every == 1:
            run = _layers(weights_at, x, ctx, start, group)
        else:
            run = _blocks(weights_at, x, ctx, start, group)
        x, residuals = run
        kept.append(residuals)
        start += group.layers
    return x, kept


def _layers(weights_at, x, ctx, start, group):
    offloaded = _arrays(group.offload)

    def body(x, i):
        y, kept = layer_forward(weights_at(i), x, ctx, group.kept)
        return y, {n: _to_host(a) if n in offloaded else a for n, a in kept.items()}

    return jax.lax.scan(body, x, start + jnp.arange(group.layers))


def _blocks(weights_at, x, ctx, start, group):
    """Keep the input of every k-th layer only."""

    def one(i, x):
        return layer_forward(weights_at(i), x, ctx)[0]

    def body(x, first):
        y = jax.lax.fori_loop(first, first + group.every, one, x)
        return y, {"input": _to_host(x) if "input" in group.offload else x}

    return jax.lax.scan(body, x, start + jnp.arange(0, group.layers, group.every))


def stack_backward(
    plan: Plan,
    kept: list[dict[str, jax.Array]],
    dy: jax.Array,
    ctx: Context,
    carry: Any,
    *,
    weights_at: Callable[[Any, Any], Any],
    consume: Callable[[Any, Any, Any], Any],
) -> tuple[jax.Array, Any]:
    """Differentiate all layers, the last one first.

    Args:
        plan: that of `stack_forward`.
        kept: what it returned.
        dy: gradient of its result.
        ctx: the same.
        carry: pytree that `weights_at` reads and `consume` rewrites.
        weights_at: (carry, i) -> the weights of layer i.
        consume: (carry, i, f32 gradients of layer i) -> carry.

    Returns:
        (gradient of x, carry).
    """

    def one_layer(state, i, residuals):
        dx, carry = state
        gradients, dx = layer_backward(weights_at(carry, i), residuals, dx, ctx)
        return dx, consume(carry, i, gradients)

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
        ahead = _arrays(group.offload) if plan.prefetch else frozenset()
        state = _reversed(
            body, state, start, group.layers, group.every, residuals, ahead
        )
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

    def compute(state, i, own):
        own |= fetch(residuals.keys() - ahead, i)
        return body(state, start + i * every, own)

    if not ahead:
        return jax.lax.fori_loop(
            0, count, lambda t, state: compute(state, count - 1 - t, {}), state
        )

    def step(t, carry):
        state, own = carry
        i = count - 1 - t
        # Linear in t and never out of range: else XLA reads the host's memory with a
        # kernel, which slows the others down.
        following = fetch(ahead, i - 1)
        return compute(state, i, own), following

    # The first layer's wait for dx: the head's own peak is before it.
    dx, carry = state
    dx, last, one = jax.lax.optimization_barrier((dx, jnp.int32(count - 1), 1))
    first = (dx, carry), fetch(ahead, last)
    state, own = jax.lax.fori_loop(0, count - 1, step, first)
    # A loop of one turn that XLA does not know: outside one it takes more memory.
    return jax.lax.fori_loop(0, one, lambda _, state: compute(state, 0, own), state)


def _arrays(names: Collection[str]) -> frozenset[str]:
    return frozenset(array for name in names for array in _ARRAYS[name])


def _to_host(a: jax.Array) -> jax.Array:
    return jax.device_put(a, jax.memory.Space.Host)


def _to_device(a: jax.Array) -> jax.Array:
    return jax.device_put(a, jax.memory.Space.Device)
