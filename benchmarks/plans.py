"""Time whole steps of Llama3-8B under different residual plans, leanest first.

    python benchmarks/plans.py offload-8 offload full attention-8 attention
    python benchmarks/plans.py offload offload-ahead offload-attention-ahead full
    python benchmarks/plans.py --layers 8 --tokens 32768 adamw-host adamw

One process, weights made on the device, SGD in the backward pass if the variant does
not say AdamW, batch 1, no data pipeline: the step alone. JAX's peak counter only rises,
so the leanest plan comes first. Prints one JSON line a variant.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any

from arguments import positive

VARIANTS: dict[str, dict[str, Any]] = {
    # name: fields of TrainConfig and OptimConfig
    "offload-8": {"plan": "offload", "head_groups": 8},
    "offload-8-ahead": {"plan": "offload", "head_groups": 8, "prefetch": True},
    "offload": {"plan": "offload"},
    "offload-ahead": {"plan": "offload", "prefetch": True},
    "offload-attention": {"plan": "offload_attention"},
    "offload-attention-ahead": {"plan": "offload_attention", "prefetch": True},
    "full": {"plan": "full"},
    "attention-8": {"plan": "save_attention", "head_groups": 8},
    "attention": {"plan": "save_attention"},
    "attention-after": {"plan": "save_attention", "optim": {"in_backward": False}},
    "all-but-gate-up": {"plan": "* save=input+qkv+attention+mlp_input"},
    "all-but-gate-up-whole": {
        "plan": "* save=input+qkv+attention+mlp_input",
        "mlp_chunk_size": 0,
    },
    "gate-up": {
        "plan": "* offload=input+qkv+attention+mlp_input save=gate_up",
        "mlp_chunk_size": 0,
        "prefetch": True,
    },
    "offload-whole": {"plan": "offload", "mlp_chunk_size": 0},
    "offload-whole-ahead": {"plan": "offload", "mlp_chunk_size": 0, "prefetch": True},
    "full-whole": {"plan": "full", "mlp_chunk_size": 0},
    "none": {"plan": "none"},
    "attention-whole": {"plan": "save_attention", "mlp_chunk_size": 0},
    "none-whole": {"plan": "none", "mlp_chunk_size": 0},
    "none-whole-xla": {"plan": "none", "mlp_chunk_size": 0, "implementation": "xla"},
    "none-whole-cudnn": {"plan": "none", "mlp_chunk_size": 0, "attention": "cudnn"},
}
ADAMW: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-after": {"in_backward": False},
    "adamw-8bit": {"moment_dtype": "int8"},
}
VARIANTS |= {
    name + away * "-host": {
        "plan": "none", "mlp_chunk_size": 0,
        "optim": optim | {
            "name": "adamw", "learning_rate": 1e-4, "state_on_host": away
        },
    }
    for name, optim in ADAMW.items()
    for away in (False, True)
}  # fmt: skip


def run(name: str, model: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Compile and time one variant; seconds are the median after the first step."""
    import jax
    from implementations import random_batch, step_config

    from mst_jax.model import init_params
    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import init_train_state, make_train_step

    cfg = step_config(model, tokens, **VARIANTS[name])
    mesh = make_mesh(cfg.mesh)
    state = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))()
    batch = random_batch(model, tokens)
    step = make_train_step(cfg, model, mesh)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    times, losses = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(round(float(metrics["loss"]), 4))
        times.append(time.perf_counter() - began)
    seconds = sorted(times[1:])[steps // 2]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "variant": name, "tokens": tokens, "step_s": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        "state_GiB": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporaries_GiB": round(memory.temp_size_in_bytes / 2**30, 2),
        "host_GiB": round(host / 2**30, 2),
        "peak_GiB": round(peak / 2**30, 2), "losses": losses,
    }  # fmt: skip


def main() -> None:
    from mst_jax.config import PRESETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument(
        "--layers", type=positive, help="of the model; all if not given"
    )
    parser.add_argument("--tokens", type=positive, default=65536)
    parser.add_argument("--steps", type=positive, default=2)
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        raise SystemExit(f"no variants {sorted(unknown)}; there are {list(VARIANTS)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    model = PRESETS[args.preset]
    model = dataclasses.replace(model, num_layers=args.layers or model.num_layers)
    for name in args.variants:
        print(json.dumps(run(name, model, args.tokens, args.steps)), flush=True)


if __name__ == "__main__":
    main()
