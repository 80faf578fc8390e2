"""What a run says at its start: model, data, plan, what computes each op and why."""

import jax
import jax.numpy as jnp

from mst_jax.compile_cache import CompileCache
from mst_jax.config import Config, ModelConfig
from mst_jax.data import Data
from mst_jax.gradients import layer_chunk_size, make_plan
from mst_jax.metrics import peak_flops
from mst_jax.ops import attention, linear_cross_entropy, swiglu

LABEL = 12
"""Columns of a line's name."""


def implementations(cfg: Config, model: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return what computes each op of the step on this device, and why, by op.

    An op that has a choice has `choose_implementation`; ask it here.
    """
    dtype = jnp.dtype(cfg.train.compute_dtype)
    batch = cfg.data.batch_size // (cfg.mesh.data * cfg.mesh.fsdp)
    heads = model.num_heads // cfg.train.head_groups
    name, why = attention.choose_implementation(
        model.head_size, dtype, segmented=cfg.data.packing,
        shape=(batch, cfg.data.seq_len, heads),
    )  # fmt: skip
    if cfg.train.asked_attention:
        name, why = cfg.train.asked_attention, "as asked for"
    elif name == "xla":
        why = f"not cudnn: {why}"
    head = linear_cross_entropy.choose_implementation(model.hidden_size, dtype)
    mlp = swiglu.choose_implementation(
        dtype, model.hidden_size, model.intermediate_size
    )
    if asked := cfg.train.asked_implementation:
        head = mlp = asked, "as asked for"
    return {
        "attention": (name, why),
        "head, loss": head,
        "mlp": mlp,
        "norm, rope": ("xla", "elementwise, which XLA fuses"),
    }


def describe(
    cfg: Config, model: ModelConfig, data: Data, cache: CompileCache
) -> list[str]:
    """Return the lines: model, data, chunks, plan, ops, devices."""
    T = cfg.data.seq_len
    batch = cfg.data.batch_size // (cfg.mesh.data * cfg.mesh.fsdp)
    chunk = layer_chunk_size(cfg, model, batch, T)
    ops = implementations(cfg, model)
    head = cfg.train.loss_chunk_size or linear_cross_entropy.loss_chunk_size(
        batch, model.vocab_size, ops["head, loss"][0]
    )
    peak = peak_flops()
    tokens = f"{data.num_tokens:,} tokens" if data.num_tokens else "streamed"
    heads = model.num_kv_heads // cfg.train.head_groups
    device = jax.devices()[0].device_kind
    lines = {
        "model": f"{model.num_params:,} parameters in {cfg.optim.param_dtype}, "
        f"computed in {cfg.train.compute_dtype}",
        "data": f"{cfg.data.source}: {tokens}, T = {T}, batch {cfg.data.batch_size} x "
        f"{cfg.train.accumulate}",
        "layers": f"chunks of {chunk} of {T} tokens, {heads} of {model.num_kv_heads} "
        "key/value heads at a time",
        "loss": f"chunks of {min(head, T)} of {T} tokens, gradients in the forward "
        "pass",
        "plan": make_plan(cfg, model).describe(),
        "update": f"{cfg.optim.name}, "
        + ("in the backward pass" if cfg.optim.in_backward else "after it"),
    }
    for op, (name, why) in ops.items():
        lines[op] = f"{name}: {why}"
    lines["devices"] = f"{cfg.mesh.data * cfg.mesh.fsdp} x {device}" + (
        f", peak {peak[1] / 1e12:.0f} TFLOP/s ({peak[0]})" if peak else ""
    )
    if data.unigram_entropy is not None:
        entropy = f"{data.unigram_entropy:.4f} nats a token, held out"
        lines["to beat"] = f"unigram entropy {entropy}"
    lines["cache"] = str(cache)
    return [f"{name:{LABEL}}{text}" for name, text in lines.items()]
