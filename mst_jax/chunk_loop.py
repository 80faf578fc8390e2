"""A loop over chunks of a sequence that reads and rewrites whole sequences in place.

`mini_sequence` scans chunks that it has cut; where several arrays of a sequence's
length are read and written, that copies each into chunks and back. Here a chunk is a
slice, taken and put back by its first token.
"""

from collections.abc import Callable
from typing import Any

import jax

from mst_jax.mini_sequence import split_length


def for_chunks(
    length: int, chunk_size: int, body: Callable[[Any, Any, int], Any], carry: Any
) -> Any:
    """Fold `carry = body(carry, start, size)` over chunks of a sequence.

    Args:
        length: T.
        chunk_size: most tokens of a chunk.
        body: gets the carry, the chunk's first token (traced) and its size (an int).
        carry: pytree of arrays.

    Returns:
        The last carry. Chunks are those of `split_length`, the last one may be shorter.
    """
    size, rest = loop_chunks(length, chunk_size)
    whole = length // size
    if whole == 1:
        carry = body(carry, 0, size)
    else:
        carry = jax.lax.fori_loop(
            0, whole, lambda i, carry: body(carry, i * size, size), carry
        )
    if rest:
        carry = body(carry, whole * size, rest)
    return carry


def loop_chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """Return the tokens of `for_chunks`' chunks, and of a shorter last one or 0."""
    _, size = split_length(length, chunk_size)
    return size, length % size


def take_tokens(x: jax.Array, start: Any, size: int) -> jax.Array:
    """Return tokens start .. start + size of [B, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, 1)


def put_tokens(x: jax.Array, chunk: jax.Array, start: Any) -> jax.Array:
    """Return [B, T, ...] with a chunk written at token `start`."""
    return jax.lax.dynamic_update_slice_in_dim(x, chunk.astype(x.dtype), start, 1)
