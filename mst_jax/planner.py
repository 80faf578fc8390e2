"""Which plan trains a model on a GPU: the fastest that fits, the longest sequence.

Candidates are the same for all layers, or two neighbours of `NEIGHBOURS` mixed, with
`head_groups` and chunk sizes that cut the work finer where memory is short, and with
`prefetch` where it is not. Each is predicted (`prediction.py`); of those within the
budget the fastest is taken.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp

from mst_jax.chunk_loop import loop_chunks
from mst_jax.config import Config, ModelConfig, TrainConfig
from mst_jax.gpus import Gpu
from mst_jax.gradients import attention_implementation
from mst_jax.mini_sequence import ROW_MULTIPLE
from mst_jax.ops.linear_cross_entropy.mosaic_gpu import TILE_N
from mst_jax.ops.swiglu import mlp_chunk_size
from mst_jax.plan import PRESETS, RESIDUALS, LayerGroup, Plan, read_groups
from mst_jax.prediction import Prediction, parts, predict_step, show
from mst_jax.step_memory import (
    MOMENTS,
    StepMemory,
    default_loss_chunk,
    has_layer_kernels,
)

GRAIN = 1024
"""Lengths are searched in multiples of this many tokens."""
CHUNK_LOGITS = 2**26
"""Logits for some columns of the head's gradient, at least `FEWEST_COLUMNS`."""
FEWEST_COLUMNS = 2048
"""Narrower matrix products wait for memory."""
FEWEST_ROWS = 1024
"""Shorter chunks of the loss make fewer tiles of dx than a GPU has multiprocessors."""


def _kept(text: str, every: int = 1) -> LayerGroup:
    return replace(read_groups(f"* {text}")[0], every=every)


_NONE = _kept("save=" + "+".join(RESIDUALS))
_WITHOUT_MLP = _kept("save=input+qkv+attention+mlp_input")
_ATTENTION, _FULL = _kept("save=input+attention"), _kept("save=input")
_OFFLOAD_ATTENTION, _OFFLOAD = _kept("offload=input+attention"), _kept("offload=input")
_AWAY = _kept("offload=input save=attention")
# What is there first goes to the host: gate and up have no time left to.
_BUT_GATE_UP = "offload=input+qkv+attention+mlp_input"
_GATE_UP, _ALL_AWAY = _kept(f"{_BUT_GATE_UP} save=gate_up"), _kept(_BUT_GATE_UP)
_HALF_AWAY = _kept("offload=input+attention save=qkv+mlp_input")
_FULL_2, _FULL_4 = (_kept("save=input", k) for k in (2, 4))
_OFFLOAD_2, _OFFLOAD_4 = (_kept("offload=input", k) for k in (2, 4))
# Blocks that are run again keep attention until then, or it would run a third time.
_ATTENTION_2, _ATTENTION_4 = (_kept("save=input+attention", k) for k in (2, 4))
_AWAY_2, _AWAY_4 = (_kept("offload=input save=attention", k) for k in (2, 4))
# (faster, smaller), of device or host memory. Others, such as (_FULL, _FULL_2), were
# within 2% of one of these for Llama3-8B on A100 to H200, with and without host memory.
NEIGHBOURS = (
    (_NONE, _WITHOUT_MLP), (_WITHOUT_MLP, _ATTENTION), (_ATTENTION, _FULL),
    (_NONE, _ALL_AWAY), (_GATE_UP, _ALL_AWAY), (_GATE_UP, _HALF_AWAY),
    (_GATE_UP, _ATTENTION), (_GATE_UP, _OFFLOAD_ATTENTION),
    (_ATTENTION, _AWAY), (_ATTENTION, _OFFLOAD_ATTENTION),
    (_AWAY, _OFFLOAD_ATTENTION), (_AWAY, _OFFLOAD),
    (_OFFLOAD_ATTENTION, _OFFLOAD), (_FULL, _OFFLOAD),
    (_FULL, _ATTENTION_2), (_ATTENTION_2, _ATTENTION_4),
    (_OFFLOAD, _AWAY_2), (_ATTENTION_2, _AWAY_2),
    (_ATTENTION_4, _AWAY_4), (_AWAY_2, _OFFLOAD_4),
    (_FULL_2, _FULL_4), (_OFFLOAD, _OFFLOAD_2), (_FULL_2, _OFFLOAD_2),
    (_OFFLOAD_2, _OFFLOAD_4), (_FULL_4, _OFFLOAD_4),
)  # fmt: skip
PURE = tuple(dict.fromkeys(plan for pair in NEIGHBOURS for plan in pair))
"""Candidates for all layers, of as yet 0 layers."""
Planned = tuple[Config, Prediction]
Candidate = tuple[StepMemory, Prediction]
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
    found = [
        candidate
        for cuts in _both_cuts(cfg, model, gpu)
        for candidate in _fitting(model, gpu, budget, cuts)
    ]
    if not found:
        raise ValueError(_too_long(cfg, model, gpu, budget))
    return _planned(min(found, key=lambda item: item[1].step_seconds))


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

    def holds(grains: int) -> bool:
        return fits(at_length(grains), model, gpu, budget)

    if not holds(1):
        raise ValueError(_too_long(at_length(1), model, gpu, budget))
    low, high = 1, 2
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return fastest_plan(at_length(low), model, gpu, *budget)


def fits(cfg: Config, model: ModelConfig, gpu: Gpu, budget: Budget) -> bool:
    """Return whether any plan for `cfg.data.seq_len` is within (device, host) bytes."""
    finest = [
        cut
        for cuts in _both_cuts(cfg, model, gpu)
        for cut in cuts
        if cut.train.head_groups == model.num_kv_heads and not cut.train.prefetch
    ]
    return next(_fitting(model, gpu, budget, finest), None) is not None


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
        f"--train.vocab-chunk-size {train.vocab_chunk_size}",
    ]


def _cuts(cfg: Config, model: ModelConfig, gpu: Gpu) -> list[Config]:
    """Set head groups, chunk sizes and prefetch: of much memory to of little.

    The layers run on the whole sequence where it fits, and kernels take it (multiples
    of 8 rows): a loop over chunks copies them in and out. The chunks' budgets are those
    of `mini_sequence.py`, a quarter and a sixteenth.
    """
    B, T = cfg.data.batch_size, cfg.data.seq_len
    mlp = mlp_chunk_size(B, model.intermediate_size, jnp.dtype(cfg.train.compute_dtype))
    loss = default_loss_chunk(cfg, model, gpu)
    chunks = [(T, loss)] if mlp < T and B * T % ROW_MULTIPLE == 0 else []
    kernels = has_layer_kernels(cfg, model, gpu)
    for part in (1, 4, 16):
        if kernels:
            chunks.append((_chunks_of_8(T, mlp // part, B), loss // part))
        if not kernels or cfg.train.asked_implementation is None:
            chunks.append((_equal_chunks(T, mlp // part, B), loss // part))
    settings = [
        {
            "plan": "full",  # until one is chosen
            "head_groups": groups,
            "mlp_chunk_size": layer,
            "loss_chunk_size": _equal_chunks(T, head, B),
            "vocab_chunk_size": None,
            "prefetch": prefetch,
        }
        for layer, head in dict.fromkeys(chunks)
        for groups in _head_groups(cfg, model)
        for prefetch in (True, False)
    ]
    return [replace(cfg, train=replace(cfg.train, **setting)) for setting in settings]


def _both_cuts(
    cfg: Config, model: ModelConfig, gpu: Gpu
) -> tuple[list[Config], list[Config]]:
    """Return `_cuts`, and the same with the head's gradient made by columns."""
    cuts = _cuts(cfg, model, gpu)
    B, T, V = cfg.data.batch_size, cfg.data.seq_len, model.vocab_size
    num_chunks = -(-V // max(FEWEST_COLUMNS, CHUNK_LOGITS // (B * T)))
    size = -(-V // num_chunks)
    rows = max(FEWEST_ROWS // B, default_loss_chunk(cfg, model, gpu) // 16)
    head = {
        "loss_chunk_size": _equal_chunks(T, rows, B),
        "vocab_chunk_size": size + -size % TILE_N,
    }
    trains = dict.fromkeys(replace(cut.train, **head) for cut in cuts)
    return cuts, [replace(cfg, train=train) for train in trains]


def _head_groups(cfg: Config, model: ModelConfig) -> list[int]:
    """The groups that what was asked for can take; all if it can none.

    cuDNN's offsets of packed documents are 32 bits: a long row is too long for all
    heads.
    """

    def taken(groups: int) -> bool:
        one = replace(cfg, train=replace(cfg.train, head_groups=groups))
        try:
            attention_implementation(one, model, cfg.data.batch_size, (9, 0))
        except NotImplementedError:
            return False
        return True

    K = model.num_kv_heads
    divisors = [g for g in range(1, K + 1) if K % g == 0]
    return [g for g in divisors if taken(g)] or divisors


def _equal_chunks(length: int, most: int, batch: int) -> int:
    """The largest divisor of the length up to `most`; `most` if it is far smaller.

    A shorter last chunk costs a copy of a whole sequence, and in a step of 800,768
    tokens XLA also kept 3.9 GiB of zeros. If there is one, a divisor that makes
    multiples of the 8 rows that kernels take.
    """
    most = max(1, most)
    fewest = -(-length // most)
    counts = [c for c in range(fewest, 4 * fewest + 1) if length % c == 0]
    sizes = [length // count for count in counts]
    rows_of_8 = [size for size in sizes if batch * size % ROW_MULTIPLE == 0]
    return next(iter(rows_of_8 + sizes), most)


def _chunks_of_8(length: int, most: int, batch: int) -> int:
    """`most`, where only a shorter last chunk makes large chunks that kernels take.

    The copy takes less time than XLA's products, or than chunks of half the size, whose
    weight gradients are added up twice as often.
    """
    equal, most = _equal_chunks(length, most, batch), max(1, most)
    size, rest = loop_chunks(length, most)
    taken = all(batch * rows % ROW_MULTIPLE == 0 for rows in (size, rest))
    large = 2 * equal >= size and batch * equal % ROW_MULTIPLE == 0
    return most if taken and not large else equal


def _fitting(
    model: ModelConfig, gpu: Gpu, budget: Budget, cuts: list[Config]
) -> Iterator[Candidate]:
    """Yield the candidates within the budget; of each mixture only the fastest."""
    L = model.num_layers
    fitting = set()  # whole plans, which a finer cut would only slow down
    possible = [p for p in PURE if not p.offload or budget[1]]
    for cut in cuts:
        step = StepMemory(cut, model, gpu)
        least = dict.fromkeys(possible, 0)  # device memory of any number of layers
        for plan in possible:
            if plan in fitting or L % plan.every:
                continue
            found = _candidate(step, replace(plan, layers=L))
            least[plan] = found[1].peak_device - step.block(plan)
            if found[1].within(budget):
                fitting.add(plan)
                yield found
        for faster, smaller in NEIGHBOURS:
            if faster in fitting or not {faster, smaller} <= least.keys():
                continue  # all layers have the faster one
            if min(least[faster], least[smaller]) > budget[0]:
                continue  # a mixture lies between its plans
            found = _mixture(step, faster, smaller, budget)
            if found is not None and found[1].within(budget):
                yield found


def _candidate(step: StepMemory, *groups: LayerGroup) -> Candidate:
    train = step.cfg.train
    prefetch = train.prefetch and any(group.offload for group in groups)
    plan = Plan(groups=groups, head_groups=train.head_groups, prefetch=prefetch)
    step = step.with_plan(plan)
    return step, predict_step(step)


def _planned(found: Candidate) -> Planned:
    """Return the configuration of a candidate."""
    (step, prediction), cfg = found, found[0].cfg
    plan = _text(step.plan.groups)
    train = replace(cfg.train, plan=plan, prefetch=step.plan.prefetch)
    return replace(cfg, train=train), prediction


def _mixture(
    step: StepMemory, faster: LayerGroup, smaller: LayerGroup, budget: Budget
) -> Candidate | None:
    """As many layers of the faster plan as both memories hold."""
    L = step.L
    counts = [
        n for n in range(1, L) if n % faster.every == 0 == (L - n) % smaller.every
    ]

    @cache
    def mix(i: int) -> Candidate:
        n = counts[i]
        # Layers that save more come last: they go first on the way back.
        return _candidate(
            step, replace(smaller, layers=L - n), replace(faster, layers=n)
        )

    def too_many(i: int) -> bool:
        """Whether fewer layers would take less of a memory that is exceeded.

        They may take more: where the slower plan runs blocks again, or it alone
        offloads.
        """
        for memory, most in enumerate(budget):
            used = mix(i)[1].peaks[memory]
            if used > most and used > mix(i - 1)[1].peaks[memory]:
                return True
        return False

    if not counts:
        return None
    return mix(bisect_left(range(len(counts)), True, lo=1, key=too_many) - 1)


def _text(groups: tuple[LayerGroup, ...]) -> str:
    """The plan in words, by its name if it has one."""
    if len(groups) == 1:
        groups = (replace(groups[0], layers=0),)
    text = str(Plan(groups=groups))
    return next((name for name, known in PRESETS.items() if known == text), text)


# --- nothing fits ---


def _too_long(cfg, model, gpu, budget) -> str:
    """Say what the sequence needs and what would make room."""
    smallest, needs = _least(cfg, model, gpu, budget[1])
    train = smallest.train
    lines = [
        f"{cfg.data.seq_len} tokens do not fit {gpu.name}: the smallest plan for all "
        f"layers, {train.plan!r} with head_groups={train.head_groups}, needs "
        f"{show(needs.peak_device)} of device memory and {show(needs.peak_host)} of "
        f"host memory; there are {show(budget[0])} and {show(budget[1])}. At its peak: "
        f"{parts(needs)}."
    ]
    for change, changed, host in _changes(cfg, budget[1]):
        _, prediction = _least(changed, model, gpu, host)
        if prediction.peak_host > max(host, needs.peak_host):
            continue
        saved = needs.peak_device - prediction.peak_device
        enough = prediction.within((budget[0], host))
        if change is None:
            change = f"{show(prediction.peak_host)} of host memory"
        if saved > 0:
            lines.append(f"{change} saves {show(saved)}{'; then it fits' * enough}.")
        elif enough:
            lines.append(f"With {change} it fits.")
    return " ".join(lines)


def _least(cfg, model, gpu, host_bytes):
    """The candidate of least device memory within the host's; of equals the leanest."""
    L = model.num_layers
    finest = [cuts[-1] for cuts in _both_cuts(cfg, model, gpu)]
    found = [
        _candidate(step, replace(plan, layers=L))
        for step in [StepMemory(cut, model, gpu) for cut in finest]
        for plan in reversed(PURE)
        if L % plan.every == 0
    ]
    within = [candidate for candidate in found if candidate[1].peak_host <= host_bytes]
    return _planned(min(within or found, key=lambda item: item[1].peak_device))


def _changes(cfg: Config, host_bytes: int) -> Iterator[tuple[str | None, Config, int]]:
    """Yield (what to change, the changed configuration, host budget)."""
    optim = cfg.optim
    options: dict[str, Any] = {"param_dtype": "bfloat16"}
    if cfg.train.accumulate == 1:
        options["in_backward"] = True
    if MOMENTS[optim.name]:
        options |= {"moment_dtype": "int8", "name": "adafactor"}
    if optim.state_on_host:
        options["state_on_host"] = False
    elif host_bytes and MOMENTS[optim.name]:
        options["state_on_host"] = True
    for key, value in options.items():
        if getattr(optim, key) == value:
            continue
        new = {key: value}
        if key == "name":  # it has no moments
            lean = {"moment_dtype": "float32", "state_on_host": False}
            new |= {k: v for k, v in lean.items() if getattr(optim, k) != v}
        text = ", ".join(f"optim.{k}={v!r}" for k, v in new.items())
        yield text, replace(cfg, optim=replace(optim, **new)), host_bytes
    yield None, cfg, 2**60
