"""What a run reports: JSONL, TensorBoard, a plot, and how fast the hardware could go.

MFU is model FLOPs utilisation (arXiv 2204.02311): the FLOPs that forward and backward
need, recomputation not counted, over the GPU's dense bf16 peak.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax

# Dense bf16 (T4: f16) tensor-core peaks in FLOP/s, from NVIDIA's datasheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "4090": 165e12,
    "A10G": 70e12,
    "L4": 121e12,
    "T4": 65e12,
}


def peak_flops() -> tuple[str, float] | None:
    """Return (name, FLOP/s) of this GPU's peak; None for what the table lacks."""
    kind = jax.devices()[0].device_kind
    return next(((n, f) for n, f in PEAK_FLOPS.items() if n in kind), None)


def peak_memory_bytes() -> int | None:
    """Return the most device memory ever in use; None where JAX does not count."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


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
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
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
    return rows


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
