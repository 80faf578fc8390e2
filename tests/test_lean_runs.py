"""Lean runs end to end: learning curves beside f32 AdamW's, resume with host memory."""

import dataclasses

import jax
import numpy as np
import pytest
from test_trainer import config, final_params, finish, kill_and_finish, losses

from mst_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mst_jax.data import load_data
from mst_jax.model import init_params
from mst_jax.sharding import make_mesh
from mst_jax.train_step import init_train_state, make_train_step

STEPS = 60
# The recipe configs/tiny.py, shorter.
MODEL = ModelConfig(
    hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2
)
# name: (optimizer's fields, how far the last losses may be from f32 AdamW's)
LEAN = {
    "bf16 moments": ({"moment_dtype": "bfloat16"}, 0.02),
    "8-bit moments": ({"moment_dtype": "int8"}, 0.02),
    "bf16 weights": ({"param_dtype": "bfloat16"}, 0.02),
    "bf16 weights, 8-bit moments, in backward": (
        {
            "param_dtype": "bfloat16",
            "moment_dtype": "int8",
            "in_backward": True,
            "clip": "layer",
        },
        0.03,
    ),
    # Another optimizer: no first moment, so its curve is its own.
    "adafactor, in backward": (
        {"name": "adafactor", "in_backward": True, "clip": "layer"},
        0.10,
    ),
}


def curve(**optim):
    cfg = Config(
        model=MODEL,
        data=DataConfig(seq_len=128, batch_size=4),
        optim=OptimConfig(**{"learning_rate": 3e-3, "warmup_steps": 10, **optim}),
        train=TrainConfig(steps=STEPS, compute_dtype="float32"),
    )
    batches = load_data(cfg.data, MODEL.vocab_size).train_iterator()
    mesh = make_mesh(cfg.mesh)
    state = init_train_state(cfg, init_params(MODEL, 0), mesh)
    step = make_train_step(cfg, MODEL, mesh)
    found = []
    for _ in range(STEPS):
        batch = jax.tree.map(lambda a: a[None], next(batches))
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def adamw():
    found = curve()
    assert np.mean(found[-10:]) < 0.6 * found[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAN)
def test_the_curve_is_that_of_f32_adamw(name, adamw):
    optim, margin = LEAN[name]
    found = curve(**optim)
    difference = np.mean(found[-10:]) / np.mean(adamw[-10:]) - 1
    assert abs(difference) < margin, difference


def lean(directory, out):
    cfg = config(directory, out, plan="1 offload=input; * offload=input+attention")
    optim = dataclasses.replace(
        cfg.optim, moment_dtype="int8", in_backward=True, clip="layer",
        param_dtype="bfloat16", state_on_host=True,
    )  # fmt: skip
    model = dataclasses.replace(cfg.model, hidden_size=64, intermediate_size=96)
    return dataclasses.replace(cfg, optim=optim, model=model)


@pytest.mark.slow
def test_kill_9_and_resume_with_everything_offloaded(tmp_path):
    whole, killed = lean(tmp_path, "whole"), lean(tmp_path, "killed")
    finish(whole, tmp_path)
    assert "resumed from step" in kill_and_finish(killed, 2, tmp_path)
    assert losses(killed) == losses(whole)
    (step, got), (_, want) = final_params(killed), final_params(whole)
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, got, want)
