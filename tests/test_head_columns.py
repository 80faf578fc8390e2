"""The head's gradient by columns: the same numbers, and nothing in f32 [D, V]."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_linear_cross_entropy import D, V, close, make, plain, plain_thrice, thrice

from mst_jax import linear_cross_entropy


@pytest.mark.parametrize("vocab_chunk_size", [7, 25, V, 2 * V])
@pytest.mark.parametrize("T", [1, 64, 127])
def test_value_and_gradients(T, vocab_chunk_size):
    options = {"chunk_size": 50, "vocab_chunk_size": vocab_chunk_size}
    ours = thrice(partial(linear_cross_entropy, **options))
    for masked in ("none", "some", "all"):
        x, w, y = make(T, masked=masked)
        (total, count), grads = ours(x, w, y)
        (want, want_count), want_grads = plain_thrice(x, w, y)
        close(total, want)
        assert count == want_count
        jax.tree.map(close, grads, want_grads)


def test_half_precision_is_rounded_once():
    # As from the sum in f32: a chunk's gradient is whole before it is rounded, and the
    # factor of the loss, here 1/3, is in it by then.
    x, w, y = make(512, B=1, dtype=jnp.bfloat16)

    def loss(x, w, **how):
        return linear_cross_entropy(x, w, y, **how)[0] / 3

    def wide(x, w):
        return plain(x, w, y)[0] / 3

    f32 = (a.astype(jnp.float32) for a in (x, w))
    want = jax.grad(wide, (0, 1))(*f32)
    found = jax.grad(partial(loss, vocab_chunk_size=16), (0, 1))(x, w)
    tokens = jax.grad(partial(loss, chunk_size=512), (0, 1))(x, w)

    def error(a, b):
        return jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)

    for ours, theirs, exact in zip(found, tokens, want, strict=True):
        assert ours.dtype == jnp.bfloat16
        # 1/3 of a number just below 1 has fewer of its bits: not sqrt(2), as twice.
        assert error(ours, exact) < 1.25 * error(theirs, exact)


def test_masters_in_f32_are_used_in_the_dtype_of_the_hidden_states():
    x, w, y = make(24, B=1, dtype=jnp.bfloat16)

    def loss(x, w):
        return linear_cross_entropy(x, w, y, vocab_chunk_size=16)[0]

    dx, dw = jax.grad(loss, (0, 1))(x, w.astype(jnp.float32))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    same_dx, same_dw = jax.grad(loss, (0, 1))(x, w)
    close(dx, same_dx)
    close(dw, same_dw, 1e-2)


def test_what_is_frozen_costs_nothing():
    x, w, y = make(64, B=1)

    def dots(argnums):
        def loss(x, w):
            return linear_cross_entropy(x, w, y, vocab_chunk_size=25)[0]

        return str(jax.make_jaxpr(jax.grad(loss, argnums))(x, w)).count("dot_general")

    assert [dots((0, 1)), dots(0), dots(1)] == [4, 2, 3]
    value = jax.make_jaxpr(lambda x: linear_cross_entropy(x, w, y, vocab_chunk_size=5))
    assert str(value(x)).count("dot_general") == 1


def test_no_sum_of_the_heads_gradient_in_f32():
    x, w, y = make(24, B=1, dtype=jnp.bfloat16)

    def program(**how):
        def loss(x, w):
            return linear_cross_entropy(x, w, y, **how)[0]

        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))

    assert f"f32[{D},{V}]" not in program(vocab_chunk_size=25)
    assert f"f32[{D},{V}]" in program(chunk_size=8)


def test_memory_is_that_of_a_chunk():
    T, V = 256, 65536
    x, y, w = jnp.ones((1, T, D)), jnp.ones((1, T), int), jnp.ones((D, V))

    def loss(x, w):
        how = {"chunk_size": 4, "vocab_chunk_size": 1024}
        return linear_cross_entropy(x, w, y, **how)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    assert f"{T},{V}]" not in compiled.as_text()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (4 * T * 1024) + 8 * T * D


def test_bad_size():
    with pytest.raises(ValueError, match="vocab_chunk_size=0 must be positive"):
        linear_cross_entropy(*make(10), vocab_chunk_size=0)
