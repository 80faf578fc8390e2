"""The shape of a model from Hugging Face's `config.json`, without transformers.

Reads what transformers 4 and 5 write. What the model here cannot do is refused by name,
never left out. `hf.hf_config` is the inverse.
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
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
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
