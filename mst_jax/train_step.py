"""The train step: a pure function of (state, batch), jitted and donated here.

State is {'params', 'opt', 'step'}. f32 masters are cast to the compute dtype once a
step; the sum of all losses is differentiated, over micro-batches and devices; the
gradient is divided once, by the global number of valid tokens. So every token weighs
the same however the batch is cut.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mst_jax.config import Config, ModelConfig
from mst_jax.loss import next_token_loss
from mst_jax.model import from_params
from mst_jax.optim import init_state, make_optimizer, make_schedule, update
from mst_jax.sharding import BATCH_AXES, gather, named, param_specs

State = dict[str, Any]
Batch = dict[str, jax.Array]
BATCH_SPEC = P(None, BATCH_AXES)


def init_train_state(cfg: Config, params: Any) -> State:
    """Return the state of step 0 for these parameters. Jit it with donation."""
    params = jax.tree.map(lambda p: p.astype(cfg.optim.param_dtype), params)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    step = jnp.zeros((), jnp.int32)
    return {"params": params, "opt": init_state(optimizer, params), "step": step}


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf of a state (abstract ones too).

    Optimizer state of a parameter's shape lies as the parameter does; counters and
    factored moments are replicated.
    """
    specs = param_specs(state["params"])
    by_path = {
        (jax.tree_util.keystr(path), leaf.shape): spec
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(state["params"]),
            jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)),
            strict=True,
        )
    }

    def spec(path, leaf):
        name = jax.tree_util.keystr(path)
        for (suffix, shape), found in by_path.items():
            bare = suffix.removeprefix("['layers']")
            if name.endswith(bare) and leaf.shape == shape:
                return found
        return P()

    opt = jax.tree_util.tree_map_with_path(spec, state["opt"])
    return named(mesh, {"params": specs, "opt": opt, "step": P()})


def make_loss(cfg: Config, model: ModelConfig) -> Callable[..., Any]:
    """Return loss(params, batch [B, T]) -> (sum, count) on a device's own shards.

    params are in the compute dtype. Runs inside shard_map when the mesh has an fsdp
    axis above 1.
    """

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        options = {}
        if cfg.mesh.fsdp > 1:
            specs = param_specs(params)
            options["gather"] = partial(gather, specs=specs["layers"])
            rest = {k: v for k, v in params.items() if k != "layers"}
            rest = gather(rest, {k: specs[k] for k in rest})
            # The layers stay in shards until the scan reaches them.
            params = {**rest, "layers": params["layers"]}
        return next_token_loss(from_params(model, params), batch, cfg.train, **options)

    return loss


def make_gradients(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return gradients(params, batch [A, B, T]) -> (sum, count, d sum / d params).

    A is the number of micro-batches; their gradients add up in f32 when A > 1.
    """
    loss = jax.value_and_grad(make_loss(cfg, model), has_aux=True)

    def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        params = _cast(params, cfg)
        if cfg.train.accumulate == 1:
            only = jax.tree.map(lambda a: a[0], batch)
            (total, count), gradients = loss(params, only)
        else:

            def add(carry, micro):
                (total, count), gradients = loss(params, micro)
                return jax.tree.map(jnp.add, carry, (total, count, gradients)), None

            zero = jnp.zeros((), jnp.float32)
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            (total, count, gradients), _ = jax.lax.scan(add, (zero, zero, zeros), batch)
        if mesh.size > 1:
            total, count = jax.lax.psum((total, count), BATCH_AXES)
            # Over fsdp the gather's transpose has already added them up.
            axes = BATCH_AXES if cfg.mesh.fsdp == 1 else "data"
            gradients = jax.lax.psum(gradients, axes)
        return total, count, gradients

    return _on_shards(local, mesh, lambda specs: (P(), P(), specs))


def make_train_step(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return step(state, batch) -> (state, metrics), jitted, the state donated.

    Args of the step:
        state: from `init_train_state`.
        batch: `tokens`, `labels` and optionally `positions` and `segment_ids`, int
            [A, B, T] with A micro-batches.

    Metrics are f32 scalars: `loss` (mean over valid tokens, nats), `tokens` (valid
    ones), `grad_norm` (before clipping), `learning_rate`.
    """
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    schedule = make_schedule(cfg.optim, cfg.train.steps)
    gradients_of = make_gradients(cfg, model, mesh)
    base_key = cfg.train.seed

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        total, count, gradients = gradients_of(state["params"], batch)
        scale = 1 / jnp.maximum(count, 1)
        norm = optax.tree.norm(_f32(gradients)) * scale
        if cfg.optim.clip_norm is not None:
            scale = scale * jnp.minimum(1, cfg.optim.clip_norm / (norm + 1e-12))
        key = jax.random.fold_in(jax.random.key(base_key), state["step"])
        params, opt = update(
            optimizer, state["params"], gradients, state["opt"], scale=scale, key=key
        )
        metrics = {
            "loss": total / jnp.maximum(count, 1),
            "tokens": count,
            "grad_norm": norm,
            "learning_rate": jnp.float32(schedule(state["step"])),
        }
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return evaluate(params, batch [1, B, T]) -> (sum, count), jitted."""
    loss = make_loss(cfg, model)

    def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        total, count = loss(_cast(params, cfg), jax.tree.map(lambda a: a[0], batch))
        if mesh.size > 1:
            total, count = jax.lax.psum((total, count), BATCH_AXES)
        return total, count

    return jax.jit(_on_shards(local, mesh, lambda specs: (P(), P())))


def _on_shards(local: Any, mesh: Mesh, out_specs: Any) -> Callable[..., Any]:
    if mesh.size == 1:
        return local

    def sharded(params: Any, batch: Batch) -> Any:
        specs = param_specs(params)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, BATCH_SPEC),
            out_specs=out_specs(specs),
            check_vma=False,
        )(params, batch)

    return sharded


def _cast(params: Any, cfg: Config) -> Any:
    return jax.tree.map(lambda p: p.astype(cfg.train.compute_dtype), params)


def _f32(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)
