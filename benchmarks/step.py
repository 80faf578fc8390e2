"""Time whole training steps of Llama3-8B through `train.py`, from HF and back.

    python benchmarks/step.py --work /tmp/mst --out docs/benchmarks

Makes a full-size HF checkpoint (random bf16 weights, sharded safetensors) and a text of
Python's own source files, then runs the recipe at several lengths, each in a process of
its own so that its peak memory is its own. The plan of a row is said, not chosen by the
planner. Writes a dated markdown and a CSV.

Loading: the first row reads the files after the page cache has dropped them, and so
does a plain read of the same files by as many threads, just before; the others find
them in memory.

The way back: the last row trains at a learning rate of 1e-38, far below what moves a
bf16 weight. Its checkpoint, exported, must be the original's tensors bit for bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args, get_type_hints

import report
from arguments import positive

ROOT = Path(__file__).resolve().parent.parent
AFTER = ["--optim.no-in-backward", "--optim.clip", "global"]
NO_CHUNKS = ["--train.mlp-chunk-size", "0", "--train.loss-chunk-size", "16384"]
ROWS = {
    # name: (tokens, plan, extra options)
    "65536": (65536, "save_attention", []),
    "32768": (32768, "save_attention", []),
    "32768 all but gate and up": (
        32768, "* save=input+qkv+attention+mlp_input", [],
    ),
    "16384": (16384, "save_attention", []),
    "16384 unchunked": (16384, "save_attention", NO_CHUNKS),
    "65536 after": (65536, "save_attention", AFTER),
    "65536 offload": (65536, "offload", []),
    "32768 none": (32768, "none", []),
}  # fmt: skip
TARGETS = ("65536", "32768 all but gate and up", "16384", "16384 unchunked")
THREADS = 16  # of a plain read, as hf.py reads
PIECE = 2**24


def make_checkpoint(directory: Path, preset: str) -> float:
    """Write random weights of the preset's shape; return the seconds it took."""
    began = time.perf_counter()
    code = f"""
import jax
from mst_jax import config, hf
from mst_jax.model import init_params
cfg = config.PRESETS[{preset!r}]
def narrow():
    return jax.tree.map(lambda p: p.astype("bfloat16"), init_params(cfg, 0))
make = jax.jit(narrow)
hf.export_hf(make(), cfg, {str(directory)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - began


def make_text(path: Path) -> None:
    """Join the standard library's sources into one long document."""
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    text = "\n".join(p.read_text(errors="ignore") for p in files)
    path.write_text(text[: 16 * 2**20])


def drop_from_memory(directory: Path) -> None:
    """Ask the system to forget the files' pages, so that a read reads the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(directory: Path) -> float:
    """Return the GiB/s at which threads read the files and do nothing with them."""

    def read(piece: tuple[Path, int]) -> int:
        path, start = piece
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return len(file.read(PIECE))

    pieces = [
        (path, start)
        for path in sorted(directory.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, PIECE)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        size = sum(pool.map(read, pieces))
    return size / 2**30 / (time.perf_counter() - began)


def run(work: Path, name: str, tokens: int, extra: list[str], args) -> dict:
    """Train a few steps in a process; return its summary."""
    out = work / "runs" / name.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)  # an earlier run of it would be resumed
    command = [
        sys.executable, "train.py", "--config", "configs/llama3_8b.py",
        "--init-from", str(work / "hf"), "--out-dir", str(out),
        "--data.source", str(work / "text.txt"), "--data.tokenizer", "bytes",
        "--data.seq-len", str(tokens), "--optim.name", args.optimizer,
        "--optim.warmup-steps", "1", "--train.steps", str(args.steps),
        "--data.holdout", "0", "--train.eval-batches", "1", "--train.save-every", "0",
        "--train.memory-budget", "None", "--optim.moment-dtype",
        "int8" if args.optimizer in ("adamw", "lion") else "float32", *extra,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-1800:], done.stderr[-3000:] if done.returncode else "")
    if done.returncode:
        return {"row": name, "tokens": tokens, "error": done.stderr.strip()[-300:]}
    summary = json.loads((out / "summary.json").read_text())
    peak = summary.get("peak_memory_bytes")
    loading = summary["load_bytes"] / 2**30 / summary["load_seconds"]
    return {
        "row": name,
        "tokens": tokens,
        "tokens_per_second": round(summary["tokens_per_second"]),
        "peak_GiB": round(peak / 2**30, 2) if peak else None,
        "mfu": round(summary["mfu"], 4) if summary.get("mfu") else None,
        "loss": round(summary["loss"], 4),
        "load_GiB_s": round(loading, 2),
        "process_seconds": round(time.perf_counter() - began),
    }


def export_and_compare(work: Path, out_dir: Path) -> str:
    """Export a run that moved nothing, and compare every tensor with the original's.

    Raises:
        SystemExit: names of tensors that are missing, new or different.
    """
    began = time.perf_counter()
    back = work / "back"
    shutil.rmtree(back, ignore_errors=True)
    command = [sys.executable, "-m", "mst_jax.cli", "export", str(out_dir), str(back)]
    subprocess.run(command, check=True, cwd=ROOT)
    seconds = time.perf_counter() - began
    wrong, size = different(work / "hf", back)
    if wrong:
        raise SystemExit(f"not exported as they were loaded: {sorted(wrong)[:20]}")
    count = len(tensor_files(back))
    return (
        f"export of the last row's checkpoint: {seconds:.0f} s; all {count} tensors, "
        f"{size / 2**30:.2f} GiB, bit-equal to the original's"
    )


def tensor_files(directory: Path) -> dict[str, Path]:
    """Return the file of every tensor, by its name."""
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def different(one: Path, other: Path) -> tuple[set[str], int]:
    """Return the names of tensors that differ in any bit, and the bytes compared."""
    import ml_dtypes  # noqa: F401  numpy's bfloat16
    import numpy as np
    from safetensors import safe_open

    files = tensor_files(one), tensor_files(other)
    wrong = set(files[0]) ^ set(files[1])

    def compare(name: str) -> tuple[str, bool, int]:
        arrays = []
        for paths in files:
            with safe_open(paths[name], "np") as file:
                arrays.append(file.get_tensor(name))
        a, b = arrays
        same = a.dtype == b.dtype and a.shape == b.shape
        bits = [x.view(f"u{x.itemsize}") for x in arrays]
        return name, same and bool(np.array_equal(*bits)), a.nbytes

    with ThreadPoolExecutor(4) as pool:  # two of the largest tensors each, in memory
        results = list(pool.map(compare, sorted(set(files[0]) - wrong)))
    wrong |= {name for name, same, _ in results if not same}
    return wrong, sum(size for *_, size in results)


def main() -> None:
    from mst_jax.config import PRESETS, OptimConfig

    optimizers = get_args(get_type_hints(OptimConfig)["name"])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--rows", nargs="+", default=list(TARGETS), choices=ROWS)
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--optimizer", default="sgd", choices=optimizers)
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument("--tokens", type=positive, help="replace every row's length")
    parser.add_argument("--no-export", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made = 0.0
    if not (args.work / "hf" / "config.json").exists():
        made = make_checkpoint(args.work / "hf", args.preset)
        print(f"made the checkpoint in {made:.0f} s")
    make_text(args.work / "text.txt")
    drop_from_memory(args.work / "hf")
    rate = plain_read(args.work / "hf")
    notes = [
        f"plain read of the checkpoint's files by {THREADS} threads, page cache "
        f"dropped: {rate:.2f} GiB/s; the first row, too, loads them from the disk"
    ]
    print(notes[-1], flush=True)
    drop_from_memory(args.work / "hf")
    results = []
    for i, name in enumerate(args.rows):
        tokens, plan, extra = ROWS[name]
        extra = ["--train.plan", plan, *extra]
        last = i == len(args.rows) - 1 and not args.no_export
        if last:
            extra += ["--train.save-every", str(args.steps)]
            extra += ["--optim.learning-rate", "1e-38"]
        results.append(run(args.work, name, args.tokens or tokens, extra, args))
        print(results[-1], flush=True)
        if last and "error" not in results[-1]:
            out_dir = args.work / "runs" / name.replace(" ", "-")
            notes.append(export_and_compare(args.work, out_dir))
            print(notes[-1], flush=True)
    write(args, results, notes, made)


def write(args, results: list[dict], notes: list[str], made: float) -> None:
    """Write the CSV and the markdown, and print the latter."""
    query = "import jax; print(jax.devices()[0].device_kind)"
    device = subprocess.run(
        [sys.executable, "-c", query], capture_output=True, text=True
    ).stdout.strip()
    path = report.write(
        args.out, "step", "Whole training steps", results,
        gpu=device, packages=("jax", "jaxlib", "flax", "optax", "transformers"),
        notes=[
            f"model: {args.preset}, random bf16 weights from sharded safetensors, "
            f"{args.optimizer}, batch 1, median of {args.steps} steps less the first "
            "two",
            *([f"making the checkpoint: {made:.0f} s"] if made else []),
            *notes,
        ],
    )  # fmt: skip
    print(path.read_text())
    if any("error" in r for r in results):
        raise SystemExit("a row failed")


if __name__ == "__main__":
    main()
