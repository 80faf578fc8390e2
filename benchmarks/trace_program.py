"""What a compiled step launches: each instruction's row, FLOPs, bytes and launches.

Reads the optimised HLO of `compiled.as_text()`. Costs are what the shapes ask for, not
what a kernel does:

    products     2 M N K FLOPs; attention 2 matrix products forward, 5 backward, over
                 the pairs of tokens that the mask leaves, T (T + 1) / 2 if causal
    bytes        each operand read and each result written once; of an array that is
                 only sliced, the slice; of one that is updated in place, the update
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from trace_rows import HOST, row_of

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
MOVES = {
    "bitcast-convert", "broadcast", "concatenate", "convert", "copy", "dynamic-slice",
    "dynamic-update-slice", "iota", "pad", "reshape", "reverse", "slice", "transpose",
}  # fmt: skip
PRODUCTS = {
    # Mosaic kernels by the start of their names: (matrix products, whether the first
    # operand is [K, M]); None: one for each pair of operands, less what is added to
    "matmul_nn": (None, False), "matmul_nt": (None, False), "matmul_tn": (None, True),
    "gate_up": (2, False), "logits": (1, False), "gradient_kernel": (0, False),
}  # fmt: skip
ATTENTION = {"attention_forward": 2, "attention_backward": 5}
"""Mosaic kernels of attention: products of the pairs of tokens."""


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's type."""

    dtype: str
    dims: tuple[int, ...]
    on_host: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = BITS.get(self.dtype, int(digits[1]) if digits else 0)
        return math.prod(self.dims) * bits // 8


@dataclass
class Instruction:
    """One line of a module."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    rest: str = field(repr=False)
    """Attributes: called computations, metadata, backend configuration."""
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the results, without libraries' workspace."""
        return sum(shape.bytes for shape in self.results)

    @property
    def results(self) -> list[Shape]:
        """Shapes of the results, without libraries' workspace."""
        if self.opcode != "custom-call" or len(self.shapes) == 1:
            return self.shapes
        return [s for s in self.shapes if s.dtype not in ("s8", "u8")]

    @property
    def is_free(self) -> bool:
        """Whether nothing runs for it on the device."""
        ends = self.opcode.endswith("-done") or self.target == "AllocateBuffer"
        return self.opcode in FREE or ends

    @property
    def scope(self) -> str:
        """Path of the operation's name in JAX."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """Name of a computation that the instruction calls, or ''."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Cost:
    """What a table says of an instruction, for one launch."""

    row: str
    flops: int
    bytes: int
    host_bytes: int = 0
    """Over the link between host and device."""


class Program:
    """A module by its instructions."""

    def __init__(self, hlo: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] = []
        for line in hlo.split("\n"):
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                lines = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif found := _instruction(line):
                lines.append(found)
        if not self.entry:
            raise ValueError("not the text of a compiled module: it has no ENTRY")
        name = re.match(r"HloModule ([\w.\-]+)", hlo)
        self.name = name[1] if name else ""
        self.by_name = {i.name: i for c in self.computations.values() for i in c}

    @property
    def launches(self) -> Counter[str]:
        """Times that each instruction that does work runs in a step.

        A loop whose number of iterations XLA does not know counts as one.
        """
        return self._walked[0]

    @property
    def endless(self) -> int:
        """Times that a loop begins whose number of iterations XLA does not know."""
        return self._walked[2]

    @cached_property
    def _walked(self) -> tuple[Counter[str], dict[str, tuple[str, ...]], int]:
        """`launches`, the scopes of the loops around each of them, `endless`."""
        found: Counter[str] = Counter()
        loops: dict[str, tuple[str, ...]] = {}
        endless = 0

        def walk(computation: str, times: int, around: tuple[str, ...]) -> None:
            nonlocal endless
            for one in self.computations[computation]:
                if one.opcode == "while":
                    known = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                    times_in = times * int(known[1]) if known else times
                    endless += 0 if known else times
                    walk(one.called("body"), times_in, (one.scope, *around))
                elif one.opcode == "call":
                    walk(one.called("to_apply"), times, around)
                elif not one.is_free:
                    found[one.name] += times
                    loops[one.name] = around

        walk(self.entry, 1, ())
        return found, loops, endless

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Cost of one launch of every instruction in `launches`."""
        return {name: self._cost(self.by_name[name]) for name in self.launches}

    @cached_property
    def owners(self) -> dict[str, str]:
        """Instruction of a called computation -> the instruction that launches it."""
        found = {}
        for name in self.launches:
            for one in self._inside(self.by_name[name]):
                found.setdefault(one.name, name)
        return found

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Name that a kernel gets from its instruction -> that instruction."""
        names = {re.sub(r"[.\-]", "_", name): name for name in self.owners}
        return names | {re.sub(r"[.\-]", "_", name): name for name in self.launches}

    def _inside(self, one: Instruction) -> list[Instruction]:
        """The instructions that a launch computes: itself, or those of its fusion."""
        called = one.called("calls")
        if not called:
            return [one]
        return [i for inner in self.computations[called] for i in self._inside(inner)]

    def _cost(self, one: Instruction) -> Cost:
        inside = self._inside(one)
        row = self._row(one, inside)
        flops = sum(self._flops(i) for i in inside)
        called = one.called("calls")
        moved = (
            self._fusion_bytes(self.computations[called])
            if called
            else self._plain_bytes(one)
        )
        if row == HOST:  # read on one side, written on the other
            return Cost(row, 0, 0, moved // 2)
        return Cost(row, flops, moved)

    # --- rows ---

    def _row(self, one: Instruction, inside: list[Instruction]) -> str:
        on_host = {
            s.on_host
            for i in [one, *map(self.by_name.get, one.operands)]
            if i is not None
            for s in i.shapes
        }
        work = [i for i in inside if i.opcode not in FREE]
        moves = all(i.opcode in MOVES or i.opcode.startswith("copy") for i in work)
        moves = moves or self._only_moves(one, inside)
        calls = [i for i in inside if i.opcode in ("custom-call", "dot")]
        return row_of(
            scopes=[i.scope for i in [*calls, one, *work]],
            loops=self._walked[1][one.name],
            targets=[i.target or i.opcode for i in calls],
            kernels=[self._kernel(i) for i in calls],
            opcodes={i.opcode for i in work},
            moves=moves,
            bytes=max([one.bytes, *map(self._bytes, one.operands)]),
            crosses=moves and on_host == {True, False},
        )

    def _only_moves(self, one: Instruction, inside: list[Instruction]) -> bool:
        """Whether all arithmetic is on indices: what reaches the root only moves."""
        called = one.called("calls")
        if not called or any(i.opcode == "custom-call" for i in inside):
            return False
        todo = [i.name for i in self.computations[called] if i.is_root]
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if name in seen or name not in self.by_name:
                continue
            seen.add(name)
            i = self.by_name[name]
            if i.opcode not in MOVES | FREE:
                return False
            data = {"dynamic-slice": 1, "dynamic-update-slice": 2}.get(i.opcode)
            todo += i.operands[:data]
        return True

    # --- costs ---

    def _bytes(self, name: str) -> int:
        return self.by_name[name].bytes if name in self.by_name else 0

    def _plain_bytes(self, one: Instruction) -> int:
        if one.opcode.endswith("-start"):  # (operands, results, context)
            return 2 * one.shapes[0].bytes
        return one.bytes + sum(map(self._bytes, one.operands))

    def _fusion_bytes(self, body: list[Instruction]) -> int:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for i in body:
            for name in i.operands:
                users[name].append(i)

        def read(name: str) -> int:
            whole, total = self._bytes(name), 0
            for user in users[name]:
                first = user.operands[0] == name
                if user.opcode in ("bitcast", "get-tuple-element"):
                    total += read(user.name)
                elif user.opcode in ("slice", "dynamic-slice", "gather") and first:
                    total += user.bytes
                elif user.opcode == "scatter" and first:
                    total += self._bytes(user.operands[-1])
                elif not (user.opcode == "dynamic-update-slice" and first):
                    total += 0 if user.opcode == "tuple" else whole
            return min(total, whole)

        def written(i: Instruction) -> int:
            if i.opcode == "bitcast":
                return written(self.by_name[i.operands[0]])
            if i.opcode == "tuple":
                return sum(written(self.by_name[n]) for n in i.operands)
            if i.opcode == "get-tuple-element":
                return i.bytes
            if i.opcode == "dynamic-update-slice":
                return self._bytes(i.operands[1])
            if i.opcode == "scatter":
                return self._bytes(i.operands[-1])
            return 0 if i.opcode == "parameter" else i.bytes

        reads = sum(read(i.name) for i in body if i.opcode == "parameter")
        return reads + sum(written(i) for i in body if i.is_root)

    def _kernel(self, one: Instruction) -> str:
        """Name of a Mosaic kernel in `PRODUCTS` or `ATTENTION`, or ''."""
        parts = one.scope.split("/")[::-1]
        names = sorted(PRODUCTS | ATTENTION, key=len, reverse=True)
        return next((n for part in parts for n in names if part.startswith(n)), "")

    def _flops(self, one: Instruction) -> int:
        operands = [self.by_name[n] for n in one.operands if n in self.by_name]
        if one.opcode == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        elif one.target.startswith("__cublas"):
            dims = re.search(r'lhs_contracting_dimensions":\s*\[([\d", ]*)\]', one.rest)
        elif one.target.startswith("__cudnn$fmha"):
            return _attention_flops(one, operands[0].shapes[0].dims)
        elif "mosaic" in one.target and self._kernel(one) in ATTENTION:
            products = ATTENTION[self._kernel(one)]
            return _pairs_flops(operands[0].shapes[0].dims, products, causal=True)
        elif "mosaic" in one.target and self._kernel(one):
            products, depth_first = PRODUCTS[self._kernel(one)]
            pairs = operands[: 2 * (len(operands) // 2)]
            lefts = pairs[::2] if products is None else operands[:1] * products
            depths = (a.shapes[0].dims[0 if depth_first else -1] for a in lefts)
            out = max(one.results, key=lambda s: s.bytes).dims
            return 2 * math.prod(out) * sum(depths)
        else:
            return 0
        if dims is None:
            raise ValueError(f"{one.name}: which dimensions it contracts is not said")
        lhs = operands[0].shapes[0].dims
        depth = math.prod(lhs[int(d)] for d in re.findall(r"\d+", dims[1]))
        return 2 * math.prod(one.results[0].dims) * depth


def _attention_flops(one: Instruction, q: tuple[int, ...]) -> int:
    """q is [B, T, N, H]; keys are as many as queries."""
    mask = re.search(r'mask_type":\s*"(\w+)"', one.rest)
    window = re.search(r'sliding_window_length":\s*(\d+)', one.rest)
    causal = mask is not None and "CAUSAL" in mask[1]
    products = 5 if "Backward" in one.target else 2
    return _pairs_flops(q, products, causal, int(window[1]) if window else 0)


def _pairs_flops(
    q: tuple[int, ...], products: int, causal: bool, window: int = 0
) -> int:
    B, T, N, H = q
    w = min(T, window or T)
    pairs = w * (w + 1) // 2 + (T - w) * w if causal else T * T
    return 2 * products * B * N * H * pairs


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    after = line[head.end() :]
    end = _closing(after) + 1 if after.startswith("(") else after.index(" ")
    kind = re.match(r"\s*([a-z][a-z0-9\-]*)\(", after[end:])
    if not kind:
        return None
    inside = after[end + kind.end() - 1 :]
    close = _closing(inside)
    shapes = [
        Shape(s[1], tuple(map(int, re.findall(r"\d+", s[2]))), "S(5)" in (s[3] or ""))
        for s in re.finditer(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", after[:end])
    ]
    operands = [
        part.split()[-1].lstrip("%")
        for part in _split(re.sub(r"/\*.*?\*/", "", inside[1:close]))
    ]
    return Instruction(
        head[2], kind[1], shapes, operands, inside[close + 1 :], bool(head[1])
    )


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"no end of {text[:80]!r}")


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in map(str.strip, parts) if part]
