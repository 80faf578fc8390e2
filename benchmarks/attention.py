"""Time attention alone, forward and forward + backward, in every regime.

    python benchmarks/attention.py --out docs/benchmarks

Every implementation is first held against f32 attention at a small size; one that is
wrong is not timed. A packed program is compiled once for all packings of its length.
Rows come in the order of their worth, and none is begun after `--seconds`. tokamax is
timed when it is installed. Writes a dated markdown and a CSV.
"""

import argparse
import time
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

from mst_jax.ops.attention import attention, packed, reference_attention

ROOT = Path(__file__).resolve().parent.parent
HEADS = 32, 8
SMALL = 1024
PACKINGS = [
    [32768], [16384] * 2, [4096] * 8, [1024] * 32, [128] * 256,
    [2**i for i in range(14, -1, -1)] + [1],  # 16384, 8192, ..., 1, 1
]  # fmt: skip


def packed_rows(how: str, **options: int) -> list[dict[str, Any]]:
    """Return a row for each packing."""
    row = {"how": how, "T": 32768, **options}
    return [{**row, "documents": packing} for packing in PACKINGS]


ROWS: list[dict[str, Any]] = [
    # how: 'cudnn' is dense without documents; a number after it is the levels' ratio
    {"how": "cudnn", "T": 32768},
    *packed_rows("cudnn 2"),
    *packed_rows("cudnn 4"),
    {"how": "xla", "T": 32768, "documents": [16384] * 2},
    {"how": "xla", "T": 32768, "documents": [1024] * 32},
    {"how": "mosaic_gpu", "T": 32768},
    *packed_rows("mosaic_gpu"),
    {"how": "cudnn", "T": 8192},
    {"how": "mosaic_gpu", "T": 8192},
    {"how": "cudnn", "T": 65536},
    {"how": "mosaic_gpu", "T": 65536},
    {"how": "cudnn", "T": 32768, "window": 4096},
    {"how": "mosaic_gpu", "T": 32768, "window": 4096},
    {"how": "cudnn 2", "T": 32768, "documents": [16384] * 2, "window": 4096},
    {"how": "mosaic_gpu", "T": 32768, "documents": [16384] * 2, "window": 4096},
    {"how": "xla", "T": 32768, "window": 4096},
    {"how": "tokamax", "T": 8192},
    {"how": "tokamax", "T": 32768},
    {"how": "tokamax", "T": 65536},
    {"how": "cudnn", "T": 32768, "H": 64},
    {"how": "mosaic_gpu", "T": 32768, "H": 64},
    *packed_rows("cudnn 2", H=64),
    *packed_rows("mosaic_gpu", H=64),
    {"how": "cudnn", "T": 8192, "H": 64},
    {"how": "mosaic_gpu", "T": 8192, "H": 64},
    {"how": "cudnn", "T": 32768, "H": 64, "window": 4096},
    {"how": "mosaic_gpu", "T": 32768, "H": 64, "window": 4096},
    {"how": "xla", "T": 32768},
]
TRIALS: list[dict[str, Any]] = [
    {"how": "cudnn"},
    {"how": "mosaic_gpu"},
    {"how": "mosaic_gpu", "window": 100},
    {"how": "mosaic_gpu", "documents": [513, 300, 1, 1, 150]},
    {"how": "mosaic_gpu", "documents": [70] * 14, "window": 100},
    {"how": "mosaic_gpu", "H": 64},
    {"how": "mosaic_gpu", "documents": [70] * 14, "window": 100, "H": 64},
    {"how": "cudnn", "window": 100},
    {"how": "cudnn 2", "documents": [513, 300, 1, 1, 150]},
    {"how": "xla", "documents": [513, 300, 1, 1, 150]},
    {"how": "cudnn 2", "documents": [513, 300, 1, 1, 150], "window": 100, "H": 64},
    {"how": "cudnn 4", "documents": [70] * 14},
    {"how": "tokamax"},
]


def function(how: str, window: int | None):
    """Return fn(q, k, v, segment_ids or None) -> out."""
    name, *ratio = how.split()
    if name == "tokamax":
        import tokamax

        return lambda q, k, v, ids: tokamax.dot_product_attention(
            q, k, v, is_causal=True, implementation="mosaic"
        )

    def fn(q, k, v, ids):
        if ratio:
            packed.RATIO = int(ratio[0])
        return attention(
            q, k, v, segment_ids=ids, sliding_window=window, implementation=name
        )

    return fn


@cache
def program(how: str, T: int, H: int, segmented: bool, window: int | None, both: bool):
    """Compile attention, or attention and its gradients; return it and the seconds."""
    began = time.perf_counter()
    fn = function(how, window)

    def run(q, k, v, d_out, ids):
        if not both:
            return fn(q, k, v, ids)
        out, vjp = jax.vjp(partial(fn, ids=ids), q, k, v)
        return out, *vjp(d_out)

    args = jax.eval_shape(lambda: arrays(T, H))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if segmented else None
    compiled = jax.jit(run).lower(*args, ids).compile()
    return compiled, time.perf_counter() - began


def arrays(T: int, H: int) -> list[jax.Array]:
    """Return q, k, v and the gradient of the output."""
    N, K = HEADS
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, T, n, H) for n in (N, K, K, N)]
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def segment_ids(T: int, documents: list[int] | None) -> jax.Array | None:
    """Return ids 1, 2, ... and 0 after the last document."""
    if documents is None:
        return None
    ids = np.repeat(np.arange(len(documents)) + 1, documents)
    return jnp.asarray(np.pad(ids, (0, T - len(ids)))[None], jnp.int32)


def pairs(T: int, documents: list[int] | None, window: int | None) -> int:
    """Count the query-key pairs that are to be computed."""
    sizes = np.array(documents or [T])
    seen = np.minimum(sizes, window or T)
    return int((seen * (seen + 1) // 2 + (sizes - seen) * seen).sum())


def trial(row: dict[str, Any]) -> float:
    """Return the largest relative error of out, dq, dk and dv against f32."""
    T, H, window = SMALL, row.get("H", 128), row.get("window")
    q, k, v, d_out = arrays(T, H)
    ids = segment_ids(T, row.get("documents"))
    both, _ = program(row["how"], T, H, ids is not None, window, True)
    got = both(q, k, v, d_out, ids)

    @jax.jit
    def want(q, k, v, d_out):
        fn = partial(reference_attention, segment_ids=ids, sliding_window=window)
        wide = [a.astype(jnp.float32) for a in (q, k, v)]
        out, vjp = jax.vjp(fn, *wide)
        return out, *vjp(d_out.astype(jnp.float32))

    @jax.jit
    def error(a, b):
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    wanted = want(q, k, v, d_out)
    found = [float(error(a, b)) for a, b in zip(got, wanted, strict=True)]
    return max(found) if np.isfinite(found).all() else float("nan")


def milliseconds(fn, args, at_least: float = 0.5) -> float:
    """Return the time of a call, one after the other without waiting in between.

    The card is at its limit of power then, as it is in a step.
    """
    jax.block_until_ready(fn(*args))
    began = time.perf_counter()
    jax.block_until_ready(fn(*args))
    once = time.perf_counter() - began
    count = max(3, int(at_least / once))
    for _ in range(count):
        out = fn(*args)
    jax.block_until_ready(out)
    began = time.perf_counter()
    for _ in range(count):
        out = fn(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / count * 1e3


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Time one row."""
    T, H, window = row["T"], row.get("H", 128), row.get("window")
    documents = row.get("documents")
    ids = segment_ids(T, documents)
    shape = row["how"], T, H, ids is not None, window
    (forward, seconds), (both, more) = (program(*shape, b) for b in (False, True))
    args = *arrays(T, H), ids
    ms = [milliseconds(f, args) for f in (forward, both)]
    flops = 4 * HEADS[0] * H * pairs(T, documents, window)
    backward = max(ms[1] - ms[0], 1e-6)
    return {
        "forward_ms": round(ms[0], 2),
        "both_ms": round(ms[1], 2),
        "forward_TFLOPs": round(flops / ms[0] / 1e9),
        "backward_TFLOPs": round(2.5 * flops / backward / 1e9),
        "forward_temp_GiB": round(temporaries(forward), 2),
        "both_temp_GiB": round(temporaries(both), 2),
        "compile_s": round(seconds + more, 1),
    }


def temporaries(compiled) -> float:
    """Return what XLA allocates beside arguments and results, in GiB."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**30


def describe(documents: list[int] | None) -> str:
    """Name a packing."""
    if documents is None:
        return "-"
    if len(set(documents)) == 1:
        return f"{len(documents)} x {documents[0]}"
    return f"{len(documents)}, {max(documents)} to {min(documents)}"


def run(rows: list[dict[str, Any]], seconds: float) -> tuple[list[dict], list[str]]:
    """Return the results, and a line for each trial and each row not begun."""
    began, results, notes, wrong = time.perf_counter(), [], [], set()
    for row in TRIALS:
        if not any(row["how"] == r["how"] for r in rows):
            continue
        what = {k: v for k, v in row.items() if k != "documents"}
        what["documents"] = describe(row.get("documents"))
        try:
            error = trial(row)
        except Exception as e:
            error, what["failed"] = float("nan"), f"{type(e).__name__}: {e}"[:300]
        if not error < 2e-2:
            wrong.add((row["how"], row.get("window") is not None))
        notes.append(f"error against f32 at {SMALL} tokens: {error:.1e}, {what}")
        print(notes[-1], flush=True)
    for row in rows:
        result = {
            "how": row["how"], "tokens": row["T"], "head_size": row.get("H", 128),
            "documents": describe(row.get("documents")), "window": row.get("window"),
        }  # fmt: skip
        if time.perf_counter() - began > seconds:
            notes.append(f"not begun after {seconds:.0f} s: {result}")
        elif (row["how"], row.get("window") is not None) in wrong:
            notes.append(f"wrong, not timed: {result}")
        else:
            try:
                result |= measure(row)
            except Exception as e:
                result["failed"] = f"{type(e).__name__}: {e}"[:300].replace("\n", " ")
            results.append(result)
            print(result, flush=True)
    return results, notes


def main() -> None:
    """Run the rows that can run here and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--seconds", type=float, default=90)
    names, lengths = ({row[key]: None for row in ROWS} for key in ("how", "T"))
    parser.add_argument("--only", nargs="*", choices=names, help="implementations")
    parser.add_argument(
        "--tokens", type=int, choices=lengths, help="only rows of this length"
    )
    args = parser.parse_args()
    rows = [r for r in ROWS if not args.only or r["how"] in args.only]
    rows = [r for r in rows if args.tokens in (None, r["T"])]
    if not find_spec("tokamax"):
        rows = [r for r in rows if r["how"] != "tokamax"]
    if not rows:
        parser.error(
            f"no row has --only {args.only} and --tokens {args.tokens}; tokamax has "
            "rows where it is installed"
        )
    results, notes = run(rows, args.seconds)
    if not results:  # would take the place of today's table
        raise SystemExit("\n".join(["no row ran, nothing is written", *notes]))
    write(args.out, results, notes)
    if any("failed" in r for r in results):
        raise SystemExit("a row failed")


def write(out: Path, results: list[dict], notes: list[str]) -> None:
    """Write the CSV and the markdown, and print the latter."""
    N, K = HEADS
    path = report.write(
        out, "attention", "Attention alone", results,
        gpu=jax.devices()[0].device_kind,
        packages=(
            "jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "tokamax"
        ),
        notes=[
            f"bf16, causal, batch 1, {N} query and {K} key/value heads; backward is "
            "both less forward; FLOPs of the pairs that are to be seen, backward 2.5 "
            "forward",
            *notes,
        ],
    )  # fmt: skip
    print(path.read_text())


if __name__ == "__main__":
    main()
