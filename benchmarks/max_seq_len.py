"""The longest sequences: which fit a budget, and whole steps at them.

    python benchmarks/max_seq_len.py
    python benchmarks/max_seq_len.py --rows 80-host-384k --measure 80-host-384k

Each row is a model, a length, a memory budget and a plan. Its real train step is
compiled for the row's GPU, which needs none (`mst_jax/compile_only.py`, the CUDA
plugin): 20 to 60 seconds a row on two cores. cuDNN's workspace, which such a
compilation leaves out, is the planner's. The rows that --measure names are compiled and
run on the GPU that is there instead, with JAX's memory pool limited to the budget, so
that a step that needs more fails. Weights are random, made on the device. Writes a
dated markdown, a CSV and a plot.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import report
from arguments import positive

from mst_jax.compile_only import compile_step
from mst_jax.config import PRESETS, Config, DataConfig, OptimConfig, TrainConfig
from mst_jax.gpus import GPUS
from mst_jax.prediction import predict
from mst_jax.step_memory import WORKSPACE

HOW = {
    "compiled": "compiled: NOT RUN. The real step compiled for the GPU in the row, "
    "without one. compiled_GiB is XLA's peak, workspace_GiB what cuDNN's attention "
    "takes besides, as measured on an H200; device_GiB is their sum",
    "run": "run: on a GPU, with JAX's memory pool limited to the budget (pool_GiB). "
    "compiled_GiB is XLA's peak there, device_GiB the allocator's",
}
ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    preset: str
    tokens: int
    gpu: str
    """That the step is compiled for."""
    budget: float
    """GiB of device memory."""
    host: int
    """GiB of host memory."""
    plan: str
    head_groups: int = 8
    optimizer: str = "adamw"
    moments: str = "int8"
    mlp_chunk_size: int | None = None
    """Divides the tokens, as the planner chooses it."""
    loss_chunk_size: int | None = None
    """The same."""


def lean(tokens: int, budget: float) -> Row:
    """SGD in the least memory without a host's, against Liger's tiled MLP with
    checkpointing at the same length."""
    return Row(
        f"lean-{tokens // 1024}k", "llama3_8b", tokens, "h200", budget, 0,
        "* save=input", optimizer="sgd", moments="float32", mlp_chunk_size=4096,
        loss_chunk_size=1024,
    )  # fmt: skip


ROWS = [
    lean(8192, 30.2),
    lean(32768, 32.0),
    lean(65536, 37.9),
    Row(
        "80-bf16-100k", "llama3_8b", 102400, "h100", 80, 0, "* save=input",
        moments="bfloat16", mlp_chunk_size=12800, loss_chunk_size=4096,
    ),
    Row(
        "80-8bit-150k", "llama3_8b", 153600, "h100", 80, 0, "* save=input",
        mlp_chunk_size=15360, loss_chunk_size=3840,
    ),
    Row(
        "80-host-384k", "llama3_8b", 393216, "h100", 80, 120,
        "24 offload=input; 8 offload=input save=attention",
    ),
    Row(
        "80-host-450k", "llama3_8b", 460800, "h100", 80, 120, "* offload=input",
        mlp_chunk_size=15360, loss_chunk_size=3840,
    ),
    Row(
        "139-host-650k", "llama3_8b", 665600, "h200", 139, 120,
        "23 offload=input; 9 save=input", mlp_chunk_size=13312, loss_chunk_size=4160,
    ),
    Row(
        "139-host-1200k", "llama3_8b", 1228800, "h200", 139, 120,
        "24 offload=input every=2; 8 save=input every=2",
    ),
    Row("24-1b-128k", "llama32_1b", 131072, "rtx-4090", 24, 0, "* save=input"),
    Row(
        "15-1b-32k", "llama32_1b", 32768, "t4", 15, 0, "* save=input",
        mlp_chunk_size=4096, loss_chunk_size=1024,
    ),
]  # fmt: skip


def config(row: Row) -> Config:
    """Return the run that a row stands for."""
    return Config(
        model=PRESETS[row.preset],
        data=DataConfig(
            seq_len=row.tokens, batch_size=1, tokenizer="none", packing=False
        ),
        optim=OptimConfig(
            name=row.optimizer, moment_dtype=row.moments, param_dtype="bfloat16",
            warmup_steps=0, clip="layer", in_backward=True, learning_rate=1e-4,
        ),
        train=TrainConfig(
            plan=row.plan, head_groups=row.head_groups,
            mlp_chunk_size=row.mlp_chunk_size, loss_chunk_size=row.loss_chunk_size,
        ),
    )  # fmt: skip


def compiled(row: Row) -> dict:
    """Compile a row's step for its GPU, without one."""
    cfg, model, gpu = config(row), PRESETS[row.preset], GPUS[row.gpu]
    began = time.perf_counter()
    step = compile_step(cfg, model, gpu)
    seconds = time.perf_counter() - began
    phases = predict(cfg, model, gpu).phases.values()
    workspace = max(phase.get(WORKSPACE, 0) for phase in phases)
    return {
        "compiled_GiB": round(step.device / GIB, 2),
        "workspace_GiB": round(workspace / GIB, 2),
        "device_GiB": round((step.device + workspace) / GIB, 2),
        "host_GiB": round(step.host / GIB, 2),
        "compile_s": round(seconds),
    }


def one(row: Row, steps: int) -> dict:
    """Compile a row's step on this GPU, and run it `steps` times."""
    import jax
    import jax.numpy as jnp

    from mst_jax.model import init_params
    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import abstract_state, init_train_state, make_train_step

    cfg, model = config(row), PRESETS[row.preset]
    mesh = make_mesh(cfg.mesh)
    shape = jax.ShapeDtypeStruct((1, 1, row.tokens), jnp.int32)
    step = make_train_step(cfg, model, mesh)
    began = time.perf_counter()
    batch = {"tokens": shape, "labels": shape}
    compiled = step.lower(abstract_state(cfg, model), batch).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    device = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    found = {
        "compiled_GiB": round(device / GIB, 2),
        "host_GiB": round(memory.host_temp_size_in_bytes / GIB, 2),
        "compile_s": round(seconds),
    }
    state = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))()
    key = jax.random.key(0)
    tokens = jax.random.randint(key, shape.shape, 0, model.vocab_size)
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, -1)}
    times, losses = [], []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    best = min(times)
    return found | {
        "step_s": round(best, 1),
        "tokens_per_second": round(row.tokens / best),
        "device_GiB": round(stats["peak_bytes_in_use"] / GIB, 2),
        "pool_GiB": round(stats["bytes_limit"] / GIB, 2),
        "losses": " ".join(f"{x:.4f}" for x in losses),
        "grad_norm": round(float(metrics["grad_norm"]), 4),
    }


def in_process(row: Row, steps: int, total: float) -> dict:
    """Run `one` in a process whose memory pool is the row's budget."""
    fraction = min(0.97, row.budget / total)
    # XLA's host pool may take all that it is allowed: allow what the step needs.
    host = predict(config(row), PRESETS[row.preset], GPUS["h200"]).peak_host / GIB
    env = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(max(64, math.ceil(1.02 * host) + 1)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    }
    command = [sys.executable, __file__, "--one", row.name, "--steps", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--rows", nargs="+", default=[r.name for r in ROWS])
    parser.add_argument("--measure", nargs="*", default=[], help="rows to run")
    parser.add_argument("--steps", type=positive, default=1, help="of a measured row")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = {r.name: r for r in ROWS}
    if unknown := {*args.rows, *args.measure} - {*rows}:
        raise SystemExit(f"no rows {sorted(unknown)}; there are {[*rows]}")
    if args.one:
        print(json.dumps(one(rows[args.one], args.steps)))
        return
    kind, total = present_gpu() if args.measure else ("", 0.0)
    results = []
    for row in (rows[name] for name in args.rows):
        if row.name in args.measure:
            found = {"how": "run"} | in_process(row, args.steps, total)
        else:
            found = {"how": "compiled"} | compiled(row)
        if "error" not in found:
            fits = found["device_GiB"] <= row.budget and found["host_GiB"] <= row.host
            found["fits"] = "yes" if fits else "NO"
        results.append(asdict(row) | found)
        print(json.dumps(results[-1]), flush=True)
    write(args, kind, results)


def present_gpu() -> tuple[str, float]:
    """Return the name and the memory, in GiB, of this machine's GPU."""
    query = (
        "import jax; d = jax.devices()[0]; print(d.device_kind); "
        "print(d.memory_stats()['bytes_limit'])"
    )
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.0"}
    done = subprocess.run(
        [sys.executable, "-c", query], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"--measure needs a GPU:\n{done.stderr[-1500:]}")
    kind, total = done.stdout.split("\n")[:2]
    return kind, int(total) / GIB


def write(args, kind: str, results: list[dict]) -> None:
    """Write CSV, markdown and plot, and print the markdown."""
    path = report.write(
        args.out, "max_seq_len", "Longest sequences", results,
        gpu=kind or "none",
        packages=("jax", "jaxlib", "flax", "optax"),
        notes=[
            "every parameter trained, batch 1, bf16 weights with stochastic rounding, "
            "optimizer in the backward pass, gradients clipped by layer; memory in GiB",
            *[HOW[how] for how in HOW if any(r["how"] == how for r in results)],
            "fits: device_GiB is at most the budget, host_GiB at most the host's",
        ],
        suffix="-measured" if kind else "",  # files of their own
    )  # fmt: skip
    plot(results, path.with_suffix(".png"))
    print(path.read_text())
    if any(r.get("fits") != "yes" for r in results):
        raise SystemExit("a row failed, or does not fit")


def plot(results: list[dict], path: Path) -> None:
    """Draw device and host memory of each row as bars."""
    from matplotlib.figure import Figure

    whole = [r for r in results if "device_GiB" in r]
    figure = Figure(figsize=(0.9 * len(whole) + 1.5, 5), layout="constrained")
    axes = figure.add_subplot(ylabel="GiB")
    names = [
        f"{r['tokens'] // 1024}K\n{r['preset']}\n{r['optimizer']}"
        f"\n{'' if r['optimizer'] == 'sgd' else r['moments']}\n{r['how']}"
        for r in whole
    ]
    for i, r in enumerate(whole):
        labels = ["device", "host", "device budget"] if i == 0 else [None] * 3
        axes.bar(i - 0.2, r["device_GiB"], 0.4, color="C0", label=labels[0])
        axes.bar(i + 0.2, r["host_GiB"], 0.4, color="C1", label=labels[1])
        axes.hlines(
            r["budget"], i - 0.4, i, colors="k", linestyles=":", label=labels[2]
        )
    axes.set_xticks(range(len(whole)), names, fontsize=7)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
