"""Tiled matrix products for Hopper, with epilogues of the caller's own."""

from mst_jax.ops.matmul.api import sum_of_products
from mst_jax.ops.matmul.epilogue import Epilogue, pallas, part_columns, swizzled
from mst_jax.ops.matmul.mosaic_gpu import (
    OLDEST_JAX,
    compute_capability,
    device_obstacle,
    in_place,
    matmul,
    num_sms,
    obstacle,
    tiled_matmul,
)
from mst_jax.ops.matmul.tiles import Tiles

__all__ = [
    "OLDEST_JAX",
    "Epilogue",
    "Tiles",
    "compute_capability",
    "device_obstacle",
    "in_place",
    "matmul",
    "num_sms",
    "obstacle",
    "pallas",
    "part_columns",
    "sum_of_products",
    "swizzled",
    "tiled_matmul",
]
