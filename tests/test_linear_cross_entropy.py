"""linear_cross_entropy against plain f32 log-softmax: every option, any length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mst_jax import linear_cross_entropy, token_log_probs

D, V = 16, 50


def make(T, B=3, masked="some", dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T), 4)
    x = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    w = (jax.random.normal(keys[1], (D, V)) / 4).astype(dtype)
    y = jax.random.randint(keys[2], (B, T), 0, V)
    if masked == "some":
        y = jnp.where(jax.random.bernoulli(keys[3], 0.3, (B, T)), -100, y)
    elif masked == "chunk":
        y = y.at[:, :64].set(-100)
    elif masked == "all":
        y = jnp.full_like(y, -100)
    return x, w, y


def plain(x, w, y, weights=None, z_loss=0.0, logit_softcap=None, label_smoothing=0.0):
    logits = x.astype(jnp.float32) @ w.astype(jnp.float32)
    if logit_softcap:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    lse = jax.nn.logsumexp(logits, -1)
    s = label_smoothing
    target = (1 - s) * jax.nn.one_hot(y, V) + s / V
    loss = lse - (target * logits).sum(-1) + z_loss * lse**2
    keep = (y != -100) * (1.0 if weights is None else weights)
    return (loss * keep).sum(), keep.sum()


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6


def thrice(loss):
    """Return (x, w, y) -> ((three times the sum, count), gradients), compiled."""

    def fn(x, w, y):
        total, count = loss(x, w, y)
        return 3 * total, count

    return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))


plain_thrice = thrice(plain)


@pytest.mark.parametrize("chunk_size", [64, 100, None])
@pytest.mark.parametrize("T", [1, 40, 63, 64, 127, 191, 256, 257, 300])
def test_value_and_gradients(T, chunk_size):
    ours = thrice(partial(linear_cross_entropy, chunk_size=chunk_size))
    for masked in ("none", "some", "chunk", "all"):
        x, w, y = make(T, masked=masked)
        (total, count), grads = ours(x, w, y)
        (want, want_count), want_grads = plain_thrice(x, w, y)
        close(total, want)
        assert count == want_count
        jax.tree.map(close, grads, want_grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_head_is_the_same_head(dtype):
    x, w, y = make(100, dtype=dtype)

    def loss(x, w, **how):
        return linear_cross_entropy(x, w, y, chunk_size=32, **how)[0]

    want, (want_dx, want_dw) = jax.value_and_grad(loss, (0, 1))(x, w)
    grad = jax.value_and_grad(lambda x, w: loss(x, w, transposed=True), (0, 1))
    found, (dx, dw) = grad(x, w.T)
    assert dw.shape == (V, D) and dw.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2  # bf16 results
    for a, b in ((found, want), (dx, want_dx), (dw.T, want_dw)):
        close(a, b, tolerance)
    close(loss(x, w.T, transposed=True), want)
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        loss(x, w, transposed=True)


def test_a_transposed_head_is_not_copied():
    x, w, y = make(64, B=1)

    def loss(w):
        return linear_cross_entropy(x, w, y, chunk_size=16, transposed=True)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(w.T))
    assert f"f32[{D},{V}]" not in text and f"f32[{V},{D}]" in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_loss": 1e-2},
        {"logit_softcap": 2.0},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2, "logit_softcap": 2.0, "label_smoothing": 0.2},
    ],
)
@pytest.mark.parametrize("columns", [None, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_options(options, columns, transposed):
    x, w, y = make(100)
    weights = jax.random.uniform(jax.random.key(9), y.shape)
    weights = jnp.where(weights < 0.2, 0, weights)  # these have a gradient too

    def ours(x, w, weights):
        return linear_cross_entropy(
            x, w.T if transposed else w, y, chunk_size=32, vocab_chunk_size=columns,
            transposed=transposed, token_weights=weights, **options,
        )[0]  # fmt: skip

    got = jax.value_and_grad(ours, (0, 1, 2))(x, w, weights)
    want = jax.value_and_grad(
        lambda *a: plain(*a[:2], y, a[2], **options)[0], (0, 1, 2)
    )(x, w, weights)
    jax.tree.map(close, got, want)


def test_all_masked_is_zero_not_nan():
    x, w, y = make(100, masked="all")
    (total, count), vjp = jax.vjp(
        lambda x, w: linear_cross_entropy(x, w, y, chunk_size=32), x, w
    )
    assert total == 0 and count == 0
    assert all((g == 0).all() for g in vjp((jnp.float32(1), jnp.float32(0))))


def test_tail_of_the_sequence_counts():
    # The original drops the last T % M positions.
    x, w, y = make(300, B=1, masked="none")
    assert linear_cross_entropy(x, w, y, chunk_size=257)[1] == 300


def test_tied_head_gradient():
    # The original is off by 70%: both uses of the embedding must add up.
    _, _, y = make(40)
    table = jax.random.normal(jax.random.key(1), (V, D)) / 4
    ids = jnp.where(y == -100, 0, y)
    got = jax.grad(lambda e: linear_cross_entropy(e[ids], e.T, y, chunk_size=7)[0])(
        table
    )
    close(got, jax.grad(lambda e: plain(e[ids], e.T, y)[0])(table))


def test_frozen_head_computes_no_weight_gradient():
    x, w, y = make(256, B=1)

    def dots(argnums):
        def loss(x, w):
            return linear_cross_entropy(x, w, y, chunk_size=64)[0]

        return str(jax.make_jaxpr(jax.grad(loss, argnums))(x, w)).count("dot_general")

    assert dots((0, 1)) == 3
    assert dots(0) == 2
    value = jax.make_jaxpr(lambda x: linear_cross_entropy(x, w, y, chunk_size=64))(x)
    assert str(value).count("dot_general") == 1


def test_weight_gradient_accumulates_in_f32():
    x, w, y = make(4096, B=1, dtype=jnp.bfloat16)
    want = jax.grad(lambda w: plain(x, w, y)[0])(w.astype(jnp.float32))

    def error(chunk_size):
        got = jax.grad(
            lambda w: linear_cross_entropy(x, w, y, chunk_size=chunk_size)[0]
        )(w)
        diff = np.asarray(got, np.float64) - np.asarray(want, np.float64)
        return np.linalg.norm(diff) / np.linalg.norm(want)

    assert error(16) < 1.1 * error(4096) + 1e-4


def test_large_logits_stay_finite():
    x, w, y = make(40)
    total, grads = jax.value_and_grad(
        lambda x, w: linear_cross_entropy(x, w, y, chunk_size=7)[0], (0, 1)
    )(1e4 * x, w)
    assert np.isfinite(total) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("label", [V, -1, -V, -V - 1])
def test_label_outside_the_vocabulary_is_nan(label):
    x, w, y = make(10, masked="none")
    assert np.isnan(linear_cross_entropy(x, w, y.at[0, 3].set(label))[0])
    found = token_log_probs(x, w, y.at[0, 3].set(label))
    assert all(np.isnan(values[0, 3]) for values in found)


def test_arrays_of_other_kinds(untyped):
    x, w, y = make(20, B=2, masked="none")
    want = linear_cross_entropy(x, w, y, chunk_size=7)
    close(linear_cross_entropy(x, w, y.astype(jnp.uint8), chunk_size=7), want)
    close(linear_cross_entropy(x, w, np.asarray(y).tolist(), chunk_size=7), want)
    head = nnx.Param(w)
    grad = nnx.grad(lambda head: linear_cross_entropy(x, head, y, chunk_size=7)[0])
    close(grad(head)[...], jax.grad(lambda w: linear_cross_entropy(x, w, y)[0])(w))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": jnp.ones((2, 3, D), int)}, "hidden must be floating, not int32"),
        ({"weight": jnp.ones((D, V), int)}, "weight must be floating, not int32"),
        ({"labels": jnp.ones((2, 3))}, "labels must be integer, not float32"),
        ({"hidden": jnp.ones((2, 0, D)), "labels": jnp.ones((2, 0), int)}, "is empty"),
        ({"token_weights": 1.0}, r"token_weights of shape \(\) must be"),
    ],
)
def test_bad_arrays(untyped, change, message):
    given = {
        "hidden": jnp.ones((2, 3, D)), "weight": jnp.ones((D, V)),
        "labels": jnp.ones((2, 3), int),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given | change)


@pytest.mark.parametrize("name", ["z_loss", "logit_softcap", "label_smoothing"])
def test_traced_options_are_refused(untyped, name):
    x, w, y = make(10)
    with pytest.raises(ValueError, match="Python numbers"):
        jax.grad(lambda z: linear_cross_entropy(x, w, y, **{name: z})[0])(0.1)


@pytest.mark.parametrize("columns", [None, 16])
def test_inside_shard_map(columns):
    x, w, y = make(40, B=4)
    how = {"chunk_size": 9, "vocab_chunk_size": columns}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, w, y):
        return jax.lax.psum(linear_cross_entropy(x, w, y, **how)[0], "data")

    shards = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P()
    )
    got = jax.value_and_grad(shards, (0, 1))(x, w, y)
    want = jax.value_and_grad(lambda *a: linear_cross_entropy(*a)[0], (0, 1))(x, w, y)
    jax.tree.map(close, got, want)


def test_token_log_probs():
    x, w, y = make(100)
    losses, log_probs = token_log_probs(x, w, y, chunk_size=33)
    ids = jnp.where(y == -100, 0, y)
    want = jnp.take_along_axis(jax.nn.log_softmax(x @ w), ids[..., None], -1)[..., 0]
    want = jnp.where(y == -100, 0, want)
    close(log_probs, want)
    close(losses, -want)
    got = jax.grad(lambda w: (token_log_probs(x, w, y, chunk_size=33)[1] ** 2).sum())(w)
    ref = jax.grad(
        lambda w: (
            jnp.where(
                y == -100,
                0,
                jnp.take_along_axis(jax.nn.log_softmax(x @ w), ids[..., None], -1)[
                    ..., 0
                ],
            )
            ** 2
        ).sum()
    )(w)
    close(got, ref, 1e-4)


def test_no_whole_logits_in_memory():
    T, V = 4096, 1024
    x, y = jnp.ones((1, T, D)), jnp.ones((1, T), int)
    w = jnp.ones((D, V))

    def temp(chunk_size):
        def loss(x, w):
            return linear_cross_entropy(x, w, y, chunk_size=chunk_size)[0]

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

    small, text = temp(T // 16)
    assert small < temp(T)[0] / 4
    assert f"{T},{V}]" not in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0"),
        ({"chunk_size": -1}, "chunk_size=-1"),
    ],
)
def test_bad_options(change, message):
    x, w, y = make(10)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, w, y, **change)


def test_unknown_implementation():
    with pytest.raises(NotImplementedError, match="cuda"):
        linear_cross_entropy(*make(10), implementation="cuda")


def test_a_wider_head_is_used_in_the_dtype_of_the_hidden_states():
    # f32 masters under bf16 activations: bf16 products, an f32 gradient.
    hidden = jnp.ones((2, 12, 8), jnp.bfloat16)
    weight = jnp.ones((8, 32), jnp.float32)
    labels = jnp.zeros((2, 12), jnp.int32)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunk_size=4)[0]

    gradient = jax.grad(loss, argnums=(0, 1))
    assert [g.dtype for g in gradient(hidden, weight)] == [jnp.bfloat16, jnp.float32]
    dots = [
        eqn
        for eqn in _equations(jax.make_jaxpr(gradient)(hidden, weight).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert len(dots) == 3
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in dots for v in eqn.invars)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_another_ignore_index():
    x, w, y = make(100)
    other = jnp.where(y == -100, 7, jnp.where(y == 7, 8, y))
    got = linear_cross_entropy(x, w, other, chunk_size=32, ignore_index=7)
    want = plain(x, w, jnp.where(other == 7, -100, other))
    jax.tree.map(close, got, want)


def test_count_is_the_sum_of_the_weights():
    x, w, y = make(100)
    weights = jax.random.uniform(jax.random.key(9), y.shape)
    got = linear_cross_entropy(x, w, y, chunk_size=32, token_weights=weights)
    jax.tree.map(close, got, plain(x, w, y, weights))


@pytest.mark.parametrize(
    "options", [{"z_loss": 1e-2}, {"logit_softcap": 2.0}, {"label_smoothing": 0.1}]
)
def test_token_log_probs_options(options):
    x, w, y = make(100)
    losses, log_probs = token_log_probs(x, w, y, chunk_size=33, **options)
    close(losses.sum(), plain(x, w, y, **options)[0])
    if "logit_softcap" in options:
        close(-log_probs.sum(), plain(x, w, y, **options)[0])
