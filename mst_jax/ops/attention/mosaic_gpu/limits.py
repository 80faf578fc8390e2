"""What the kernels can compute, on which GPU, and where they are the best choice."""

import os
import re

import jax
import jax.numpy as jnp

from mst_jax.ops import matmul as mm

REGISTERS_MOVE = jax.__version_info__ < (0, 12)
"""Whether `setmaxnreg` does something: JAX 0.12 assembles kernels for NVIDIA's linker,
which it loads when it runs, and there the assembler ignores it (docs/LOG.md). Without
it the forward pass is slower than cuDNN's, but for documents."""
LOAD_REGISTERS, COMPUTE_REGISTERS = 24, 240
"""Of a thread, while three warpgroups share 65,536."""
HEAD_SIZES = 64, 128
"""That the kernels are written for."""
SHORT = 8192
"""The most tokens that a token sees at which the backward pass of heads of 128 is known
to be faster than cuDNN's where registers do not move; at 16,384 it is 2% slower."""
DETERMINISTIC = "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"
"""XLA's flags for runs that repeat to the last bit."""


def obstacle(q, *, causal, window, segmented, softcap) -> str | None:
    """Return why the kernels cannot compute attention of such a q, or None."""
    if reason := mm.obstacle():
        return reason
    if q.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {q.dtype}"
    if q.shape[-1] not in HEAD_SIZES:
        return f"head size {q.shape[-1]} is none of {HEAD_SIZES}"
    if q.shape[1] % 8:
        return f"T={q.shape[1]} is no multiple of 8"
    if softcap or not causal:
        return "is causal and has no softcap"
    flags = os.environ.get("XLA_FLAGS", "")
    if re.search(rf"--({'|'.join(DETERMINISTIC)})(=(true|1))?(\s|$)", flags, re.I):
        return "adds up dq in no fixed order, and XLA_FLAGS ask for one"
    return None


def has_fast_forward(head_size: int) -> bool:
    """Return whether the forward kernel is clearly faster than cuDNN, no documents."""
    return REGISTERS_MOVE and head_size == 128


def forward_note(name: str, q, segmented: bool) -> str:
    """Return what to add to why this is the implementation, if cuDNN goes forward."""
    if name != "mosaic_gpu" or segmented or has_fast_forward(q.shape[-1]):
        return ""
    return "; forward in cuDNN, which is as fast or faster"


def not_by_default(q, *, window, segmented, **_) -> str | None:
    """Return why cuDNN is chosen where the kernels could run too, or None."""
    _, T, _, H = q.shape
    slow = not REGISTERS_MOVE and H == 128 and not segmented
    if slow and min(T, window or T) > SHORT:
        return f"on JAX 0.12 it is faster than cuDNN only up to {SHORT} tokens, T={T}"
    return None


def device_obstacle(
    capability: tuple[int, int], head_size: int, *, segmented: bool
) -> str | None:
    """Return why a GPU of this compute capability cannot run the kernels, or None."""
    return mm.device_obstacle(capability)
