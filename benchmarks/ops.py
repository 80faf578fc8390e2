"""The LM head's loss and the gated MLP beside their peers, on one GPU.

    python benchmarks/ops.py --out docs/benchmarks
    python benchmarks/ops.py --preset llama31_70b --out docs/benchmarks

Every row runs in a process of its own, so that each allocator's peak is its own:
forward alone, forward + backward (ms, median), peak memory with inputs and gradients
(GiB), errors of the loss (of the MLP: its output) and gradients against f64 on a few
rows. A package that is not installed, and a row that does not fit, say so in the table.
Writes a dated markdown and a CSV.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import report  # noqa: E402
from arguments import positive  # noqa: E402
from op_reference import head_errors, mlp_errors  # noqa: E402
from op_variants import VARIANTS  # noqa: E402

PACKAGES = (
    "jax", "jaxlib", "torch", "triton", "liger-kernel", "cut-cross-entropy", "tokamax",
)  # fmt: skip
COLUMNS = (
    "op", "width", "tokens", "variant", "forward_ms", "both_ms", "tflops",
    "forward_peak_GiB", "peak_GiB", "loss_error", "dx_error", "dw_error", "note",
)  # fmt: skip


def median_ms(run, wait, repeats: int) -> float:
    """Return the median wall time of `run` until `wait` is over, after two warm-ups."""
    for _ in range(2):
        wait(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        wait(run())
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def shapes_of(job) -> tuple[tuple, list[tuple]]:
    """Return the shapes of x and of the weights, in JAX's order [in, out]."""
    T, D, W = job["tokens"], job["d_model"], job["width"]
    weights = [(D, W)] if job["op"] == "head" else [(D, W), (D, W), (W, D)]
    return (T, D), weights


def counting_rows(job) -> np.ndarray:
    """Return R rows, spread over the sequence, the last one among them."""
    return np.linspace(0, job["tokens"] - 1, job["rows"]).astype(np.int32)


def run_jax(job) -> dict:
    """Time one variant in JAX."""
    import jax
    import jax.numpy as jnp

    _, build, arguments = VARIANTS[job["op"]][job["variant"]]
    fn = build(*arguments)
    x_shape, w_shapes = shapes_of(job)

    @jax.jit
    def normal(key, like, scale):  # in blocks: random bits take memory too
        rows = like.shape[0] // 64 or 1

        def fill(i, a):
            block = jax.random.normal(
                jax.random.fold_in(key, i), (rows, *a.shape[1:]), jnp.float32
            )
            block = (scale * block).astype(a.dtype)
            return jax.lax.dynamic_update_slice_in_dim(a, block, i * rows, 0)

        return jax.lax.fori_loop(0, -(-like.shape[0] // rows), fill, like)

    def array(seed, shape, scale=1.0):
        like = jnp.zeros(shape, jnp.bfloat16)
        return normal(jax.random.key(seed), like, jnp.float32(scale))

    x = array(0, x_shape)
    scale = 2 if job["op"] == "head" else 1
    ws = [array(i + 1, s, scale * s[0] ** -0.5) for i, s in enumerate(w_shapes)]
    rows = counting_rows(job)
    kept = np.zeros(x_shape[0], bool)
    kept[rows] = True
    if job["op"] == "head":
        y = jax.random.randint(jax.random.key(9), x_shape[:1], 0, job["width"])
        few = jnp.where(kept, y, -100)
        forward = jax.jit(fn)
        both = jax.jit(jax.value_and_grad(fn, (0, 1)))
    else:
        y = array(9, x_shape)
        few = jnp.where(kept[:, None], y, 0)

        def with_gradients(x, *rest):
            *ws, dy = rest
            out, vjp = jax.vjp(fn, x, *ws)
            return out, vjp(dy)

        forward = jax.jit(lambda x, *rest: fn(x, *rest[:-1]))
        both = jax.jit(with_gradients)

    def peak():
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")

    def timed(fn):
        return median_ms(lambda: fn(x, *ws, y), jax.block_until_ready, job["repeats"])

    found = {"forward_ms": timed(forward), "forward_peak": peak()}
    found |= {"both_ms": timed(both), "peak": peak()}

    def wide(a):
        return np.asarray(a.astype(jnp.float32))

    out, (dx, *dws) = both(x, *ws, few)
    if job["op"] == "head":
        errors = head_errors(
            wide(x[rows]), wide(ws[0]), np.asarray(y)[rows], out, wide(dx[rows]),
            wide(dws[0]),
        )  # fmt: skip
    else:
        errors = mlp_errors(
            wide(x[rows]), list(map(wide, ws)), wide(y[rows]), wide(out[rows]),
            wide(dx[rows]), list(map(wide, dws)),
        )  # fmt: skip
    device = jax.local_devices()[0]
    return found | errors | {"device": device.device_kind}


def run_torch(job) -> dict:
    """Time one variant in torch."""
    import torch

    _, build, arguments = VARIANTS[job["op"]][job["variant"]]
    fn = build(*arguments)
    cuda = torch.cuda.is_available()
    torch.set_default_device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    x_shape, w_shapes = shapes_of(job)
    x = torch.randn(x_shape, dtype=torch.bfloat16).requires_grad_()
    scale = 2 if job["op"] == "head" else 1
    ws = [
        (torch.randn(s[::-1], dtype=torch.bfloat16) * (scale * s[0] ** -0.5))
        .detach()
        .requires_grad_()
        for s in w_shapes
    ]
    rows = torch.as_tensor(counting_rows(job)).long()
    kept = torch.zeros(x_shape[0], dtype=torch.bool)
    kept[rows] = True
    head = job["op"] == "head"
    if head:
        y = torch.randint(job["width"], x_shape[:1])
        few = torch.where(kept, y, -100)
    else:
        y = torch.randn(x_shape, dtype=torch.bfloat16)
        few = torch.where(kept[:, None], y, 0)

    def forward():
        with torch.no_grad():
            return fn(x, *ws, y) if head else fn(x, *ws)

    def both(y=y):
        for a in (x, *ws):
            a.grad = None
        out = fn(x, *ws, y) if head else fn(x, *ws)
        out.backward(*([] if head else [y]))
        return out

    def wait(_):
        if cuda:
            torch.cuda.synchronize()

    def measured(run):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms(run, wait, job["repeats"])
        return ms, torch.cuda.max_memory_allocated() if cuda else None

    found = {}
    found["forward_ms"], found["forward_peak"] = measured(forward)
    found["both_ms"], found["peak"] = measured(both)

    def wide(a):
        return a.detach().float().cpu().numpy()

    out = both(few)
    dws = [wide(w.grad).T for w in ws]
    arrays = wide(x[rows]), [wide(w).T for w in ws]
    if head:
        errors = head_errors(
            arrays[0], arrays[1][0], y[rows].cpu().numpy(), out.item(),
            wide(x.grad[rows]), dws[0],
        )  # fmt: skip
    else:
        errors = mlp_errors(
            *arrays, wide(y[rows]), wide(out[rows]), wide(x.grad[rows]), dws
        )
    device = torch.cuda.get_device_name() if cuda else "cpu"
    return found | errors | {"device": device}


def child(job) -> None:
    """Run one row and print it as JSON; what fails is its note."""
    framework = VARIANTS[job["op"]][job["variant"]][0]
    try:
        found = (run_jax if framework == "jax" else run_torch)(job)
    except ImportError as error:
        found = {"note": f"not installed: {error.name or error}"}
    except Exception as error:
        text = " ".join(str(error).split())
        fits = "out of memory" not in text.lower() and "RESOURCE_EXHAUSTED" not in text
        note = f"{type(error).__name__}: {text[:160]}" if fits else "out of memory"
        found = {"note": note}
    print("ROW " + json.dumps(found))


def run_row(job, seconds: int) -> dict:
    """Run one row in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    # Memory as it is needed, so that a peak is what was used.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return job | {"note": f"over {seconds} s"}
    rows = [r for r in done.stdout.splitlines() if r.startswith("ROW ")]
    if not rows:
        return job | {"note": f"died ({done.returncode}): {done.stderr[-160:]}"}
    row = job | json.loads(rows[-1][4:])
    products = 3 if job["op"] == "head" else 9
    flop = products * 2 * job["tokens"] * job["d_model"] * job["width"]
    if "both_ms" in row:
        row["tflops"] = round(flop / row["both_ms"] / 1e9)
    for ms in ("forward_ms", "both_ms"):
        if ms in row:
            row[ms] = round(row[ms], 2)
    for key in ("forward_peak", "peak"):
        peak = row.pop(key, None)
        row[f"{key}_GiB"] = round(peak / 2**30, 2) if peak else None
    for error in ("loss_error", "dx_error", "dw_error"):
        if error in row:
            row[error] = f"{row[error]:.2e}"
    return row


def write(args, results: list[dict]) -> None:
    """Write the CSV and the markdown, and print the latter."""
    path = report.write(
        args.out, "ops", "The LM head's loss and the gated MLP alone",
        [{column: row.get(column) for column in COLUMNS} for row in results],
        gpu=", ".join(sorted({r["device"] for r in results if "device" in r})),
        packages=PACKAGES,
        notes=[
            f"bf16, D = {args.d_model}, each row a process, median of {args.repeats}",
            "both: forward + backward, all gradients; peak: with inputs and gradients; "
            "TFLOP/s: 3 products of the head, 9 of the MLP (recomputed ones do not "
            "count)",
            f"errors: relative, against f64, on {args.rows} rows",
        ],
    )  # fmt: skip
    print(path.read_text())


def fill_in_widths(args) -> None:
    """Take the widths that were not given from the preset, or Llama3-8B's and others.

    Raises:
        SystemExit: no such preset.
    """
    widths = {"vocab": [32768, 131072, 262144], "ffn": [14336], "d_model": 4096}
    if args.preset is not None:
        from mst_jax.presets import PRESETS

        if args.preset not in PRESETS:
            raise SystemExit(f"no preset {args.preset!r}; there are {list(PRESETS)}")
        model = PRESETS[args.preset]
        widths = {
            "vocab": [model.vocab_size], "ffn": [model.intermediate_size],
            "d_model": model.hidden_size,
        }  # fmt: skip
    for name, default in widths.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def jobs_of(args) -> list[dict]:
    """Return what the rows' processes are told, in the table's order."""
    return [
        {
            "op": op, "width": width, "variant": variant, "tokens": args.tokens,
            "d_model": args.d_model, "rows": args.rows, "repeats": args.repeats,
        }
        for op in args.ops
        for width in (args.vocab if op == "head" else args.ffn)
        for variant in VARIANTS[op]
        if not args.variants or any(v in variant for v in args.variants)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--ops", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--preset", help="its widths, where none are given")
    parser.add_argument("--vocab", nargs="+", type=positive)
    parser.add_argument("--ffn", nargs="+", type=positive)
    parser.add_argument("--d-model", type=positive)
    parser.add_argument("--tokens", type=positive, default=16384)
    parser.add_argument(
        "--rows", type=positive, default=64, help="of the f64 reference"
    )
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--seconds", type=positive, default=180, help="limit of a row")
    parser.add_argument("--variants", nargs="*", help="part of a name; all if none")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    fill_in_widths(args)
    jobs = jobs_of(args)
    if not jobs:
        names = sorted({name for op in args.ops for name in VARIANTS[op]})
        parser.error(f"--variants {args.variants} is part of no name of {names}")
    results = []
    for job in jobs:
        results.append(run_row(job, args.seconds))
        print({c: results[-1].get(c) for c in COLUMNS}, flush=True)
    write(args, results)


if __name__ == "__main__":
    main()
