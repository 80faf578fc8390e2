"""Optimizer state in host memory: the same numbers as on the device, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.layer_state import enter, exchange, join, leave, split
from mst_jax.model import init_params
from mst_jax.sharding import make_mesh
from mst_jax.train_step import init_train_state, make_train_step


def on_host(a):
    place = jax.sharding.SingleDeviceSharding(
        jax.devices()[0], memory_kind="pinned_host"
    )
    return jax.device_put(a, place)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_layer_comes_once_and_goes_back_to_its_place(layers):
    def stack(width):
        return jnp.arange(layers * width, dtype=jnp.float32).reshape(layers, width)

    count = jnp.arange(layers)
    state = {"mu": stack(6), "nu": stack(7), "norm": stack(3)}

    @jax.jit
    def run(params, state):
        def turn(t, stacks):
            i, x = layers - 1 - t, jnp.float32(0)
            stacks, x = exchange(stacks, i, x, half=0)
            for k in ("mu", "nu", "norm"):
                assert (stacks.going[k] is None) != (stacks.coming[k] is not None)
            stacks, x = exchange(stacks, i, x, half=1)
            assert not jax.tree.leaves(stacks.going)
            # Another number for every layer, added to what has come.
            going = jax.tree.map(lambda a: a + 100 * (i + 1) + x, stacks.coming)
            here = {**stacks.here, "count": stacks.here["count"].at[i].add(1)}
            nothing = jax.tree.map(lambda _: None, going)
            return stacks._replace(going=going, coming=nothing, here=here)

        stacks = enter(params, state)
        return leave(jax.lax.fori_loop(0, layers, turn, stacks))

    away = jax.tree.map(on_host, state) | {"count": count}
    params, new = run({"w": count}, away)
    want = jax.tree.map(lambda a: a + 100 * jnp.arange(1, layers + 1)[:, None], state)
    want["count"] = count + 1
    np.testing.assert_array_equal(params["w"], count)
    jax.tree.map(np.testing.assert_array_equal, new, want)


def test_a_half_of_the_state_moves_each_way():
    # The largest first, to the lesser half: 6 + 2 and 4 + 3 + 1.
    widths = {"a": 3, "b": 6, "c": 2, "d": 4, "e": 1}
    state = {k: on_host(jnp.zeros((2, n))) for k, n in widths.items()}

    @jax.jit
    def run(state):
        stacks = enter({}, state)
        stacks, _ = exchange(stacks, 1, jnp.float32(0), half=0)
        sent = [k for k, a in stacks.going.items() if a is None]
        come = [k for k, a in stacks.coming.items() if a is not None]
        assert sorted(sent + come) == sorted(state)
        assert sum(widths[k] for k in sent) == sum(widths[k] for k in come) == 8
        return leave(exchange(stacks, 1, jnp.float32(0), half=1)[0]._replace(
            going=enter({}, state).going
        ))  # fmt: skip

    run(state)


def test_state_on_the_device_stays_there():
    state = {"mu": jnp.ones((3, 2)), "count": jnp.zeros(3)}
    x = jnp.float32(1)
    stacks = enter({"w": x}, state)
    assert exchange(stacks, 1, x, half=0) == (stacks, x)
    assert jax.tree.leaves((stacks.away, stacks.going, stacks.coming)) == []
    jax.tree.map(np.testing.assert_array_equal, leave(stacks), ({"w": x}, state))


def test_split_and_join_are_each_others_inverse():
    state = {"a": {"b": 1, "c": 2}, "d": 3}
    is_away = {"a": {"b": True, "c": False}, "d": True}
    here, away = split(state, is_away)
    assert here == {"a": {"b": None, "c": 2}, "d": None}
    assert away == {"a": {"b": 1, "c": None}, "d": 3}
    assert join(here, away) == state


GROUPS = "1 save=input; 2 offload=input; 2 save=input every=2"
IN_BACKWARD = {"in_backward": True, "clip": "layer"}


@pytest.mark.parametrize(
    "optim, train, mesh",
    [
        (IN_BACKWARD, {"plan": "none"}, (1, 1)),
        # Groups of layers, one of them offloaded, and blocks within a loop.
        (IN_BACKWARD, {"plan": GROUPS, "prefetch": True}, None),
        ({**IN_BACKWARD, "clip": "global"}, {"plan": "full"}, None),
        ({**IN_BACKWARD, "name": "lion", "freeze": ("layers/mlp",)}, {}, None),
        ({**IN_BACKWARD, "freeze": ("layers",)}, {}, None),
        ({"param_dtype": "bfloat16", "moment_dtype": "int8"}, {}, None),
        ({"name": "lion"}, {"accumulate": 2}, None),
        ({}, {}, (2, 2)),
    ],
)
def test_state_on_the_host_changes_nothing(optim, train, mesh):
    model = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=5,
        num_heads=4, num_kv_heads=2,
    )  # fmt: skip
    data, fsdp = mesh or (1, 1)
    tokens = jax.random.randint(
        jax.random.key(0), (train.get("accumulate", 1), 4, 64), 0, 64
    )
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, -1)}

    def run(away):
        cfg = Config(
            model=model,
            data=DataConfig(seq_len=64, batch_size=4, tokenizer="x"),
            mesh=MeshConfig(data=data, fsdp=fsdp),
            optim=OptimConfig(**{"warmup_steps": 0, "state_on_host": away} | optim),
            train=TrainConfig(compute_dtype="float32", **train),
        )
        mesh = make_mesh(cfg.mesh)
        state = init_train_state(cfg, init_params(model, 0), mesh)
        step = make_train_step(cfg, model, mesh)
        for _ in range(3):
            state, metrics = step(state, batch)
        layers = jax.tree.leaves(state["opt"].get("layers", {}))
        moved = [a for a in layers if a.sharding.memory_kind == "pinned_host"]
        assert len(moved) == away * sum(a.ndim > 2 for a in layers)
        return state["params"], metrics

    for got, want in zip(*map(jax.tree.leaves, (run(True), run(False))), strict=True):
        error = np.linalg.norm(np.subtract(got, want, dtype=np.float64))
        assert error <= 1e-5 * np.linalg.norm(np.asarray(want, np.float64))
