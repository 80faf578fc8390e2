"""A GPU's trace joined with the program it ran: where a step's milliseconds go.

An `.xplane.pb` has a plane `/device:GPU:0` with a line for each stream; XLA writes the
instruction that launched a kernel into the event's `hlo_op`; for a kernel in a CUDA
graph that is only the graph's number, so a step is traced without graphs.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trace_program import Program
from trace_rows import HOST, OTHER

OUTSIDE = "outside of the step"


@dataclass(frozen=True)
class Event:
    """One kernel, copy or fill on the device, in ns."""

    start: float
    end: float
    kernel: str
    op: str = ""
    """XLA's instruction, '' if the trace does not say."""
    module: str = ""


@dataclass
class Tally:
    """What one row, or one instruction, took in a step."""

    ms: float = 0.0
    launches: int = 0
    flops: int = 0
    bytes: int = 0
    host_bytes: int = 0
    limit_ms: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)

    @property
    def kernel(self) -> str:
        """The kernel launched most."""
        return max(self.kernels, key=lambda k: self.kernels[k], default="")

    def add(self, other: "Tally") -> None:
        """Add another tally."""
        for name in ("ms", "launches", "flops", "bytes", "host_bytes", "limit_ms"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kernels += other.kernels


@dataclass(frozen=True)
class Limits:
    """What the card can do, a second."""

    flops: float
    bytes: float
    host_bytes: float


@dataclass
class Account:
    """One traced step, in ms."""

    by_op: dict[str, Tally]
    """By instruction; kernels of no instruction by their own name."""
    rows: dict[str, str]
    """The row of each of `by_op`."""
    span: float
    """From the first event's start to the last one's end."""
    busy: float
    """Of that, with at least one event running."""
    gaps: list[tuple[float, str, str]]
    """(ms, the row before, the row after), longest first."""
    problems: list[str]
    """Where trace and program do not agree."""

    @property
    def by_row(self) -> dict[str, Tally]:
        """Sums of `by_op`."""
        found: dict[str, Tally] = defaultdict(Tally)
        for op, tally in self.by_op.items():
            found[self.rows[op]].add(tally)
        return dict(found)

    @property
    def overlap(self) -> float:
        """What the sum of all kernels counts more than once."""
        return sum(t.ms for t in self.by_op.values()) - self.busy


def read_events(profile: Any) -> list[Event]:
    """Return what ran on the streams of the one GPU of a `jax.profiler.ProfileData`.

    Raises:
        ValueError: no GPU's streams are in it, or those of several.
    """
    found: dict[str, list[Event]] = {}
    seen = []
    for plane in profile.planes:
        for line in plane.lines:
            seen.append(f"{plane.name}: {line.name}")
            if re.match(r"/device:GPU:\d+", plane.name) and "Stream" in line.name:
                events = found.setdefault(plane.name, [])
                events += [_event(event) for event in line.events]
    found = {name: events for name, events in found.items() if events}
    if len(found) != 1:
        raise ValueError(f"streams of one GPU are needed, the trace has {seen}")
    return sorted(*found.values(), key=lambda e: e.start)


def _event(event: Any) -> Event:
    stats = {name: value for name, value in event.stats if name}
    end = event.start_ns + event.duration_ns
    op, module = (str(stats.get(n, "")) for n in ("hlo_op", "hlo_module"))
    return Event(event.start_ns, end, event.name, op, module.split("(")[0])


def account(events: Iterable[Event], program: Program, limits: Limits) -> Account:
    """Attribute the events of ONE step to the program's instructions.

    Raises:
        ValueError: there are no events.
    """
    events = sorted(events, key=lambda e: e.start)
    if not events:
        raise ValueError("the trace has no events")
    by_op: dict[str, Tally] = defaultdict(Tally)
    rows: dict[str, str] = {}
    ops = []
    for event in events:
        op, row = _attribute(event, program)
        ops.append(op)
        rows[op] = row
        tally = by_op[op]
        tally.ms += (event.end - event.start) / 1e6
        tally.launches += 1
        tally.kernels[event.kernel] += 1
    for op, tally in by_op.items():
        if op in program.launches:
            times, cost = program.launches[op], program.costs[op]
            tally.flops, tally.bytes = cost.flops * times, cost.bytes * times
            tally.host_bytes = cost.host_bytes * times
            seconds = max(
                cost.flops / limits.flops,
                cost.bytes / limits.bytes,
                cost.host_bytes / limits.host_bytes,
            )
            tally.limit_ms = 1e3 * seconds * times
    busy, gaps = _gaps(events, [rows[op] for op in ops])
    span = (max(e.end for e in events) - events[0].start) / 1e6
    problems = _problems(by_op, rows, program)
    if events[0].start > 2**53:  # f64, and not since the trace began
        problems.append("starts are rounded to 256 ns, and gaps with them")
    return Account(dict(by_op), rows, span, busy, gaps, problems)


def _attribute(event: Event, program: Program) -> tuple[str, str]:
    """Return (instruction or kernel, row)."""
    if event.module and event.module != program.name:
        return f"{event.module}: {event.kernel}", OUTSIDE
    op = event.op if event.op in program.launches else program.owners.get(event.op, "")
    op = op or program.kernels.get(re.sub(r"[.\-]", "_", event.kernel), "")
    if op:
        return op, program.costs[op].row
    to_host = re.match(r"Memcpy(H2D|D2H|HtoD|DtoH)", event.kernel)
    return event.kernel, HOST if to_host else OTHER


def _gaps(events: list[Event], rows: list[str]):
    """Return (busy ms, gaps), events sorted by their start."""
    busy, gaps = 0.0, []
    end, before = events[0].start, rows[0]
    for event, row in zip(events, rows, strict=True):
        if event.start > end:
            gaps.append(((event.start - end) / 1e6, before, row))
        busy += max(0.0, event.end - max(end, event.start)) / 1e6
        if event.end > end:
            end, before = event.end, row
    return busy, sorted(gaps, reverse=True)


def _problems(by_op: dict[str, Tally], rows, program: Program) -> list[str]:
    """Say which kernels the program does not know, and which it says in vain."""
    strangers = [op for op in by_op if rows[op] == OTHER]
    found = [f"{by_op[op].ms:.2f} ms in {op}, of no known row" for op in strangers]
    for op, times in program.launches.items():
        cost, seen = program.costs[op], by_op[op].launches if op in by_op else 0
        if seen % times and times > 1:
            found.append(f"{op} ({cost.row}): {seen} events for {times} launches")
        elif not seen and times * (cost.flops + cost.bytes) > 1e9:
            found.append(f"{op} ({cost.row}): no event, {times} launches expected")
    return found
