"""Where the milliseconds of one training step go, by row, beside each row's limit.

    python benchmarks/trace.py --tokens 8192 32768 65536 --out docs/benchmarks \\
        --keep traces
    python benchmarks/trace.py --read traces/*.xplane.pb.gz --out docs/benchmarks

The step of `implementations.py`: Llama3-8B, random bf16 weights made on the device, SGD
in the backward pass, batch 1. For each length one compilation and four steps: one to
warm up, two to time, one to trace. Every kernel of the trace is joined with the
compiled program (`trace_events.py`, `trace_program.py`) and counted in a row
(`trace_rows.py`). `--keep` writes the trace, the program (.hlo.txt.gz) and the times
(.json), from which `--read` makes the same table without a GPU. Writes a dated
markdown, and a CSV with a line for each instruction.
"""

import argparse
import csv
import dataclasses
import datetime
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import report
from trace_events import Account, Limits, account, read_events
from trace_program import Program
from trace_rows import row_order

COLUMNS = (
    "tokens", "row", "instruction", "kernel", "launches", "ms", "limit_ms", "flops",
    "bytes", "host_bytes", "operation",
)  # fmt: skip
LARGEST = 15


# --- on the GPU ---


def trace_steps(args: argparse.Namespace, keep: Path) -> list[Path]:
    """Run and trace a step of each length; return the traces' paths."""
    import jax
    from implementations import step_config

    from mst_jax.config import PRESETS
    from mst_jax.model import init_params
    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import init_train_state

    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"a trace needs a GPU, there is none ({jax.default_backend()}); --read "
            "makes the table of kept traces"
        )
    keep.mkdir(parents=True, exist_ok=True)
    model = PRESETS[args.preset]
    if args.layers is not None:
        model = dataclasses.replace(model, num_layers=args.layers)
    about = {
        "device": jax.devices()[0].device_kind,
        "bandwidth": args.bandwidth * 1e12 or copy_bandwidth(args.copy_gib),
        "bandwidth_is": "given" if args.bandwidth else "a copy of 2 bytes an element, "
        "read + write, measured in this run before the steps",
        "preset": args.preset, "layers": model.num_layers, "plan": args.plan,
        "head_groups": args.head_groups, "prefetch": args.prefetch,
        "implementation": args.implementation,
        "versions": report.versions("jax", "jaxlib", "flax", "optax"),
        "command": f"python {' '.join(sys.argv)}",
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    state: Any = None
    found, began, longest = [], time.perf_counter(), 0.0
    for tokens in args.tokens:
        started = time.perf_counter()
        if started - began + longest > args.seconds:
            print(f"{tokens} tokens left out: no time", flush=True)
            continue
        cfg = step_config(
            model, tokens, args.plan, args.implementation,
            head_groups=args.head_groups, prefetch=args.prefetch,
            command_buffers="off",
        )  # fmt: skip
        if state is None:
            fresh = partial(init_train_state, cfg, mesh=make_mesh(cfg.mesh))
            state = jax.jit(lambda fresh=fresh: fresh(init_params(model, 0)))()
        path = keep / f"step-{tokens}.xplane.pb.gz"
        state, measured = trace_one(cfg, model, state, path)
        beside(path, "json").write_text(json.dumps({**about, **measured}, indent=1))
        print(json.dumps(measured), flush=True)
        found.append(path)
        longest = max(longest, time.perf_counter() - started)
    return found


def trace_one(cfg: Any, model: Any, state: Any, path: Path) -> tuple[Any, dict]:
    """Compile a step, time it, trace it; keep trace and program at `path`."""
    import jax
    from implementations import random_batch

    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import make_train_step

    batch = random_batch(model, cfg.data.seq_len)
    began = time.perf_counter()
    step = make_train_step(cfg, model, make_mesh(cfg.mesh))
    compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - began
    beside(path, "hlo.txt.gz").write_bytes(gzip.compress(compiled.as_text().encode()))
    times, losses = [], []

    def take_step(state):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        times.append(1e3 * (time.perf_counter() - began))
        return state

    for _ in range(3):
        state = take_step(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, profiler_options=options)
        state = take_step(state)
        jax.profiler.stop_trace()
        (space,) = Path(directory).rglob("*.xplane.pb")
        path.write_bytes(gzip.compress(space.read_bytes()))
    gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
    return state, {
        "tokens": cfg.data.seq_len, "step_ms": statistics.median(times[1:3]),
        "first_to_traced_ms": [round(ms, 2) for ms in times],
        "losses": [round(loss, 4) for loss in losses],
        "compile_s": round(compile_s, 1), "temporaries_GiB": round(gib, 2),
    }  # fmt: skip


def copy_bandwidth(gib: float) -> float:
    """Return bytes a second, read and written, of adding 1 to a large array."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(int(gib * 2**29), jnp.bfloat16)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(x))
    began, copies = time.perf_counter(), 50
    for _ in range(copies):  # one waits for the next: no call's own time is in it
        x = add(x)
    jax.block_until_ready(x)
    return copies * 2 * x.nbytes / (time.perf_counter() - began)


# --- anywhere ---


def beside(path: Path, ending: str) -> Path:
    """Return name.ending for a path name.xplane.pb or name.xplane.pb.gz."""
    return path.with_name(path.name.split(".xplane.pb")[0] + "." + ending)


def read(path: Path) -> bytes:
    """Return the bytes of a file, compressed or not."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def read_step(path: Path, hlo: Path | None, args) -> tuple[dict, Account, Program]:
    """Return what is known about a kept step, its account and its program."""
    from jax.profiler import ProfileData

    about = {"tokens": 0, "device": "not said", "bandwidth": 0, "bandwidth_is": "given"}
    if beside(path, "json").exists():
        about |= json.loads(beside(path, "json").read_text())
    if args.bandwidth:
        about |= {"bandwidth": args.bandwidth * 1e12, "bandwidth_is": "given"}
    if not about["bandwidth"]:
        raise SystemExit(f"{beside(path, 'json')} is missing: give --bandwidth")
    program = Program(read(hlo or beside(path, "hlo.txt.gz")).decode())
    profile = ProfileData.from_serialized_xspace(read(path))
    limits = Limits(args.tflops * 1e12, about["bandwidth"], args.link * 1e9)
    return about, account(read_events(profile), program, limits), program


def table(about: dict, found: Account) -> list[str]:
    """Return the markdown of one length."""
    step = about.get("step_ms")
    said = f"{step:.1f} ms a step, {1e3 * about['tokens'] / step:.0f} tokens/s; "
    gaps = sum(ms for ms, _, _ in found.gaps)
    lines = [
        f"## {about['tokens']:,} tokens",
        "",
        (said if step else "")
        + f"traced {found.span:.1f} ms from the first kernel to the last, a kernel "
        f"running for {found.busy:.1f} of them.",
        "",
        "| row | ms | share | launches | TFLOP | GB | limit ms | limit / ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def line(name, ms, launches="", flops=0.0, moved=0.0, limit=0.0):
        return (
            f"| {name} | {ms:.2f} | {ms / found.span:.1%} | {launches} | "
            f"{f'{flops / 1e12:.2f}' if flops else ''} | "
            f"{f'{moved / 1e9:.2f}' if moved else ''} | "
            f"{f'{limit:.2f}' if limit else ''} | "
            f"{f'{limit / ms:.2f}' if limit and ms else ''} |"
        )

    rows = found.by_row
    for row in sorted(rows, key=row_order):
        t = rows[row]
        moved = t.bytes + t.host_bytes
        lines.append(line(row, t.ms, t.launches, t.flops, moved, t.limit_ms))
    all_ms = sum(t.ms for t in rows.values())
    launches = sum(t.launches for t in rows.values())
    flops = sum(t.flops for t in rows.values())
    limit = sum(t.limit_ms for t in rows.values())
    moved = sum(t.bytes + t.host_bytes for t in rows.values())
    return [
        *lines,
        line("**all kernels**", all_ms, launches, flops, moved, limit),
        line("less: two at a time", -found.overlap),
        line("gaps", gaps, len(found.gaps)),
        line("**traced step**", found.span),
        "",
        *_losses(found),
        *_gap_lines(found),
        *_problems(found),
    ]


def _losses(found: Account) -> list[str]:
    ranked = sorted(found.by_op.items(), key=lambda o: o[1].limit_ms - o[1].ms)
    lines = [
        "Furthest above their limits, by instruction:",
        "",
        "| instruction | kernel | row | launches | ms | limit ms | lost ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op, t in ranked[:LARGEST]:
        name, kernel = (text.replace("|", "/")[:50] for text in (op, t.kernel))
        lines.append(
            f"| `{name}` | `{kernel}` | {found.rows[op]} | {t.launches} | {t.ms:.2f} | "
            f"{t.limit_ms:.2f} | {t.ms - t.limit_ms:.2f} |"
        )
    return [*lines, ""]


def _problems(found: Account) -> list[str]:
    if not found.problems:
        return []
    more = len(found.problems) - LARGEST
    return [
        "Where trace and program do not agree:",
        "",
        *[f"- {problem}" for problem in found.problems[:LARGEST]],
        *([f"- and {more} more"] if more > 0 else []),
        "",
    ]


def _gap_lines(found: Account) -> list[str]:
    classes = (
        ("below 5 us", 0, 5e-3),
        ("5 to 50 us", 5e-3, 5e-2),
        ("longer", 5e-2, 9e9),
    )
    said = []
    for name, low, high in classes:
        inside = [ms for ms, _, _ in found.gaps if low <= ms < high]
        said.append(f"{name} {len(inside)}, {sum(inside):.2f} ms")
    between: dict[tuple[str, str], float] = {}
    for ms, before, after in found.gaps:
        between[before, after] = between.get((before, after), 0) + ms
    top = sorted(between.items(), key=lambda g: -g[1])[:5]
    where = "; ".join(f"{a} to {b} {ms:.2f} ms" for (a, b), ms in top)
    return [f"Gaps: {'; '.join(said)}. Most: {where or 'none'}.", ""]


def _heading(args, about: dict) -> list[str]:
    names = ("preset", "layers", "plan", "head_groups", "implementation")
    model = ", ".join(f"{name} {about[name]}" for name in names if name in about)
    return [
        f"# Where a step's milliseconds go, {datetime.date.today().isoformat()}",
        "",
        f"- GPU: {about['device']}; {about.get('versions', 'versions not said')}",
        f"- command: `{about.get('command', 'not said')}`",
        f"- {model or 'model not said'}; bf16, SGD in the backward pass, batch 1, "
        "random weights and tokens, the step alone",
        f"- limits: {args.tflops:g} TFLOP/s; {about['bandwidth'] / 1e12:.2f} TB/s "
        f"({about['bandwidth_is']}); {args.link:g} GB/s to and from the host. A "
        "kernel's limit is the larger of its FLOPs' and its bytes'; bytes are operands "
        "read once and results written once, FLOPs those of the products (causal "
        "attention: half)",
        "- ms: sums of kernels in one traced step, compiled without CUDA graphs, whose "
        "kernels a trace cannot tell apart; `ms a step` is the same program without "
        "the trace, the median of two, until the loss is read",
        "- a kernel fused from operations of several rows counts in one of them",
        "",
    ]


def write(args, steps: list[tuple[dict, Account, Program]]) -> None:
    """Write the CSV and the markdown."""
    name = f"trace-{datetime.date.today().isoformat()}{args.suffix}"
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for about, found, program in steps:
            for op, t in sorted(found.by_op.items(), key=lambda o: -o[1].ms):
                one = program.by_name.get(op)
                writer.writerow([
                    about["tokens"], found.rows[op], op,
                    t.kernel[:120], t.launches,
                    round(t.ms, 4), round(t.limit_ms, 4), t.flops, t.bytes,
                    t.host_bytes, one.scope if one else "",
                ])  # fmt: skip
    lines = _heading(args, steps[0][0])
    for about, found, _ in steps:
        lines += table(about, found)
    text = "\n".join(lines).rstrip() + "\n"
    (args.out / f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    from mst_jax.config import PRESETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--plan", default="save_attention")
    parser.add_argument("--head-groups", type=int, default=1)
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument(
        "--implementation", default="auto", choices=("auto", "xla", "mosaic_gpu")
    )
    parser.add_argument("--tflops", type=float, default=790, help="limit of products")
    parser.add_argument(
        "--bandwidth", type=float, default=0, help="TB/s; 0: measure, or as kept"
    )
    parser.add_argument("--link", type=float, default=53, help="GB/s to the host")
    parser.add_argument(
        "--copy-gib", type=float, default=2, help="of the measured copy"
    )
    parser.add_argument("--seconds", type=int, default=480, help="none starts later")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--suffix", default="", help="of the files' names")
    parser.add_argument("--keep", type=Path, help="folder for traces and programs")
    parser.add_argument("--read", type=Path, nargs="+", help="kept traces; no run")
    parser.add_argument("--hlo", type=Path, help="the program of one --read")
    args = parser.parse_args()
    if args.hlo and len(args.read or []) != 1:
        parser.error("--hlo is the program of one --read")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    with tempfile.TemporaryDirectory() as directory:
        paths = args.read or trace_steps(args, args.keep or Path(directory))
        write(args, [read_step(path, args.hlo, args) for path in paths])


if __name__ == "__main__":
    main()
