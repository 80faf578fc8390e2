"""The step that updates each layer in the backward pass, and never holds a gradient.

    forward, loss -> head updated -> layers updated, last to first -> embedding updated

Parameters and optimizer state are carried through the backward pass and rewritten in
place: a layer's gradient is used up before the next one's exists. What depends on all
gradients, the global norm for clipping, takes a backward pass of its own before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mst_jax.config import Config, ModelConfig
from mst_jax.gradients import Batch, compute_layer, embedding_gradient, forward
from mst_jax.layer_state import enter, exchange, leave
from mst_jax.optim import (
    at,
    clip_factor,
    join_frozen,
    layer_clip,
    split_frozen,
    squared_norm,
    unit_key,
    update_layer,
    update_one,
)
from mst_jax.stack import Beside, nothing_beside, stack_backward


def step_in_backward(
    cfg: Config,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: dict[str, Any],
    batch: Batch,
    key: jax.Array,
) -> tuple[Any, Any, tuple[jax.Array, jax.Array, jax.Array]]:
    """Take one step.

    Args:
        cfg: one device, no accumulation.
        model: its shape.
        optimizer: from `optim.make_optimizer`.
        state: of the train step; its buffers are rewritten.
        batch: [1, B, T].
        key: of the stochastic rounding.

    Returns:
        (params, optimizer state, (sum of the losses, labels that count, norm of the
        mean loss's gradient before clipping)).
    """
    one = _Backward(cfg, model, state["params"], jax.tree.map(lambda a: a[0], batch))
    trained, opt = one.trained, dict(state["opt"])
    mean = 1 / jnp.maximum(one.run.count, 1)
    factor = clip_factor(cfg.optim, lambda: jnp.sqrt(one.squares()) * mean)
    options = {"scale": mean * factor, "clip_norm": layer_clip(cfg.optim)}

    def update_rest(name, gradients):
        trained[name], opt[name] = update_one(
            optimizer, trained[name], gradients, opt[name],
            key=unit_key(key, name), **options,
        )  # fmt: skip

    def consume(carry, i, gradients, known):
        stacks, squares = carry
        if gradients:
            stacks = update_layer(optimizer, stacks, i, gradients, key=key, **options)
        return stacks, squares + squared_norm(gradients, known)

    def beside(carry, i, dx, half):
        stacks, squares = carry
        stacks, dx = exchange(stacks, i, dx, half=half)
        return (stacks, squares), dx

    for name, gradients in one.heads.items():
        update_rest(name, gradients)
    stacks = enter(one.stack, opt.get("layers", {}))
    dx, (stacks, squares) = one.layers(
        (stacks, squared_norm(one.heads)),
        lambda carry: carry[0].params, consume, beside,
    )  # fmt: skip
    if one.stack:
        trained["layers"], opt["layers"] = leave(stacks)
    for name, gradients in one.embedding(dx).items():
        squares += squared_norm(gradients)
        update_rest(name, gradients)
    norm = jnp.sqrt(squares) * mean
    return join_frozen(trained, one.frozen), opt, (one.run.total, one.run.count, norm)


class _Backward:
    """A batch run forward; its backward pass, once or twice."""

    def __init__(self, cfg: Config, model: ModelConfig, params: Any, batch: Batch):
        self.cfg, self.batch = cfg, batch
        self.trained, self.frozen = split_frozen(params, cfg.optim.freeze)
        self.rest = {k: v for k, v in params.items() if k != "layers"}
        self.stack = self.trained.get("layers", {})
        """Trained parameters of all layers, as they were."""
        weights_at = partial(self._weights_at, self.stack)
        self.run = forward(cfg, model, self.rest, weights_at, batch)
        self.heads = {n: g for n, g in self.run.d_head.items() if n != "embed"}
        """Gradients of the trained final norm and head."""

    @jax.named_scope("weights")
    def _weights_at(self, stack: Any, i: Any) -> Any:
        layers = join_frozen(stack, self.frozen.get("layers", {}))
        return compute_layer(at(layers, i), self.cfg)

    def layers(
        self,
        carry: Any,
        stack_of: Callable[[Any], Any],
        consume: Callable[[Any, Any, Any, Any], Any],
        beside: Beside = nothing_beside,
    ) -> tuple[jax.Array, Any]:
        """Differentiate all layers, the last one first.

        Args:
            carry: pytree that `consume` rewrites.
            stack_of: carry -> trained parameters of all layers.
            consume: (carry, i, f32 gradients of what layer i trains, the sums of
                squares of some of them) -> carry.
            beside: see `stack_backward`.

        Returns:
            (gradient of the first layer's input, carry).
        """

        def of_trained(carry, i, *found):
            trained = [
                split_frozen({"layers": a}, self.cfg.optim.freeze)[0] for a in found
            ]
            return consume(carry, i, *(a.get("layers", {}) for a in trained))

        run = self.run
        return stack_backward(
            run.plan, run.kept, run.dy, run.ctx, carry,
            weights_at=lambda carry, i: self._weights_at(stack_of(carry), i),
            consume=of_trained, beside=beside,
        )  # fmt: skip

    def embedding(self, dx: jax.Array) -> dict[str, Any]:
        """Return {'embed': its gradient}, or nothing if it is frozen."""
        if "embed" not in self.trained:
            return {}
        tokens, tied = self.batch["tokens"], self.run.d_head.get("embed")
        return {"embed": embedding_gradient(tokens, dx, self.rest["embed"], tied)}

    def squares(self) -> jax.Array:
        """Return the squared norm of all gradients: a backward pass of its own."""
        dx, total = self.layers(
            squared_norm(self.heads),
            lambda _: self.stack,
            lambda total, i, *found: total + squared_norm(*found),
        )
        return total + squared_norm(self.embedding(dx))
