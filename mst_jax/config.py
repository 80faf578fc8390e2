"""Configuration: frozen dataclasses and model presets.

A recipe (configs/*.py) returns a `Config`. Everything that can be wrong is checked in
`__post_init__`, before anything is compiled, read or downloaded. Defaults live here and
nowhere else.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mst_jax.plan import read_groups


def _check_types(owner: Any) -> None:
    """Hold every field to its annotation; numbers are finite, strings not empty."""
    for name, hint in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if get_origin(hint) is Literal:
            _one_of(owner, name, get_args(hint))
            continue
        if get_origin(hint) is tuple:
            if not isinstance(value, tuple) or not all(
                isinstance(v, str) for v in value
            ):
                _fail(owner, name, "must be a tuple of strings")
            continue
        kinds = get_args(hint) or (hint,)
        wanted = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
        allowed = (*kinds, int) if float in kinds else kinds
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, allowed):
            _fail(owner, name, f"must be {wanted}, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            _fail(owner, name, f"must be a finite {wanted}")
        if value == "":
            _fail(owner, name, f"must be a {wanted} that is not empty")


def _one_of(owner: Any, name: str, options: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        _fail(owner, name, f"is not one of {options}{hint}")


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            nullable = NoneType in get_args(get_type_hints(type(owner))[name])
            _fail(owner, name, "must be positive" + (", or None" if nullable else ""))


def _not_negative(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 0:
            _fail(owner, name, "is negative; it must be 0 or more")


def _fail(owner: Any, name: str, rest: str) -> NoReturn:
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
        _check_types(self)
        _positive(
            self, "theta", "factor", "original_max_position", "low_freq_factor",
            "beta_fast", "beta_slow", "attention_factor",
        )  # fmt: skip
        for kind, name, low in (
            ("llama3", "high_freq_factor", "low_freq_factor"),
            ("yarn", "beta_fast", "beta_slow"),
        ):
            if self.type == kind and getattr(self, name) <= getattr(self, low):
                _fail(self, name, f"must be larger than {low}={getattr(self, low)}")


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
        _check_types(self)
        _positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_dim", "sliding_window",
            "rms_norm_eps", "initializer_range", "max_position",
        )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            _fail(self, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rest = f"is no multiple of num_heads={self.num_heads}; set head_dim"
            _fail(self, "hidden_size", rest)
        if self.head_size % 2:
            rest = f"gives heads of {self.head_size}: RoPE needs an even size"
            _fail(self, "head_dim", rest)

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

    def flops_per_token(self, seq_len: int) -> float:
        """Forward + backward FLOPs a token, causal attention, nothing recomputed."""
        embedding = self.vocab_size * self.hidden_size
        matmul = self.num_params - (0 if self.tie_embeddings else embedding)
        seen = min(seq_len / 2, float(self.sliding_window or seq_len))
        attention = 4 * self.num_layers * self.num_heads * self.head_size * seen
        return 6 * matmul + 3 * attention


_LLAMA3_ROPE: dict[str, Any] = dict(theta=500000.0, original_max_position=8192)
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "llama2_7b": ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
        num_heads=32, num_kv_heads=32, max_position=4096,
        rope=RopeConfig(original_max_position=4096),
    ),
    "llama3_8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, max_position=8192,
        rope=RopeConfig(**_LLAMA3_ROPE),
    ),
    "llama32_1b": ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
        num_heads=32, num_kv_heads=8, head_dim=64, tie_embeddings=True,
        rope=RopeConfig(type="llama3", factor=32.0, **_LLAMA3_ROPE),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from. Held-out documents never reach training."""

    source: str = "stdlib"
    """'stdlib' (Python's own source files), or a path to .txt, .jsonl, .parquet, .npy,
    or a directory of such files; 'hf:NAME' is a Hugging Face dataset."""
    tokenizer: str = "bytes"
    """'bytes' (V=256), or an HF tokenizer directory or hub id."""
    text_field: str = "text"
    """Field of the text in JSONL, Parquet and HF rows."""
    seq_len: int = 512
    """T, tokens of a sequence."""
    batch_size: int = 4
    """Sequences of one micro-batch, over all devices."""
    packing: bool = True
    """Pack documents into sequences with segment ids; False cuts long documents and
    pads the last piece."""
    holdout: float = 0.05
    """Fraction of the documents held out for evaluation."""
    seed: int = 0
    """Seed of the shuffle."""
    streaming: bool = False
    """Stream an HF dataset instead of downloading it."""

    def __post_init__(self):
        _check_types(self)
        _positive(self, "seq_len", "batch_size")
        if not 0 <= self.holdout < 1:
            _fail(self, "holdout", "must be in [0, 1)")
        if self.streaming and not self.source.startswith("hf:"):
            _fail(self, "source", "cannot stream: set source='hf:NAME' or no streaming")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    """Optimizer."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warmup; cosine and linear end at `end_factor` of the peak."""
    warmup_steps: int = 10
    """Steps of linear warmup from 0."""
    end_factor: float = 0.1
    """Final learning rate over the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms are not decayed."""
    b1: float = 0.9
    """First moment decay (adamw, lion); sgd: momentum is 0."""
    b2: float = 0.95
    """Second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float | None = 1.0
    """Clip gradients to this norm; None does not clip."""
    clip: Literal["global", "layer"] = "global"
    """Norm of all gradients together, or of each layer's (and of the embedding's and
    the head's) apart. With in_backward, 'global' runs the backward pass twice: the norm
    is known only after all of it."""
    in_backward: bool = False
    """Update each layer as soon as its gradient is there: no whole gradient is held."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: beginnings of their paths, such as 'embed',
    'lm_head', 'layers/attention'."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 masters cast to the compute dtype once a step; bfloat16 weights are
    updated with stochastic rounding, since plain bf16 updates vanish."""
    moment_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the optimizer's moments: bfloat16 is rounded stochastically, int8 is quantised
    in blocks of 256."""
    state_on_host: bool = False
    """Keep the layers' optimizer state in pinned host memory."""

    def __post_init__(self):
        _check_types(self)
        _positive(self, "learning_rate", "eps", "clip_norm")
        _not_negative(self, "warmup_steps", "weight_decay")
        if self.moment_dtype != "float32" and self.name in ("sgd", "adafactor"):
            rest = (
                f"needs adamw or lion: {self.name} has no moments of whole parameters"
            )
            _fail(self, "moment_dtype", rest)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                _fail(self, name, "must be in [0, 1)")
        if not 0 <= self.end_factor <= 1:
            _fail(self, "end_factor", "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; both split the batch, `fsdp` also splits the parameters."""

    data: int = 1
    """Replicas."""
    fsdp: int = 1
    """Shards of every parameter."""

    def __post_init__(self):
        _check_types(self)
        _positive(self, "data", "fsdp")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 100
    """Optimizer steps."""
    accumulate: int = 1
    """Micro-batches a step; every valid token weighs the same."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and of the weights in matrix products."""
    plan: str = "save_attention"
    """What layers keep for the backward pass: 'full' their inputs, 'save_attention'
    also attention's output, 'none' recomputes nothing, 'offload' and
    'offload_attention' keep it in host memory; or groups as in '8 offload=input; 24
    save=input+attention'."""
    head_groups: int = 1
    """Attention runs on num_kv_heads / head_groups key/value heads at a time: less
    memory, slightly slower. Divides num_kv_heads."""
    mlp_chunk_size: int | None = None
    """Tokens of a chunk of the layers; None picks from a byte budget, 0 does not
    chunk."""
    loss_chunk_size: int | None = None
    """Tokens of an LM-head chunk; None picks from a byte budget."""
    eval_every: int = 50
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: int = 4
    """Batches of an evaluation."""
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved, 0 never saves."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_every: int = 1
    """Steps between metric lines; a log waits for the device."""
    seed: int = 0
    """Seed of fresh weights and of stochastic rounding."""

    def __post_init__(self):
        _check_types(self)
        _positive(self, "steps", "accumulate", "eval_every", "eval_batches", "keep")
        _positive(self, "loss_chunk_size", "log_every", "head_groups")
        read_groups(self.plan)
        _not_negative(self, "mlp_chunk_size", "save_every")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: what a recipe returns and what a checkpoint stores."""

    model: ModelConfig | None = None
    """Shape of a fresh model; None reads it from `init_from`."""
    init_from: str | None = None
    """HF directory or hub id to start from; None starts from fresh weights."""
    out_dir: str = "runs/default"
    """Directory of checkpoints, metrics and plots. A run that finds its own
    checkpoints there resumes."""
    profile: bool = False
    """Write a profiler trace of three steps to out_dir/profile."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""

    def __post_init__(self):
        _check_types(self)
        if self.model is None and self.init_from is None:
            raise ValueError("Config needs a model or init_from (an HF checkpoint)")
        if self.model is not None and self.init_from is not None:
            raise ValueError(
                f"Config has both a model and init_from={self.init_from!r}: the shape "
                "comes from the checkpoint, leave model None"
            )
        self._check_in_backward()
        shards = self.mesh.data * self.mesh.fsdp
        if self.data.batch_size % shards:
            raise ValueError(
                f"DataConfig.batch_size={self.data.batch_size} must be a multiple of "
                f"mesh.data * mesh.fsdp = {shards}"
            )
        if self.optim.warmup_steps >= self.train.steps > 1:
            raise ValueError(
                f"OptimConfig.warmup_steps={self.optim.warmup_steps} must be below "
                f"TrainConfig.steps={self.train.steps}"
            )
        if self.model is not None and self.data.tokenizer == "bytes":
            if self.model.vocab_size < 256:
                raise ValueError(
                    f"ModelConfig.vocab_size={self.model.vocab_size} is below the 256 "
                    "of tokenizer='bytes'"
                )

    def _check_in_backward(self) -> None:
        if not self.optim.in_backward:
            return
        if self.train.accumulate > 1:
            raise ValueError(
                f"TrainConfig.accumulate={self.train.accumulate} needs whole gradients "
                "to add up, and OptimConfig.in_backward=True never holds one: raise "
                "data.batch_size instead, or turn in_backward off"
            )
        if self.mesh.data * self.mesh.fsdp > 1:
            raise NotImplementedError(
                "OptimConfig.in_backward=True runs on one device, the mesh has "
                f"{self.mesh.data * self.mesh.fsdp}"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a (nested) config as plain JSON-ready dictionaries."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Config) -> Any:
    """Build a `Config`, or another of its classes, from nested dictionaries.

    Raises:
        ValueError: an unknown key, with the closest known one.
    """
    return _build(cls, values, "config")


_NESTED = {
    "model": ModelConfig, "rope": RopeConfig, "data": DataConfig,
    "optim": OptimConfig, "mesh": MeshConfig, "train": TrainConfig,
}  # fmt: skip


def _build(cls: Any, values: dict[str, Any], where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} must be a dictionary")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {names}"
            raise ValueError(f"unknown key {where}.{key}{hint}")
    # JSON has lists where a field is a tuple.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**{
        k: _build(_NESTED[k], v, f"{where}.{k}")
        if k in _NESTED and isinstance(v, dict)
        else v
        for k, v in values.items()
    })  # fmt: skip
