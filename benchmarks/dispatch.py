"""Time how long the host needs to hand a tiny train step to the device.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --count h200      # without a GPU: launches only

The model of configs/tiny.py, AdamW, one document a row. For each setting of XLA's
command buffers (CUDA graphs) the table has the milliseconds until the call returns, the
milliseconds of a whole step, and how many kernels, copies and library calls the step
launches, loops counted as often as they run. `no work` is a jitted function that adds 1
to a step counter and passes the same donated state through: what arguments alone cost.
Medians; the losses of all settings are compared. Ends within a minute: what does not
fit is left out, and said.
"""

import argparse
import dataclasses
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from arguments import positive
from trace_program import Program

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
UNROLL = "xla_gpu_command_buffer_unroll_loops"
SETTINGS = ("default", "step", "loops", "off")
"""Of TrainConfig.command_buffers, and 'loops': XLA's own loops in a command buffer.
The most telling come first, since time may run out."""


def count_launches(hlo: str) -> Counter[str]:
    """Return what a compiled module launches, by kind of instruction.

    `loops` are those whose number of iterations XLA does not know: the host waits for
    the device before each, and their bodies are counted once.
    """
    program, found = Program(hlo), Counter[str]()
    for name, times in program.launches.items():
        found[program.by_name[name].opcode] += times
    found["loops"] = program.endless
    return +found


def tiny_step(chunk: int | None) -> tuple[Any, Any]:
    """Return the configuration, with chunks of that many tokens, and the model."""
    from mst_jax.cli import load_recipe

    cfg = load_recipe(ROOT / "configs" / "tiny.py")
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, packing=False),
        train=dataclasses.replace(cfg.train, compute_dtype="bfloat16"),
    )
    if chunk is not None:
        train = dataclasses.replace(
            cfg.train, mlp_chunk_size=chunk, loss_chunk_size=chunk or cfg.data.seq_len
        )
        cfg = dataclasses.replace(cfg, train=train)
    return cfg, cfg.model


def median_ms(call: Any, state: Any, batches: Any, repeats: int) -> tuple[Any, ...]:
    """Return the median ms until the call returns, ms until it is done, last result."""
    import jax

    returned, done = [], []
    out = None
    for i in range(repeats):
        batch = jax.block_until_ready(jax.device_put(batches[i % len(batches)]))
        began = time.perf_counter()
        state, out = call(state, batch)
        returned.append(1e3 * (time.perf_counter() - began))
        jax.block_until_ready((state, out))
        done.append(1e3 * (time.perf_counter() - began))
    return statistics.median(returned), statistics.median(done), out


def measure(repeats: int, chunk: int | None) -> list[tuple[Any, ...]]:
    """Return rows of (name, ms until returned, ms until done, launches, last loss)."""
    import jax
    import numpy as np

    from mst_jax.model import init_params
    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import COMMAND_BUFFERS, init_train_state, make_train_step

    loops = {"loops": {**COMMAND_BUFFERS["step"], UNROLL: False}}
    began = time.perf_counter()
    cfg, model = tiny_step(chunk)
    mesh = make_mesh(cfg.mesh)
    fresh = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))
    rng = np.random.default_rng(0)
    shape = (1, cfg.data.batch_size, cfg.data.seq_len + 1)
    texts = [rng.integers(0, model.vocab_size, shape, np.int32) for _ in range(4)]
    batches = [{"tokens": t[..., :-1], "labels": t[..., 1:]} for t in texts]
    state = fresh()
    batch = jax.device_put(batches[0])
    leaves = len(jax.tree.leaves((state, batch)))
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {leaves} arrays in")

    def no_work(state, batch):
        return state | {"step": state["step"] + 1}, batch["tokens"].ravel()[0]

    step = make_train_step(cfg, model, mesh)
    rows = []
    nothing = jax.jit(no_work, donate_argnums=0)
    rows.append(("no work", *median_ms(nothing, state, batches, repeats)[:2], "", ""))
    lowered = step.lower(fresh(), batch)
    slowest = 0.0
    for name in SETTINGS:
        started = time.perf_counter()
        if started - began + slowest > SECONDS:
            rows.append((name, "", "", "", "left out: no time"))
            continue
        try:
            options = (COMMAND_BUFFERS | loops)[name]
            compiled = lowered.compile(compiler_options=options)
            launches = sum(count_launches(compiled.as_text()).values())
            result = median_ms(compiled, fresh(), batches, repeats)
            rows.append((name, *result[:2], launches, float(result[2]["loss"])))
        except jax.errors.JaxRuntimeError as error:  # a driver too old, for one
            rows.append((name, "", "", "", str(error).splitlines()[0][:200]))
        slowest = max(slowest, time.perf_counter() - started)
    return rows


def count(gpu: str, chunk: int | None) -> None:
    """Print what the step launches on a named GPU, compiled without it."""
    from mst_jax.compile_only import compile_step
    from mst_jax.gpus import find_gpu

    cfg, model = tiny_step(chunk)
    found = count_launches(compile_step(cfg, model, find_gpu(gpu)).hlo)
    print(f"{sum(found.values())} launches on {gpu}: {dict(found.most_common())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=positive, default=50)
    parser.add_argument("--count", metavar="GPU", help="only count, for a named GPU")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk; 0: no chunks")
    args = parser.parse_args()
    if args.count:
        count(args.count, args.chunk)
        return
    rows = measure(args.repeats, args.chunk)
    print("\n| step | returns after ms | done after ms | launches | last loss |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in row[:-1]]
        print("| " + " | ".join([*cells, str(row[-1])]) + " |")
    losses = [row[-1] for row in rows if isinstance(row[-1], float)]
    if max(losses) - min(losses) > 1e-3 * max(losses):
        raise SystemExit(f"the settings do not train alike: {losses}")


if __name__ == "__main__":
    main()
