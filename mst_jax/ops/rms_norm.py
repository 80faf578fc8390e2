"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], *, eps: float
) -> Float[Array, "*batch D"]:
    """Normalise the last axis, in f32, and return x's dtype.

    The backward pass keeps x and recomputes the rest: differentiating the formula would
    keep f32 copies of x.
    """
    return _rms_norm(x, scale, eps)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)
