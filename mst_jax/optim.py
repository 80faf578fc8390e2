"""Optimizers from optax, applied layer by layer and in place.

Parameters are stacked [L, ...]. Updating them as they stand would make f32 temporaries
of a whole stack, and would compute Adafactor's RMS over all layers at once. So the
update is a loop that carries parameters and optimizer state and rewrites one layer at a
time. The state may lie in host memory: each layer's comes to the device and goes back.

bfloat16 parameters are rounded stochastically: an update below half a bf16 step, which
is nearly every one at a fine-tuning learning rate, would vanish otherwise. The rounding
is unbiased, E[round(x)] = x.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from mst_jax.config import OptimConfig
from mst_jax.layer_state import (
    LayerStacks,
    enter,
    exchange,
    join,
    leave,
    nothing,
    split,
)
from mst_jax.low_precision import low_precision_state, stochastic_round


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear warmup, then the configured shape."""
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.end_factor
    decay = max(1, steps - cfg.warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay, alpha=cfg.end_factor),
    }[cfg.schedule]
    if cfg.warmup_steps == 0:
        return after
    # The first step already moves: warmup_steps updates reach the peak.
    warmup = optax.linear_schedule(
        peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps
    )
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation for one layer's parameters.

    Clipping is not part of it: the global norm is that of all layers, see
    `clip_factor`.
    """
    optimizer = _in_full_precision(cfg, make_schedule(cfg, steps))
    if cfg.moment_dtype == "float32":
        return optimizer
    return low_precision_state(optimizer, cfg.moment_dtype, seed=1)


def _in_full_precision(
    cfg: OptimConfig, rate: optax.Schedule
) -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim >= 2, params)  # not the norms

    decay = {"weight_decay": cfg.weight_decay, "mask": decayed}
    if cfg.name == "adamw":
        return optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, **decay)
    if cfg.name == "lion":
        return optax.lion(rate, b1=cfg.b1, b2=cfg.b2, **decay)
    if cfg.name == "adafactor":
        # Without momentum and without scaling by the parameters' own size, so that
        # learning_rate means what it means for the others.
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(
        optax.add_decayed_weights(cfg.weight_decay, decayed),
        optax.scale_by_learning_rate(rate),
    )


def init_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Return optimizer state by top-level name; of `layers`, per layer [L, ...]."""

    def init(params):
        return optimizer.init(f32(params))

    return {
        name: jax.vmap(init)(p) if name == "layers" else init(p)
        for name, p in params.items()
    }


def update(
    optimizer: optax.GradientTransformation,
    params: Any,
    gradients: Any,
    state: Any,
    *,
    scale: Float[Array, ""],
    key: jax.Array,
    clip_norm: float | None = None,
) -> tuple[Any, Any]:
    """Take one step, layer by layer.

    Args:
        optimizer: from `make_optimizer`.
        params: dict by top-level name, with stacked `layers`; f32, or bf16 (rounded
            stochastically).
        gradients: like params, of any floating dtype.
        state: from `init_state`.
        scale: factor of every gradient: 1 / tokens, and the clipping.
        key: of the stochastic rounding.
        clip_norm: clips each layer's gradients, and each other name's, apart.

    Returns:
        (params, state), for the buffers of the old ones.
    """
    params, state = dict(params), dict(state)
    options = {"scale": scale, "clip_norm": clip_norm}
    for name in params:
        if name != "layers":
            params[name], state[name] = update_one(
                optimizer, params[name], gradients[name], state[name],
                key=unit_key(key, name), **options,
            )  # fmt: skip
    if "layers" in params:
        num_layers = len(jax.tree.leaves(params["layers"])[0])

        def one_layer(t, stacks):
            i, own = num_layers - 1 - t, scale
            for half in (0, 1):
                stacks, own = exchange(stacks, i, own, half=half)
            return update_layer(
                optimizer, stacks, i, at(gradients["layers"], i),
                key=key, scale=own, clip_norm=clip_norm,
            )  # fmt: skip

        stacks = enter(params["layers"], state["layers"])
        stacks = jax.lax.fori_loop(0, num_layers, one_layer, stacks)
        params["layers"], state["layers"] = leave(stacks)
    return params, state


@jax.named_scope("optimizer")
def update_layer(
    optimizer: optax.GradientTransformation,
    stacks: LayerStacks,
    i: Any,
    gradients: Any,
    *,
    key: jax.Array,
    **options: Any,
) -> LayerStacks:
    """Return the stacks with layer i updated in place, or going.

    Args:
        optimizer: from `make_optimizer`.
        stacks: parameters and state of all layers; what lies in host memory has come.
        i: the layer.
        gradients: of this layer.
        key: of the step.
        **options: see `update`.
    """
    own_key = unit_key(key, i)

    def one(entry, gradients):
        params, here, coming = entry
        state = join(here, coming)
        return update_one(optimizer, params, gradients, state, key=own_key, **options)

    coming = stacks.coming
    if jax.tree.leaves(coming):  # else XLA widens it, and waits for it, before
        coming, gradients = jax.lax.optimization_barrier((coming, gradients))
    entries = *_entries((stacks.params, stacks.here), i), coming
    params, state = jax.vmap(one)(entries, jax.tree.map(lambda a: a[None], gradients))
    here, going = split(state, stacks.is_away)
    params, here = _put((stacks.params, stacks.here), i, (params, here))
    return LayerStacks(params, here, stacks.away, going, nothing(stacks.away))


@jax.named_scope("optimizer")
def update_one(
    optimizer: optax.GradientTransformation,
    params: Any,
    gradients: Any,
    state: Any,
    *,
    scale: Float[Array, ""],
    key: jax.Array,
    clip_norm: float | None = None,
) -> tuple[Any, Any]:
    """Update one layer's parameters, or one top-level name's: see `update`."""
    wide = f32(params)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
    if clip_norm is not None:
        factor = jnp.minimum(1, clip_norm / (optax.tree.norm(gradients) + 1e-12))
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    updates, state = optimizer.update(gradients, state, wide)
    leaves, tree = jax.tree.flatten(optax.apply_updates(wide, updates))
    keys = jax.random.split(key, len(leaves))
    narrow = [
        stochastic_round(x, k) if p.dtype == jnp.bfloat16 else x.astype(p.dtype)
        for x, k, p in zip(leaves, keys, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(tree, narrow), state


def unit_key(key: jax.Array, unit: Any) -> jax.Array:
    """Return the key of a layer (an index) or of a top-level name."""
    if isinstance(unit, str):
        unit = 2**31 + zlib.crc32(unit.encode()) % 2**31  # above every layer's
    return jax.random.fold_in(key, jnp.uint32(unit))


@jax.named_scope("gradient_norm")
def squared_norm(tree: Any, known: Any = None) -> Float[Array, ""]:
    """Return the sum of all squares, in f32.

    `known`: a part of the tree, of the leaves' own sums that are there already.
    """
    leaves, sums = flatten_dict(tree), flatten_dict(known or {})
    total: Any = jnp.zeros((), jnp.float32)
    for path in sorted(leaves):  # in the same order wherever the tree comes from
        total += sums[path] if path in sums else jnp.sum(jnp.square(f32(leaves[path])))
    return total


def clip_factor(
    cfg: OptimConfig, norm: Callable[[], Float[Array, ""]]
) -> Float[Array, ""] | float:
    """Return what clipping by the global norm multiplies all gradients with.

    Args:
        cfg: whether to clip so, and to which norm.
        norm: called, only if it is needed, for the norm of all gradients.
    """
    if cfg.clip != "global" or cfg.clip_norm is None:
        return 1.0
    return jnp.minimum(1, cfg.clip_norm / (norm() + 1e-12))


def layer_clip(cfg: OptimConfig) -> float | None:
    """Return the norm that each layer's gradients are clipped to, apart."""
    return cfg.clip_norm if cfg.clip == "layer" else None


def at(stacks: Any, i: Any) -> Any:
    """Return entry i of every stacked leaf."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stacks
    )


def rewrite(fn: Callable[[Any, Any], Any], stacks: Any, i: Any, new: Any) -> Any:
    """Return the stacks with `fn(entry i, new)` in entry i, in the stacks' dtypes.

    Under vmap over one entry: XLA reads a slice of a stack in the kernel that
    overwrites it, and does not copy it before, only if nothing but elementwise
    operations lies between. A reshape of [1, D, F] to [D, F] is none.
    """

    new = jax.tree.map(lambda a: a[None], new)
    return _put(stacks, i, jax.vmap(fn)(_entries(stacks, i), new))


def _entries(stacks: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), stacks)


def _put(stacks: Any, i: Any, entries: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), i, 0),
        stacks, entries,
    )  # fmt: skip


def check_frozen(params: Any, freeze: tuple[str, ...]) -> None:
    """Raise ValueError if a path of `freeze` names nothing, or all are frozen."""
    names = [*flatten_dict(params, sep="/")]
    for path in freeze:
        if not any(is_below(name, path) for name in names):
            raise ValueError(f"freeze={path!r} names no parameter; there are {names}")
    if not split_frozen(params, freeze)[0]:
        raise ValueError(f"{freeze=} freezes every parameter")


def split_frozen(params: Any, freeze: tuple[str, ...]) -> tuple[Any, Any]:
    """Split a nested dict in (trained, frozen).

    Args:
        params: nested dict.
        freeze: beginnings of paths such as 'embed' or 'layers/attention'; whole names.
    """
    sides: list[dict[str, Any]] = [{}, {}]
    for name, leaf in flatten_dict(params, sep="/").items():
        sides[any(is_below(name, path) for path in freeze)][name] = leaf
    trained, frozen = (unflatten_dict(side, sep="/") for side in sides)
    return trained, frozen


def is_below(name: str, path: str) -> bool:
    """Whether a parameter's path begins with another, in whole names."""
    return f"{name}/".startswith(f"{path.strip('/')}/")


def join_frozen(trained: Any, frozen: Any) -> Any:
    """Undo `split_frozen`."""
    flat = flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/")
    return unflatten_dict(flat, sep="/")


def f32(tree: Any) -> Any:
    """Return the tree in f32."""
    return jax.tree.map(lambda p: p.astype(jnp.float32), tree)
