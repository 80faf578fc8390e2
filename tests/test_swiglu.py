"""swiglu's written-out backward pass against the formula's own, and its precision."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.ops.swiglu import choose_implementation, mlp_forward, swiglu
from mst_jax.ops.swiglu.xla import gated

D, F = 16, 40


def make(T, B=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T), 5)
    shapes = [(B, T, D), (D, F), (D, F), (F, D), (B, T, D)]
    scales = [1, D**-0.5, D**-0.5, F**-0.5, 1]
    arrays = [
        (jax.random.normal(k, s) * c).astype(dtype)
        for k, s, c in zip(keys, shapes, scales, strict=True)
    ]
    return arrays[:4], arrays[4]


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@partial(jax.jit, static_argnames=("chunk_size", "activation"))
def value_and_gradients(args, dy, **options):
    y, vjp = jax.vjp(partial(swiglu, **options), *args)
    return y, *vjp(dy)


@pytest.mark.parametrize("chunk_size", [64, 100, None])
@pytest.mark.parametrize("T", [1, 63, 64, 127, 300])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_equals_plain(T, chunk_size, activation):
    args, dy = make(T)
    found = value_and_gradients(args, dy, activation=activation, chunk_size=chunk_size)
    plain = value_and_gradients(args, dy, activation=activation, chunk_size=0)
    for got, want in zip(found, plain, strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-5


def test_bf16_error_does_not_grow_with_the_chunks():
    args, dy = make(4096, B=1, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in args]
    want = jax.vjp(lambda *a: swiglu(*a, chunk_size=0), *wide)[1](
        dy.astype(jnp.float32)
    )

    def errors(chunk_size):
        grads = jax.vjp(lambda *a: swiglu(*a, chunk_size=chunk_size), *args)[1](dy)
        return [relative(g, w) for g, w in zip(grads, want, strict=True)]

    for many, whole in zip(errors(16), errors(0), strict=True):
        assert many < 1.1 * whole + 1e-4


def test_unknown_activation():
    args, _ = make(4)
    with pytest.raises(ValueError, match="activation='relu'"):
        swiglu(*args, activation="relu")


def test_unknown_implementation():
    args, _ = make(4)
    for chunk_size in (0, 2):
        with pytest.raises(NotImplementedError, match="implementation='triton'"):
            swiglu(*args, implementation="triton", chunk_size=chunk_size)


def test_this_machine_is_the_obstacle():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    args = [jnp.zeros(s, jnp.bfloat16) for s in [(1, 8, 64), *[(64, 64)] * 3]]
    because = "no GPU|older than 0.11.2"
    with pytest.raises(NotImplementedError, match=because):
        swiglu(*args, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=because):
        mlp_forward(args[0], tuple(args[1:]), implementation="mosaic_gpu")
    assert swiglu(*args).shape == (1, 8, 64)
    name, reason = choose_implementation(jnp.bfloat16, 64, 64, rows=8)
    assert name == "xla" and re.search(because, reason)


def test_gelus():
    x = jnp.linspace(-4, 4, 101)
    one = jnp.ones_like(x)
    erf = x * (1 + jax.lax.erf(x / 2**0.5)) / 2
    tanh = x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    np.testing.assert_allclose(gated("gelu", x, one), erf, atol=1e-5)
    np.testing.assert_allclose(gated("gelu_tanh", x, one), tanh, atol=1e-5)


def test_dx_has_the_dtype_of_x_whatever_the_weights():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 13, 6), jnp.bfloat16)
    w = [
        jax.random.normal(k, s)
        for k, s in zip(keys[1:], ((6, 10), (6, 10), (10, 6)), strict=True)
    ]

    def twice(x):  # a scan refuses a carry whose gradient has another dtype
        def body(x, _):
            return x + swiglu(x, *w, chunk_size=4).astype(x.dtype), None

        return jax.lax.scan(body, x, None, length=2)[0].astype(jnp.float32).sum()

    assert jax.grad(twice)(x).dtype == jnp.bfloat16
