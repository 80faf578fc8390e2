"""Optimizer state in 8 or 16 bits, as optax building blocks.

AdamW's two moments take 8 bytes a parameter in f32, 4 in bf16 and 2 (1 + 4/256) in
8 bits. `low_precision_state` wraps an elementwise optax transformation: it widens the
state to f32, lets the transformation update it, and narrows it again.

8 bits are the block-wise dynamic quantisation of Dettmers et al., "8-bit Optimizers
via Block-wise Quantization" (arXiv 2110.02861), with the maps of bitsandbytes:
x = map[code] * scale, where scale is the largest magnitude of the block and map has
seven decades, the largest with the most codes. The state differs from bitsandbytes':

- Rounding is stochastic: E[round(x)] = x, but for -scale, since the map ends at -0.993.
  A second moment changes by 1 - b2 of itself a step, less than half the distance of
  two codes, or of two bf16 numbers: rounded to nearest it hardly moves. Measured with
  b2 = 0.999 after 3000 steps of an MLP, the median of sqrt(nu) was 0.69 of f32's.
- Second moments are stored as sqrt(nu), which spans half the decades, and what is not
  zero is never stored as zero: mu / (sqrt(0) + eps) would be an exploding update.

A step of AdamW, bf16 parameters and gradients, on an H100, for 8e9 parameters: 62 ms
with f32 state, 41 with bf16, 108 with 8 bits and 4 bytes of temporaries an element.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """8-bit codes, and a scale for each block along the last axis."""

    codes: Any
    """uint8, of the array's shape: a sharding of the array fits the codes."""
    scales: Any
    """f32 [..., ceil(last / block_size)]: the largest magnitude of each block."""
    block_size: int = field(metadata={"static": True})
    signed: bool = field(metadata={"static": True})


class LowPrecisionState(NamedTuple):
    """The wrapped state, narrowed; the uint32 count of updates seeds the rounding."""

    count: Any
    inner: Any


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Return `optax.adamw` in 2 (1 + 4 / block_size) bytes of state a parameter.

    Args:
        learning_rate, b1, b2, eps, weight_decay, mask: of `optax.adamw`.
        options: block_size, min_size and seed of `low_precision_state`.
    """
    adamw = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask
    )
    return low_precision_state(adamw, "int8", **options)


def low_precision_state(
    inner: optax.GradientTransformation,
    dtype: Literal["bfloat16", "int8"],
    *,
    block_size: int = 256,
    min_size: int = 4096,
    seed: int = 0,
    first_moments: Collection[str] = ("mu", "trace"),
    second_moments: Collection[str] = ("nu", "nu_max", "sum_of_squares"),
) -> optax.GradientTransformation:
    """Store the state of an elementwise transformation in bf16 or 8 bits.

    Narrowed are floating leaves with the path and the shape of a parameter: of at least
    two axes and min_size elements. Counters, norm scales and factored moments stay as
    they are. Gradients and parameters are widened to f32 too, and the updates are f32.
    The f32 state is a temporary of the update: update large models layer by layer.

    Args:
        inner: adamw, lion, sgd with momentum, ...
        dtype: of the stored state.
        block_size: elements along the last axis that share a scale, in 8 bits.
        min_size: elements from which a parameter's state is narrowed.
        seed: of the noise. Layers of a stack, having the same count, share it.
        first_moments: fields of the optax state, by name, that have a sign.
        second_moments: those that are never negative, and whose root divides.

    Raises:
        ValueError: for an unknown dtype; from init, in 8 bits, for a state that is
            neither a first nor a second moment.
    """
    if dtype not in ("bfloat16", "int8"):
        raise ValueError(f"{dtype=}: use 'bfloat16' or 'int8'")

    def init(params):
        params = jax.tree.map(_widen, params)
        shapes = {path: x.shape for path, x in jax.tree.leaves_with_path(params)}

        def narrow(path, x):
            name = _field_of_parameter(path, x, shapes)
            if name is None or x.ndim < 2 or x.size < min_size:
                return x
            if dtype == "bfloat16":
                return x.astype(jnp.bfloat16)
            if name not in {*first_moments, *second_moments}:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: is {name!r} signed? Name it in "
                    f"{first_moments=} or, if never negative, in {second_moments=}"
                )
            # Zeros of 8e9 elements: XLA would quantise them while compiling.
            x = jax.lax.optimization_barrier(x)
            return _store(x, Quantized(None, None, block_size, name in first_moments))

        state = jax.tree.map_with_path(narrow, inner.init(params))
        return LowPrecisionState(jnp.zeros((), jnp.uint32), state)

    def update(updates, state, params=None):
        stored, tree = jax.tree.flatten(
            state.inner, is_leaf=lambda x: isinstance(x, Quantized)
        )
        updates, params = jax.tree.map(_widen, (updates, params))
        wide = tree.unflatten(map(_widen, stored))
        updates, new = inner.update(updates, wide, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        keys = jax.random.split(key, len(stored))
        new = tree.unflatten(map(_store, tree.flatten_up_to(new), stored, keys))
        return updates, LowPrecisionState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def _field_of_parameter(path: Any, x: Array, shapes: dict) -> str | None:
    """Return the state's field that x is in if x is like a parameter, else None."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        for i in range(len(path)):  # the path ends with the parameter's own
            if shapes.get(path[i + 1 :]) == x.shape:
                return getattr(path[i], "name", str(path[i]))
    return None


def _widen(x: Any) -> Array:
    if isinstance(x, Quantized):
        wide = dequantize_blockwise(x)
        return wide if x.signed else wide**2
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x


def _store(x: Array, like: Any, key: Any = None) -> Any:
    """Narrow x to what `like` is: of second moments the root, kept from zero."""
    if not isinstance(like, Quantized):
        narrow = like.dtype == jnp.bfloat16 and x.dtype == jnp.float32
        return stochastic_round(x, key) if narrow else x
    x = x.astype(jnp.float32) if like.signed else jnp.sqrt(x.astype(jnp.float32))
    q = quantize_blockwise(x, block_size=like.block_size, signed=like.signed, key=key)
    if like.signed:
        return q
    return replace(q, codes=jnp.maximum(q.codes, (x > 0).astype(jnp.uint8)))


def quantize_blockwise(
    x: Float[Array, "*shape"],
    *,
    block_size: int = 256,
    signed: bool = True,
    key: jax.Array | None = None,
) -> Quantized:
    """Quantise to 256 codes, relative to the largest magnitude of each block.

    Args:
        x: of at least one axis. Blocks run along the last, and the last block may be
            short. Nothing of a block with NaN or infinity comes back finite.
        block_size: elements that share a scale.
        signed: whether to use the map with negative values; else they become 0.
        key: of stochastic rounding. None rounds to nearest.

    Raises:
        ValueError: if x has no axis, or block_size is not positive.
    """
    if x.ndim == 0 or block_size < 1:
        raise ValueError(f"{x.shape=} {block_size=}: blocks need an axis and a size")
    x = x.astype(jnp.float32)
    last = x.shape[-1]
    block = max(1, min(block_size, last))
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -last % block)]
    blocks = jnp.pad(jnp.abs(x), pad).reshape(*x.shape[:-1], -(-last // block), block)
    # As integers, where NaN is the largest: XLA's float maximum loses NaN on a CPU.
    scales = jax.lax.bitcast_convert_type(blocks, jnp.int32).max(-1)
    scales = jax.lax.bitcast_convert_type(scales, jnp.float32)
    spread = _spread(scales, block_size, last)
    x = x / jnp.where(spread == 0, 1, spread)
    index = _magnitude_index(jnp.abs(x) if signed else x, signed, key)
    if signed:  # the map has 1 but not -1
        index = jnp.where(x < 0, 127 - jnp.minimum(index, 127), 127 + index)
    return Quantized(index, scales, block_size, signed)


def _magnitude_index(x: Array, signed: bool, key: jax.Array | None) -> Array:
    """Return the index of the magnitude that x, at most 1, rounds to.

    The codes of a decade lie on a line, and each decade's line is less steep than the
    one before, so the least of the lines is a code's index, to a quarter. That gives
    the threshold next to x, and comparing with it the exact code, for one look-up.
    """
    magnitudes, thresholds, slopes, offsets = _tables(signed)
    index = x * slopes[0] + offsets[0]
    for slope, offset in zip(slopes[1:], offsets[1:], strict=True):
        index = jnp.minimum(index, x * slope + offset)
    # uint8, because XLA writes the index to memory before it looks up.
    index = jnp.clip(jnp.round(index), 1, len(thresholds) - 1).astype(jnp.uint8)
    if key is None:
        threshold = _look_up(thresholds, index)
    else:
        below, above = _look_up(magnitudes, index - 1), _look_up(magnitudes, index)
        noise = (_random_bits(key, x.shape).astype(jnp.float32) + 0.5) / 2**16
        threshold = below + noise * (above - below)
    return index - (x <= threshold).astype(jnp.uint8)


def dequantize_blockwise(q: Quantized, dtype: Any = jnp.float32) -> Array:
    """Return map[code] * scale in the dtype."""
    scales = _spread(q.scales, q.block_size, q.codes.shape[-1])
    return (_look_up(dynamic_map(q.signed), q.codes) * scales).astype(dtype)


def stochastic_round(
    x: Float[Array, "*shape"], key: jax.Array
) -> Float[Array, "*shape"]:
    """Round f32 to bf16, up with the probability of the part that is cut off.

    To the nearest beyond 2**100, where infinities and NaN stay; maybe below 2**-102.
    """
    # Without a look at the bits, which to XLA is no elementwise operation. What is
    # added to `grid`, 3/2 of 2**23 bf16 steps, is rounded to whole steps; nothing else
    # is rounded.
    size = jnp.abs(x)
    power = jax.lax.reduce_precision(size, exponent_bits=8, mantissa_bits=0)
    power = jnp.where(power > size, power / 2, power)  # of two, at most |x|
    grid = power * (1.5 * 2**16)
    near = (x + grid) - grid
    noise = _random_bits(key, x.shape).astype(jnp.float32) - (2**15 - 0.5)
    up = (x - near + noise * (power * 2**-23) + grid) - grid
    return jnp.where(size < 2.0**100, near + up, x).astype(jnp.bfloat16)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt16[Array, "..."]:
    """Return 16 bits of a hash of the element's number and the key.

    A bijection of 32 bits for each key: every element's bits are uniform over the keys.
    Fused into the rounding, which integer operations limit (docs/LOG.md): it has few.
    XLA's Philox writes 4 bytes an element to memory first: a step of AdamW in bf16 took
    2.5 times as long.
    """
    words = jax.random.key_data(key)
    number = jax.lax.iota(jnp.uint32, prod(shape)).reshape(shape)
    h = (number ^ words[0]) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * (words[-1] | 1)
    return (h >> 16).astype(jnp.uint16)


def dynamic_map(signed: bool) -> np.ndarray:
    """Return the 256 f32 values of bitsandbytes' `create_dynamic_map`, ascending."""
    values = _tables(signed)[0]
    return np.concatenate([-values[-2:0:-1], values]) if signed else values


@cache
def _tables(signed: bool) -> tuple[np.ndarray, ...]:
    """Return magnitudes, thresholds below them, and slopes, offsets of the decades."""
    decade = np.arange(7)
    tops, n = 10.0 ** (decade - 6), 2**decade * (1 if signed else 2)  # n even steps
    steps = [(np.arange(m) + 0.5) / m for m in n]
    decades = [x * (0.1 + 0.9 * s) for x, s in zip(tops, steps, strict=True)]
    values = np.concatenate([[0.0], *decades, [1.0]]).astype(np.float32)
    middles = (values[:-1].astype(np.float64) + values[1:]) / 2
    below = middles.astype(np.float32)  # the largest f32 up to the middle
    below = np.where(below > middles, np.nextafter(below, np.float32(0)), below)
    thresholds = np.concatenate([[-np.inf], below])
    lines = n / 0.9 / tops, 1 + np.cumsum(n) - n - n / 9
    return tuple(x.astype(np.float32) for x in (values, thresholds, *lines))


def _look_up(table: np.ndarray, index: Array) -> Array:
    # NaN has no index: it must not read out of bounds.
    return jnp.asarray(table).at[index].get(mode="clip")


def _spread(scales: Array, block_size: int, last: int) -> Array:
    return jnp.repeat(scales, block_size, axis=-1)[..., :last]
