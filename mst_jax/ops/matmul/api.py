"""Sums of matrix products: what a projection's input gets from several outputs."""

import jax
import jax.numpy as jnp

from mst_jax.ops.matmul.mosaic_gpu import device_obstacle, matmul, obstacle


def sum_of_products(
    *pairs: tuple[jax.Array, jax.Array], implementation: str | None = None
) -> jax.Array:
    """Return sum_i A_i B_i^T, added up in f32 and rounded once.

    Args:
        pairs: A [..., O_i] and B [I, O_i] of each product, all A of one dtype.
        implementation: 'xla', which writes every product in f32; 'mosaic_gpu'
            (Hopper), one kernel; or None for the kernel where it can run.

    Returns:
        [..., I] in A's dtype.

    Raises:
        NotImplementedError: an implementation that cannot, or does not exist.
    """
    first = pairs[0][0]
    flat = [(a.reshape(-1, a.shape[-1]), b.astype(first.dtype)) for a, b in pairs]
    rows, columns = flat[0][0].shape[0], flat[0][1].shape[0]
    result = jax.ShapeDtypeStruct((rows, columns), first.dtype)
    reason = obstacle(result, *(x for pair in flat for x in pair)) or device_obstacle()
    if implementation not in (None, "xla", "mosaic_gpu"):
        raise NotImplementedError(f"{implementation=} is not 'xla' or 'mosaic_gpu'")
    if implementation == "mosaic_gpu" and reason:
        raise NotImplementedError(f"{implementation=}: {reason}; use 'xla', or None")
    if implementation == "xla" or reason:
        total = jnp.zeros((), jnp.float32)
        for a, b in flat:
            total += jnp.einsum("RO,IO->RI", a, b, preferred_element_type=jnp.float32)
        total = total.astype(first.dtype)
    else:
        (a, b), *also = flat
        total = matmul(a, b, also=tuple(also), transpose_b=True)
    return total.reshape(*first.shape[:-1], -1)
