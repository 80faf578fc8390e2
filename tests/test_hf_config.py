"""Hugging Face's config.json: what known checkpoints say, and what is refused."""

import dataclasses
import json
import re
from typing import Any

import pytest

from mst_jax.config import PRESETS, RopeConfig
from mst_jax.hf_config import model_config_from_hf

# As transformers 4 wrote it.
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
LLAMA2_7B: dict[str, Any] = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA3_8B: dict[str, Any] = LLAMA2_7B | {
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA31_8B: dict[str, Any] = LLAMA3_8B | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA32_1B = LLAMA31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA31_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA31_70B = LLAMA31_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
LLAMA31_MODEL = dataclasses.replace(
    PRESETS["llama3_8b"],
    max_position=131072,
    rope=RopeConfig(
        type="llama3", theta=500000.0, factor=8.0, original_max_position=8192
    ),
)
KNOWN = {
    "llama2_7b": (LLAMA2_7B, PRESETS["llama2_7b"], 6_738_415_616),
    "llama3_8b": (LLAMA3_8B, PRESETS["llama3_8b"], 8_030_261_248),
    "llama31_8b": (LLAMA31_8B, LLAMA31_MODEL, 8_030_261_248),
    "llama32_1b": (LLAMA32_1B, PRESETS["llama32_1b"], 1_235_814_400),
    "llama31_70b": (LLAMA31_70B, PRESETS["llama31_70b"], 70_553_706_496),
}


def as_transformers_5(hf):
    """The same config as transformers 5 writes it: all of RoPE in one dictionary."""
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), "rope_type": "default"}
    rope |= hf["rope_scaling"] or {}
    dropped = ("rope_theta", "rope_scaling", "torch_dtype")
    rest = {k: v for k, v in hf.items() if k not in dropped}
    return rest | {"rope_parameters": rope, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", KNOWN)
def test_reads_hf_config(name, tmp_path):
    hf, want, num_params = KNOWN[name]
    assert model_config_from_hf(hf) == want
    assert model_config_from_hf(as_transformers_5(hf)) == want
    assert want.num_params == num_params
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert model_config_from_hf(tmp_path) == want
    assert model_config_from_hf(str(tmp_path / "config.json")) == want


def test_reads_the_oldest_hf_config():
    # Before grouped queries, norms' epsilon and RoPE's base had their own keys.
    new = ("num_key_value_heads", "rms_norm_eps", "rope_scaling", "attention_bias")
    hf = {k: v for k, v in LLAMA2_7B.items() if k not in new}
    cfg = model_config_from_hf(hf | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (cfg.num_kv_heads, cfg.rms_norm_eps) == (32, 1e-6)
    assert cfg.rope == RopeConfig(type="linear", factor=2.0, original_max_position=4096)


def test_reads_rope_without_a_factor():
    default = {"rope_type": "default", "factor": None, "mscale": 1, "mscale_all_dim": 2}
    assert model_config_from_hf(LLAMA3_8B | {"rope_scaling": default}).rope.factor == 1
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    rope = model_config_from_hf(LLAMA3_8B | {"rope_scaling": yarn}).rope
    assert (rope.factor, rope.original_max_position) == (4, 2048)


@pytest.mark.parametrize(
    "values, truncate",
    [({}, True), ({"truncate": True}, True), ({"truncate": False}, False),
     ({"truncate": None}, False)],
)  # fmt: skip
def test_reads_yarn_bounds_that_are_not_rounded(values, truncate):
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    got = model_config_from_hf(LLAMA3_8B | {"rope_scaling": yarn | values}).rope
    assert got.truncate is truncate


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_bias": True}, "attention_bias=true: biases are not supported"),
        ({"mlp_bias": True}, "mlp_bias=true: biases are not supported"),
        ({"model_type": "mistral"}, "model_type='mistral': only 'llama' is known"),
        ({"model_type": None}, "model_type=None: only 'llama' is known"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' is supported"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rope_type='longrope' is not one of ('default', 'linear', 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
            "rope_type='su' is not one of",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' has no factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only whole heads"),
        ({"num_key_value_heads": 5}, "num_kv_heads=5 must divide num_heads=32"),
    ],
)
def test_refuses_what_the_model_lacks(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config_from_hf(LLAMA3_8B | change)


def test_refuses_values_of_another_type():
    # Under conftest.py the type checker speaks before ModelConfig does.
    with pytest.raises((ValueError, TypeError), match="hidden_size"):
        model_config_from_hf(LLAMA3_8B | {"hidden_size": "4096"})


def test_names_every_missing_key():
    hf = {k: v for k, v in LLAMA3_8B.items() if k not in ("vocab_size", "hidden_size")}
    with pytest.raises(ValueError, match=r"lacks \['vocab_size', 'hidden_size'\]"):
        model_config_from_hf(hf)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Hugging .* no config\.json"):
        model_config_from_hf(tmp_path)


def test_config_json_that_is_torn(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
        model_config_from_hf(tmp_path)


@pytest.mark.parametrize("content, kind", [("[]", "list"), ('"llama"', "str")])
def test_config_json_that_is_no_object(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    message = rf"config\.json is a JSON {kind}, not an object"
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(tmp_path)
