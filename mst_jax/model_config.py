"""The shape of a model: frozen dataclasses, and how their fields are checked.

Everything that can be wrong is checked in `__post_init__`, before anything is compiled,
read or downloaded.
"""

import difflib
import math
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

_hints = cache(get_type_hints)  # the planner makes thousands of configurations


def check_types(owner: Any) -> None:
    """Hold every field to its annotation; numbers are finite, strings not empty."""
    for name, hint in _hints(type(owner)).items():
        value = getattr(owner, name)
        if get_origin(hint) is Literal:
            one_of(owner, name, get_args(hint))
            continue
        if get_origin(hint) is tuple:
            if not isinstance(value, tuple) or not all(
                isinstance(v, str) for v in value
            ):
                fail(owner, name, "must be a tuple of strings")
            continue
        kinds = get_args(hint) or (hint,)
        wanted = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
        allowed = (*kinds, int) if float in kinds else kinds
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, allowed):
            fail(owner, name, f"must be {wanted}, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            fail(owner, name, f"must be a finite {wanted}")
        if value == "":
            fail(owner, name, f"must be a {wanted} that is not empty")


def one_of(owner: Any, name: str, options: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        fail(owner, name, f"is not one of {options}{hint}")


def positive(owner: Any, *names: str) -> None:
    """Refuse fields that are zero or negative; None passes."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            nullable = NoneType in get_args(_hints(type(owner))[name])
            fail(owner, name, "must be positive" + (", or None" if nullable else ""))


def not_negative(owner: Any, *names: str) -> None:
    """Refuse fields that are negative; None passes."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 0:
            fail(owner, name, "is negative; it must be 0 or more")


def fail(owner: Any, name: str, rest: str) -> NoReturn:
    """Raise the error for a field, naming class, field and value."""
    value = getattr(owner, name)
    raise ValueError(f"{type(owner).__name__}.{name}={value!r} {rest}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, with the scalings of HF `rope_parameters`."""

    theta: float = 10000.0
    """Base of the frequencies."""
    type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    """Scaling of the frequencies for lengths beyond the pre-training length."""
    factor: float = 1.0
    """How much longer than `original_max_position` sequences may be."""
    original_max_position: int = 8192
    """Sequence length in tokens of the pre-training, before scaling."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / this are scaled by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / this stay as they are."""
    beta_fast: float = 32.0
    """yarn: rotations above which a frequency stays as it is."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is interpolated."""
    truncate: bool = True
    """yarn: whether the interpolation bounds are rounded to whole dimensions."""
    attention_factor: float | None = None
    """yarn: scale of cos and sin; None takes 0.1 ln(factor) + 1."""

    def __post_init__(self):
        check_types(self)
        positive(
            self, "theta", "factor", "original_max_position", "low_freq_factor",
            "beta_fast", "beta_slow", "attention_factor",
        )  # fmt: skip
        for kind, name, low in (
            ("llama3", "high_freq_factor", "low_freq_factor"),
            ("yarn", "beta_fast", "beta_slow"),
        ):
            if self.type == kind and getattr(self, name) <= getattr(self, low):
                fail(self, name, f"must be larger than {low}={getattr(self, low)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-class decoder. The letters are the package's shape legend."""

    vocab_size: int = 256
    """V, entries of the vocabulary."""
    hidden_size: int = 256
    """D, width of the residual stream."""
    intermediate_size: int = 768
    """F, width of the MLP."""
    num_layers: int = 4
    """L, decoder layers."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 2
    """K, key/value heads; divides N."""
    head_dim: int | None = None
    """H, size of a head; None is D / N."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    tie_embeddings: bool = False
    """Whether the LM head is the transposed embedding."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None is all before it."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    max_position: int = 131072
    """Longest sequence the checkpoint claims to handle, in tokens."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""

    def __post_init__(self):
        check_types(self)
        positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_dim", "sliding_window",
            "rms_norm_eps", "initializer_range", "max_position",
        )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            fail(self, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rest = f"is no multiple of num_heads={self.num_heads}; set head_dim"
            fail(self, "hidden_size", rest)
        if self.head_size % 2:
            rest = f"gives heads of {self.head_size}: RoPE needs an even size"
            fail(self, "head_dim", rest)

    @property
    def head_size(self) -> int:
        """H, the size of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_size
        attention = 2 * D * H * (self.num_heads + self.num_kv_heads)
        head = 0 if self.tie_embeddings else D * self.vocab_size
        layer = attention + 3 * D * F + 2 * D
        return self.vocab_size * D + head + self.num_layers * layer + D

    def flops_per_token(self, context: float) -> float:
        """Forward + backward FLOPs of a token that sees `context` tokens."""
        embedding = self.vocab_size * self.hidden_size
        matmul = self.num_params - (0 if self.tie_embeddings else embedding)
        attention = 4 * self.num_layers * self.num_heads * self.head_size * context
        return 6 * matmul + 3 * attention
