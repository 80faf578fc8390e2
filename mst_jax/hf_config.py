"""The shape of a model from and to Hugging Face's `config.json`, without transformers.

Reads what transformers 4 and 5 write, and writes what both read. What the model here
cannot do is refused by name, never left out.
"""

import json
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mst_jax.config import ModelConfig, RopeConfig


def model_config_from_hf(hf: dict[str, Any] | str | Path) -> ModelConfig:
    """Read a Llama `ModelConfig` from HF `config.json`.

    Args:
        hf: the parsed dictionary, the file, or the directory that holds it.

    Raises:
        ValueError: no JSON object, another architecture, a missing key, a bias, an
            activation other than SiLU, or a RoPE scaling this package does not have.
        FileNotFoundError: no such file.
    """
    values = hf if isinstance(hf, dict) else _read_config(Path(hf))
    if values.get("model_type") != "llama":
        raise ValueError(
            f"model_type={values.get('model_type')!r}: only 'llama' is known"
        )
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"config.json has {name}=true: biases are not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act={values['hidden_act']!r}: only 'silu' is supported"
        )
    needed = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    )  # fmt: skip
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"config.json lacks {missing}")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=values.get("head_dim"),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_embeddings=values.get("tie_word_embeddings", False),
        initializer_range=values.get("initializer_range", 0.02),
        max_position=values.get("max_position_embeddings", 2048),
        rope=_rope_from_hf(values),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_dir():
        directory, path = path, path / "config.json"
        if not path.exists():
            there = sorted(p.name for p in directory.iterdir())[:10]
            raise FileNotFoundError(
                f"{directory} is no Hugging Face checkpoint: it has no config.json, "
                f"only {there}"
            )
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise a ValueError that names the file."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is a JSON {type(values).__name__}, not an object")
    return values


def _rope_from_hf(hf: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters (theta inside); 4 wrote rope_scaling.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    known = get_args(get_type_hints(RopeConfig)["type"])
    if kind not in known:
        raise ValueError(f"rope_type={kind!r} is not one of {known}")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor={partial}: only whole heads are known")
    position = hf.get("max_position_embeddings", 2048)
    original = rope.get("original_max_position_embeddings") or position
    # transformers derives yarn's factor, and does not read a dynamic original length.
    derived = {"default": 1.0, "yarn": position / original}
    factor = rope.get("factor") or derived.get(kind)
    if factor is None:
        raise ValueError(f"rope_type={kind!r} has no factor: {rope}")
    attention_factor = rope.get("attention_factor")
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all and factor > 1:
        log = 0.1 * math.log(factor)
        attention_factor = (mscale * log + 1) / (mscale_all * log + 1)
    optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    return RopeConfig(
        theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        type=kind,
        factor=factor,
        original_max_position=position if kind == "dynamic" else original,
        # As transformers: null reads as false, only a missing key as true.
        truncate=bool(rope.get("truncate", True)),
        attention_factor=attention_factor,
        **{k: rope[k] for k in optional if rope.get(k) is not None},
    )


def hf_config(
    cfg: ModelConfig, *, base: dict[str, Any] | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Return HF's `config.json` of a model, the inverse of `model_config_from_hf`.

    RoPE is written as transformers 5 reads it (`rope_parameters`) and as 4 does.

    Args:
        cfg: the model.
        base: a parsed config.json whose other fields are kept.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: a sliding window, which HF's llama does not have.
    """
    if cfg.sliding_window is not None:
        raise ValueError(
            f"{cfg.sliding_window=}: HF's llama has no sliding window; export with "
            "dataclasses.replace(cfg, sliding_window=None) for one that sees all"
        )
    # Without a base, transformers' Llama would end a text at token 2.
    base = dict(base or {"bos_token_id": None, "eos_token_id": None})
    for stale in ("quantization_config", "torch_dtype"):
        base.pop(stale, None)
    rope = cfg.rope
    scaling: dict[str, Any] = {"rope_type": rope.type}
    if rope.type != "default":
        scaling["factor"] = rope.factor
        # transformers knows this key in llama3 and yarn, elsewhere it warns.
        differs = rope.original_max_position != cfg.max_position
        if differs or rope.type in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = rope.original_max_position
    own = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
    }
    values = {key: getattr(rope, key) for key in own.get(rope.type, ())}
    scaling |= {key: value for key, value in values.items() if value is not None}
    old = base.get("rope_parameters") or base.get("rope_scaling") or {}
    kept = ("mscale", "mscale_all_dim", "partial_rotary_factor")
    scaling |= {key: old[key] for key in kept if key in old}
    return base | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", dtype=dtype,
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, hidden_act="silu", attention_bias=False, mlp_bias=False,
        rms_norm_eps=cfg.rms_norm_eps, tie_word_embeddings=cfg.tie_embeddings,
        initializer_range=cfg.initializer_range,
        max_position_embeddings=cfg.max_position,
        rope_parameters=scaling | {"rope_theta": rope.theta}, rope_theta=rope.theta,
        rope_scaling=None if rope.type == "default" else scaling,
    )  # fmt: skip
