"""Time whole training steps of Llama3-8B through `train.py`, from HF and back.

    python benchmarks/step.py --work /tmp/mst --out docs/benchmarks

Makes a full-size HF checkpoint (random bf16 weights, sharded safetensors) and a text of
Python's own source files, then runs the recipe at several lengths, each in a process of
its own so that its peak memory is its own, exports the last run's checkpoint and
compares it with what it started from. Writes a dated markdown and a CSV.
"""

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    # name: (tokens, extra options)
    "65536": (65536, []),
    "32768": (32768, []),
    "65536 after": (65536, ["--optim.no-in-backward", "--optim.clip", "global"]),
    "65536 offload": (65536, ["--train.plan", "offload"]),
    "32768 none": (32768, ["--train.plan", "none"]),
    "16384": (16384, []),
    "16384 unchunked": (
        16384,
        ["--train.mlp-chunk-size", "0", "--train.loss-chunk-size", "16384"],
    ),
}


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


def run(work: Path, name: str, tokens: int, extra: list[str], args) -> dict:
    """Train a few steps in a process; return its summary."""
    out = work / "runs" / name.replace(" ", "-")
    command = [
        sys.executable, "train.py", "--config", "configs/llama3_8b.py",
        "--init-from", str(work / "hf"), "--out-dir", str(out),
        "--data.source", str(work / "text.txt"), "--data.tokenizer", "bytes",
        "--data.seq-len", str(tokens), "--optim.name", args.optimizer,
        "--optim.warmup-steps", "1", "--train.steps", str(args.steps),
        "--train.eval-batches", "1", "--train.save-every", "0",
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
    return {
        "row": name,
        "tokens": tokens,
        "tokens_per_second": round(summary["tokens_per_second"]),
        "peak_GiB": round(peak / 2**30, 2) if peak else None,
        "mfu": round(summary["mfu"], 4) if summary.get("mfu") else None,
        "loss": round(summary["loss"], 4),
        "process_seconds": round(time.perf_counter() - began),
    }


def export_and_compare(work: Path, out_dir: Path) -> str:
    """Export a run and check that every tensor of the original is there again."""
    from safetensors import safe_open

    began = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "mst_jax.cli",
            "export",
            str(out_dir),
            str(work / "back"),
        ],
        check=True,
        cwd=ROOT,
    )
    seconds = time.perf_counter() - began

    def shapes(directory: Path) -> dict[str, list[int]]:
        found = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "np") as file:
                found |= {k: file.get_slice(k).get_shape() for k in file.keys()}
        return found

    same = shapes(work / "hf") == shapes(work / "back")
    return f"export: {seconds:.0f} s, names and shapes as the original's: {same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--preset", default="llama3_8b")
    parser.add_argument("--tokens", type=int, help="replace every row's length")
    parser.add_argument("--no-export", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made = 0.0
    if not (args.work / "hf" / "config.json").exists():
        made = make_checkpoint(args.work / "hf", args.preset)
        print(f"made the checkpoint in {made:.0f} s")
    make_text(args.work / "text.txt")
    results, notes = [], []
    for i, name in enumerate(args.rows):
        tokens, extra = ROWS[name]
        last = i == len(args.rows) - 1 and not args.no_export
        if last:
            extra = [*extra, "--train.save-every", str(args.steps)]
        results.append(run(args.work, name, args.tokens or tokens, extra, args))
        print(results[-1], flush=True)
        if last and "error" not in results[-1]:
            out_dir = args.work / "runs" / name.replace(" ", "-")
            notes.append(export_and_compare(args.work, out_dir))
            print(notes[-1], flush=True)
    write(args, results, notes, made)


def write(args, results: list[dict], notes: list[str], made: float) -> None:
    """Write the CSV and the markdown."""
    query = "import jax; print(jax.devices()[0].device_kind)"
    device = subprocess.run(
        [sys.executable, "-c", query], capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(
        f"{p} {version(p)}" for p in ("jax", "jaxlib", "flax", "optax", "transformers")
    )
    date = datetime.date.today().isoformat()
    args.out.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(k for r in results for k in r))
    with (args.out / f"step-{date}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(results)
    lines = [
        f"# Whole training steps, {date}",
        "",
        f"- GPU: {device}",
        f"- versions: Python {platform.python_version()}, {versions}",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- model: {args.preset}, random bf16 weights from sharded safetensors, "
        f"{args.optimizer}, batch 1, median of {args.steps} steps less the first two",
        *([f"- making the checkpoint: {made:.0f} s"] if made else []),
        *[f"- {n}" for n in notes],
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *[
            "| " + " | ".join(str(r.get(c, "")) for c in columns) + " |"
            for r in results
        ],
    ]
    (args.out / f"step-{date}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if any("error" in r for r in results):
        raise SystemExit("a row failed")


if __name__ == "__main__":
    main()
