"""mini_sequence equals the plain function, in values, gradients and less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax import mini_sequence, mini_sequence_sum
from mst_jax.mini_sequence import bytes_per_token, split_length

D, F = 8, 24


def mlp(params, x):
    return jax.nn.silu(x @ params["gate"]) * (x @ params["up"]) @ params["down"]


def make(T, B=2, dtype=jnp.float32, D=D, F=F):
    keys = jax.random.split(jax.random.key(T), 5)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {
        n: (jax.random.normal(k, s) / s[0] ** 0.5).astype(dtype)
        for k, (n, s) in zip(keys, shapes.items(), strict=False)
    }
    x = jax.random.normal(keys[3], (B, T, D)).astype(dtype)
    g = jax.random.normal(keys[4], (B, T, D)).astype(dtype)
    return params, x, g


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, params, x, g):
    y, vjp = jax.vjp(fn, params, x)
    return y, vjp(g)


@pytest.mark.parametrize("chunk_size", [1, 64, 100, 1000, None])
@pytest.mark.parametrize("T", [1, 40, 63, 64, 127, 191, 257, 300])
def test_equals_plain_function(T, chunk_size):
    if chunk_size == 1 and T > 64:
        chunk_size = 7
    params, x, g = make(T)
    chunked = partial(mini_sequence, mlp, chunk_size=chunk_size)
    y, grads = value_and_gradients(chunked, params, x, g)
    want, want_grads = value_and_gradients(mlp, params, x, g)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_pytrees_and_any_axis(axis):
    x = {"a": jnp.arange(60.0).reshape(3, 4, 5), "b": jnp.ones((3, 4, 5))}

    def fn(p, x):
        return {"sum": x["a"] + p * x["b"], "twice": (2 * x["a"],)}

    got = mini_sequence(fn, jnp.float32(3.0), x, chunk_size=2, axis=axis)
    jax.tree.map(np.testing.assert_array_equal, got, fn(3.0, x))


def test_pad_rows_leave_no_nan():
    # x / |x| has no gradient at zero: rows that only fill up a chunk must be valid.
    x = jax.random.normal(jax.random.key(0), (1, 5, 4))

    def fn(p, x):
        return p * x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    grad = jax.grad(lambda p: mini_sequence(fn, p, x, chunk_size=3).sum())(jnp.ones(4))
    assert np.isfinite(grad).all()


def test_weight_gradients_accumulate_in_f32():
    # The original accumulates in bf16: its error grows with the number of chunks.
    params, x, g = make(2048, B=1, dtype=jnp.bfloat16, D=32, F=64)
    f32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, g))
    want = jax.vjp(mlp, *f32[:2])[1](f32[2])[0]
    plain = jax.vjp(mlp, params, x)[1](g)[0]

    def error(chunk_size):
        def chunked(p):
            return mini_sequence(mlp, p, x, chunk_size=chunk_size)

        return jax.tree.map(relative, jax.vjp(chunked, params)[1](g)[0], want)

    for name, plain_error in jax.tree.map(relative, plain, want).items():
        assert error(8)[name] < 1.1 * plain_error + 1e-4


def test_memory_falls_with_the_chunk():
    D, F, T = 64, 1024, 4096
    params, x, _ = make(T, B=1, D=D, F=F)

    def temp(chunk_size):
        def loss(p, x):
            return (mini_sequence(mlp, p, x, chunk_size=chunk_size) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
        assert chunk_size == T or f"f32[1,{T},{F}]" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, half, eighth = temp(T), temp(T // 2), temp(T // 8)
    assert whole > half > eighth
    assert eighth < whole / 4


def test_sum_over_ragged_chunks():
    x = jax.random.normal(jax.random.key(0), (2, 300, 4))

    def fn(w, x, valid):
        y = jnp.where(valid[None, :], (x @ w) ** 2, 0)
        return y.sum(), valid.sum()

    w = jnp.ones(4)
    total, count = mini_sequence_sum(fn, w, x, chunk_size=64)
    assert count == 300
    np.testing.assert_allclose(total, ((x @ w) ** 2).sum(), rtol=1e-5)
    got = jax.grad(lambda w: mini_sequence_sum(fn, w, x, chunk_size=64)[0])(w)
    want = jax.grad(lambda w: ((x @ w) ** 2).sum())(w)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_split_is_balanced():
    assert split_length(300, 64) == (5, 64)
    assert split_length(257, 256) == (2, 136)
    assert split_length(4096, 1000) == (5, 824)
    assert split_length(4096, 1024) == (4, 1024)
    assert split_length(1, 64) == (1, 1)
    assert split_length(60, 64) == (1, 60)  # one chunk is not padded


def test_split_is_never_above_the_asked_size_and_of_8_rows_where_it_can_be():
    for length in range(1, 200):
        for chunk_size in range(1, 70):
            M, C = split_length(length, chunk_size)
            assert M == -(-length // chunk_size)
            assert C <= chunk_size and (M - 1) * C < length <= M * C
            even = -(-length // M)
            if M == 1 or -(-even // 8) * 8 > chunk_size:
                assert C == even
            else:
                assert C % 8 == 0 and C - even < 8


def test_bytes_per_token_counts_the_wide_part():
    params, x, _ = make(64)
    assert bytes_per_token(mlp, params, x) >= 2 * 4 * (2 * F + D)


@pytest.mark.parametrize("chunk_size", [0, -3, "8", 2.5])
def test_bad_chunk_size(untyped, chunk_size):
    params, x, _ = make(4)
    for run in (mini_sequence, mini_sequence_sum):
        with pytest.raises(ValueError, match=f"{chunk_size=}"):
            run(mlp, params, x, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="a whole number of tokens"):
        jax.jit(lambda c: mini_sequence(mlp, params, x, chunk_size=c))(2)


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        mini_sequence(lambda p, x: x, None, (jnp.ones((1, 3)), jnp.ones((1, 4))))


def test_an_axis_that_is_not_there():
    for x in (jnp.ones(3), {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}):
        with pytest.raises(ValueError, match=r"axis=1.*\(3,\)"):
            mini_sequence(lambda p, x: x, None, x)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jnp.concatenate([x, x], 1),
        lambda p, x: x[:, ::2],
        lambda p, x: x.sum(1),
        lambda p, x: x.sum(),
        lambda p, x: {"kept": x, "lost": x.sum((1, 2))},
    ],
)
def test_what_is_not_position_wise_is_refused(fn, chunk_size):
    x = jnp.ones((2, 13, 8))
    with pytest.raises(ValueError, match=r"not position-wise.*axis=1 of"):
        mini_sequence(fn, None, x, chunk_size=chunk_size)


def test_closed_over_values_are_differentiated():
    x = jax.random.normal(jax.random.key(0), (1, 10, 4))

    def loss(scale):
        return mini_sequence(lambda p, x: p * scale * x, 2.0, x, chunk_size=3).sum()

    np.testing.assert_allclose(jax.grad(loss)(3.0), 2 * x.sum(), rtol=1e-5)


def test_closed_over_integers_of_an_outer_transformation():
    x = jax.random.normal(jax.random.key(0), (2, 10, 3))

    def run(chunked, p):
        def layer(x, i):
            def fn(p, x):
                return jnp.tanh(x * p * (1 + i)) + jnp.arange(3)[i % 3]

            return (mini_sequence(fn, p, x, chunk_size=4) if chunked else fn(p, x)), i

        y, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(4))
        return (y**2).sum()

    for vmapped in (lambda f: f, lambda f: lambda p: jax.vmap(f)(p[None])[0]):
        grads = [
            jax.jit(jax.grad(vmapped(lambda p, c=c: run(c, p))))(jnp.full(3, 0.5))
            for c in (True, False)
        ]
        assert relative(*grads) < 1e-5


def test_integer_inputs_and_second_derivative():
    x = {"ids": jnp.arange(10)[None] % 3, "x": jnp.linspace(0, 1, 10)[None]}

    def loss(table):
        y = mini_sequence(
            lambda t, x: t[x["ids"]] ** 3 * x["x"], table, x, chunk_size=4
        )
        return y.sum()

    def plain(table):
        return (table[x["ids"]] ** 3 * x["x"]).sum()

    table = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(jax.grad(loss)(table), jax.grad(plain)(table), rtol=1e-6)
    got = jax.jacrev(jax.grad(loss))(table)
    np.testing.assert_allclose(got, jax.jacrev(jax.grad(plain))(table), rtol=1e-6)
