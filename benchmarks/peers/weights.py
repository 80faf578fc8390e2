"""Initial weights and tokens that PyTorch and JAX make bit for bit alike.

Weight i of a tensor is a hash of i and the tensor's Hugging Face name: murmur3's last
mix of a multiple of i, of which the four bytes are added. That is nearly normal (of
four uniform numbers, cut off at 3.5 standard deviations), exact in integers, and takes
one multiplication in f32 and one rounding to bf16. Norms are ones. Each framework makes
its tensors on the device, without a file between them.
"""

import zlib
from typing import Any

import numpy as np

SPREAD, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
MEAN = 510.0
STD = float(np.sqrt(4 * (256**2 - 1) / 12))
PIECE = 2**27  # elements that torch fills at a time


def scale(initializer_range: float) -> float:
    """Return the factor, a number of f32, from a sum of bytes to a weight."""
    return float(np.float32(initializer_range / STD))


def seed(name: str) -> int:
    """Return the 32-bit seed of a tensor's Hugging Face name."""
    return zlib.crc32(name.encode())


def token_ids(tokens: int, vocab_size: int) -> np.ndarray:
    """Return int32 [T], uniform over the vocabulary."""
    return np.random.default_rng(0).integers(0, vocab_size, tokens, dtype=np.int32)


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def fill_torch(parameter: Any, name: str, initializer_range: float) -> None:
    """Write a torch parameter in place; name and layout are Hugging Face's."""
    import torch

    if parameter.ndim == 1:
        parameter.fill_(1.0)
        return
    # int32: torch has no uint32 product; it wraps, and shifts are masked to be logical.
    rows = max(1, PIECE // parameter.shape[1])
    for start in range(0, parameter.shape[0], rows):
        part = parameter[start : start + rows]
        first = start * parameter.shape[1]
        x = torch.arange(
            first, first + part.numel(), dtype=torch.int32, device=parameter.device
        )
        x.mul_(_signed(SPREAD)).add_(_signed(seed(name)))
        for shift, factor in ((16, FIRST), (13, SECOND), (16, None)):
            x ^= (x >> shift) & (2 ** (32 - shift) - 1)
            if factor is not None:
                x.mul_(_signed(factor))
        total = x & 255
        for shift in (8, 16, 24):
            total += (x >> shift) & 255
        values = (total.float() - MEAN) * scale(initializer_range)
        part.copy_(values.view_as(part))


def jax_params(cfg: Any) -> Any:
    """Return mst_jax's parameters of a `ModelConfig`, bf16. Jit it."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from mst_jax.hf import _names  # the one table of names

    def draw(name: Any, shape: tuple[int, ...]) -> jax.Array:
        stacked = "{layer}" in name.hf
        if len(shape) - stacked == 1:
            return jnp.ones(shape, jnp.bfloat16)
        layers = range(shape[0]) if stacked else [0]
        seeds = np.array([seed(name.hf.format(layer=i)) for i in layers], np.uint32)
        seeds = seeds.reshape((-1, 1, 1) if stacked else (1, 1))
        row, column = (
            jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - k) for k in (2, 1)
        )
        if name.transposed:  # the index is that of HF's layout
            i = column * np.uint32(shape[-2]) + row
        else:
            i = row * np.uint32(shape[-1]) + column
        x = i * np.uint32(SPREAD) + seeds
        x = (x ^ (x >> np.uint32(16))) * np.uint32(FIRST)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(SECOND)
        x = x ^ (x >> np.uint32(16))
        total = x & np.uint32(255)
        for shift in (8, 16, 24):
            total += (x >> np.uint32(shift)) & np.uint32(255)
        values = total.astype(jnp.float32) - np.float32(MEAN)
        values *= np.float32(scale(cfg.initializer_range))
        return values.astype(jnp.bfloat16)

    return unflatten_dict({n.path: draw(n, s) for n, s in _names(cfg)}, sep="/")
