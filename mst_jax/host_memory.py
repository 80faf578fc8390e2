"""Copies between the device's memory and the host's, beside the computation.

Without its latency-hiding scheduler (`train_step.py`) XLA begins a copy to or from the
host when its operands are there, and waits for it in front of its first user. But it
puts off whatever only a copy needs. So a copy's index and stack are tied by a barrier
to something that the computation waits for (`after`), and its array is no reshape: rows
lie along the stack's first axis.

The index must be linear in the loop's own counter. XLA then knows where the slice lies,
and copies it by DMA; from any other index a kernel copies it.
"""

from typing import Any

import jax
import jax.numpy as jnp


def to_host(a: jax.Array) -> jax.Array:
    """Move an array to host memory."""
    return jax.device_put(a, jax.memory.Space.Host)


def to_device(a: jax.Array) -> jax.Array:
    """Move an array to the device's memory."""
    return jax.device_put(a, jax.memory.Space.Device)


def is_on_host(a: jax.Array) -> bool:
    """Whether an array is in host memory."""
    return jax.typeof(a).memory_space == jax.memory.Space.Host


def after(x: jax.Array, row: Any, stacks: Any) -> jax.Array:
    """Return x, which waits for what copies from or to `row` of the stacks need."""
    if not jax.tree.leaves(stacks):
        return x
    zero = jnp.int32(0)  # the index of their other dimensions
    return jax.lax.optimization_barrier((x, row, zero, stacks))[0]


def early(x: Any, a: jax.Array, others: Any) -> tuple[Any, jax.Array]:
    """Return x and a; both, and others, are there before what waits for x begins.

    For copies of what a barrier returned: nothing but them may need that, so a second
    barrier does.
    """
    zero = jnp.int32(0)
    x, a = jax.lax.optimization_barrier((x, a, others, zero))[:2]
    return jax.lax.optimization_barrier((x, a))[0], a


def put_rows(stack: jax.Array, rows: jax.Array, row: Any) -> jax.Array:
    """Return the stack with `rows` from `row` on; beyond its end, at its end."""
    at = (row, *[0] * (rows.ndim - 1))
    return jax.lax.dynamic_update_slice(stack, rows, at, allow_negative_indices=False)


def get_rows(stack: jax.Array, row: Any, count: int) -> jax.Array:
    """Return `count` rows of the stack, from `row` on."""
    at, sizes = (row, *[0] * (stack.ndim - 1)), (count, *stack.shape[1:])
    return jax.lax.dynamic_slice(stack, at, sizes, allow_negative_indices=False)
