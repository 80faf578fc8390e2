"""The step: exact under sharding; optimizers; rounding."""

import dataclasses

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
from mst_jax.gradients import embedding_gradient
from mst_jax.model import init_params
from mst_jax.optim import make_schedule, stochastic_round
from mst_jax.sharding import make_mesh, named, param_specs
from mst_jax.train_step import (
    abstract_state,
    init_train_state,
    make_eval_step,
    make_gradients,
    make_train_step,
)

MODEL = ModelConfig(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2,
)  # fmt: skip


def config(model=MODEL, mesh=(1, 1), optim=None, batch_size=8, **train):
    return Config(
        model=model,
        data=DataConfig(seq_len=64, batch_size=batch_size),
        mesh=MeshConfig(data=mesh[0], fsdp=mesh[1]),
        optim=OptimConfig(**{"warmup_steps": 0, **(optim or {})}),
        train=TrainConfig(compute_dtype="float32", **train),
    )


def make_batch(A=1, B=2, T=64, masked=True, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (A, B, T), 0, 64)
    labels = jax.random.randint(keys[1], (A, B, T), 0, 64)
    if masked:  # uneven over micro-batches and rows
        keep = jnp.linspace(0.1, 0.9, A * B).reshape(A, B, 1)
        labels = jnp.where(
            jax.random.uniform(keys[2], labels.shape) < keep, labels, -100
        )
    return {"tokens": tokens, "labels": labels}


def gradients(cfg, batch, params=None):
    mesh = make_mesh(cfg.mesh)
    params = init_params(cfg.model, 0) if params is None else params
    params = jax.device_put(params, named(mesh, param_specs(params)))
    return jax.jit(make_gradients(cfg, cfg.model, mesh))(params, batch)


def start(cfg, params=None):
    """Return (step, state of step 0)."""
    mesh = make_mesh(cfg.mesh)
    params = init_params(cfg.model, 0) if params is None else params
    return make_train_step(cfg, cfg.model, mesh), init_train_state(cfg, params, mesh)


def assert_close(got, want, tolerance=2e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


def test_all_masked_step_changes_nothing():
    batch = make_batch()
    batch["labels"] = jnp.full_like(batch["labels"], -100)
    step, state = start(config(optim={"learning_rate": 1e-2}, steps=12))
    before = jax.tree.map(np.array, state["params"])
    state, metrics = step(state, batch)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["params"], before)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4)])
def test_sharded_equals_single_device(mesh):
    batch = make_batch(A=2, B=8)
    kwargs = {"accumulate": 2, "mlp_chunk_size": 20, "loss_chunk_size": 20}
    got = gradients(config(mesh=mesh, **kwargs), batch)
    assert_close(got, gradients(config(**kwargs), batch))


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_replicas_add_up_before_they_round(mesh):
    # bf16 parameters, whose gradient is bf16 too: one rounding, not one a replica.
    batch = make_batch(B=8)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params(MODEL, 0))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    want = gradients(config(), batch, wide)[2]
    got = gradients(config(mesh=mesh), batch, params)[2]
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(got))
    del got["final_norm"], got["lm_head"]  # of the loss, which rounds them itself
    assert_close(got, {name: want[name] for name in got}, 1.9e-3)


@pytest.mark.parametrize("mesh, accumulate", [((1, 1), 1), ((2, 1), 1), ((2, 2), 2)])
def test_layers_may_all_be_frozen(mesh, accumulate):
    optim = {"freeze": ("layers",), "name": "sgd", "learning_rate": 0.1}
    step, state = start(config(mesh=mesh, optim=optim, accumulate=accumulate))
    before = jax.tree.map(np.array, state["params"])
    state, _ = step(state, make_batch(A=accumulate, B=8))
    after = state["params"]
    jax.tree.map(np.testing.assert_array_equal, after["layers"], before["layers"])
    for name in ("embed", "lm_head"):
        (new,), (old,) = (jax.tree.leaves(p[name]) for p in (after, before))
        assert (new != old).any(), name


def test_sharded_step_and_state():
    cfg = config(mesh=(2, 4), optim={"param_dtype": "bfloat16"})
    mesh = make_mesh(cfg.mesh)

    state = jax.jit(lambda: init_train_state(cfg, init_params(MODEL, 0), mesh))()
    w_gate = state["params"]["layers"]["mlp"]["w_gate"]
    assert w_gate.addressable_shards[0].data.shape == (2, 8, 48)
    moments = [
        leaf
        for leaf in jax.tree.leaves(state["opt"]["layers"])
        if leaf.shape == w_gate.shape
    ]
    assert moments and all(m.sharding == w_gate.sharding for m in moments)
    batch = make_batch(B=8)
    step = make_train_step(cfg, MODEL, mesh)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    single, other = start(config(optim={"param_dtype": "bfloat16"}))
    _, first = single(other, batch)
    assert abs(float(first["loss"]) - losses[0]) < 1e-4


@pytest.fixture
def lowered():
    """Collect the name of every function that JAX compiles."""
    names = []

    def listen(event, seconds, **about):
        del seconds
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


LEAN = {"moment_dtype": "int8", "state_on_host": True}


@pytest.mark.parametrize(
    "mesh, optim",
    [
        ((1, 1), {}),
        ((1, 1), {**LEAN, "in_backward": True, "clip": "layer"}),
        ((2, 1), {}),
        ((1, 2), LEAN),
    ],
)
def test_all_steps_are_one_program(lowered, mesh, optim):
    cfg = config(mesh=mesh, optim=optim)
    mesh = make_mesh(cfg.mesh)

    def fresh():
        return init_train_state(cfg, init_params(MODEL, 0), mesh)

    step = make_train_step(cfg, MODEL, mesh)
    for first in (fresh, jax.jit(fresh)):
        state = first()
        places = jax.tree.map(lambda a: a.sharding, state)
        for _ in range(2):
            state, _ = step(state, make_batch())
        for leaf, place in zip(*map(jax.tree.leaves, (state, places)), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert leaf.sharding.memory_kind == place.memory_kind
    assert lowered.count("jit(step)") == 1


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizers_learn(name, dtype):
    rate = {"sgd": 1.0, "lion": 3e-3}.get(name, 1e-2)
    optim = {"name": name, "learning_rate": rate, "param_dtype": dtype}
    step, state = start(config(optim=optim, steps=12))
    batch = make_batch()
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses
    assert int(state["step"]) == 12
    assert all(p.dtype == dtype for p in jax.tree.leaves(state["params"]))


def test_adamw_is_optax_on_the_whole_tree():
    import optax

    cfg = config(optim={"weight_decay": 0.1, "clip_norm": 0.5, "schedule": "constant"})
    params = init_params(MODEL, 0)
    batch = make_batch()
    total, count, grads = gradients(cfg, batch, params)
    mask = jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key != "scale", params)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(cfg.optim.learning_rate, b2=0.95, weight_decay=0.1, mask=mask),
    )
    grads = jax.tree.map(lambda g: g / count, grads)

    @jax.jit
    def updated(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    want = updated(params, grads)
    step, state = start(cfg, params)
    state, metrics = step(state, batch)
    for a, b in zip(*map(jax.tree.leaves, (state["params"], want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_stochastic_rounding_is_unbiased():
    x = jnp.full((200_000,), 1.0 + 2.0**-8 * 0.2, jnp.float32)
    rounded = stochastic_round(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(rounded)) <= {1.0, 1.0 + 2.0**-7}
    assert abs(float(rounded.mean()) - float(x[0])) < 5e-5
    special = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0])
    got = stochastic_round(special, jax.random.key(1)).astype(jnp.float32)
    np.testing.assert_array_equal(got, special)


def test_eval_is_the_training_loss():
    cfg = config()
    params, batch = init_params(MODEL, 0), make_batch()
    total, count = make_eval_step(cfg, MODEL, make_mesh(cfg.mesh))(params, batch)
    want = gradients(cfg, batch, params)
    np.testing.assert_allclose([total, count], want[:2], rtol=1e-6)


def test_eval_needs_less_memory_than_a_step():
    # No second copy of f32 masters, and nothing kept for a backward pass.
    model = dataclasses.replace(MODEL, num_layers=8, intermediate_size=400)
    cfg = config(
        model, batch_size=1, plan="full", mlp_chunk_size=32, loss_chunk_size=32,
        optim={"name": "sgd", "in_backward": True, "clip_norm": None},
    )  # fmt: skip
    cfg = dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, compute_dtype="bfloat16")
    )
    mesh = make_mesh(cfg.mesh)
    state = abstract_state(cfg, model)
    ids = jax.ShapeDtypeStruct((1, 1, 256), jnp.int32)
    batch = {"tokens": ids, "labels": ids}

    def temporaries(fn, *args):
        return fn.lower(*args).compile().memory_analysis().temp_size_in_bytes

    step = temporaries(make_train_step(cfg, model, mesh), state, batch)
    evaluation = temporaries(make_eval_step(cfg, model, mesh), state["params"], batch)
    assert evaluation < step


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedules(shape):
    cfg = OptimConfig(schedule=shape, warmup_steps=10, learning_rate=1.0)
    rate = make_schedule(cfg, 100)
    assert 0 < rate(0) < 0.2 and float(rate(10)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(1.0 if shape == "constant" else 0.1)


def test_no_quadratic_or_wide_buffer():
    # No [T, T], [T, F] or [T, V] buffer in the compiled gradient.
    model = dataclasses.replace(MODEL, intermediate_size=176, vocab_size=272)
    T = 1024
    cfg = config(model, mlp_chunk_size=128, loss_chunk_size=128)
    batch = {k: jnp.zeros((1, 1, T), jnp.int32) for k in ("tokens", "labels")}
    params = jax.eval_shape(lambda: init_params(model, 0))
    fn = jax.jit(make_gradients(cfg, model, make_mesh(cfg.mesh)))
    text = fn.lower(params, batch).compile().as_text()
    for width in (T, 176, 272):
        assert f"{T},{width}]" not in text


def test_every_step_rounds_with_noise_of_its_own():
    optim = {
        "name": "sgd",
        "learning_rate": 1e-2,
        "param_dtype": "bfloat16",
        "schedule": "constant",
    }
    found = []
    for number in (0, 1):
        step, state = start(config(optim=optim))
        new, _ = step(state | {"step": jnp.int32(number)}, make_batch())
        found.append(np.asarray(new["params"]["lm_head"]["kernel"], np.float32))
    assert (found[0] != found[1]).any()


def test_micro_batches_add_up_in_f32():
    cfg = config(optim={"param_dtype": "bfloat16"}, accumulate=2)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params(MODEL, 0))
    _, _, sums = jax.eval_shape(
        make_gradients(cfg, MODEL, make_mesh(cfg.mesh)), params, make_batch(A=2)
    )
    assert {g.dtype for g in jax.tree.leaves(sums)} == {jnp.dtype("float32")}


def test_a_frequent_token_adds_up_in_f32():
    dx = jnp.ones((1, 4096, 2), jnp.bfloat16)
    embed = {"embedding": jnp.zeros((3, 2), jnp.bfloat16)}
    got = embedding_gradient(jnp.zeros((1, 4096), jnp.int32), dx, embed)["embedding"]
    assert got.dtype == jnp.float32 and (got[0] == 4096).all()
