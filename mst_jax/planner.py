"""Which plan trains a model on a GPU: the fastest that fits, the longest sequence.

Candidates are the same for all layers, or two neighbours of `NEIGHBOURS` mixed, with
`head_groups` and chunk sizes that cut the work finer where memory is short, and with
`prefetch` where it is not. Each is predicted (`prediction.py`); of those within the
budget the fastest is taken.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from mst_jax.config import Config, ModelConfig, TrainConfig
from mst_jax.gpus import Gpu
from mst_jax.ops.attention import choose_implementation
from mst_jax.ops.swiglu import mlp_chunk_size
from mst_jax.plan import PRESETS, RESIDUALS, read_groups
from mst_jax.prediction import Prediction, predict
from mst_jax.step_memory import default_loss_chunk

GIB = 2**30
GRAIN = 1024
"""Lengths are searched in multiples of this many tokens."""

_NONE = "save=" + "+".join(RESIDUALS)
_WITHOUT_MLP = "save=input+qkv+attention+mlp_input"
_ATTENTION, _FULL = "save=input+attention", "save=input"
_OFFLOAD_ATTENTION, _OFFLOAD = "offload=input+attention", "offload=input"
_EVERY = ("offload=input every=2", "offload=input every=4")
# (faster, smaller), of device or host memory.
NEIGHBOURS = (
    (_NONE, _WITHOUT_MLP), (_WITHOUT_MLP, _ATTENTION), (_ATTENTION, _FULL),
    (_ATTENTION, _OFFLOAD_ATTENTION), (_OFFLOAD_ATTENTION, _OFFLOAD), (_FULL, _OFFLOAD),
    (_OFFLOAD, _EVERY[0]), (_EVERY[0], _EVERY[1]),
)  # fmt: skip
PURE = tuple(dict.fromkeys(plan for pair in NEIGHBOURS for plan in pair))


Planned = tuple[Config, Prediction]
Budget = tuple[int, int]


def fastest_plan(
    cfg: Config,
    model: ModelConfig,
    gpu: Gpu,
    device_bytes: int | None = None,
    host_bytes: int = 0,
) -> tuple[Config, Prediction]:
    """Choose plan, head groups and chunk sizes for `cfg.data.seq_len`.

    Args:
        cfg: all else: optimizer, dtypes, batch.
        model: its shape.
        gpu: where it runs.
        device_bytes: budget of device memory; None is `default_budget`.
        host_bytes: budget of pinned host memory.

    Returns:
        (cfg with `train` filled in, its prediction).

    Raises:
        ValueError: nothing fits; with what would be needed and what to change.
    """
    budget = default_budget(gpu) if device_bytes is None else device_bytes, host_bytes
    found = list(_fitting(cfg, model, gpu, budget, _cuts(cfg, model, gpu)))
    if not found:
        raise ValueError(_too_long(cfg, model, gpu, budget))
    return min(found, key=lambda item: item[1].step_seconds)


def longest_sequence(
    cfg: Config,
    model: ModelConfig,
    gpu: Gpu,
    device_bytes: int | None = None,
    host_bytes: int = 0,
) -> tuple[Config, Prediction]:
    """Find the longest sequence that fits, to 1024 tokens, and its fastest plan.

    Args, Returns, Raises: as `fastest_plan`, with `data.seq_len` filled in too.
    """
    budget = default_budget(gpu) if device_bytes is None else device_bytes, host_bytes

    def at_length(grains: int) -> Config:
        return replace(cfg, data=replace(cfg.data, seq_len=grains * GRAIN))

    def fits(grains: int) -> bool:
        return _fits(at_length(grains), model, gpu, budget)

    if not fits(1):
        raise ValueError(_too_long(at_length(1), model, gpu, budget))
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return fastest_plan(at_length(low), model, gpu, *budget)


def parse_bytes(text: str) -> int:
    """Read a size such as '120GiB' or '80 GB'.

    Raises:
        ValueError: no number with a unit.
    """
    match = re.fullmatch(r"([0-9.]+) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no size: write for example 120GiB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


def default_budget(gpu: Gpu) -> int:
    """Return the device memory to plan with: 3% less, the predictions' error."""
    return int(0.97 * gpu.usable)


def options(train: TrainConfig) -> list[str]:
    """Return the options of `train.py` that set what the planner has chosen."""
    prefetch = f"--train.{'' if train.prefetch else 'no-'}prefetch"
    return [
        "--train.memory-budget None --train.host-memory None",  # no planning again
        f"--train.plan '{train.plan}'",
        f"--train.head-groups {train.head_groups}",
        *([prefetch] if "offload" in train.plan else []),
        f"--train.mlp-chunk-size {train.mlp_chunk_size}",
        f"--train.loss-chunk-size {train.loss_chunk_size}",
    ]


def memory_limit(
    cfg: Config, model: ModelConfig, gpu: Gpu, device_bytes: int, host_bytes: int
) -> str:
    """Return which memory keeps `cfg`'s sequence from being longer."""
    longer = replace(cfg, data=replace(cfg.data, seq_len=cfg.data.seq_len + GRAIN))
    if _fits(longer, model, gpu, (device_bytes, 2**60)):
        return f"host memory ({host_bytes / GIB:.1f} GiB)"
    return f"device memory ({device_bytes / GIB:.1f} GiB)"


def _fits(cfg, model, gpu, budget):
    cuts = _cuts(cfg, model, gpu)
    finest = [
        c for c in cuts if c["head_groups"] == model.num_kv_heads and not c["prefetch"]
    ]
    return next(_fitting(cfg, model, gpu, budget, finest), None) is not None


def _cuts(cfg: Config, model: ModelConfig, gpu: Gpu) -> list[dict[str, int]]:
    """Return head groups, chunk sizes and prefetch, much memory to little.

    The layers run on the whole sequence where it fits, and kernels take it (multiples
    of 8 rows): a loop over chunks copies them in and out. The chunks' budgets are those
    of `mini_sequence.py`, a quarter and a sixteenth. All chunks are equal where that is
    possible: a shorter last one costs a copy of a whole sequence, and in a step of
    800,768 tokens XLA also kept 3.9 GiB of zeros.
    """
    B, T = cfg.data.batch_size, cfg.data.seq_len
    dtype = jnp.dtype(cfg.train.compute_dtype)
    mlp = mlp_chunk_size(B, model.intermediate_size, dtype)
    loss = default_loss_chunk(cfg, model, gpu)
    chunks = [(mlp // part, loss // part) for part in (1, 4, 16)]
    if mlp < T and B * T % 8 == 0:
        chunks.insert(0, (T, loss))
    return [
        {
            "head_groups": groups,
            "mlp_chunk_size": _equal_chunks(T, layer, B),
            "loss_chunk_size": _equal_chunks(T, head, B),
            "prefetch": prefetch,
        }
        for layer, head in chunks
        for groups in _head_groups(cfg, model)
        for prefetch in (True, False)
    ]


def _head_groups(cfg: Config, model: ModelConfig) -> list[int]:
    """The groups that cuDNN can take, if it was asked for by name; all if it has none.

    Its offsets of packed documents are 32 bits: a long row is too long for all heads.
    """

    def taken(groups: int) -> bool:
        name, _ = choose_implementation(
            model.head_size, jnp.dtype(cfg.train.compute_dtype),
            segmented=cfg.data.packing, capability=(9, 0),
            shape=(cfg.data.batch_size, cfg.data.seq_len, model.num_heads // groups),
        )  # fmt: skip
        return cfg.train.asked_attention in (None, "xla", name)

    K = model.num_kv_heads
    divisors = [g for g in range(1, K + 1) if K % g == 0]
    return [g for g in divisors if taken(g)] or divisors


def _equal_chunks(length: int, most: int, batch: int) -> int:
    """The largest divisor of the length up to `most`; `most` if it is far smaller.

    If there is one, one that makes multiples of the 8 rows that kernels take.
    """
    most = max(1, most)
    fewest = -(-length // most)
    counts = [c for c in range(fewest, 4 * fewest + 1) if length % c == 0]
    sizes = [length // count for count in counts]
    rows_of_8 = [size for size in sizes if batch * size % 8 == 0]
    return next(iter(rows_of_8 + sizes), most)


def _fitting(
    cfg: Config,
    model: ModelConfig,
    gpu: Gpu,
    budget: Budget,
    cuts: list[dict[str, int]],
) -> Iterator[Planned]:
    """Yield the candidates within the budget; of each mixture only the fastest."""
    L = model.num_layers
    fitting = set()  # whole plans, which a finer cut would only slow down
    for cut in cuts:
        attempt = partial(_attempt, cfg, model, gpu, cut)
        least = 2**60
        for plan in PURE:
            if plan in fitting or L % _every(plan):
                continue
            found = attempt(_by_name(plan))
            least = min(least, found[1].peak_device)
            if _within(found, budget):
                fitting.add(plan)
                yield found
        if not fitting and least > budget[0]:
            continue  # a mixture lies between its plans
        for faster, smaller in NEIGHBOURS:
            if faster in fitting:
                continue  # all layers have the faster one
            found = _mixture(attempt, L, faster, smaller, budget)
            if found is not None and _within(found, budget):
                yield found


def _attempt(cfg, model, gpu, cut, plan) -> Planned:
    offloads = any(group.offload for group in read_groups(plan))
    cut = cut | {"prefetch": cut["prefetch"] and offloads}
    changed = replace(cfg, train=replace(cfg.train, plan=plan, **cut))
    return changed, predict(changed, model, gpu)


def _within(found: Planned, budget: Budget) -> bool:
    return found[1].peak_device <= budget[0] and found[1].peak_host <= budget[1]


def _mixture(attempt, L, faster, smaller, budget) -> Planned | None:
    """As many layers of the faster plan as the memory holds that it takes more of."""
    on_host = faster.startswith("offload")
    counts = [
        n
        for n in range(1, L)
        if n % _every(faster) == 0 and (L - n) % _every(smaller) == 0
    ]

    def mix(n: int) -> Planned:
        # Layers that save more come last: they go first on the way back.
        return attempt(f"{L - n} {smaller}; {n} {faster}")

    def too_many(n: int) -> bool:
        prediction = mix(n)[1]
        used = prediction.peak_host if on_host else prediction.peak_device
        return used > budget[on_host]

    if not counts or too_many(counts[0]):
        return None
    return mix(counts[bisect_left(counts, True, lo=1, key=too_many) - 1])


def _every(plan: str) -> int:
    return int(plan.partition("every=")[2] or 1)


def _by_name(plan: str) -> str:
    """The plan for all layers, by its name if it has one."""
    text = f"* {plan}"
    return next((name for name, known in PRESETS.items() if known == text), text)


# --- nothing fits ---


def _too_long(cfg, model, gpu, budget) -> str:
    """Say what the sequence needs and what would make room."""
    least = _least(cfg, model, gpu, budget[1])
    lines = [
        f"{cfg.data.seq_len} tokens do not fit {gpu.name}: the smallest plan, "
        f"{least[0].train.plan!r} with head_groups={least[0].train.head_groups}, needs "
        f"{show(least[1].peak_device)} of device memory and {show(least[1].peak_host)} "
        f"of host memory; there are {show(budget[0])} and {show(budget[1])}. At its "
        f"peak: {parts(least[1])}."
    ]
    for change, changed, host in _changes(cfg, budget[1]):
        _, prediction = found = _least(changed, model, gpu, host)
        saved = least[1].peak_device - prediction.peak_device
        fits = _within(found, (budget[0], host))
        if change is None:
            change = f"{show(prediction.peak_host)} of host memory"
        if saved > 0:
            lines.append(f"{change} saves {show(saved)}{'; then it fits' * fits}.")
        elif fits:
            lines.append(f"With {change} it fits.")
    return " ".join(lines)


def _least(cfg, model, gpu, host_bytes):
    """The candidate of least device memory within the host's; of equals the leanest."""
    L = model.num_layers
    cut = _cuts(cfg, model, gpu)[-1]
    found = []
    for plan in (p for p in reversed(PURE) if L % _every(p) == 0):
        train = replace(cfg.train, plan=_by_name(plan), **cut)
        changed = replace(cfg, train=train)
        found.append((changed, predict(changed, model, gpu)))
    within = [item for item in found if item[1].peak_host <= host_bytes]
    return min(within or found, key=lambda item: item[1].peak_device)


def _changes(cfg: Config, host_bytes: int) -> Iterator[tuple[str | None, Config, int]]:
    """Yield (what to change, the changed configuration, host budget)."""
    optim = cfg.optim
    options: dict[str, Any] = {"param_dtype": "bfloat16"}
    if cfg.train.accumulate == 1:
        options["in_backward"] = True
    if optim.name in ("adamw", "lion"):
        options |= {"moment_dtype": "int8", "name": "adafactor"}
    if optim.state_on_host:
        options["state_on_host"] = False
    for key, value in options.items():
        if getattr(optim, key) == value:
            continue
        extra = {"moment_dtype": "float32"} if key == "name" else {}
        changed = replace(cfg, optim=replace(optim, **{key: value}, **extra))
        yield f"optim.{key}={value!r}", changed, host_bytes
    yield None, cfg, 2**60


def parts(prediction: Prediction) -> str:
    """Name what the device holds at the peak, largest first."""
    parts = sorted(prediction.components.items(), key=lambda item: -item[1])
    least = prediction.peak_device / 100
    return ", ".join(f"{name} {show(size)}" for name, size in parts if size > least)


def show(size: int) -> str:
    """Write a size in GiB, a small one in MiB."""
    if 0 < size < GIB // 2:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"
