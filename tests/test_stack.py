"""Training's layers: a plan decides what is kept, and nothing else.

Every plan gives the plain model's loss and gradients, and updating inside the backward
pass gives the ordinary step's parameters, bit for bit.
"""

import dataclasses
from functools import cache

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
from mst_jax.loss import next_token_loss
from mst_jax.model import from_params, init_params
from mst_jax.optim import split_frozen
from mst_jax.sharding import make_mesh, named, param_specs
from mst_jax.train_step import init_train_state, make_gradients, make_train_step

B, T = 8, 50
PLAIN = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=8,
    num_kv_heads=4, head_dim=8,
)  # fmt: skip
MODELS = {
    "plain": PLAIN,
    "packed": dataclasses.replace(PLAIN, tie_embeddings=True, sliding_window=9),
}
# Compiled fast rather than to be fast.
FAST = {"xla_backend_optimization_level": 0}
# The old emitters that conftest.py takes on JAX 0.10 fuse multiplications and additions
# as each program goes: two programs then differ in a last bit.
SAME_BITS: dict[str, bool | int] = {**FAST, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):
    SAME_BITS["xla_cpu_use_fusion_emitters"] = True


def config(kind, mesh=(1, 1), optim=None, **train):
    return Config(
        model=MODELS[kind],
        data=DataConfig(seq_len=T, batch_size=B, tokenizer="x"),
        mesh=MeshConfig(data=mesh[0], fsdp=mesh[1]),
        optim=OptimConfig(**{"warmup_steps": 0, **(optim or {})}),
        train=TrainConfig(steps=10, compute_dtype="float32", **train),
    )


def make_params(kind):
    rng = np.random.default_rng(0)

    def make(path, a):
        if path[-1].key == "scale":  # fresh ones are all 1, which tests nothing
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), jnp.float32)
        # Large enough that attention is far from uniform.
        return jnp.asarray(0.3 * rng.standard_normal(a.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: init_params(MODELS[kind], 0))
    return jax.tree_util.tree_map_with_path(make, shapes)


def make_batch(kind, seed=0):
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, 64, (2, 1, B, T))
    labels = np.where(rng.random(labels.shape) < np.linspace(0.2, 1, T), labels, -100)
    batch = {"tokens": tokens, "labels": labels}
    if kind == "packed":  # rows of two documents, cut at different tokens
        cut, t = 3 + 5 * np.arange(B)[:, None], np.arange(T)
        batch["segment_ids"] = (t >= cut).astype(int)[None]
        batch["positions"] = np.where(t < cut, t, t - cut)[None]
    return {name: jnp.asarray(a, jnp.int32) for name, a in batch.items()}


@cache
def plain(kind):
    """Return (sum, count, gradients) of `Llama.__call__` under `jax.grad`."""
    batch = {name: a[0] for name, a in make_batch(kind).items()}
    train = TrainConfig(mlp_chunk_size=0, loss_chunk_size=T)

    def loss(params):
        return next_token_loss(from_params(MODELS[kind], params), batch, train)

    fn = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    (total, count), grads = fn(make_params(kind))
    return total, count, grads


def gradients(kind, cfg):
    mesh = make_mesh(cfg.mesh)
    params = make_params(kind)
    params = jax.device_put(params, named(mesh, param_specs(params)))
    fn = jax.jit(make_gradients(cfg, MODELS[kind], mesh), compiler_options=FAST)
    return fn(params, make_batch(kind))


def assert_close(got, want, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    "kind, plan, head_groups, chunk_size",
    [
        ("plain", "full", 1, 0),
        ("packed", "save_attention", 1, 16),
        ("plain", "none", 4, 7),
        ("packed", "none", 1, 25),
        ("plain", "offload", 2, 13),
        ("packed", "offload_attention", 4, 50),
        ("packed", "* offload=input every=2", 2, 64),
        ("plain", "* save=input+qkv+gate_up every=4", 1, 49),
        ("plain", "1 save=input; 3 offload=input+qkv save=attention", 2, 16),
        (
            "packed",
            "2 save=attention offload=input every=2; 1 save=input+mlp_input;"
            "* offload=input+gate_up save=mlp_input",
            1,
            None,
        ),
    ],
)
def test_every_plan_gives_the_plain_models_gradients(
    kind, plan, head_groups, chunk_size
):
    cfg = config(
        kind, plan=plan, head_groups=head_groups, mlp_chunk_size=chunk_size,
        loss_chunk_size=20,
    )  # fmt: skip
    assert_close(gradients(kind, cfg), plain(kind))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_the_heads_gradient_by_columns_is_the_plain_models(mesh):
    cfg = config("packed", mesh, plan="full", loss_chunk_size=20, vocab_chunk_size=20)
    assert_close(gradients("packed", cfg), plain("packed"))


def test_plan_and_frozen_parameters_on_a_mesh():
    plan = "2 offload=input every=2; * offload=input+attention"
    freeze = ("final_norm", "layers/mlp/w_up")
    cfg = config(
        "packed", (2, 4), {"freeze": freeze},
        plan=plan, head_groups=2, mlp_chunk_size=20,
    )  # fmt: skip
    total, count, grads = plain("packed")
    trained = split_frozen(grads, freeze)[0]
    assert_close(gradients("packed", cfg), (total, count, trained))


def equations(jaxpr):
    """Yield every equation, those of loops and branches too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize(
    "plan, again, offloaded",
    [
        ("full", 1, 0),
        ("save_attention", 0, 0),
        ("none", 0, 0),
        ("offload", 1, 1),
        ("offload_attention", 0, 3),  # input, output and logsumexp
        ("* save=input every=2", 2, 0),
        ("* offload=input save=attention every=2", 1, 1),
        ("* offload=input+qkv+attention+mlp_input+gate_up", 0, 9),
    ],
)
def test_what_is_computed_again_and_what_goes_to_the_host(plan, again, offloaded):
    def trace(plan):
        cfg = config("plain", plan=plan)
        fn = make_gradients(cfg, PLAIN, make_mesh(cfg.mesh))
        params, batch = make_params("plain"), make_batch("plain")
        return [*equations(jax.make_jaxpr(fn)(params, batch).jaxpr)]

    def attentions(traced):  # a forward pass takes two maxima more than a backward pass
        return sum(eqn.primitive.name == "reduce_max" for eqn in traced) / 2

    traced = trace(plan)
    assert attentions(traced) - attentions(trace("none")) == again
    to_host = [
        eqn
        for eqn in traced
        if eqn.primitive.name == "device_put"
        and eqn.outvars[0].aval.memory_space == jax.memory.Space.Host
    ]
    assert len(to_host) == 2 * offloaded  # the empty stack, and what is put in it


def train(kind, plan, optim, steps=3, **options):
    """Return the last state and the metrics of every step."""
    options = {"head_groups": 2, "mlp_chunk_size": 25, **options}
    cfg = config(kind, (1, 1), optim, plan=plan, **options)
    mesh = make_mesh(cfg.mesh)
    state = init_train_state(cfg, make_params(kind), mesh)
    step = make_train_step(cfg, MODELS[kind], mesh)
    batches = [make_batch(kind, seed) for seed in range(steps)]
    compiled = step.lower(state, batches[0]).compile(compiler_options=SAME_BITS)
    history = []
    for batch in batches:
        state, metrics = compiled(state, batch)
        history.append(metrics)
    return state, history


@pytest.mark.parametrize(
    "kind, plan, optim",
    [
        (
            "plain",
            "save_attention",
            {"clip_norm": 0.1, "weight_decay": 0.1, "warmup_steps": 2},
        ),
        ("packed", "* save=input every=2", {"clip": "layer", "clip_norm": 0.02}),
        (
            "plain",
            "offload",
            {"clip_norm": None, "freeze": ("embed", "layers/attention")},
        ),
        pytest.param(
            "plain",
            "1 save=input; * offload=input+qkv",
            {"name": "adafactor", "clip_norm": None, "freeze": ("lm_head",)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "packed",
            "none",
            {"name": "lion", "clip_norm": None, "weight_decay": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "packed",
            "full",
            {"name": "sgd", "clip": "layer", "clip_norm": 0.02},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value["name"] if "name" in value else None,
)
def test_update_in_backward_is_the_ordinary_step(kind, plan, optim):
    state, history = train(kind, plan, optim)
    same_state, same_history = train(kind, plan, {**optim, "in_backward": True})
    jax.tree.map(np.testing.assert_array_equal, same_state, state)
    jax.tree.map(np.testing.assert_array_equal, same_history, history)
    if optim.get("clip_norm"):
        assert all(metrics["grad_norm"] > optim["clip_norm"] for metrics in history)

    freeze = optim.get("freeze", ())
    old, new = (split_frozen(p, freeze) for p in (make_params(kind), state["params"]))
    jax.tree.map(np.testing.assert_array_equal, new[1], old[1])
    for a, b in zip(*map(jax.tree.leaves, (new[0], old[0])), strict=True):
        assert (a != b).any()
    assert set(state["opt"]) == set(new[0])


@pytest.mark.parametrize(
    "kind, plan, optim",
    [
        ("plain", "offload_attention", {"in_backward": True}),
        ("packed", "* offload=input every=2", {"in_backward": True, "clip": "layer"}),
        pytest.param(
            "packed",
            "1 save=input; 2 offload=input+qkv save=attention; 1 offload=input",
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["global norm", "every second input", "mixture"],
)
def test_what_is_fetched_ahead_is_the_same(kind, plan, optim):
    waited, ahead = (
        train(kind, plan, optim, steps=2, prefetch=prefetch)
        for prefetch in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, ahead, waited)


def test_each_layer_is_clipped_apart():
    total, count, grads = plain("packed")
    # In NumPy: every slice of an array would be a program of its own.
    grads = jax.tree.map(lambda g: np.asarray(g) / np.asarray(count), grads)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(tree)))

    def norms(tree):  # of each layer, of the final norm, of the embedding
        layers = [jax.tree.map(lambda a, i=i: a[i], tree["layers"]) for i in range(4)]
        units = [*layers, tree["final_norm"], tree["embed"]]
        return np.array([norm(unit) for unit in units])

    clip = float(np.median(norms(grads)))  # half of them
    rate = {"learning_rate": 1.0, "schedule": "constant"}
    optim = {"name": "sgd", "clip": "layer", "clip_norm": clip, "in_backward": True}
    state, history = train("packed", "full", optim | rate, steps=1)
    ends = state["params"], make_params("packed")
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *ends)
    np.testing.assert_allclose(norms(moved), np.minimum(norms(grads), clip), rtol=1e-4)
    np.testing.assert_allclose(history[0]["grad_norm"], norm(grads), rtol=1e-5)


def test_head_groups_divide_the_heads():
    cfg = config("plain", head_groups=3)
    fn = make_gradients(cfg, PLAIN, make_mesh(cfg.mesh))
    params, batch = make_params("plain"), make_batch("plain")
    with pytest.raises(ValueError, match="head_groups=3 must divide num_kv_heads=4"):
        jax.eval_shape(fn, params, batch)
