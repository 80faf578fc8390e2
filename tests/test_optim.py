"""Frozen parameters, and the update of one layer at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mst_jax.config import ModelConfig, OptimConfig
from mst_jax.model import init_params
from mst_jax.optim import (
    at,
    check_frozen,
    init_state,
    join_frozen,
    make_optimizer,
    make_schedule,
    rewrite,
    split_frozen,
    squared_norm,
    unit_key,
    update,
    update_one,
)

SHAPES = jax.eval_shape(
    lambda: init_params(ModelConfig(vocab_size=8, num_layers=2), seed=0)
)


def names(tree, where=""):
    if not isinstance(tree, dict):
        return {where}
    return {name for key in tree for name in names(tree[key], f"{where}/{key}")}


@pytest.mark.parametrize(
    "freeze, frozen",
    [
        ((), set()),
        (("embed",), {"/embed/embedding"}),
        (("lm_head/kernel/",), {"/lm_head/kernel"}),
        (
            ("layers/attention", "final_norm"),
            {f"/layers/attention/{w}" for w in ("wq", "wk", "wv", "wo")}
            | {"/final_norm/scale"},
        ),
        (
            ("layers/mlp/w_up", "layers/mlp"),
            {f"/layers/mlp/{w}" for w in ("w_gate", "w_up", "w_down")},
        ),
        (("layers",), names(SHAPES["layers"], "/layers")),
        (tuple(SHAPES), names(SHAPES)),
    ],
)
def test_frozen_parameters_are_split_off(freeze, frozen):
    # 'layers/attention' is no beginning of the name 'layers/attention_norm'.
    trained, apart = split_frozen(SHAPES, freeze)
    assert names(apart) == frozen
    assert names(trained) == names(SHAPES) - frozen
    assert join_frozen(trained, apart) == SHAPES


@pytest.mark.parametrize(
    "freeze, message",
    [
        (
            ("embed", "layers/attn"),
            "freeze='layers/attn' names no parameter; there",
        ),
        (("lm",), "freeze='lm' names no parameter"),  # whole names only
        (("",), "freeze='' names no parameter"),
        (tuple(SHAPES), "freezes every parameter"),
    ],
)
def test_what_cannot_be_frozen(freeze, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_frozen(SHAPES, freeze)
    check_frozen(SHAPES, ("embed", "layers/attention", "lm_head"))


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": {"w": (3, 4)},
        "layers": {"norm": (5, 4), "w": (5, 4, 3)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32),
        shapes, is_leaf=lambda s: isinstance(s, tuple),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_layers_are_updated_one_by_one(name):
    # As if every layer, and the embedding, were a model of its own.
    cfg = OptimConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(cfg, steps=10)
    params, gradients, key = tree(0), tree(1), jax.random.key(0)
    options = {"scale": jnp.float32(0.5), "clip_norm": 1.0}
    state = init_state(optimizer, params)
    new, new_state = update(optimizer, params, gradients, state, key=key, **options)
    units = [("embed", lambda t: t["embed"])]
    units += [(i, lambda t, i=i: at(t["layers"], i)) for i in range(5)]
    for unit, own in units:
        want = update_one(
            optimizer, own(params), own(gradients), own(state),
            key=unit_key(key, unit), **options,
        )  # fmt: skip
        for a, b in zip(
            *map(jax.tree.leaves, ((own(new), own(new_state)), want)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_every_unit_rounds_with_a_key_of_its_own():
    key = jax.random.key(0)
    units = [*range(200), "embed", "final_norm", "lm_head"]
    keys = {bytes(np.asarray(jax.random.key_data(unit_key(key, u)))) for u in units}
    assert len(keys) == len(units)


def test_rewrite_keeps_the_stacks_dtype():
    stacks = {"a": jnp.ones((3, 2), jnp.bfloat16)}
    new = rewrite(
        lambda own, new: {"a": own["a"] + new}, stacks, 1, jnp.float32([1, 2])
    )
    assert new["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["a"], jnp.bfloat16([[1, 1], [2, 3], [1, 1]]))
    np.testing.assert_array_equal(at(new, 1)["a"], jnp.bfloat16([2, 3]))


def test_a_known_sum_of_squares_takes_the_place_of_its_leaf():
    tree = {"mlp": {"w": jnp.full((2, 3), 2.0), "b": jnp.ones(4)}, "norm": jnp.ones(5)}
    assert squared_norm(tree) == 24 + 4 + 5
    assert squared_norm(tree, {"mlp": {"w": jnp.float32(7)}}) == 7 + 4 + 5
    assert squared_norm({}) == 0


def test_bf16_updates_add_up():
    cfg = OptimConfig(
        name="sgd",
        learning_rate=1e-4,
        weight_decay=0.0,
        clip_norm=None,
        warmup_steps=0,
        schedule="constant",
    )
    optimizer = make_optimizer(cfg, 100)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = optimizer.init({"w": jnp.ones((64, 64))})
    for i in range(50):
        params, state = update_one(
            optimizer,
            params,
            {"w": jnp.ones((64, 64))},
            state,
            scale=jnp.float32(1),
            key=jax.random.key(i),
        )
    moved = 1 - np.asarray(params["w"], np.float64)
    assert abs(moved.mean() / 50e-4 - 1) < 0.1


def test_schedules_between():
    values = [
        float(
            make_schedule(
                OptimConfig(schedule=s, warmup_steps=10, learning_rate=1.0), 110
            )(35)
        )
        for s in ("cosine", "linear", "constant")
    ]
    np.testing.assert_allclose(
        values, [0.1 + 0.45 * (1 + 0.5**0.5), 0.775, 1.0], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_matrices_decay_and_norms_do_not(name):
    cfg = OptimConfig(
        name=name,
        learning_rate=0.1,
        weight_decay=0.5,
        warmup_steps=0,
        schedule="constant",
    )
    optimizer = make_optimizer(cfg, 10)
    params = {"w": jnp.ones((4, 4)), "norm": jnp.ones(4)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-5)
    assert (updates["norm"] == 0).all()


def test_adamw_takes_every_number_of_the_config():
    cfg = OptimConfig(
        learning_rate=0.1, b1=0.5, b2=0.7, eps=0.3, warmup_steps=0, schedule="constant"
    )
    ours, theirs = (
        make_optimizer(cfg, 10),
        optax.adamw(0.1, b1=0.5, b2=0.7, eps=0.3, weight_decay=cfg.weight_decay),
    )
    params = {"w": jnp.ones((4, 4))}
    states = [o.init(params) for o in (ours, theirs)]
    for size in (1.0, -0.2):
        g = {"w": jnp.full((4, 4), size)}
        found = [
            o.update(g, s, params) for o, s in zip((ours, theirs), states, strict=True)
        ]
        states = [s for _, s in found]
        np.testing.assert_allclose(found[0][0]["w"], found[1][0]["w"], rtol=1e-5)
