"""The train step: a pure function of (state, batch), jitted and donated here.

State is {'params', 'opt', 'step'}. f32 masters are cast to the compute dtype layer by
layer; the sum of all losses is differentiated, over micro-batches and devices; the
gradient is divided once, by the global number of valid tokens. So every token weighs
the same however the batch is cut.

Two kinds of step give the same parameters. The ordinary one collects all gradients, in
the parameters' dtype, and then updates. With `in_backward` each layer is updated from
its f32 gradient as soon as that is there, so that no whole gradient is ever held
(`layerwise.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mst_jax.config import Config, ModelConfig
from mst_jax.gradients import (
    Batch,
    compute_layer,
    embedding_gradient,
    evaluate,
    forward,
    make_plan,
    mlp_implementation,
)
from mst_jax.layerwise import step_in_backward
from mst_jax.model import init_params
from mst_jax.optim import (
    at,
    clip_factor,
    init_state,
    join_frozen,
    layer_clip,
    make_optimizer,
    make_schedule,
    rewrite,
    split_frozen,
    squared_norm,
    update,
)
from mst_jax.sharding import BATCH_AXES, gather, named, param_specs, scatter
from mst_jax.stack import WeightsAt, stack_backward

State = dict[str, Any]
Metrics = dict[str, jax.Array]
BATCH_SPEC = P(None, BATCH_AXES)

_COMMANDS = "xla_gpu_enable_command_buffer"
COMMAND_BUFFERS: dict[str, dict[str, str | bool]] = {
    "default": {},
    "step": {
        _COMMANDS: "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,"
        "DYNAMIC_SLICE_FUSION,WHILE",
        "xla_gpu_command_buffer_unroll_loops": True,
    },
    "off": {_COMMANDS: ""},
}
"""XLA's options for each of `TrainConfig.command_buffers`; other backends have none."""


def init_train_state(cfg: Config, params: Any, mesh: Mesh) -> State:
    """Return the state of step 0 for these parameters, where the step keeps it.

    A step whose state came from elsewhere would be compiled again for its own result.
    Inside a jit every leaf is made in place; outside, moved there. The first step
    donates the state, and `params` with it where they were in place already.
    """
    state = _first_state(cfg, params)
    shardings = state_shardings(state, mesh, on_host=cfg.optim.state_on_host)
    state = jax.device_put(state, shardings)
    if isinstance(state["step"], Tracer):
        # Inside a jit device_put chooses the memory, and this the device.
        state = jax.lax.with_sharding_constraint(state, shardings)
    return state


def abstract_state(cfg: Config, model: ModelConfig) -> State:
    """Return shapes and dtypes of a state, without a device."""
    return jax.eval_shape(lambda: _first_state(cfg, init_params(model, 0)))


def _first_state(cfg: Config, params: Any) -> State:
    params = jax.tree.map(lambda p: p.astype(cfg.optim.param_dtype), params)
    trained, _ = split_frozen(params, cfg.optim.freeze)
    opt = init_state(make_optimizer(cfg.optim, cfg.train.steps), trained)
    return {"params": params, "opt": opt, "step": jnp.zeros((), jnp.int32)}


def state_shardings(state: Any, mesh: Mesh, *, on_host: bool = False) -> Any:
    """Return the sharding of every leaf of a state (abstract ones too).

    Optimizer state of a parameter's shape lies as the parameter does, and so do scales
    of 8-bit moments where blocks are not cut; counters and factored moments are
    replicated. With `on_host` the optimizer state of the layers' matrices lies in
    pinned host memory.
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
        top = jax.tree_util.keystr(path[:1])
        name = jax.tree_util.keystr(path)
        for (whole, shape), found in by_path.items():
            below = whole.removeprefix(top)
            if not (whole.startswith(top) and below in name):
                continue
            if leaf.shape == shape:
                return found
            # Scales of 8-bit moments: one of several columns.
            if leaf.ndim == len(shape) and leaf.shape[:-1] == shape[:-1]:
                last = found[-1]
                whole_blocks = last is None or leaf.shape[-1] % mesh.shape[last] == 0
                return P(*found[:-1], last if whole_blocks else None)
        return P()

    opt = jax.tree_util.tree_map_with_path(spec, state["opt"])
    shardings = named(mesh, {"params": specs, "opt": opt, "step": P()})
    if on_host and "layers" in state["opt"]:
        shardings["opt"]["layers"] = jax.tree.map(
            lambda s, a: s.with_memory_kind("pinned_host") if goes_to_host(a) else s,
            shardings["opt"]["layers"],
            state["opt"]["layers"],
        )
    return shardings


def goes_to_host(leaf: Any) -> bool:
    """Whether a leaf of the layers' optimizer state does: matrices, [L, ...]."""
    return leaf.ndim > 2


def make_gradients(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return gradients(params, batch [A, B, T]) -> (sum, count, d sum / d params).

    A is the number of micro-batches. Gradients are those of the trained parameters, in
    the parameters' dtype, in f32 when A > 1. Runs inside shard_map when the mesh has
    more than one device.
    """
    wide = cfg.train.accumulate > 1

    def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        specs = param_specs(params)
        rest, weights_at = _whole(params, specs, cfg)

        def add(carry, micro):
            total, count, sums = carry
            new = _whole_gradients(cfg, model, rest, weights_at, micro, sums, specs)
            return (total + new[0], count + new[1], new[2]), None

        trained, _ = split_frozen(params, cfg.optim.freeze)
        zero = jnp.zeros((), jnp.float32)
        if wide:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
            carry, _ = jax.lax.scan(add, (zero, zero, zeros), batch)
        else:
            # Of the gradients' shapes and dtypes; what is there is not read.
            carry = zero, zero, trained
            carry, _ = add(carry, jax.tree.map(lambda a: a[0], batch))
        total, count, sums = carry
        if mesh.size > 1:
            total, count = jax.lax.psum((total, count), BATCH_AXES)
        return total, count, _over_devices(sums, cfg) if wide else sums

    def out_specs(specs):
        return P(), P(), split_frozen(specs, cfg.optim.freeze)[0]

    return _on_shards(local, mesh, out_specs)


def _over_devices(gradients: Any, cfg: Config) -> Any:
    """Add up what replicas have; over fsdp `scatter` has done so."""
    if cfg.mesh.data * cfg.mesh.fsdp == 1:
        return gradients
    return jax.lax.psum(gradients, BATCH_AXES if cfg.mesh.fsdp == 1 else "data")


def _whole_gradients(cfg, model, rest, weights_at, batch, sums, specs):
    """Add a micro-batch's gradients to `sums`, shards of the trained parameters.

    Of one micro-batch they are the sums, whatever is there, of all devices.
    """
    freeze = cfg.optim.freeze

    def shards(name, new):
        new = {name: new}
        if cfg.mesh.fsdp > 1:
            new = scatter(new, {name: specs[name]})
        new = split_frozen(new, freeze)[0].get(name, {})
        # In f32, before it is rounded.
        return new if cfg.train.accumulate > 1 else _over_devices(new, cfg)

    def add(total, new):
        if cfg.train.accumulate == 1:
            return jax.tree.map(lambda a, b: b.astype(a.dtype), total, new)
        return jax.tree.map(jnp.add, total, new)

    def consume(stacks, i, gradients, squares):
        own = shards("layers", gradients)
        return rewrite(add, stacks, i, own) if own else stacks

    run = forward(cfg, model, rest, weights_at, batch)
    dy, layers = run.dy, sums.get("layers", {})
    if cfg.train.accumulate == 1:
        # Filled, though each is written: XLA makes what has no operand before the head.
        dy, zero = jax.lax.optimization_barrier((dy, jnp.float32(0)))
        layers = jax.tree.map(lambda a: jnp.full(a.shape, zero, a.dtype), layers)
    dx, layers = stack_backward(
        run.plan, run.kept, dy, run.ctx, layers,
        weights_at=lambda _, i: weights_at(i), consume=consume,
    )  # fmt: skip
    new = dict(run.d_head)
    if "embed" in sums:
        tied = new.get("embed")
        new["embed"] = embedding_gradient(batch["tokens"], dx, rest["embed"], tied)
    sums = sums | {name: add(sums[name], shards(name, g)) for name, g in new.items()}
    return run.total, run.count, sums | ({"layers": layers} if layers else {})


def make_train_step(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return step(state, batch) -> (state, metrics), jitted, the state donated.

    Args of the step:
        state: from `init_train_state`.
        batch: `tokens`, `labels` and optionally `positions` and `segment_ids`, int
            [A, B, T] with A micro-batches.

    Metrics are f32 scalars: `loss` (mean over valid tokens, nats), `tokens` (valid
    ones), `grad_norm` (before clipping), `learning_rate`.
    """
    return jit_step(cfg, model, pure_train_step(cfg, model, mesh))


def jit_step(cfg: Config, model: ModelConfig, step: Any) -> Any:
    """Return a step's function jitted as `make_train_step` does."""
    options = compiler_options(cfg, model, cfg.train.command_buffers)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def pure_train_step(
    cfg: Config, model: ModelConfig, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Return `make_train_step`'s function, not jitted."""
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    schedule = make_schedule(cfg.optim, cfg.train.steps)
    if cfg.optim.in_backward:
        run = partial(step_in_backward, cfg, model, optimizer)
    else:
        run = partial(
            _step_after_backward, cfg, make_gradients(cfg, model, mesh), optimizer
        )
    base_key = cfg.train.seed

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(base_key), state["step"])
        params, opt, (total, count, norm) = run(state, batch, key)
        metrics = {
            "loss": total / jnp.maximum(count, 1),
            "tokens": count,
            "grad_norm": norm,
            "learning_rate": jnp.float32(schedule(state["step"])),
        }
        state = {"params": params, "opt": opt, "step": state["step"] + 1}
        if mesh.size > 1:  # XLA splits what it likes, scales of int8 moments for one
            shardings = state_shardings(state, mesh)
            state = jax.lax.with_sharding_constraint(state, shardings)
        return state, metrics

    return step


def compiler_options(
    cfg: Config, model: ModelConfig, command_buffers: str = "default"
) -> dict[str, str | bool]:
    """Return XLA's options for a step, or for an evaluation, which takes the default.

    `command_buffers`: a key of `COMMAND_BUFFERS`.
    """
    # XLA's own rematerialization counts arrays in host memory as the device's, and then
    # computes matrix products twice. Its asynchronous copies within the device share
    # streams with those to and from the host, and then wait for them.
    passes = ["rematerialization", "dynamic-slice-copy-fusion-async-wrapper"]
    options: dict[str, str | bool] = {}
    if cfg.optim.state_on_host or make_plan(cfg, model).offloads:
        # In a CUDA graph copies take their turn with kernels. Nor does XLA's scheduler
        # know how long either takes; without it copies begin as early, and are waited
        # for as late, as they can be.
        options |= COMMAND_BUFFERS["off"]
        options["xla_gpu_enable_latency_hiding_scheduler"] = False
    mlp = cfg.train.asked_implementation or mlp_implementation(cfg, model)[0]
    if mlp == "mosaic_gpu":
        # What is left to XLA is cuBLAS's, which then reads weights where they lie in
        # their stacks: not if Triton could have taken it, nor joined for q, k and v.
        # XLA's own MLP is 10% slower so.
        passes.append("dot-merger")
        options["xla_gpu_enable_triton_gemm"] = False
    options["xla_disable_hlo_passes"] = ",".join(passes)
    return options | COMMAND_BUFFERS[command_buffers]


def _step_after_backward(cfg, gradients_of, optimizer, state, batch, key):
    total, count, gradients = gradients_of(state["params"], batch)
    scale = 1 / jnp.maximum(count, 1)
    norm = jnp.sqrt(_all_squares(gradients)) * scale
    scale *= clip_factor(cfg.optim, lambda: norm)
    trained, frozen = split_frozen(state["params"], cfg.optim.freeze)
    trained, opt = update(
        optimizer, trained, gradients, state["opt"],
        scale=scale, key=key, clip_norm=layer_clip(cfg.optim),
    )  # fmt: skip
    return join_frozen(trained, frozen), opt, (total, count, norm)


def make_eval_step(cfg: Config, model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    """Return evaluate(params, batch [1, B, T]) -> (sum, count), jitted."""

    def local(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rest, weights_at = _whole(params, param_specs(params), cfg)
        batch = jax.tree.map(lambda a: a[0], batch)
        total, count = evaluate(cfg, model, rest, weights_at, batch)
        if mesh.size > 1:
            total, count = jax.lax.psum((total, count), BATCH_AXES)
        return total, count

    evaluate_shards = _on_shards(local, mesh, lambda specs: (P(), P()))
    return jax.jit(evaluate_shards, compiler_options=compiler_options(cfg, model))


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


def _whole(params: Any, specs: Any, cfg: Config) -> tuple[Any, WeightsAt]:
    """Return all but the layers, whole, and i -> layer i, whole when it is its turn."""
    rest, layers = _split(params)

    def weights_at(i):
        return compute_layer(_gather(at(layers, i), specs["layers"], cfg), cfg)

    return _gather(rest, specs, cfg), weights_at


def _gather(params: Any, specs: Any, cfg: Config) -> Any:
    if cfg.mesh.fsdp == 1:
        return params
    return gather(params, {name: specs[name] for name in params})


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return {k: v for k, v in params.items() if k != "layers"}, params["layers"]


def _all_squares(gradients: Any) -> jax.Array:
    """Add up in the order of the backward pass, so that both steps clip alike."""
    rest, layers = _split({"layers": {}, **gradients})
    squares = squared_norm({name: g for name, g in rest.items() if name != "embed"})
    if layers:
        num_layers = jax.tree.leaves(layers)[0].shape[0]

        def add(t, total):
            return total + squared_norm(at(layers, num_layers - 1 - t))

        squares = jax.lax.fori_loop(0, num_layers, add, squares)
    return squares + squared_norm(rest.get("embed", {}))
