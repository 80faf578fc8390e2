"""Rotary position embedding (arXiv 2104.09864), scaled as Hugging Face defines it.

Heads are rotated in halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), with the
angle of token t and frequency i being t * inv_freq[i]. This is the layout of HF
checkpoints, so converted weights need no permutation.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mst_jax.model_config import RopeConfig


def rope_tables(
    cfg: RopeConfig, head_size: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return f32 cos and sin of every token's angles, [B, T, H/2] each.

    'dynamic' stretches the base by the length of a token's document, where positions
    rise by 1, as HF does for that document alone; the others do not depend on it.
    """
    inv_freq, scale = _frequencies(cfg, head_size, positions)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(
    x: Float[Array, "B T heads H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T heads H"]:
    """Rotate the heads, in f32, and return x's dtype."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(
        x.dtype
    )


def _frequencies(
    cfg: RopeConfig, head_size: int, positions: jax.Array
) -> tuple[jax.Array, float]:
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / head_size
    inv_freq = (1.0 / np.float32(cfg.theta) ** exponent).astype(np.float32)
    if cfg.type == "linear":
        return jnp.asarray(inv_freq / np.float32(cfg.factor)), 1.0
    if cfg.type == "llama3":
        return jnp.asarray(_llama3(cfg, inv_freq)), 1.0
    if cfg.type == "yarn":
        scale = cfg.attention_factor
        if scale is None:
            scale = 0.1 * math.log(cfg.factor) + 1 if cfg.factor > 1 else 1.0
        return jnp.asarray(_yarn(cfg, inv_freq, head_size)), scale
    if cfg.type == "dynamic":
        limit = cfg.original_max_position
        length = jnp.maximum(_lengths(positions), limit).astype(jnp.float32)
        stretch = cfg.factor * length / limit - (cfg.factor - 1)
        base = cfg.theta * stretch ** (head_size / (head_size - 2))
        return 1.0 / base[..., None] ** exponent, 1.0
    return jnp.asarray(inv_freq), 1.0


def _lengths(positions: jax.Array) -> jax.Array:
    """Return the length of each token's document, [B, T]."""
    t = jnp.arange(positions.shape[1])
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    ends = jnp.where(jnp.pad(goes_on, ((0, 0), (0, 1))), len(t), t)
    return positions + jax.lax.cummin(ends, axis=1, reverse=True) - t + 1


def _llama3(cfg: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    # Long wavelengths are stretched, short ones kept, those between are blended.
    wavelength = 2 * math.pi / inv_freq
    low, high = cfg.low_freq_factor, cfg.high_freq_factor
    smooth = (cfg.original_max_position / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    blended = (1 - smooth) * inv_freq / cfg.factor + smooth * inv_freq
    return blended.astype(np.float32)


def _yarn(cfg: RopeConfig, inv_freq: np.ndarray, head_size: int) -> np.ndarray:
    # arXiv 2309.00071: the dimension that turns `rotations` times in the pre-training
    # length marks where interpolation begins and ends.
    def dimension(rotations: float) -> float:
        turns = cfg.original_max_position / (rotations * 2 * math.pi)
        return head_size * math.log(turns) / (2 * math.log(cfg.theta))

    low, high = dimension(cfg.beta_fast), dimension(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(head_size // 2) - low) / width, 0, 1)
    blended = inv_freq / cfg.factor * ramp + inv_freq * (1 - ramp)
    return blended.astype(np.float32)
