"""Hidden states and labels -> (sum, count); never the logits of a whole sequence."""

from typing import Any

import jax

from mst_jax.config import TrainConfig
from mst_jax.model import Llama
from mst_jax.ops.linear_cross_entropy import linear_cross_entropy


def next_token_loss(
    model: Llama, batch: dict[str, jax.Array], cfg: TrainConfig, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Sum the cross entropy of a batch.

    Args:
        model: the decoder.
        batch: `tokens` and `labels` int [B, T], labels already shifted and -100 where
            there is none; optionally `positions` and `segment_ids` int [B, T].
        cfg: chunk sizes, implementation.
        **options: passed on to the model.

    Returns:
        (sum of the losses, number of labels that count), f32. Divide once all
        micro-batches and devices are added up.
    """
    hidden = model(
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        mlp_chunk_size=cfg.mlp_chunk_size,
        mlp_implementation=cfg.asked_implementation,
        **{"implementation": cfg.asked_attention, **options},
    )
    return linear_cross_entropy(
        hidden, model.head_weight(), batch["labels"], chunk_size=cfg.loss_chunk_size,
        vocab_chunk_size=cfg.vocab_chunk_size,
        implementation=cfg.asked_implementation,
    )  # fmt: skip
