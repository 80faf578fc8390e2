"""What `mst-jax plan` prints and draws: a plan in words, a table, a figure."""

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mst_jax.config import Config, ModelConfig
from mst_jax.gpus import Gpu
from mst_jax.planner import (
    GRAIN,
    Planned,
    fastest_plan,
    fits,
    longest_sequence,
    options,
)
from mst_jax.prediction import GIB, Prediction, parts, show


def table(rows: list[Planned]) -> str:
    """Return predictions as a table in Markdown."""
    names = (
        "tokens", "plan", "head groups", "device GiB", "host GiB", "tokens/s",
        "limited by",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for cfg, p in rows:
        cells = (
            cfg.data.seq_len, cfg.train.plan, cfg.train.head_groups,
            f"{p.peak_device / GIB:.1f}", f"{p.peak_host / GIB:.1f}",
            f"{p.tokens_per_second:.0f}", p.limited_by,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(
    cfg: Config,
    model: ModelConfig,
    gpu: Gpu,
    *,
    recipe: Path,
    overrides: list[str],
    seq_len: int | None,
    device_bytes: int,
    host_bytes: int,
    png: Path,
) -> tuple[str, Config, Prediction]:
    """Plan a sequence, draw the figure, and put all of it in words.

    Args:
        cfg: the run.
        model: its shape.
        gpu: where it runs.
        recipe: the run's file, for the command.
        overrides: the run's other options, for the command.
        seq_len: tokens; None is the longest that fits.
        device_bytes: budget.
        host_bytes: budget.
        png: where the figure goes.

    Returns:
        (text, cfg with the plan, its prediction).

    Raises:
        ValueError: nothing fits, or `png` cannot be written.
    """
    _check_path(png)
    budget = device_bytes, host_bytes

    def at_length(tokens: int) -> Config:
        return replace(cfg, data=replace(cfg.data, seq_len=tokens))

    if seq_len is None:
        found = longest_sequence(cfg, model, gpu, *budget)
        limit = memory_limit(found[0], model, gpu, *budget)
        tokens = found[0].data.seq_len
        first = f"The longest sequence is {tokens} tokens, limited by {limit}."
    else:
        found = fastest_plan(at_length(seq_len), model, gpu, *budget)
        first = f"The fastest plan for {seq_len} tokens:"
    rows = []
    for tokens in lengths(found[0].data.seq_len, 9)[:-1]:
        with suppress(ValueError):  # a length of odd divisors may not fit
            rows.append(fastest_plan(at_length(tokens), model, gpu, *budget))
    rows.append(found)
    title = f"{gpu.name}, {cfg.optim.name}, {show(host_bytes)} of host memory"
    plot_memory(
        rows, png, title=title, device_bytes=device_bytes, host_bytes=host_bytes
    )
    planned, prediction = found
    spent = "; ".join(f"{k} {s:.2f} s" for k, s in prediction.seconds.items() if s)
    text = [
        f"{gpu.name}: {show(device_bytes)} of {show(gpu.memory)} for the process, "
        f"{show(host_bytes)} of pinned host memory.",
        f"{first}\n",
        f"{table([*rows[:-1:2], found])}\n",
        f"At its peak ({prediction.peak_phase}): {parts(prediction)}.",
        f"A step takes {prediction.step_seconds:.2f} s: {spent}.",
        f"Figure: {png}\n",
        command(planned, gpu, recipe, overrides, device_bytes),
    ]
    return "\n".join(text), planned, prediction


def memory_limit(
    cfg: Config, model: ModelConfig, gpu: Gpu, device_bytes: int, host_bytes: int
) -> str:
    """Return which memory keeps `cfg`'s sequence from being longer."""
    longer = replace(cfg, data=replace(cfg.data, seq_len=cfg.data.seq_len + GRAIN))
    device = f"device memory ({device_bytes / GIB:.1f} GiB)"
    if not fits(longer, model, gpu, (device_bytes, 2**60)):
        return device
    if not host_bytes:
        return f"{device}; host memory would make it longer"
    return f"host memory ({host_bytes / GIB:.1f} GiB)"


def command(
    cfg: Config, gpu: Gpu, recipe: Path, overrides: list[str], device_bytes: int
) -> str:
    """Return the command of the run."""
    # JAX takes three quarters of the device if it is not told.
    fraction = min(0.97, device_bytes / gpu.memory + 0.03)
    lines = [
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f} python train.py",
        shlex.join(["--config", str(recipe), *overrides]),
        f"--data.seq-len {cfg.data.seq_len}",
        *options(cfg.train),
    ]
    return " \\\n    ".join(lines)


def lengths(longest: int, count: int) -> list[int]:
    """Return about so many lengths up to the longest, at equal ratios."""
    first = min(4 * GRAIN, longest)
    steps = (first * (longest / first) ** (i / (count - 1)) for i in range(count))
    rounded = (max(GRAIN, int(t) // GRAIN * GRAIN) for t in steps)
    return sorted({min(longest, t) for t in rounded} | {longest})


def _check_path(png: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if png.suffix.lower().removeprefix(".") not in known:
        raise ValueError(
            f"the figure's path {str(png)!r} must end in one of {[*known]}"
        )
    if not png.parent.is_dir():
        raise ValueError(
            f"the figure's path {str(png)!r} is in a directory that is not there: "
            "create it, or name another"
        )


def plot_memory(
    rows: list[Planned],
    path: Path,
    *,
    title: str,
    device_bytes: int,
    host_bytes: int,
) -> None:
    """Draw device memory at the peak by component, and host memory, against the length.

    Args:
        rows: by increasing length.
        path: of the PNG.
        title: of the figure.
        device_bytes: budget, drawn as a line.
        host_bytes: the same.
    """
    from matplotlib.figure import Figure

    tokens = [cfg.data.seq_len for cfg, _ in rows]
    names = dict.fromkeys(name for _, p in rows for name in p.components)
    sizes = {name: [p.components.get(name, 0) / GIB for _, p in rows] for name in names}
    sizes = {name: values for name, values in sizes.items() if any(values)}
    figure = Figure(figsize=(9, 6 if host_bytes else 4.5), layout="constrained")
    figure.suptitle(title)
    if host_bytes:
        panels = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        host = [p.peak_host / GIB for _, p in rows]
        panels[1].plot(tokens, host, "o-", markersize=3)
    else:
        panels = [figure.subplots()]
    panels[0].stackplot(tokens, list(sizes.values()), labels=list(sizes))
    limits = (device_bytes, "device GiB"), (host_bytes, "pinned host GiB")
    for axes, (budget, label) in zip(panels, limits, strict=False):
        axes.axhline(budget / GIB, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{t / 1024:.3g}K" for t in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("tokens of a sequence")
    panels[0].legend(
        reverse=True, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small"
    )
    figure.savefig(path, dpi=120)
