"""A step on two GPUs: compiled for H200s that are not there, run where two are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import needs_pallas
from test_memory import copied

from mst_jax.compile_only import compile_step
from mst_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.gpus import GPUS
from mst_jax.model import init_params
from mst_jax.sharding import make_mesh
from mst_jax.train_step import init_train_state, make_train_step

T = 4096
MODEL = ModelConfig(
    vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_layers=2,
    num_heads=8, num_kv_heads=2,
)  # fmt: skip
MESHES = pytest.mark.parametrize("data, fsdp", [(1, 2), (2, 1)])


def config(data, fsdp, packing=True, away=False):
    return Config(
        model=MODEL,
        data=DataConfig(seq_len=T, batch_size=2, packing=packing),
        optim=OptimConfig(
            param_dtype="bfloat16", moment_dtype="int8", warmup_steps=0,
            state_on_host=away,
        ),
        mesh=MeshConfig(data=data, fsdp=fsdp),
        train=TrainConfig(plan="save_attention"),
    )  # fmt: skip


@pytest.mark.compiled
@needs_pallas
@MESHES
def test_kernels_are_in_a_step_of_two(data, fsdp):
    cfg = config(data, fsdp, packing=False)
    # Long enough that activations outweigh cuBLAS's workspaces.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=2 * T))
    two = compile_step(cfg, MODEL, GPUS["h200"])
    for name in ("attention_backward", "gate_up", "logits"):
        assert f"/{name}/" in two.hlo, name
    assert ("all-gather" in two.hlo) == (fsdp > 1)
    # Bytes of one device, which has one of the two sequences.
    whole = dataclasses.replace(cfg, mesh=MeshConfig())
    one = compile_step(whole, MODEL, GPUS["h200"])
    assert two.arguments < (0.6 if fsdp > 1 else 1.01) * one.arguments
    assert two.temporaries < 0.8 * one.temporaries


@pytest.mark.compiled
@needs_pallas
def test_each_of_two_has_its_part_of_the_state_on_the_host():
    two, one = (
        compile_step(config(1, fsdp, away=True), MODEL, GPUS["h200"]) for fsdp in (2, 1)
    )
    assert two.host == pytest.approx(one.host / 2, rel=0.01)
    # Codes and scales of two moments of seven matrices, both ways, by DMA.
    assert copied(two.hlo) == copied(one.hlo) == 56


@pytest.mark.gpu
@pytest.mark.parametrize("away", [False, True])
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@MESHES
def test_losses_of_two_are_those_of_one(data, fsdp, away):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 1000, (1, 2, T)), jnp.int32)
    ids = np.broadcast_to(np.repeat([1, 2, 3, 4], T // 4), tokens.shape)
    place = np.broadcast_to(np.tile(np.arange(T // 4), 4), tokens.shape)
    batch = {
        "tokens": tokens, "labels": jnp.roll(tokens, -1, -1),
        "segment_ids": jnp.asarray(ids, jnp.int32),
        "positions": jnp.asarray(place, jnp.int32),
    }  # fmt: skip

    def losses(cfg):
        mesh = make_mesh(cfg.mesh)
        state = init_train_state(cfg, init_params(MODEL, 0), mesh)
        step, found = make_train_step(cfg, MODEL, mesh), []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    # Weights of 16 bits are rounded at random, each device by numbers of its own.
    got, want = losses(config(data, fsdp, away=away)), losses(config(1, 1))
    np.testing.assert_allclose(got, want, rtol=2e-3)
    assert want[2] < want[0]
