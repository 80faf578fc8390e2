"""What a run reports: JSONL, TensorBoard, a plot, and how fast the hardware could go.

MFU is model FLOPs utilisation (arXiv 2204.02311): the FLOPs that forward and backward
need, recomputation not counted, over the GPU's dense bf16 peak.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mst_jax.config import ModelConfig

# Dense bf16 (T4: f16) tensor-core peaks in FLOP/s, from NVIDIA's datasheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "4090": 165e12,
    "A10G": 70e12,
    "L4": 121e12,
    "T4": 65e12,
}


def peak_flops() -> tuple[str, float] | None:
    """Return (name, FLOP/s) of this GPU's peak; None for what the table lacks."""
    kind = jax.devices()[0].device_kind
    found = (n for n in PEAK_FLOPS if re.search(rf"\b{n}\b", kind))
    return next(((name, PEAK_FLOPS[name]) for name in found), None)


def peak_memory_bytes() -> int | None:
    """Return the most device memory ever in use; None where JAX does not count."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


class Meter:
    """Speed of the steps since it was last read.

    Tokens are those with a label: padding does not count. MFU takes what each of them
    can see, so that packed documents count with their own lengths.
    """

    def __init__(self, model: ModelConfig, devices: int):
        self._model, self._devices = model, devices
        self._begin()

    def add(self, batch: dict[str, np.ndarray]) -> None:
        """Count a micro-batch of the next step: its `labels` and `positions`."""
        seen = batch["positions"][batch["labels"] >= 0] + 1
        self._tokens += seen.size
        self._seen += float(np.minimum(seen, self._model.sliding_window or seen).sum())

    def restart(self) -> None:
        """Leave out the time since the last reading: an evaluation, a save."""
        self._began = time.perf_counter()

    def read(self, steps: int) -> dict[str, Any]:
        """Return the speed of `steps` steps, which have ended."""
        seconds, tokens = time.perf_counter() - self._began, max(1, self._tokens)
        rate, peak = tokens / seconds, peak_flops()
        flops = self._model.flops_per_token(self._seen / tokens)
        self._begin()
        return {
            "tokens_per_second": rate,
            "step_seconds": seconds / steps,
            "mfu": rate * flops / (peak[1] * self._devices) if peak else None,
        }

    def _begin(self) -> None:
        self._tokens, self._seen = 0, 0.0
        self.restart()


@contextmanager
def profiled(
    directory: Path | None, first: int
) -> Iterator[Callable[[int, Any], None]]:
    """Give a function to call before each step, with the steps done and their state.

    It traces three steps from `first` on, or as many as there are; None traces none.
    """
    running = False

    def before(step: int, state: Any) -> None:
        nonlocal running
        if directory is not None and step == first:
            jax.profiler.start_trace(directory)
            running = True
        elif running and step == first + 3:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running = False

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and TensorBoard files in a directory.

    A resumed run continues the file; lines beyond the step it resumes from, which a
    killed run may have left, are dropped.
    """

    def __init__(self, directory: Path, *, start_step: int):
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= start_step]
        whole = self.path.with_suffix(".tmp")  # a run killed here keeps its history
        whole.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(whole, self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(
            str(directory / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line. Values are floats; None and NaN are written as null."""
        clean = {k: v for k, v in values.items() if v is not None}
        safe = {k: v if math.isfinite(v) else None for k, v in clean.items()}
        self._file.write(json.dumps({"step": step, **safe}) + "\n")
        self._file.flush()
        for name, value in clean.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def plot_loss(rows: list[dict[str, Any]], path: Path, *, floor: float | None) -> None:
    """Draw training and held-out loss against the step.

    Args:
        rows: from `read_metrics`.
        path: of the PNG.
        floor: the held-out unigram entropy in nats, as a line; None for none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    for name, label, style in (
        ("loss", "training", "-"),
        ("eval_loss", "held out", "o-"),
    ):
        points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label="unigram entropy")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
