"""Llama-3.2-1B, every parameter, 16,384 tokens on a 16 GB GPU.

    python train.py --config configs/llama32_1b.py \
        --init-from meta-llama/Llama-3.2-1B --data.source documents/

bfloat16 weights with stochastic rounding, AdamW with 8-bit moments, each layer updated
in the backward pass; the planner picks the rest for the memory of the GPU that is
there. Not run on a 16 GB GPU yet: compiled for a T4, 32,768 tokens take 10 GiB
(docs/benchmarks/max_seq_len-2026-11-25.md).
"""

from mst_jax.config import Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        init_from="meta-llama/Llama-3.2-1B",
        out_dir="runs/llama32_1b",
        data=DataConfig(
            source="stdlib", seq_len=16384, batch_size=1,
            packing=False,
        ),
        optim=OptimConfig(
            name="adamw", learning_rate=1e-5, warmup_steps=20,
            param_dtype="bfloat16", moment_dtype="int8", in_backward=True, clip="layer",
        ),
        train=TrainConfig(
            steps=1000, memory_budget="auto", eval_every=100, save_every=100,
        ),
    )  # fmt: skip
