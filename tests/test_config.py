"""Config: every bad value is named with its way out; round trips."""

import dataclasses
import importlib
import importlib.util
import json
import re
import sys

import pytest


def plain(name):
    """A copy without conftest.py's type checks, which would speak before the messages
    that a user sees."""
    spec = importlib.util.find_spec(f"mst_jax.{name}")
    spec = importlib.util.spec_from_file_location(f"plain_{name}", spec.origin)
    module = sys.modules[f"plain_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


USED = ("mst_jax.model_config", "mst_jax.presets")  # by config
checked = {name: importlib.import_module(name) for name in USED}
for name in USED:
    sys.modules[name] = plain(name.removeprefix("mst_jax."))
config = plain("config")
sys.modules.update(checked)

PRESETS = config.PRESETS
Config, DataConfig, MeshConfig = config.Config, config.DataConfig, config.MeshConfig
ModelConfig, OptimConfig = config.ModelConfig, config.OptimConfig
RopeConfig, TrainConfig = config.RopeConfig, config.TrainConfig
from_dict, to_dict = config.from_dict, config.to_dict
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
    (OptimConfig, {"clip": "layers"}, "OptimConfig.clip='layers' is not one of"),
    (
        OptimConfig,
        {"freeze": "embed"},
        "OptimConfig.freeze='embed' must be a tuple of strings",
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
    (
        TrainConfig,
        {"vocab_chunk_size": 0},
        "TrainConfig.vocab_chunk_size=0 must be positive, or None",
    ),
    (TrainConfig, {"mlp_chunk_size": -1}, "TrainConfig.mlp_chunk_size=-1 is negative"),
    (TrainConfig, {"save_every": -1}, "TrainConfig.save_every=-1 is negative"),
    (TrainConfig, {"head_groups": 0}, "TrainConfig.head_groups=0 must be positive"),
    (TrainConfig, {"plan": "ful"}, "plan group 'ful' must start with a number of"),
    (TrainConfig, {"plan": 3}, "TrainConfig.plan=3 must be str, not int"),
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
        OptimConfig,
        {"name": "sgd", "state_on_host": True},
        "OptimConfig.state_on_host=True needs adamw or lion: sgd has no moments",
    ),
    (
        TrainConfig,
        {"memory_budget": "80"},
        "TrainConfig.memory_budget='80' is no size: write for example 120GiB, or 'au",
    ),
    (
        TrainConfig,
        {"host_memory": "8GiB"},
        "TrainConfig.host_memory='8GiB' is a limit for the planner: set memory_budget",
    ),
    (
        Config,
        {"model": TINY, "train": TrainConfig(steps=10)},
        "OptimConfig.warmup_steps=10 must be below TrainConfig.steps=10",
    ),
    (
        Config,
        {
            "model": TINY,
            "optim": OptimConfig(in_backward=True),
            "train": TrainConfig(accumulate=2),
        },
        "TrainConfig.accumulate=2 needs whole gradients to add up",
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


def test_no_tokenizer_is_the_checkpoints_or_bytes():
    assert Config(model=TINY).tokenizer == DataConfig().tokenizer_name() == "bytes"
    assert Config(init_from="somewhere").tokenizer == "somewhere"
    own = DataConfig(tokenizer="own")
    assert Config(init_from="somewhere", data=own).tokenizer == "own"


def test_in_backward_runs_on_one_device():
    optim = OptimConfig(in_backward=True)
    with pytest.raises(NotImplementedError, match="the mesh has 4"):
        Config(model=TINY, optim=optim, mesh=MeshConfig(data=2, fsdp=2))
    Config(model=TINY, optim=optim)


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
        optim=OptimConfig(
            clip_norm=None, learning_rate=1e-5, freeze=("embed", "layers/attention")
        ),
        train=TrainConfig(mlp_chunk_size=0, plan="none"),
    )
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    model = json.loads(json.dumps(to_dict(PRESETS[name])))
    assert from_dict(model, ModelConfig) == PRESETS[name]


def test_round_trip_without_a_model():
    cfg = Config(init_from="somewhere")
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_flops_per_token():
    cfg = PRESETS["llama3_8b"]
    head_and_layers = cfg.num_params - cfg.vocab_size * cfg.hidden_size
    # Causal: half of T keys a query; 4 D FLOPs a key forward, twice that backward.
    attention = 3 * 4 * cfg.num_layers * cfg.hidden_size * 8192 / 2
    assert cfg.flops_per_token(8192 / 2) == 6 * head_and_layers + attention
