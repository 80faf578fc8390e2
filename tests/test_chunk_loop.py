"""The loop in place visits every token once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.chunk_loop import for_chunks, put_tokens, take_tokens


@pytest.mark.parametrize(
    "length, chunk_size, sizes",
    [
        (12, 4, {4}),
        (10, 4, {4, 2}),  # equal chunks and a rest
        (300, 75, {75}),  # 80 would be more than was asked for
        (300, 80, {80, 60}),  # even chunks of 75, rounded up to a multiple of 8
        (300, 140, {104, 92}),  # balanced: not two of 140 and one of 20
        (7, 2, {2, 1}),
        (9, 5, {5, 4}),  # one whole chunk: no loop
        (8, 8, {8}),
        (8, 1000, {8}),
        (3, 1, {1}),
    ],
)
def test_for_chunks_visits_every_token_once(length, chunk_size, sizes):
    x = jax.random.normal(jax.random.key(0), (2, length, 3))
    seen = set()

    def body(carry, start, size):
        y, visits = carry
        seen.add(size)
        chunk = take_tokens(y, start, size)
        assert chunk.shape == (2, size, 3)
        visits = put_tokens(visits, take_tokens(visits, start, size) + 1, start)
        return put_tokens(y, 2 * chunk, start), visits

    visits = jnp.zeros((2, length), jnp.int32)
    y, visits = for_chunks(length, chunk_size, body, (x, visits))
    assert seen == sizes
    np.testing.assert_array_equal(visits, 1)
    np.testing.assert_array_equal(y, 2 * x)


def test_chunks_are_written_in_the_sequences_dtype():
    x = jnp.zeros((1, 4, 2), jnp.bfloat16)
    y = put_tokens(x, jnp.ones((1, 2, 2), jnp.float32), 1)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0, :, 0], jnp.bfloat16([0, 1, 1, 0]))
