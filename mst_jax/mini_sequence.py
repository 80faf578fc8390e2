"""The mini-sequence idea: run a position-wise function on one chunk at a time.

A function is position-wise when token t of its output depends on token t of its input
alone: an MLP, an LM head, a norm. Then

    f(x) = concat(f(x[0:C]), f(x[C:2C]), ...)

holds exactly. Only one chunk's intermediates are alive at a time, and the backward
pass recomputes them chunk by chunk, so the memory of an MLP of width F falls from
O(T F) to O(C F), and that of a loss over V words from O(T V) to O(C V).

Luo et al., "Mini-Sequence Transformer", 2024, https://arxiv.org/abs/2407.15892.

Shape legend of the package: B batch, T tokens, M chunks, C = T/M, D model, F ffn,
V vocabulary, N query heads, K key/value heads, H head size, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_BYTES = 2**30
"""Budget of one chunk's intermediates when no chunk size is given."""


def split_length(length: int, chunk_size: int) -> tuple[int, int]:
    """Split `length` tokens into (M, C): M = ceil(length / chunk_size) equal chunks.

    M * C - length is the number of pad rows, below M: the fewest that make the chunks
    equal.
    """
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1 token")
    num_chunks = max(1, -(-length // chunk_size))
    return num_chunks, -(-length // num_chunks)


def mini_sequence(
    fn: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    *,
    chunk_size: int | None = None,
    axis: int = 1,
) -> Any:
    """Apply a position-wise function chunk by chunk; recompute it in the backward pass.

    Values and gradients are those of `fn(params, x)`. Gradients of floating-point
    params narrower than f32 are accumulated over the chunks in f32.

    Args:
        fn: `fn(params, x_chunk) -> y_chunk`, position-wise along `axis`.
        params: pytree of arrays, whole in every call.
        x: pytree of arrays, all of the same length T along `axis`.
        chunk_size: most tokens of a chunk; None keeps what one chunk computes below
            1 GiB. T need not be a multiple.
        axis: the sequence axis, of every leaf of x and of the result.

    Returns:
        The pytree that `fn(params, x)` returns.

    Raises:
        ValueError: x has no arrays, or arrays of different lengths along `axis`, or
            chunk_size is not positive.
    """
    length = _length(x, axis)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // max(1, bytes_per_token(fn, params, x, axis)))
    num_chunks, size = split_length(length, chunk_size)
    if num_chunks == 1:
        return jax.checkpoint(fn)(params, x)
    wide, narrow = _widen(params)

    def body(carry, chunk):
        return carry, fn(narrow(wide), chunk)

    chunks = to_chunks(x, num_chunks, size, axis)
    _, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, chunks)
    return jax.tree.map(lambda leaf: _join(leaf, length, axis), y)


def mini_sequence_sum(
    fn: Callable[[Any, Any, jax.Array], Any],
    params: Any,
    x: Any,
    *,
    chunk_size: int,
    axis: int = 1,
) -> Any:
    """Sum a function over chunks of the sequence: the twin for losses.

    Args:
        fn: `fn(params, x_chunk, valid) -> sums`. `valid` is bool [C], False on the
            rows that only fill up a chunk: leave them out of the sums.
        params: pytree of arrays, whole in every call.
        x: pytree of arrays, all of the same length T along `axis`.
        chunk_size: most tokens of a chunk.
        axis: the sequence axis of x.

    Returns:
        The sums over all chunks, floating-point ones in f32 at least.

    Raises:
        ValueError: as `mini_sequence`.
    """
    length = _length(x, axis)
    num_chunks, size = split_length(length, chunk_size)
    valid = jnp.arange(num_chunks * size).reshape(num_chunks, size) < length
    wide, narrow = _widen(params)

    def step(inputs):
        sums = fn(narrow(wide), *inputs)
        return jax.tree.map(lambda s: s.astype(_wide_dtype(s.dtype)), sums)

    def body(total, inputs):
        return jax.tree.map(jnp.add, total, step(inputs)), None

    inputs = (to_chunks(x, num_chunks, size, axis), valid)
    shapes = jax.eval_shape(step, jax.tree.map(lambda a: a[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), zeros, inputs)
    return total


def bytes_per_token(fn: Callable[..., Any], params: Any, x: Any, axis: int = 1) -> int:
    """Return the bytes that `fn` writes for one more token, traced, not run."""

    def total(tokens: int) -> int:
        def shorten(a):
            shape = list(a.shape)
            shape[axis] = tokens
            return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

        return _written(jax.make_jaxpr(fn)(params, jax.tree.map(shorten, x)).jaxpr)

    return total(2) - total(1)


def _written(jaxpr: Any) -> int:
    count = 0
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
        inner = [j for j in inner if hasattr(j, "eqns")]
        avals = [v.aval for v in eqn.outvars if hasattr(v.aval, "dtype")]
        count += sum(map(_written, inner)) or sum(
            a.size * a.dtype.itemsize for a in avals
        )
    return count


def _length(x: Any, axis: int) -> int:
    lengths = {leaf.shape[axis] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1:
        raise ValueError(
            f"x must hold arrays of one length along {axis=}, got {sorted(lengths)}"
        )
    return lengths.pop()


def _wide_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, "float32") if jnp.issubdtype(
        dtype, jnp.floating
    ) else dtype  # fmt: skip


def _widen(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    # The scan's transpose adds up the gradient of `wide`, in f32. In the forward
    # direction the two casts cancel and XLA removes both.
    wide = jax.tree.map(lambda p: p.astype(_wide_dtype(p.dtype)), params)
    return wide, lambda w: jax.tree.map(lambda v, p: v.astype(p.dtype), w, params)


def to_chunks(x: Any, num_chunks: int, size: int, axis: int) -> Any:
    def split(a):
        ax = axis % a.ndim
        pad = num_chunks * size - a.shape[ax]
        if pad:  # repeats the last token: always a valid input, unlike zeros
            widths = [(0, pad if i == ax else 0) for i in range(a.ndim)]
            a = jnp.pad(a, widths, mode="edge")
        shape = (*a.shape[:ax], num_chunks, size, *a.shape[ax + 1 :])
        return jnp.moveaxis(a.reshape(shape), ax, 0)

    return jax.tree.map(split, x)


def _join(y: jax.Array, length: int, axis: int) -> jax.Array:
    ax = axis % (y.ndim - 1)
    y = jnp.moveaxis(y, 0, ax)
    y = y.reshape(*y.shape[:ax], -1, *y.shape[ax + 2 :])
    return jax.lax.slice_in_dim(y, 0, length, axis=ax)
