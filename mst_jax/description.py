"""What a run says at its start: model, data, plan, what computes each op and why."""

import jax

from mst_jax.chunk_loop import loop_chunks
from mst_jax.compile_cache import CompileCache
from mst_jax.config import Config, ModelConfig
from mst_jax.data import Data
from mst_jax.gradients import (
    attention_implementation,
    head_implementation,
    layer_chunk_size,
    make_plan,
    mlp_implementation,
)
from mst_jax.metrics import peak_flops
from mst_jax.mini_sequence import split_length
from mst_jax.ops import linear_cross_entropy

LABEL = 12
"""Columns of a line's name."""
ASKED = "as asked for"


def implementations(cfg: Config, model: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return what computes each op of the step on this device, and why, by op.

    An op that has a choice has `choose_implementation`; ask it here.

    Raises:
        NotImplementedError: an implementation that was asked for by name cannot
            compute this run; with the way out.
    """
    return {
        "attention": attention_implementation(cfg, model, local_batch(cfg)),
        "head, loss": head_implementation(cfg, model),
        "mlp": _mlp(cfg, model),
        "norm, rope": ("xla", "elementwise, which XLA fuses"),
    }


def _mlp(cfg: Config, model: ModelConfig) -> tuple[str, str]:
    """Of the chunks that run; both names where a shorter last one has another."""
    T, batch = cfg.data.seq_len, local_batch(cfg)
    sizes = loop_chunks(T, layer_chunk_size(cfg, model, batch, T))
    if asked := cfg.train.asked_implementation:
        for size in filter(None, sizes):
            name, reason = mlp_implementation(cfg, model, batch * size)
            if asked == "mosaic_gpu" != name:
                way_out = "set it to 'auto' or 'xla'"
                if mlp_implementation(cfg, model)[0] == asked:
                    way_out = f"set {_chunks_of_8_rows(cfg, sizes[0])}, or {way_out}"
                raise NotImplementedError(
                    f"TrainConfig.implementation={asked!r} cannot compute the MLP in "
                    f"chunks of {_chunks(sizes, T)}, {batch} sequences: {reason}; "
                    f"{way_out}"
                )
        return asked, ASKED
    name, why = mlp_implementation(cfg, model, batch * sizes[0])
    if rest := sizes[1]:
        last, its_why = mlp_implementation(cfg, model, batch * rest)
        if last != name:
            return f"{name}, {last}", f"{why}; the last {rest} tokens: {its_why}"
    return name, why


def _chunks_of_8_rows(cfg: Config, most: int) -> str:
    """Name the option, and its value, whose chunks have multiples of 8 rows."""
    T, batch = cfg.data.seq_len, local_batch(cfg)
    for size in range(most, 0, -1):
        if not any(batch * part % 8 for part in loop_chunks(T, size)):
            return f"TrainConfig.mlp_chunk_size={size}"
    return "DataConfig.seq_len to a multiple of 8"


def local_batch(cfg: Config) -> int:
    """Return the sequences that one device has of a micro-batch."""
    return cfg.data.batch_size // (cfg.mesh.data * cfg.mesh.fsdp)


def _fill(data: Data) -> str:
    """Say of rows of one document how much of them is padding, where it is much."""
    if data.fill is None or data.fill > 0.9:
        return ""
    return f"; rows are {data.fill:.0%} full, --data.packing fills them"


def _chunks(sizes: tuple[int, int], length: int) -> str:
    last = f", the last of {sizes[1]}" if sizes[1] else ""
    return f"{sizes[0]} of {length} tokens{last}"


def _loss_chunks(cfg: Config, model: ModelConfig, implementation: str) -> str:
    T, V = cfg.data.seq_len, model.vocab_size
    size = cfg.train.loss_chunk_size or linear_cross_entropy.loss_chunk_size(
        local_batch(cfg), V, implementation
    )
    text = f"chunks of {split_length(T, size)[1]} of {T} tokens, "
    if columns := cfg.train.vocab_chunk_size:
        return text + f"the head's gradient {min(columns, V)} of {V} columns at a time"
    return text + "gradients in the forward pass"


def describe(
    cfg: Config, model: ModelConfig, data: Data, cache: CompileCache
) -> list[str]:
    """Return the lines: model, data, chunks, plan, ops, devices."""
    T = cfg.data.seq_len
    batch = local_batch(cfg)
    chunks = loop_chunks(T, layer_chunk_size(cfg, model, batch, T))
    ops = implementations(cfg, model)
    peak = peak_flops()
    tokens = f"{data.num_tokens:,} tokens" if data.num_tokens else "streamed"
    heads = model.num_kv_heads // cfg.train.head_groups
    device = jax.devices()[0].device_kind
    lines = {
        "model": f"{model.num_params:,} parameters in {cfg.optim.param_dtype}, "
        f"computed in {cfg.train.compute_dtype}",
        "data": f"{cfg.data.source}: {tokens}, T = {T}, batch {cfg.data.batch_size} x "
        f"{cfg.train.accumulate}" + _fill(data),
        "layers": f"chunks of {_chunks(chunks, T)}; {heads} of {model.num_kv_heads} "
        "key/value heads at a time",
        "loss": _loss_chunks(cfg, model, ops["head, loss"][0]),
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
