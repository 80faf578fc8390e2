"""Llama3-8B, every parameter, 65,536 tokens on one 80 GB GPU or larger.

    python train.py --config configs/llama3_8b.py \
        --init-from meta-llama/Meta-Llama-3-8B --data.source documents/

bfloat16 weights with stochastic rounding, AdamW with 8-bit moments, each layer updated
in the backward pass. The planner picks what is kept of each layer, and the chunks, for
the memory of the GPU that is there. One document a row; one longer than a row is cut.
Short ones fill rows with `--data.packing`, at the cost of their own lengths on Hopper;
elsewhere packed rows miss cuDNN's attention. For more than the device holds, let layer
inputs go to host memory: `--train.host-memory 100GiB --data.seq-len 393216`; `mst-jax
plan` says what fits before you have the GPU.

Measured on an H200 with SGD in AdamW's place, from a Hugging Face checkpoint: 5047
tokens/s, 53.9 GiB with attention saved (docs/benchmarks/step-2026-11-25.md); with the
inputs on the host the step alone 4250 tokens/s, 23.5 GiB, before the kernels
(docs/benchmarks/plans-2026-11-24.md). With AdamW one step of 393,216 tokens was run on
an H100 of 80 GB (docs/benchmarks/max_seq_len-2026-11-25-h100.md); other lengths were
compiled (docs/benchmarks/max_seq_len-2026-11-25.md).
"""

from mst_jax.config import Config, DataConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        init_from="meta-llama/Meta-Llama-3-8B",
        out_dir="runs/llama3_8b",
        data=DataConfig(
            source="stdlib", seq_len=65536, batch_size=1,
            packing=False,
        ),
        optim=OptimConfig(
            name="adamw", learning_rate=1e-5, warmup_steps=20,
            param_dtype="bfloat16", moment_dtype="int8", in_backward=True, clip="layer",
        ),
        train=TrainConfig(
            steps=1000, memory_budget="auto", eval_every=100, save_every=100, keep=1,
        ),
    )  # fmt: skip
