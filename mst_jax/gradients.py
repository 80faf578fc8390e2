"""Loss and gradients of one batch on one device's own shards, under a residual plan.

    tokens -> embed -> layers (stack.py) -> final norm, LM head, loss -> back

The pieces are apart because the two kinds of step need them apart: the ordinary one
collects whole gradients, the one that updates in the backward pass has used the head's
gradient before the layers' exist. Gradients are those of the sum of the losses.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.config import Config, ModelConfig
from mst_jax.layer import Context, layer_forward
from mst_jax.mini_sequence import ROW_MULTIPLE
from mst_jax.ops import attention, linear_cross_entropy, swiglu
from mst_jax.ops.attention import find_documents
from mst_jax.ops.rms_norm import rms_norm
from mst_jax.ops.rope import rope_tables
from mst_jax.optim import join_frozen, split_frozen
from mst_jax.plan import Plan, parse_plan
from mst_jax.stack import WeightsAt, stack_forward

Batch = dict[str, jax.Array]


@dataclass
class Forward:
    """What a forward pass leaves for the backward pass of the layers."""

    plan: Plan
    ctx: Context
    kept: list[dict[str, jax.Array]]
    total: jax.Array
    """Sum of the losses, f32."""
    count: jax.Array
    """Labels that count, f32."""
    d_head: Any
    """Gradients of what the loss reads: final_norm, and lm_head or embed (tied)."""
    dy: jax.Array
    """Gradient of the last layer's output, [B, T, D]."""


def forward(
    cfg: Config, model: ModelConfig, rest: Any, weights_at: WeightsAt, batch: Batch
) -> Forward:
    """Run a batch, and the loss and the head both ways.

    Args:
        cfg: the plan, chunk sizes, dtypes and frozen parameters.
        model: its shape.
        rest: all parameters but the layers, whole.
        weights_at: i -> layer i, whole, in the compute dtype (`compute_layer`).
        batch: `tokens` and `labels` int [B, T], labels already shifted and -100 where
            there is none; optionally `positions` and `segment_ids`.
    """
    plan, ctx = make_plan(cfg, model), _context(cfg, model, batch)
    y, kept = stack_forward(plan, weights_at, _embed(cfg, rest, batch), ctx)

    names = ("final_norm", "embed" if model.tie_embeddings else "lm_head")
    head, frozen = split_frozen({n: rest[n] for n in names}, cfg.optim.freeze)

    def loss(head, y):
        return _loss(cfg, model, join_frozen(head, frozen), y, batch["labels"])

    total, vjp, count = jax.vjp(loss, head, y, has_aux=True)
    d_head, dy = vjp(jnp.ones_like(total))
    return Forward(plan, ctx, kept, total, count, d_head, dy)


def evaluate(
    cfg: Config, model: ModelConfig, rest: Any, weights_at: WeightsAt, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Return (sum of the losses, labels that count) of a batch, f32.

    As `forward`, in its chunks and head groups, with nothing kept.
    """
    ctx = _context(cfg, model, batch)

    def layer(i, x):
        return layer_forward(weights_at(i), x, ctx)[0]

    y = jax.lax.fori_loop(0, model.num_layers, layer, _embed(cfg, rest, batch))
    return _loss(cfg, model, rest, y, batch["labels"])


def _context(cfg: Config, model: ModelConfig, batch: Batch) -> Context:
    B, T = batch["tokens"].shape
    positions = batch.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segment_ids = batch.get("segment_ids")
    return Context(
        cfg=model,
        rope=jax.named_scope("rope")(rope_tables)(
            model.rope, model.head_size, positions
        ),
        segment_ids=None if segment_ids is None else find_documents(segment_ids),
        chunk_size=layer_chunk_size(cfg, model, B, T),
        head_groups=cfg.train.head_groups,
        attention_implementation=cfg.train.asked_attention,
        implementation=cfg.train.asked_implementation,
    )


@jax.named_scope("embed")
def _embed(cfg: Config, rest: Any, batch: Batch) -> jax.Array:
    return rest["embed"]["embedding"][batch["tokens"]].astype(cfg.train.compute_dtype)


@jax.named_scope("head")
def _loss(
    cfg: Config, model: ModelConfig, rest: Any, y: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    with jax.named_scope("norm"):
        hidden = rms_norm(y, rest["final_norm"]["scale"], eps=model.rms_norm_eps)
    tied = model.tie_embeddings
    weight = rest["embed"]["embedding"] if tied else rest["lm_head"]["kernel"]
    return linear_cross_entropy.linear_cross_entropy(
        hidden, weight, labels, chunk_size=cfg.train.loss_chunk_size,
        vocab_chunk_size=cfg.train.vocab_chunk_size,
        implementation=cfg.train.asked_implementation, transposed=tied,
    )  # fmt: skip


def make_plan(cfg: Config, model: ModelConfig) -> Plan:
    """Return the plan of a run.

    Raises:
        ValueError: it does not fit the model.
    """
    if model.num_kv_heads % cfg.train.head_groups:
        raise ValueError(
            f"TrainConfig.head_groups={cfg.train.head_groups} must divide "
            f"num_kv_heads={model.num_kv_heads}"
        )
    train = cfg.train
    return parse_plan(
        train.plan, model.num_layers,
        head_groups=train.head_groups, prefetch=train.prefetch,
    )  # fmt: skip


def layer_chunk_size(cfg: Config, model: ModelConfig, batch: int, length: int) -> int:
    """Return the tokens of a layer's chunk that the configuration stands for."""
    if cfg.train.mlp_chunk_size is not None:
        return cfg.train.mlp_chunk_size or length
    dtype = jnp.dtype(cfg.train.compute_dtype)
    return min(length, swiglu.mlp_chunk_size(batch, model.intermediate_size, dtype))


def attention_implementation(
    cfg: Config,
    model: ModelConfig,
    batch: int,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return what computes attention for `batch` sequences on a device, and why.

    Args:
        cfg, model: the run.
        batch: sequences of one device.
        capability: of the GPU, if it is not this machine's.

    Raises:
        NotImplementedError: it was asked for by name, and cannot; with the way out.
    """
    train = cfg.train
    try:
        return attention.choose_implementation(
            model.head_size, jnp.dtype(train.compute_dtype),
            segmented=cfg.data.packing, sliding_window=model.sliding_window,
            shape=(batch, cfg.data.seq_len, model.num_heads // train.head_groups),
            capability=capability, asked=train.asked_attention,
        )  # fmt: skip
    except NotImplementedError as error:
        raise NotImplementedError(
            f"TrainConfig.attention={train.attention!r}: {error}; set it to 'auto' or "
            "'xla'"
        ) from None


def mlp_implementation(
    cfg: Config,
    model: ModelConfig,
    rows: int = ROW_MULTIPLE,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return what can compute chunks of the MLP, whatever was asked for, and why.

    Args:
        cfg, model: the run.
        rows: tokens of a chunk, of all sequences of a device.
        capability: of the GPU, if it is not this machine's.
    """
    return swiglu.choose_implementation(
        jnp.dtype(cfg.train.compute_dtype), model.hidden_size, model.intermediate_size,
        rows=rows, capability=capability,
    )  # fmt: skip


def head_implementation(
    cfg: Config, model: ModelConfig, capability: tuple[int, int] | None = None
) -> tuple[str, str]:
    """Return what computes the LM head's loss on a device, and why.

    Args:
        cfg, model: the run.
        capability: of the GPU, if it is not this machine's.

    Raises:
        NotImplementedError: it was asked for by name, and cannot; with the way out.
    """
    name, why = linear_cross_entropy.choose_implementation(
        model.hidden_size, jnp.dtype(cfg.train.compute_dtype), capability=capability
    )
    asked = cfg.train.asked_implementation
    if asked == "mosaic_gpu" != name:
        raise NotImplementedError(
            f"TrainConfig.implementation={asked!r} cannot compute the LM head's loss: "
            f"{why}; set it to 'auto' or 'xla'"
        )
    return (asked, "as asked for") if asked else (name, why)


@jax.named_scope("embed")
def embedding_gradient(
    tokens: jax.Array, dx: jax.Array, embed: Any, d_tied: Any = None
) -> Any:
    """Return the f32 gradient of the embedding.

    Args:
        tokens: [B, T].
        dx: [B, T, D] gradient of the first layer's input.
        embed: the parameters, for their shape.
        d_tied: the LM head's gradient when it is the same matrix.
    """
    shape = embed["embedding"].shape
    # After dx: XLA would make these zeros before the layers' backward pass, to fill a
    # wait for the host link, and hold them all through it.
    zero, dx = jax.lax.optimization_barrier((jnp.float32(0), dx))
    total = jnp.full(shape, zero)
    if d_tied is not None:
        total = d_tied["embedding"].astype(jnp.float32)
    # In f32: a frequent token's rows add up over the whole sequence.
    return {"embedding": total.at[tokens].add(dx.astype(jnp.float32))}


@jax.named_scope("weights")
def compute_layer(layer: Any, cfg: Config) -> Any:
    """Return a layer's weights with the matrices in the compute dtype."""
    dtype = cfg.train.compute_dtype
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, layer)
