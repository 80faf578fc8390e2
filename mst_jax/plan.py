"""The residual plan: what each layer keeps between its forward and its backward pass.

A residual is saved in device memory, offloaded to host memory, or, if neither,
computed again. For hidden width D, query and key/value heads N and K of size H, and MLP
width F, a token costs in 16 bits

    input      2 D             the layer's input; always kept
    qkv        2 (N + 2 K) H   queries, keys and values after RoPE
    attention  2 N H + 4 N     attention's output and the logsumexp of its scores
    mlp_input  2 D             the residual stream between attention and MLP
    gate_up    4 F             the MLP's gate and up projections

Layers are grouped: each group has its own choice, and may keep inputs only of every
k-th layer and run the layers in between again from there. `parse_plan` reads the text
form, `str(plan)` writes it:

    "8 offload=input; 24 save=input+attention"
    "* offload=input every=2"
"""

import re
from dataclasses import dataclass, replace

RESIDUALS = ("input", "qkv", "attention", "mlp_input", "gate_up")

PRESETS = {
    "full": "* save=input",
    "save_attention": "* save=input+attention",
    "none": "* save=" + "+".join(RESIDUALS),
    "offload": "* offload=input",
    "offload_attention": "* offload=input+attention",
}


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers in a row that keep the same residuals."""

    layers: int
    """How many; 0 in a text form's `*`, until `parse_plan` fills it in."""
    save: frozenset[str] = frozenset()
    """Residuals in device memory."""
    offload: frozenset[str] = frozenset()
    """Residuals in pinned host memory."""
    every: int = 1
    """Keep only every k-th layer's input; `save` then holds for the layers that are
    being run again."""

    @property
    def kept(self) -> frozenset[str]:
        """All residuals that are not computed again."""
        return self.save | self.offload

    def __str__(self) -> str:
        words = [str(self.layers or "*")]
        for key in ("save", "offload"):
            if names := getattr(self, key):
                words.append(f"{key}={'+'.join(n for n in RESIDUALS if n in names)}")
        return " ".join(words + [f"every={self.every}"] * (self.every > 1))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step keeps and how it cuts its work. Printed, and saved with the run."""

    groups: tuple[LayerGroup, ...]
    """First layer first."""
    head_groups: int = 1
    """Attention runs on num_kv_heads / head_groups key/value heads at a time."""
    prefetch: bool = False
    """Offloaded residuals come back while the layer after theirs is differentiated."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.groups))

    def describe(self) -> str:
        """Return the plan for a reader: the text form, and what it leaves open."""
        ahead = "; fetched a layer ahead" if self.offloads and self.prefetch else ""
        return f"{self} (what is not named is recomputed{ahead})"

    @property
    def offloads(self) -> bool:
        """Whether anything lies in host memory."""
        return any(group.offload for group in self.groups)


def parse_plan(
    text: str, num_layers: int, *, head_groups: int = 1, prefetch: bool = False
) -> Plan:
    """Read a preset's name or the text form of a plan.

    Args:
        text: a key of `PRESETS`, or groups as in the module's docstring. One group may
            have `*` layers: those that the others leave.
        num_layers: L, which the groups must add up to.
        head_groups, prefetch: see `Plan`.

    Raises:
        ValueError: not a plan, or not one for L layers.
    """
    groups = read_groups(text)
    rest = num_layers - sum(g.layers for g in groups)
    if sum(g.layers == 0 for g in groups) == 1 and rest > 0:
        groups = [g if g.layers else replace(g, layers=rest) for g in groups]
        rest = 0
    if rest or any(g.layers == 0 for g in groups):
        raise ValueError(
            f"plan={text!r} does not add up to {num_layers} layers; one group may have "
            "'*' layers, for the rest"
        )
    for group in groups:
        if group.layers % group.every:
            raise ValueError(
                f"plan={text!r}: every={group.every} does not divide the group's "
                f"{group.layers} layers; split it in two groups"
            )
    return Plan(groups=tuple(groups), head_groups=head_groups, prefetch=prefetch)


def read_groups(text: str) -> list[LayerGroup]:
    """Read a plan's groups, `*` as 0 layers, without holding them to a model.

    Raises:
        ValueError: not a plan.
    """
    return [_group(part) for part in PRESETS.get(text.strip(), text).split(";")]


def _group(text: str) -> LayerGroup:
    words = text.split()
    if not words or not re.fullmatch(r"\*|[1-9]\d*", words[0]):
        raise ValueError(
            f"plan group {text!r} must start with a number of layers or '*', as in "
            f"'24 save=input+attention'; or name one of {tuple(PRESETS)}"
        )
    fields: dict[str, str] = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key not in ("save", "offload", "every") or key in fields or not value:
            raise ValueError(
                f"plan group {text!r}: {word!r} is not save=..., offload=... or "
                "every=..., once each"
            )
        fields[key] = value
    if not re.fullmatch(r"[1-9]\d*", every := fields.get("every", "1")):
        raise ValueError(f"plan group {text!r}: {every=} must be a positive number")
    save, offload = (
        frozenset(fields[key].split("+")) if key in fields else frozenset()
        for key in ("save", "offload")
    )
    if unknown := (save | offload) - set(RESIDUALS):
        raise ValueError(f"plan group {text!r}: {sorted(unknown)} not in {RESIDUALS}")
    if both := save & offload:
        raise ValueError(
            f"plan group {text!r}: {sorted(both)} both saved and offloaded"
        )
    if "input" not in save | offload:
        raise ValueError(f"plan group {text!r}: 'input' must be saved or offloaded")
    if int(every) > 1 and offload - {"input"}:
        raise ValueError(
            f"plan group {text!r}: with every={every} only 'input' can be offloaded; "
            "the other residuals live for a few layers only"
        )
    layers = 0 if words[0] == "*" else int(words[0])
    return LayerGroup(layers=layers, save=save, offload=offload, every=int(every))


def parse_bytes(text: str) -> int:
    """Read a size such as '120GiB' or '80 GB'.

    Raises:
        ValueError: no number with a unit.
    """
    pattern = r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no size: write for example 120GiB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper())
    return int(float(number) * (1024 if binary else 1000) ** power)
