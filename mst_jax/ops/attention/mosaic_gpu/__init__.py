"""Causal attention as two Mosaic GPU kernels, for Hopper."""

from mst_jax.ops.attention.mosaic_gpu.backward import flash_backward
from mst_jax.ops.attention.mosaic_gpu.forward import flash_forward
from mst_jax.ops.attention.mosaic_gpu.limits import (
    device_obstacle,
    forward_note,
    has_fast_forward,
    not_by_default,
    obstacle,
)

__all__ = [
    "device_obstacle",
    "flash_backward",
    "flash_forward",
    "forward_note",
    "has_fast_forward",
    "not_by_default",
    "obstacle",
]
