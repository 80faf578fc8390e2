"""Optimizers from optax, applied layer by layer and in place.

Parameters are stacked [L, ...]. Updating them as they stand would make f32 temporaries
of a whole stack, and would compute Adafactor's RMS over all layers at once. So the
update is a loop that carries parameters and optimizer state and rewrites one layer at a
time. Moments are f32 whatever the parameters are.

bfloat16 parameters are rounded stochastically: an update below half a bf16 step, which
is nearly every one at a fine-tuning learning rate, would vanish otherwise. The rounding
is unbiased, E[round(x)] = x.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mst_jax.config import OptimConfig


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
    `train_step.py`.
    """
    rate = make_schedule(cfg, steps)

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
    """Return f32 optimizer state: per layer [L, ...] for the stack, and the rest."""
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    layers, rest = _split(wide)
    return {"layers": jax.vmap(optimizer.init)(layers), "rest": optimizer.init(rest)}


def update(
    optimizer: optax.GradientTransformation,
    params: Any,
    gradients: Any,
    state: Any,
    *,
    scale: Float[Array, ""],
    key: jax.Array,
) -> tuple[Any, Any]:
    """Take one step, layer by layer.

    Args:
        optimizer: from `make_optimizer`.
        params: nested dict with stacked `layers`; f32, or bf16 (rounded
            stochastically).
        gradients: like params, of any floating dtype.
        state: from `init_state`.
        scale: factor of every gradient: 1 / tokens, and the clipping.
        key: of the stochastic rounding.

    Returns:
        (params, state), for the buffers of the old ones.
    """

    def step(params, gradients, state, key):
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
        updates, state = optimizer.update(gradients, state, wide)
        leaves, tree = jax.tree.flatten(optax.apply_updates(wide, updates))
        keys = jax.random.split(key, len(leaves))
        narrow = [
            stochastic_round(x, k) if p.dtype == jnp.bfloat16 else x.astype(p.dtype)
            for x, k, p in zip(leaves, keys, jax.tree.leaves(params), strict=True)
        ]
        return jax.tree.unflatten(tree, narrow), state

    layers, rest = _split(params)
    layer_gradients, rest_gradients = _split(gradients)
    num_layers = jax.tree.leaves(layers)[0].shape[0]

    def one_layer(i, carry):
        def pick(tree):
            return jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree
            )

        layer, layer_state = pick(carry)
        new = step(layer, pick(layer_gradients), layer_state, keys[i])
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), carry, new
        )

    *keys, rest_key = jax.random.split(key, num_layers + 1)
    keys = jnp.stack(keys)
    layers, layer_state = jax.lax.fori_loop(
        0, num_layers, one_layer, (layers, state["layers"])
    )
    rest, rest_state = step(rest, rest_gradients, state["rest"], rest_key)
    return {"layers": layers, **rest}, {"layers": layer_state, "rest": rest_state}


def stochastic_round(
    x: Float[Array, "*shape"], key: jax.Array
) -> Float[Array, "*shape"]:
    """Round f32 to bf16, up with the probability of the part that is cut off.

    Infinities and NaN stay as they are. The noise is XLA's own generator (Philox on a
    GPU): threefry's arithmetic took twice as long.
    """
    key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(
        (bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _split(tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tree["layers"], {k: v for k, v in tree.items() if k != "layers"}
