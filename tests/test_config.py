"""Config: every bad value is named with its way out; HF configs; round trips."""

import dataclasses
import importlib.util
import json
import re
import sys

import pytest

# A copy without the type checks of conftest.py: they would speak before the messages
# that a user sees.
_SPEC = importlib.util.spec_from_file_location(
    "plain_config", importlib.util.find_spec("mst_jax.config").origin
)
config = importlib.util.module_from_spec(_SPEC)
sys.modules["plain_config"] = config
_SPEC.loader.exec_module(config)

PRESETS = config.PRESETS
Config, DataConfig, MeshConfig = config.Config, config.DataConfig, config.MeshConfig
ModelConfig, OptimConfig = config.ModelConfig, config.OptimConfig
RopeConfig, TrainConfig = config.RopeConfig, config.TrainConfig
from_dict, to_dict = config.from_dict, config.to_dict
model_config_from_hf = config.model_config_from_hf
NAN, INF = float("nan"), float("inf")
TINY = PRESETS["tiny"]

BAD = [
    # types
    (TrainConfig, {"steps": "10"}, "TrainConfig.steps='10' must be int, not str"),
    (TrainConfig, {"steps": 1e3}, "TrainConfig.steps=1000.0 must be int, not float"),
    (TrainConfig, {"steps": True}, "TrainConfig.steps=True must be int, not bool"),
    (TrainConfig, {"seed": None}, "TrainConfig.seed=None must be int, not NoneType"),
    (TrainConfig, {"keep": [2]}, "TrainConfig.keep=[2] must be int, not list"),
    (
        TrainConfig,
        {"mlp_chunk_size": 4096.0},
        "TrainConfig.mlp_chunk_size=4096.0 must be int or None, not float",
    ),
    (
        OptimConfig,
        {"learning_rate": "3e-4"},
        "OptimConfig.learning_rate='3e-4' must be float, not str",
    ),
    (DataConfig, {"packing": 1}, "DataConfig.packing=1 must be bool, not int"),
    (DataConfig, {"source": 3}, "DataConfig.source=3 must be str, not int"),
    (Config, {"model": 3}, "Config.model=3 must be ModelConfig or None, not int"),
    (
        Config,
        {"model": TINY, "train": {"steps": 3}},
        "Config.train={'steps': 3} must be TrainConfig, not dict",
    ),
    (Config, {"init_from": ""}, "Config.init_from='' must be a str or None that is"),
    (
        DataConfig,
        {"source": ""},
        "DataConfig.source='' must be a str that is not empty",
    ),
    # not finite
    (
        OptimConfig,
        {"learning_rate": NAN},
        "OptimConfig.learning_rate=nan must be a finite float",
    ),
    (
        OptimConfig,
        {"clip_norm": INF},
        "OptimConfig.clip_norm=inf must be a finite float or None",
    ),
    (DataConfig, {"holdout": NAN}, "DataConfig.holdout=nan must be a finite float"),
    (RopeConfig, {"theta": INF}, "RopeConfig.theta=inf must be a finite float"),
    # rope
    (RopeConfig, {"theta": 0.0}, "RopeConfig.theta=0.0 must be positive"),
    (RopeConfig, {"factor": -1.0}, "RopeConfig.factor=-1.0 must be positive"),
    (
        RopeConfig,
        {"original_max_position": 0},
        "RopeConfig.original_max_position=0 must be positive",
    ),
    (RopeConfig, {"type": "lama3"}, "RopeConfig.type='lama3' is not one of"),
    (RopeConfig, {"type": "lama3"}, "did you mean 'llama3'?"),
    (
        RopeConfig,
        {"low_freq_factor": 0.0},
        "RopeConfig.low_freq_factor=0.0 must be positive",
    ),
    (
        RopeConfig,
        {"type": "llama3", "high_freq_factor": 1.0},
        "RopeConfig.high_freq_factor=1.0 must be larger than low_freq_factor=1.0",
    ),
    (RopeConfig, {"beta_slow": 0.0}, "RopeConfig.beta_slow=0.0 must be positive"),
    (
        RopeConfig,
        {"type": "yarn", "beta_fast": 0.5},
        "RopeConfig.beta_fast=0.5 must be larger than beta_slow=1.0",
    ),
    (
        RopeConfig,
        {"attention_factor": 0.0},
        "RopeConfig.attention_factor=0.0 must be positive, or None",
    ),
    # model
    *(
        (ModelConfig, {name: 0}, f"ModelConfig.{name}=0 must be positive")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "sliding_window",
            "max_position",
            "rms_norm_eps",
            "initializer_range",
        )  # fmt: skip
    ),
    (
        ModelConfig,
        {"num_kv_heads": 3},
        "ModelConfig.num_kv_heads=3 must divide num_heads=4",
    ),
    (
        ModelConfig,
        {"hidden_size": 255},
        "ModelConfig.hidden_size=255 is no multiple of num_heads=4; set head_dim",
    ),
    (
        ModelConfig,
        {"head_dim": 3},
        "ModelConfig.head_dim=3 gives heads of 3: RoPE needs",
    ),
    (
        ModelConfig,
        {"hidden_size": 12},
        "ModelConfig.head_dim=None gives heads of 3: RoPE needs an even size",
    ),
    # data
    (DataConfig, {"seq_len": 0}, "DataConfig.seq_len=0 must be positive"),
    (DataConfig, {"batch_size": -4}, "DataConfig.batch_size=-4 must be positive"),
    (DataConfig, {"holdout": 1.0}, "DataConfig.holdout=1.0 must be in [0, 1)"),
    (DataConfig, {"holdout": -0.1}, "DataConfig.holdout=-0.1 must be in [0, 1)"),
    (
        DataConfig,
        {"streaming": True},
        "DataConfig.source='stdlib' cannot stream: set source='hf:NAME'",
    ),
    # optim
    (OptimConfig, {"name": "adam"}, "OptimConfig.name='adam' is not one of"),
    (OptimConfig, {"name": "adam"}, "did you mean 'adamw'?"),
    (OptimConfig, {"schedule": "step"}, "OptimConfig.schedule='step' is not one of"),
    (OptimConfig, {"param_dtype": "bf16"}, "OptimConfig.param_dtype='bf16' is not one"),
    (
        OptimConfig,
        {"learning_rate": -1e-4},
        "OptimConfig.learning_rate=-0.0001 must be positive",
    ),
    (OptimConfig, {"eps": 0.0}, "OptimConfig.eps=0.0 must be positive"),
    (
        OptimConfig,
        {"clip_norm": 0},
        "OptimConfig.clip_norm=0 must be positive, or None",
    ),
    (OptimConfig, {"warmup_steps": -1}, "OptimConfig.warmup_steps=-1 is negative"),
    (OptimConfig, {"weight_decay": -0.1}, "OptimConfig.weight_decay=-0.1 is negative"),
    (OptimConfig, {"b1": 1.0}, "OptimConfig.b1=1.0 must be in [0, 1)"),
    (OptimConfig, {"b2": -0.5}, "OptimConfig.b2=-0.5 must be in [0, 1)"),
    (OptimConfig, {"end_factor": 2.0}, "OptimConfig.end_factor=2.0 must be in [0, 1]"),
    # mesh
    (MeshConfig, {"data": 0}, "MeshConfig.data=0 must be positive"),
    (MeshConfig, {"fsdp": -1}, "MeshConfig.fsdp=-1 must be positive"),
    # train
    *(
        (TrainConfig, {name: 0}, f"TrainConfig.{name}=0 must be positive")
        for name in (
            "steps",
            "accumulate",
            "eval_every",
            "eval_batches",
            "keep",
            "log_every",
        )  # fmt: skip
    ),
    (
        TrainConfig,
        {"loss_chunk_size": 0},
        "TrainConfig.loss_chunk_size=0 must be positive, or None",
    ),
    (TrainConfig, {"mlp_chunk_size": -1}, "TrainConfig.mlp_chunk_size=-1 is negative"),
    (TrainConfig, {"save_every": -1}, "TrainConfig.save_every=-1 is negative"),
    (TrainConfig, {"remat": "ful"}, "TrainConfig.remat='ful' is not one of"),
    (
        TrainConfig,
        {"compute_dtype": "float16"},
        "TrainConfig.compute_dtype='float16' is",
    ),
    # the whole
    (Config, {}, "Config needs a model or init_from"),
    (
        Config,
        {"model": TINY, "init_from": "x"},
        "Config has both a model and init_from",
    ),
    (
        Config,
        {"model": TINY, "mesh": MeshConfig(data=2, fsdp=3)},
        "DataConfig.batch_size=4 must be a multiple of mesh.data * mesh.fsdp = 6",
    ),
    (
        Config,
        {"model": TINY, "train": TrainConfig(steps=10)},
        "OptimConfig.warmup_steps=10 must be below TrainConfig.steps=10",
    ),
    (
        Config,
        {"model": ModelConfig(vocab_size=255)},
        "ModelConfig.vocab_size=255 is below the 256 of tokenizer='bytes'",
    ),
]


@pytest.mark.parametrize(
    "cls, values, message", BAD, ids=[message for *_, message in BAD]
)
def test_bad_values_are_named(cls, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**values)


@pytest.mark.parametrize(
    "cls, values",
    [
        (TrainConfig, {"save_every": 0, "mlp_chunk_size": 0}),
        (OptimConfig, {"clip_norm": None, "warmup_steps": 0, "b1": 0, "end_factor": 1}),
        (OptimConfig, {"learning_rate": 1}),  # an int is a float
        (DataConfig, {"source": "hf:name", "streaming": True, "holdout": 0}),
        (ModelConfig, {"hidden_size": 250, "head_dim": 64}),
        (Config, {"init_from": "somewhere"}),
        (Config, {"model": TINY, "train": TrainConfig(steps=1)}),
    ],
)
def test_values_at_the_edge_are_fine(cls, values):
    cls(**values)


def test_configs_are_frozen_and_keyword_only():
    for cls in (RopeConfig, ModelConfig, DataConfig, OptimConfig, TrainConfig):
        with pytest.raises(TypeError):
            cls(1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().seed = 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": {}}, "unknown key config.modle; did you mean 'model'?"),
        (
            {"train": {"step": 3}},
            "unknown key config.train.step; did you mean 'steps'?",
        ),
        (
            {"model": {"rope": {"thetta": 1.0}}},
            "unknown key config.model.rope.thetta; did you mean 'theta'?",
        ),
        ({"mesh": {"xyz": 1}}, "unknown key config.mesh.xyz; known: ['data', 'fsdp']"),
        ({"init_from": "x", 3: 4}, "unknown key config.3"),
        ({"model": TINY, "train": 3}, "Config.train=3 must be TrainConfig, not int"),
        ({"model": {"num_layers": "2"}}, "ModelConfig.num_layers='2' must be int"),
        ([1], "config=[1] must be a dictionary"),
    ],
)
def test_from_dict_names_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    cfg = Config(
        model=PRESETS[name],
        data=DataConfig(seq_len=77, holdout=0.25),
        optim=OptimConfig(clip_norm=None, learning_rate=1e-5),
        train=TrainConfig(mlp_chunk_size=0, remat="none"),
    )
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    model = json.loads(json.dumps(to_dict(PRESETS[name])))
    assert from_dict(model, ModelConfig) == PRESETS[name]


def test_round_trip_without_a_model():
    cfg = Config(init_from="somewhere")
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg


# Hugging Face config.json, as transformers 4 wrote it.
COMMON = {
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
LLAMA2_7B = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA3_8B = LLAMA2_7B | {
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA31_8B = LLAMA3_8B | {
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
    assert cfg.rope == RopeConfig(type="linear", factor=2, original_max_position=4096)


def test_reads_rope_without_a_factor():
    default = {"rope_type": "default", "factor": None, "mscale": 1, "mscale_all_dim": 2}
    assert model_config_from_hf(LLAMA3_8B | {"rope_scaling": default}).rope.factor == 1
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    rope = model_config_from_hf(LLAMA3_8B | {"rope_scaling": yarn}).rope
    assert (rope.factor, rope.original_max_position) == (4, 2048)


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
        ({"hidden_size": "4096"}, "ModelConfig.hidden_size='4096' must be int"),
    ],
)
def test_refuses_what_the_model_lacks(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config_from_hf(LLAMA3_8B | change)


def test_names_every_missing_key():
    hf = {k: v for k, v in LLAMA3_8B.items() if k not in ("vocab_size", "hidden_size")}
    with pytest.raises(ValueError, match=r"lacks \['vocab_size', 'hidden_size'\]"):
        model_config_from_hf(hf)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        model_config_from_hf(tmp_path)


def test_flops_per_token():
    cfg = PRESETS["llama3_8b"]
    head_and_layers = cfg.num_params - cfg.vocab_size * cfg.hidden_size
    # Causal: half of T keys a query; 4 D FLOPs a key forward, twice that backward.
    attention = 3 * 4 * cfg.num_layers * cfg.hidden_size * 8192 / 2
    assert cfg.flops_per_token(8192) == 6 * head_and_layers + attention
    window = dataclasses.replace(cfg, sliding_window=1024)
    assert window.flops_per_token(8192) == 6 * head_and_layers + attention / 4
