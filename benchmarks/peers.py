"""Whole training steps of this package and of its peers, in one run on one GPU.

    python benchmarks/peers.py --out docs/benchmarks --lengths 8192 32768 \\
        --entries ours liger compile-liger-loss liger-ckpt --seconds 300

Every entry runs in a process of its own, with the same model, memory budget, tokens,
optimizer and, bit for bit, initial weights (`peers/weights.py`), so that the first loss
is the same. Entries run in the order given until --seconds are spent; a row that fails,
hangs or does not fit is a row with its error. Peers' settings are in
`peers/with_torch.py`; mini-s is a path to a checkout of it; a missing package is named
in its rows. `ours` is the planner's choice for the budget, `ours@30` for 30 GiB,
`ours@30+80` and `ours+80` with 80 GiB of host memory besides. Writes a dated markdown,
a CSV and a plot.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import median

import report
from arguments import positive

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
OURS = (
    "ours", "ours-saved", "ours-but-gate-up", "ours-attention", "ours-inputs",
)  # fmt: skip
# Most telling first.
ENTRIES = (
    "ours", "liger", "compile-liger-loss", "liger-ckpt-attn", "liger-ckpt",
    "liger-tiled", "ours-but-gate-up", "ours-attention", "ours-saved", "mini-s",
    "hf-ckpt", "hf", "compile-liger-loss-ckpt", "compile", "compile-ckpt",
    "liger-tiled-ckpt", "ours-inputs",
)  # fmt: skip
PACKAGES = (
    "jax", "jaxlib", "flax", "torch", "triton", "transformers", "liger-kernel",
)  # fmt: skip
SAME_LOSS = 1e-2
OTHER_LOSS = "another first loss"


def read(entry: str) -> tuple[str, float, float]:
    """Return an entry's name, its GiB of device and of host memory, 0 if not given."""
    entry, _, host = entry.partition("+")
    name, _, device = entry.partition("@")
    return name, float(device or 0), float(host or 0)


def is_ours(entry: str) -> bool:
    """Whether an entry runs on this package."""
    return read(entry)[0] in OURS


def is_checkpointed(entry: str) -> bool:
    """Whether a peer recomputes whole layers, as the paper's baselines do."""
    return entry.endswith("-ckpt") or entry == "mini-s"


def gpu() -> tuple[str, float]:
    """Return the GPU's name and memory in GiB, without starting CUDA in this process.

    Without a GPU: ("CPU", 0), for trying the script.
    """
    if shutil.which("nvidia-smi") is None:
        return "CPU", 0.0
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    name, memory = done.stdout.splitlines()[0].split(", ")
    return name, float(memory.split()[0]) / 1024


def missing(entry: str, mini_s: Path | None) -> str | None:
    """Return what an entry lacks to run, or None."""
    if is_ours(entry):
        return None
    needed = ["torch", "transformers"] + ["liger_kernel"] * ("liger" in entry)
    if absent := [name for name in needed if find_spec(name) is None]:
        return f"not installed: {', '.join(absent)}"
    if entry == "mini-s":
        if mini_s is None and find_spec("minis") is None:
            return "not installed: minis (--mini-s PATH, a checkout of wdlctc/mini-s)"
        if mini_s and not (mini_s / "minis" / "mini_sequence.py").exists():
            return f"{mini_s} has no minis/mini_sequence.py"
    return None


class Worker:
    """A process of one entry, whose rows come one by one."""

    def __init__(self, job: dict, total_GiB: float):
        script = "with_jax.py" if is_ours(job["entry"]) else "with_torch.py"
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        if total_GiB:
            fraction = job["budget_GiB"] / total_GiB
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
        if host := read(job["entry"])[2]:
            env["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] = str(max(64, int(host)))
        self.errors = tempfile.TemporaryFile("w+")
        path = str(ROOT / "benchmarks" / "peers" / script)
        self.process = subprocess.Popen(
            [sys.executable, path, json.dumps(job)],
            stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        self.rows: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ROW "):
                self.rows.put(json.loads(line[4:]))
        self.rows.put(None)

    def row(self, seconds: float) -> dict:
        """Wait for the next row; one with an error if time or process end first."""
        try:
            row = self.rows.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            return {"error": f"stopped after {seconds:.0f} s"}
        if row is None:
            self.process.wait()
            self.errors.seek(0)
            lines = [x for x in self.errors.read().splitlines() if x.strip()] or [""]
            return {"error": f"exit {self.process.returncode}: {lines[-1][-300:]}"}
        return row

    def stop(self, seconds: float) -> None:
        """Wait for the process, then end it and those it started."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def run_entry(job: dict, args, total_GiB: float, ends: float) -> list[dict]:
    """Run an entry at its lengths; return a row for each."""
    lengths = job["lengths"]
    if reason := missing(job["entry"], args.mini_s):
        return [{"tokens": tokens, "error": reason} for tokens in lengths]
    worker, rows = Worker(job, total_GiB), []
    try:
        for tokens in lengths:
            if rows and "error" in rows[-1]:
                row = {"error": "not run after the row before it"}
            else:
                row = worker.row(min(args.row_seconds, ends - time.monotonic()))
            rows.append({"tokens": tokens} | row)
            print(json.dumps({"entry": job["entry"]} | rows[-1]), flush=True)
    finally:
        whole = len(rows) == len(lengths) and "error" not in rows[-1]
        worker.stop(20 if whole else 0.1)
    return rows


def run_all(args, name: str, total_GiB: float) -> list[dict]:
    """Run all entries until the time is spent."""
    from mst_jax.hf_config import hf_config
    from mst_jax.presets import PRESETS

    model, results = PRESETS[args.preset], []
    ends = time.monotonic() + args.seconds
    for entry in args.entries:
        # JAX's peak only rises: each length in a process of its own.
        ours = is_ours(entry)
        for lengths in [[n] for n in args.lengths] if ours else [args.lengths]:
            if time.monotonic() > ends - 10:
                rows = [{"tokens": n, "error": "not run: time spent"} for n in lengths]
            else:
                job = {
                    "entry": entry, "read": read(entry),
                    "lengths": lengths, "preset": args.preset,
                    "hf_config": hf_config(model, dtype="bfloat16"),
                    "initializer_range": model.initializer_range,
                    "optimizer": args.optimizer, "learning_rate": args.learning_rate,
                    "warmup": 1, "steps": args.steps, "timed_seconds": 6.0,
                    "budget_GiB": args.budget, "mini_s": str(args.mini_s or ""),
                }  # fmt: skip
                rows = run_entry(job, args, total_GiB, ends)
            results += [{"entry": entry} | row for row in rows]
            write(args, name, results)  # what there is, should the run be cut off
    return results


def table(results: list[dict]) -> list[dict]:
    """Return the rows as they are written: rounded, with the ratio to ours."""
    ours = {}
    for row in results:
        if is_ours(row["entry"]) and "step_s" in row:
            speed = row["tokens"] / row["step_s"]
            ours[row["tokens"]] = max(speed, ours.get(row["tokens"], 0.0))
    rows = []
    for row in sorted(results, key=lambda r: r["tokens"]):
        new = {"tokens": row["tokens"], "entry": row["entry"]}
        if "step_s" in row:
            speed = row["tokens"] / row["step_s"]
            best = ours.get(row["tokens"])
            new |= {
                "tokens_per_second": round(speed),
                "ours_over_it": round(best / speed, 3) if best else "",
                "peak_GiB": round(row["peak_GiB"], 2),
                "pool_GiB": round(row.get("reserved_GiB", 0), 2) or "",
                "host_GiB": round(row.get("host_GiB", 0), 2) or "",
                "step_s": round(row["step_s"], 4),
                "fastest_s": round(row["fastest_s"], 4),
                "steps": row["steps"],
                "first_loss": round(row["losses"][0], 4),
                "last_loss": round(row["losses"][-1], 4),
                "compile_s": round(row["compile_s"]) if "compile_s" in row else "",
                "plan": row.get("plan", ""),
            }  # fmt: skip
        rows.append(new | {"error": " ".join(row.get("error", "").split())[:200]})
    mark_losses(rows)
    return rows


def mark_losses(rows: list[dict]) -> None:
    """Give rows an error whose first loss is not that of most rows of their length."""
    for tokens in {r["tokens"] for r in rows}:
        group = [r for r in rows if r["tokens"] == tokens and "first_loss" in r]
        if finite := [r["first_loss"] for r in group if isfinite(r["first_loss"])]:
            middle = median(finite)
            for row in group:
                if not abs(row["first_loss"] - middle) <= SAME_LOSS:
                    row["error"] = f"{OTHER_LOSS}, most have {middle}"


def conclusions(rows: list[dict]) -> list[str]:
    """Compare, at each length, the fastest of ours with the fastest peers."""
    lines = []

    def speed(row: dict) -> float:
        return row["tokens_per_second"]

    for tokens in sorted({r["tokens"] for r in rows}):
        done = [r for r in rows if r["tokens"] == tokens and not r["error"]]
        ours = [r for r in done if is_ours(r["entry"])]
        peers = [r for r in done if not is_ours(r["entry"])]
        if not (ours and peers):
            continue
        best, peer = max(ours, key=speed), max(peers, key=speed)
        lines.append(
            f"{tokens} tokens: {best['entry']} {speed(best)} tokens/s, best peer "
            f"{peer['entry']} {speed(peer)}: **{speed(best) / speed(peer):.2f}x**"
        )
        if whole := [r for r in peers if is_checkpointed(r["entry"])]:
            peer = max(whole, key=speed)
            lean = [r for r in ours if r["peak_GiB"] <= peer["peak_GiB"]]
            text = f"; best checkpointed peer {peer['entry']} {speed(peer)} tokens/s"
            text += f", {peer['peak_GiB']} GiB; "
            if lean:
                best = max(lean, key=speed)
                text += f"in no more memory {best['entry']} {speed(best)}: "
                text += f"{speed(best) / speed(peer):.2f}x"
            else:
                text += "none of ours was run in so little"
            lines[-1] += text
    return lines


def write(args, name: str, results: list[dict]) -> None:
    """Write CSV, markdown and plot."""
    rows = table(results)
    others = {
        f"{package} {version}"
        for row in results
        for package, version in row.get("versions", {}).items()
        if package not in PACKAGES
    }
    said = ", ".join(sorted(others))
    path = report.write(
        args.out, "peers", "The peers, whole steps", rows,
        gpu=f"{name}; memory budget of every entry: {args.budget:.1f} GiB",
        packages=PACKAGES, commit=args.commit, suffix=args.suffix,
        notes=[
            *([f"in the rows' processes: {said}"] if said else []),
            f"{args.preset}, bf16 weights, the same bits in every entry, batch 1, "
            f"random tokens, {args.optimizer}, learning rate {args.learning_rate}, "
            "updated in the backward pass; median of the steps after the first",
            "peak_GiB: allocated (PyTorch), in use (JAX); pool_GiB: reserved by "
            "PyTorch; host_GiB: residuals in pinned host memory. ours_over_it: "
            "tokens/s of the fastest of ours at that length over the row's",
            "peers' settings: `benchmarks/peers/with_torch.py`. bf16 weights are "
            "rounded stochastically in ours, to nearest in the peers'; mini-s's "
            "gradient of the LM head is twice the right one: later losses differ for "
            "these reasons",
            *conclusions(rows),
        ],
    )  # fmt: skip
    plot(rows, name, path.with_suffix(".png"))


def plot(rows: list[dict], name: str, path: Path) -> None:
    """Draw tokens/s and peak memory over the length, ours in full lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sides = figure.subplots(1, 2)
    for entry in dict.fromkeys(r["entry"] for r in rows):
        mine = [r for r in rows if r["entry"] == entry and "step_s" in r]
        for axes, key in zip(sides, ("tokens_per_second", "peak_GiB"), strict=True):
            if mine:
                axes.plot(
                    [r["tokens"] for r in mine], [r[key] for r in mine],
                    "o-" if is_ours(entry) else "x--", label=entry,
                )  # fmt: skip
            axes.set(xlabel="tokens", ylabel=key, xscale="log")
            axes.set_ylim(bottom=0)
    if sides[0].get_legend_handles_labels()[0]:
        sides[0].legend(fontsize=7)
    figure.suptitle(name)
    figure.savefig(path, dpi=120)


def main() -> None:
    from mst_jax.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--entries", nargs="+", default=list(ENTRIES))
    lengths = [8192, 16384, 32768, 65536, 131072]
    parser.add_argument("--lengths", nargs="+", type=positive, default=lengths)
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    steps = "at most, when short"
    parser.add_argument("--steps", type=positive, default=8, help=steps)
    parser.add_argument("--budget", type=float, help="GiB; default 95%% of the GPU's")
    parser.add_argument("--mini-s", type=Path, help="a checkout of wdlctc/mini-s")
    parser.add_argument("--seconds", type=float, default=3600, help="of the whole run")
    parser.add_argument("--row-seconds", type=float, default=300, help="of one row")
    parser.add_argument("--suffix", default="", help="of the files' names, as -a")
    parser.add_argument("--commit", default=report.checkout())
    args = parser.parse_args()
    args.lengths.sort()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker too
    known = {*ENTRIES, *OURS}
    if unknown := {e for e in args.entries if read(e)[0] not in known}:
        raise SystemExit(f"no entries {sorted(unknown)}; there are {[*ENTRIES]}")
    name, total_GiB = gpu()
    args.budget = args.budget or 0.95 * total_GiB
    rows = table(run_all(args, name, total_GiB))
    print("\n".join(conclusions(rows)))
    if found := [r["entry"] for r in rows if r["error"].startswith(OTHER_LOSS)]:
        raise SystemExit(f"another first loss than most: {found}")
    if not any("step_s" in r for r in rows):
        raise SystemExit("no row ran")


if __name__ == "__main__":
    main()
