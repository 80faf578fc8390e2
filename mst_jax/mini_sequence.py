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
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr

CHUNK_BYTES = 2**31
"""Budget of one chunk's intermediates when no chunk size is given."""
ROW_MULTIPLE = 8
"""Rows that TMA, and so the Hopper kernels, take in multiples."""


def split_length(length: int, chunk_size: int) -> tuple[int, int]:
    """Split `length` tokens into (M, C): M = ceil(length / chunk_size) even chunks.

    Of several chunks C is rounded up to a multiple of 8, which the Hopper kernels need,
    unless that is more than `chunk_size`: 4096 in chunks of at most 1000 are 4 of 824
    and one of 800. M * C - length, below C, is what the last chunk lacks.
    """
    whole = isinstance(chunk_size, int | np.integer)
    if not whole or chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be a whole number of tokens, 1 or more")
    num_chunks = max(1, -(-length // chunk_size))
    size = -(-length // num_chunks)
    rounded = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    return num_chunks, rounded if num_chunks > 1 and rounded <= chunk_size else size


def auto_chunk_size(token_bytes: int) -> int:
    """Return the most tokens of that many bytes within the budget, a power of two.

    A power of two divides the usual lengths, and a chunk that needs no pad rows spares
    a copy of the sequence.
    """
    tokens = max(1, CHUNK_BYTES // max(1, token_bytes))
    return 1 << (tokens.bit_length() - 1)


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
            2 GiB. T need not be a multiple.
        axis: the sequence axis, of every leaf of x and of the result.

    Returns:
        The pytree that `fn(params, x)` returns.

    Raises:
        ValueError: x has no arrays, or arrays of different lengths along `axis`; fn
            returns another length than it gets; chunk_size is no positive integer.
    """
    params, x = jax.tree.map(jnp.asarray, (params, x))
    length, fn = _length(x, axis), _position_wise(fn, axis)
    if chunk_size is None:
        chunk_size = auto_chunk_size(bytes_per_token(fn, params, x, axis))
    num_chunks, size = split_length(length, chunk_size)
    if num_chunks == 1:
        return jax.checkpoint(fn)(params, x)
    chunks = to_chunks(x, num_chunks, size, axis)
    y = _map_chunks(*_closed(fn, params, chunks), chunks)
    return jax.tree.map(lambda leaf: from_chunks(leaf, length, axis), y)


def _position_wise(fn: Any, axis: int) -> Any:
    """Return fn, refusing results of another length than its input."""

    def checked(params, x):
        length, y = _length(x, axis), fn(params, x)
        for shape in map(jnp.shape, jax.tree.leaves(y)):
            if not -len(shape) <= axis < len(shape) or shape[axis] != length:
                raise ValueError(
                    f"fn is not position-wise: of {length} tokens along {axis=} of x "
                    f"it makes an array of shape {shape}"
                )
        return y

    return checked


def _closed(fn: Any, params: Any, chunks: Any) -> tuple[Any, Any]:
    """Make what fn closes over one more parameter, if it is traced: return both.

    It is differentiated too, and a custom_vjp's function may hold no traced value, also
    no integer, which `jax.closure_convert` leaves in place.
    """
    one_chunk = jax.tree.map(lambda a: a[0], chunks)
    closed, y = jax.make_jaxpr(fn, return_shape=True)(params, one_chunk)
    jaxpr, treedef = closed.jaxpr, jax.tree.structure(y)
    traced = [jnp.asarray(c) for c in closed.consts if isinstance(c, Tracer)]
    consts = [None if isinstance(c, Tracer) else c for c in closed.consts]

    def converted(params, chunk):
        params, traced = params
        given = iter(traced)
        whole = [next(given) if c is None else c for c in consts]
        y = eval_jaxpr(jaxpr, whole, *jax.tree.leaves((params, chunk)))
        return jax.tree.unflatten(treedef, y)

    return converted, (params, traced)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_chunks(fn: Any, params: Any, chunks: Any) -> Any:
    return jax.lax.map(partial(fn, params), chunks)


def _map_forward(fn: Any, params: Any, chunks: Any) -> Any:
    return _map_chunks(fn, params, chunks), (params, chunks)


def _map_backward(fn: Any, residuals: Any, dy: Any) -> Any:
    params, chunks = residuals
    params, rebuild_params = _differentiable(params)
    chunks, rebuild_chunk = _differentiable(chunks)

    def body(total, inputs):
        floats, others, dy = inputs

        def recompute(params, floats):
            return fn(rebuild_params(params), rebuild_chunk(floats, others))

        dparams, dfloats = jax.vjp(recompute, params, floats)[1](dy)
        return [t + d.astype(t.dtype) for t, d in zip(total, dparams, strict=True)], (
            dfloats
        )

    zeros = [jnp.zeros(p.shape, _wide_dtype(p.dtype)) for p in params]
    total, dchunks = jax.lax.scan(body, zeros, (chunks, rebuild_chunk.others, dy))
    dparams = [t.astype(p.dtype) for t, p in zip(total, params, strict=True)]
    return rebuild_params.cotangents(dparams), rebuild_chunk.cotangents(dchunks)


_map_chunks.defvjp(_map_forward, _map_backward)


def _differentiable(tree: Any) -> tuple[list[jax.Array], "_Rebuild"]:
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    floats = [x for x, f in zip(leaves, is_float, strict=True) if f]
    others = [x for x, f in zip(leaves, is_float, strict=True) if not f]
    return floats, _Rebuild(treedef, is_float, others)


@dataclass(frozen=True)
class _Rebuild:
    """Puts the floating-point leaves of a pytree back among the others."""

    treedef: Any
    is_float: list[bool]
    others: list[jax.Array]

    def __call__(self, floats: Any, others: Any = None) -> Any:
        floats, others = iter(floats), iter(self.others if others is None else others)
        leaves = [next(floats if f else others) for f in self.is_float]
        return jax.tree.unflatten(self.treedef, leaves)

    def cotangents(self, floats: Any) -> Any:
        return self(floats, [None] * len(self.others))


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
    params, x = jax.tree.map(jnp.asarray, (params, x))
    length = _length(x, axis)
    num_chunks, size = split_length(length, chunk_size)
    valid = jnp.arange(num_chunks * size).reshape(num_chunks, size) < length
    chunks = (to_chunks(x, num_chunks, size, axis), valid)

    def widened(params, chunk):
        sums = fn(params, *chunk)
        return jax.tree.map(lambda s: s.astype(_wide_dtype(s.dtype)), sums)

    sums = _map_chunks(*_closed(widened, params, chunks), chunks)
    return jax.tree.map(lambda s: s.sum(0), sums)


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
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    for shape in shapes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{axis=} is no axis of an array of shape {shape} in x")
    lengths = {shape[axis] for shape in shapes}
    if len(lengths) != 1:
        raise ValueError(
            f"x must hold arrays of one length along {axis=}, got {sorted(lengths)}"
        )
    return lengths.pop()


def _wide_dtype(dtype: Any) -> Any:
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, "float32") if floating else dtype


def to_chunks(x: Any, num_chunks: int, size: int, axis: int) -> Any:
    """Cut every leaf along `axis` into [M, ..., C, ...], repeating the last token."""

    def split(a):
        ax = axis % a.ndim
        pad = num_chunks * size - a.shape[ax]
        if pad:  # repeats the last token: always a valid input, unlike zeros
            widths = [(0, pad if i == ax else 0) for i in range(a.ndim)]
            a = jnp.pad(a, widths, mode="edge")
        shape = (*a.shape[:ax], num_chunks, size, *a.shape[ax + 1 :])
        return jnp.moveaxis(a.reshape(shape), ax, 0)

    return jax.tree.map(split, x)


def from_chunks(y: jax.Array, length: int, axis: int) -> jax.Array:
    """Undo `to_chunks` for one leaf, dropping the rows beyond `length`."""
    ax = axis % (y.ndim - 1)
    y = jnp.moveaxis(y, 0, ax)
    y = y.reshape(*y.shape[:ax], -1, *y.shape[ax + 2 :])
    return jax.lax.slice_in_dim(y, 0, length, axis=ax)
