"""The rows of a step's table, and which row a kernel belongs to.

A kernel is known by the named scopes of `mst_jax` (layer.py, gradients.py, stack.py,
optim.py) that its operations carry, and by what it is: a library's or a Mosaic call, a
fusion that only moves data, or arithmetic. A fusion of several scopes counts as the
first of `ELEMENTWISE`.
"""

import re
from collections.abc import Collection, Sequence

PRODUCTS = {
    "mlp": "MLP products",
    "head": "LM head products",
    "qkv": "q, k, v products",
    "output": "output projection",
}
ELEMENTWISE = {
    "optimizer": "optimizer",
    "rope": "RoPE",
    "norm": "RMS norm",
    "mlp": "MLP elementwise",
    "head": "loss statistics and gradient",
    "embed": "embedding",
    "gradient_norm": "gradient norm",
    "attention": "attention",
    "output": "residual and gradient sums",
    "qkv": "residual and gradient sums",
}
MOVES = {
    "weights": "copies: weights out of their stacks",
    "residuals": "copies: residuals kept and fetched",
    "optimizer": "optimizer",
}
BY_PASS = {*PRODUCTS.values(), "attention", "RMS norm", "RoPE"} - {"LM head products"}
OTHER = "other"
SCALARS = "scalars, loop counters"
HOST = "host copies"
SCALAR_BYTES = 4096
ORDER = [
    "MLP products", "LM head products", "q, k, v products", "output projection",
    "other products", "attention", "RMS norm", "RoPE", "MLP elementwise",
    "loss statistics and gradient", "embedding", "residual and gradient sums",
    "gradient norm", "optimizer", "copies", "zero fills", HOST, SCALARS, OTHER,
]  # fmt: skip


def row_of(
    *,
    scopes: Sequence[str],
    loops: Sequence[str],
    targets: Sequence[str],
    kernels: Sequence[str],
    opcodes: Collection[str],
    moves: bool,
    bytes: int,
    crosses: bool,
) -> str:
    """Return the row of one kernel.

    Args:
        scopes: JAX's names of its operations, the most telling first.
        loops: JAX's names of the loops around it, the innermost first. XLA merges equal
            loop bodies, whose operations then have the names of one of them.
        targets: of the custom calls and products in it.
        kernels: names of the Mosaic kernels in it, '' where unknown.
        opcodes: of the operations in it.
        moves: whether it only moves, fills or casts.
        bytes: of its largest operand or result.
        crosses: whether it moves between host and device.
    """
    names = [_names(scope) for scope in scopes]
    when = _pass(names, scopes, map(_names, loops))

    def by_pass(row: str) -> str:
        return f"{row}, {when}" if row in BY_PASS and when else row

    if crosses:
        return HOST
    ours = any(kernel.startswith("attention_") for kernel in kernels)
    if ours or any("fmha" in target for target in targets):
        return by_pass("attention")
    if targets:
        scope = _first(PRODUCTS, names, innermost=True)
        mosaic = any("mosaic" in target for target in targets)
        if mosaic and not any(kernels):
            return OTHER
        if "gradient_kernel" in kernels:
            return ELEMENTWISE["head"]
        return by_pass(PRODUCTS.get(scope, "other products"))
    if bytes <= SCALAR_BYTES:
        return SCALARS
    if moves:
        return _move(names, scopes, opcodes)
    return by_pass(ELEMENTWISE.get(_first(ELEMENTWISE, names), OTHER))


def row_order(row: str) -> tuple[int, str]:
    """Sort key of a row in the table."""
    found = [i for i, start in enumerate(ORDER) if row.startswith(start)]
    times = {"forward": "0", "recompute": "1", "backward": "2"}
    return min(found, default=len(ORDER)), times.get(row.rpartition(", ")[2], row)


def _move(names, scopes, opcodes) -> str:
    if opcodes <= {"broadcast", "iota"}:
        return "zero fills"
    # By the slice itself: XLA shares the index with slices of another scope.
    slices = [
        own
        for own, scope in zip(names, scopes, strict=True)
        if scope.endswith(("/dynamic_slice", "/dynamic_update_slice"))
    ]
    scope = _first(MOVES, slices or names)
    if scope:
        return MOVES[scope]
    if any("dynamic_update_index_in_dim" in s for s in scopes) and not any(slices):
        return MOVES["residuals"]  # the forward loop's own stacking
    if opcodes & {"dynamic-slice", "dynamic-update-slice"}:
        return "copies: chunks in and out"
    if opcodes & {"convert", "transpose", "concatenate"}:
        return "copies: casts, transposes, joined weights"
    return "copies: XLA's own"


def _names(scope: str) -> list[str]:
    """Known scopes in a path, the outermost first."""
    known = {*PRODUCTS, *ELEMENTWISE, *MOVES, "forward", "backward", "recompute"}
    return [w for w in re.findall(r"\w+", scope) if w in known]


def _first(choices, names, *, innermost=False) -> str:
    """The first of `choices` that any operation is in; of one, its innermost scope."""
    inner = [next((n for n in path[::-1] if n in choices), "") for path in names]
    if innermost:
        return next(filter(None, inner), "")
    return next((choice for choice in choices if choice in inner), "")


def _pass(names, scopes, loops) -> str:
    around = next((p for p in loops if set(p) & {"forward", "backward"}), [])
    if "forward" in around or "recompute" in around:
        return "recompute" if "recompute" in around else "forward"
    own = next((path for path in names if path), [])
    if "recompute" in own:
        return "recompute"
    if "backward" in [*around, *own] or any("transpose(" in scope for scope in scopes):
        return "backward"
    return "forward" if own else ""
