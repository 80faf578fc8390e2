"""Time this package's train step under one plan, at one length.

    python benchmarks/peers/with_jax.py JOB    # JSON, from benchmarks/peers.py

Prints a line `ROW {...}`. The same weights, tokens and optimizer as the peers'
(`with_torch.py`), each layer updated in the backward pass, bf16 weights rounded
stochastically.
"""

import json
import sys
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import weights

from mst_jax import memory
from mst_jax.config import PRESETS, Config, DataConfig, OptimConfig, TrainConfig
from mst_jax.planner import default_budget
from mst_jax.sharding import make_mesh
from mst_jax.train_step import abstract_state, init_train_state, make_train_step

GIB = 2**30
PLANS = {
    "ours-saved": "none",
    "ours-but-gate-up": "* save=input+qkv+attention+mlp_input",
    "ours-attention": "save_attention",
    "ours-inputs": "full",
}


def make_config(job: dict[str, Any]) -> Config:
    """Return the run: a plan of `PLANS`, or `ours` by the planner, in its budgets."""
    name, device, host = job["read"]
    tokens, model = job["lengths"][0], PRESETS[job["preset"]]
    options: dict[str, Any] = {"plan": PLANS[name]} if name in PLANS else {}
    adamw = job["optimizer"] == "adamw"
    cfg = Config(
        model=model,
        data=DataConfig(
            seq_len=tokens, batch_size=1, tokenizer="none", packing=False
        ),
        optim=OptimConfig(
            name=job["optimizer"], learning_rate=job["learning_rate"],
            schedule="constant", warmup_steps=0, clip_norm=None, in_backward=True,
            param_dtype="bfloat16", moment_dtype="bfloat16" if adamw else "float32",
        ),
        train=TrainConfig(**options),
    )  # fmt: skip
    if name in PLANS:
        return cfg
    gpu = memory.present_gpu()
    device_bytes = int(device * GIB) or default_budget(gpu)
    return memory.fastest_plan(cfg, model, gpu, device_bytes, int(host * GIB))[0]


def measure(cfg: Config, job: dict[str, Any]) -> dict[str, Any]:
    """Compile the step and time it: at least two steps, more while they are short."""
    model, tokens = PRESETS[job["preset"]], cfg.data.seq_len
    mesh = make_mesh(cfg.mesh)
    step = make_train_step(cfg, model, mesh)

    def start():
        return init_train_state(cfg, weights.jax_params(model), mesh)

    ids = weights.token_ids(tokens, model.vocab_size)
    batch = {
        "tokens": jnp.asarray(ids)[None, None],
        "labels": jnp.asarray(np.append(ids[1:], np.int32(-100)))[None, None],
    }
    began = time.perf_counter()
    compiled = step.lower(abstract_state(cfg, model), batch).compile()
    compile_seconds = time.perf_counter() - began
    size = compiled.memory_analysis()
    state = jax.jit(start)()
    times, losses = [], []
    while len(times) < job["warmup"] + 2 or (
        len(times) < job["warmup"] + job["steps"]
        and sum(times[job["warmup"] :]) < job["timed_seconds"]
    ):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    stats = jax.devices()[0].memory_stats() or {}
    timed = times[job["warmup"] :]
    return {
        "step_s": median(timed),
        "fastest_s": min(timed),
        "first_step_s": times[0],
        "compile_s": compile_seconds,
        "steps": len(timed),
        "peak_GiB": stats.get("peak_bytes_in_use", 0) / GIB,
        "host_GiB": size.host_temp_size_in_bytes / GIB,
        "compiled_GiB": (size.argument_size_in_bytes + size.temp_size_in_bytes) / GIB,
        "losses": losses,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    row: dict[str, Any] = {
        "tokens": job["lengths"][0],
        "versions": {"jax": jax.__version__},
    }
    try:
        cfg = make_config(job)
        train = cfg.train
        row["plan"] = train.plan + ", a layer ahead" * train.prefetch
        if train.head_groups > 1:
            row["plan"] += f", {train.head_groups} head groups"
        row |= measure(cfg, job)
    except ValueError as error:  # nothing fits the budget
        row["error"] = str(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["error"] = f"out of memory: {error}"
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
