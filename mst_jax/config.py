"""Configuration of a run: frozen dataclasses.

A recipe (configs/*.py) returns a `Config`. Everything that can be wrong is checked in
`__post_init__`, before anything is compiled, read or downloaded. Defaults live here and
in `model_config.py`, and nowhere else.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from mst_jax.model_config import (
    ModelConfig,
    RopeConfig,
    check_types,
    fail,
    not_negative,
    positive,
)
from mst_jax.plan import parse_bytes, read_groups
from mst_jax.presets import PRESETS

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeConfig",
    "TrainConfig",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from. Held-out documents never reach training."""

    source: str = "stdlib"
    """'stdlib' (Python's own source files), or a path to .txt, .jsonl, .parquet, .npy,
    or a directory of such files; 'hf:NAME' is a Hugging Face dataset."""
    tokenizer: str | None = None
    """'bytes' (V=256), or an HF tokenizer directory or hub id; None is that of
    init_from, and 'bytes' for a fresh model."""
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
        check_types(self)
        positive(self, "seq_len", "batch_size")
        if not 0 <= self.holdout < 1:
            fail(self, "holdout", "must be in [0, 1)")
        if self.streaming and not self.source.startswith("hf:"):
            fail(self, "source", "cannot stream: set source='hf:NAME' or no streaming")

    def tokenizer_name(self, init_from: str | None = None) -> str:
        """Return `tokenizer`, or what None stands for."""
        return self.tokenizer or init_from or "bytes"


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
    """Steps of linear warmup; the first has 1 / (warmup_steps + 1) of the peak."""
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
    """float32 masters cast to the compute dtype layer by layer; bfloat16 weights are
    updated with stochastic rounding, since plain bf16 updates vanish."""
    moment_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the optimizer's moments: bfloat16 is rounded stochastically, int8 is quantised
    in blocks of 256."""
    state_on_host: bool = False
    """Keep the optimizer state of the layers' matrices in pinned host memory. Each
    layer's comes and goes beside the backward pass if in_backward, else behind it."""

    def __post_init__(self):
        check_types(self)
        positive(self, "learning_rate", "eps", "clip_norm")
        not_negative(self, "warmup_steps", "weight_decay")
        if self.name in ("sgd", "adafactor"):
            rest = (
                f"needs adamw or lion: {self.name} has no moments of whole parameters"
            )
            if self.moment_dtype != "float32":
                fail(self, "moment_dtype", f"{rest}; set it to 'float32'")
            if self.state_on_host:
                fail(self, "state_on_host", rest)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                fail(self, name, "must be in [0, 1)")
        if not 0 <= self.end_factor <= 1:
            fail(self, "end_factor", "must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; both split the batch, `fsdp` also splits the parameters."""

    data: int = 1
    """Replicas."""
    fsdp: int = 1
    """Shards of every parameter."""

    def __post_init__(self):
        check_types(self)
        positive(self, "data", "fsdp")


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
    memory_budget: str | None = None
    """'auto' is this GPU's memory, or a size such as '60GiB': the planner then chooses
    plan, head_groups, prefetch and chunk sizes. None runs them as they are set."""
    host_memory: str | None = None
    """Host memory that the planner may use: 'auto' is most of what is free, or a size
    such as '120GiB'; None is none."""
    head_groups: int = 1
    """Attention runs on num_kv_heads / head_groups key/value heads at a time: less
    memory, slightly slower. Divides num_kv_heads."""
    prefetch: bool = False
    """Bring offloaded residuals back one layer ahead, beside the computation: no wait
    for the host link, one more layer's residuals in device memory."""
    mlp_chunk_size: int | None = None
    """Tokens of a chunk of the layers; None picks from a byte budget, 0 does not
    chunk."""
    loss_chunk_size: int | None = None
    """Tokens of an LM-head chunk; None picks from a byte budget."""
    vocab_chunk_size: int | None = None
    """Columns of the LM head's gradient at a time, from all tokens: one matrix product
    more. None adds it up over the loss's chunks, in f32: twice its memory in bf16."""
    attention: Literal["auto", "mosaic_gpu", "cudnn", "xla"] = "auto"
    """What computes attention: 'mosaic_gpu', this package's Hopper kernels; 'cudnn',
    NVIDIA's; 'xla', flash attention in XLA's products; 'auto' takes the fastest that
    can run, as far as it was timed."""
    implementation: Literal["auto", "xla", "mosaic_gpu"] = "auto"
    """What computes the chunks of the MLP and the LM head: XLA's matrix products or
    this package's Hopper kernels; 'auto' takes the kernels where they can run."""
    command_buffers: Literal["default", "step", "off"] = "default"
    """CUDA graphs: 'default' is XLA's choice, parts of a step, and none where a plan
    offloads, whose copies would take their turn with the kernels; 'step' makes one of
    the whole step, loops unrolled, for small models whose kernels take less time than
    their launches; 'off' makes none."""
    eval_every: int = 50
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: int = 4
    """Batches of an evaluation."""
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved. 0 saves only what is
    interrupted."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_every: int = 1
    """Steps between metric lines; a log waits for the device."""
    seed: int = 0
    """Seed of fresh weights and of stochastic rounding."""

    def __post_init__(self):
        check_types(self)
        positive(self, "steps", "accumulate", "eval_every", "eval_batches", "keep")
        positive(self, "loss_chunk_size", "vocab_chunk_size", "log_every")
        positive(self, "head_groups")
        read_groups(self.plan)
        not_negative(self, "mlp_chunk_size", "save_every")
        for name in ("memory_budget", "host_memory"):
            if (size := getattr(self, name)) not in (None, "auto"):
                try:
                    parse_bytes(size)
                except ValueError as error:
                    raise ValueError(f"TrainConfig.{name}={error}, or 'auto'") from None
        if self.host_memory is not None and self.memory_budget is None:
            raise ValueError(
                f"TrainConfig.host_memory={self.host_memory!r} is a limit for the "
                "planner: set memory_budget too ('auto' is this GPU's memory)"
            )

    @property
    def asked_attention(self) -> str | None:
        """`attention` as the op takes it: None where it chooses itself."""
        return None if self.attention == "auto" else self.attention

    @property
    def asked_implementation(self) -> str | None:
        """What an op takes as its `implementation`: None where it chooses itself."""
        return None if self.implementation == "auto" else self.implementation


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
    compile_cache: str = "auto"
    """Where compiled programs are kept for the next run: a directory, or 'off', or
    'auto': JAX_COMPILATION_CACHE_DIR, or else a directory in XDG_CACHE_HOME, ~/.cache
    if that is not set."""
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
        check_types(self)
        if self.model is None and self.init_from is None:
            raise ValueError("Config needs a model or init_from (an HF checkpoint)")
        if self.model is not None and self.init_from is not None:
            raise ValueError(
                f"Config has both a model and init_from={self.init_from!r}, and the "
                "shape comes from the checkpoint: take a recipe without a model, such "
                "as configs/llama32_1b.py"
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
        if self.model is not None and self.tokenizer == "bytes":
            if self.model.vocab_size < 256:
                raise ValueError(
                    f"ModelConfig.vocab_size={self.model.vocab_size} is below the 256 "
                    "of tokenizer='bytes'"
                )

    @property
    def tokenizer(self) -> str:
        """Of the data: its own, that of `init_from`, or 'bytes'."""
        return self.data.tokenizer_name(self.init_from)

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
