"""Llama3-8B, every parameter, 65,536 tokens on one 80 GB GPU or larger.

    python train.py --config configs/llama3_8b.py \
        --init-from meta-llama/Meta-Llama-3-8B --data.source documents/

bfloat16 weights with stochastic rounding, Adafactor (no first moment, factored second
moment), attention saved, all else recomputed, MLP and LM head on mini-sequences. One
document a row, so that attention runs on cuDNN; a document longer than a row is cut.

Measured with SGD in Adafactor's place on an H200, 2026-11-24: 5009 tokens/s, 68.8 GiB
peak at 65,536 tokens (docs/benchmarks/step-2026-11-24-b.md). Adafactor itself was
compiled for an H200, not run.
"""

from mst_jax.config import Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    init_from = "meta-llama/Meta-Llama-3-8B"
    return Config(
        init_from=init_from,
        out_dir="runs/llama3_8b",
        data=DataConfig(
            source="stdlib", tokenizer=init_from, seq_len=65536, batch_size=1,
            packing=False,
        ),
        optim=OptimConfig(
            name="adafactor", learning_rate=1e-5, warmup_steps=20,
            param_dtype="bfloat16",
        ),
        train=TrainConfig(
            steps=1000, plan="save_attention", eval_every=100, save_every=100, keep=1,
        ),
    )  # fmt: skip
