"""Tiled matrix products for Hopper, with epilogues of the caller's own."""

from mst_jax.ops.matmul.tiles import Tiles
from old_matmul.mosaic_gpu import (
    OLDEST_JAX,
    Epilogue,
    device_obstacle,
    in_place,
    matmul,
    obstacle,
    pallas,
    part_columns,
    swizzled,
    tiled_matmul,
)

__all__ = [
    "OLDEST_JAX",
    "Epilogue",
    "Tiles",
    "device_obstacle",
    "in_place",
    "matmul",
    "obstacle",
    "pallas",
    "part_columns",
    "swizzled",
    "tiled_matmul",
]
