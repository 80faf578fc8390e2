"""What becomes of the tiles of a matrix product: staged, read, written, added."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.ops.matmul.tiles import ROW_BYTES, Tiles


@dataclass(frozen=True)
class Epilogue:
    """What an epilogue sees of its tile; it runs in each of the two warpgroups."""

    tiles: Tiles
    width: int
    """Columns of one accumulator."""
    dtype: Any
    """Of everything that is staged: the results, and the operands that are read."""
    row: Any
    """First row of the warpgroup's tile in the results."""
    column: Any
    """First column."""
    smem: Any
    """[slots, wg_tile_m, part], this warpgroup's own."""
    arrived: Any
    """A barrier for each slot, or None if nothing is read."""

    @property
    def part(self) -> int:
        """Columns that are staged at once."""
        return part_columns(self.dtype)

    @property
    def num_parts(self) -> int:
        """Parts of an accumulator."""
        return self.width // self.part

    def columns(self, i: int) -> slice:
        """Return the columns of part i in an accumulator."""
        return slice(i * self.part, (i + 1) * self.part)

    def fetch(self, gmem: Any) -> None:
        """Begin to load this tile of an array, while the products still run."""
        _, plgpu = pallas()
        if self.num_parts > self.tiles.slots:
            raise ValueError(
                f"{self.tiles}: reads {self.num_parts} parts, has fewer slots"
            )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(self.num_parts):
            plgpu.copy_gmem_to_smem(
                self._tile(gmem, i), self.smem.at[i], self.arrived.at[i]
            )

    def read(self, i: int) -> jax.Array:
        """Return part i of the tile that was fetched, before its slot is written."""
        _, plgpu = pallas()
        plgpu.barrier_wait(self.arrived.at[i])
        return plgpu.load(self.smem.at[i], layout=plgpu.Layout.WGMMA)

    def write(self, gmem: Any, i: int, value: jax.Array, turn: int, *, add=False):
        """Write part i of this tile, or add it to what is there.

        `turn` counts the writes of the tile; a write waits for the one that had its
        slot before.
        """
        _, plgpu = pallas()
        slots = self.tiles.slots
        # An array of one part has no beyond: Pallas drops a dimension of size 1 and
        # its index, so that parts beyond the end would land on the first.
        if i * self.part >= gmem.shape[-1]:
            return
        # At a tile's first write nothing may be left: the tile before need not have
        # ended on the last slot. Nor where parts are left out, which breaks the count.
        complete = gmem.shape[-1] >= self.width
        younger = min(turn, slots - 1) if complete else 0
        plgpu.wait_smem_to_gmem(younger, wait_read_only=True)
        slot = self.smem.at[turn % slots]
        slot[...] = value.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            slot, self._tile(gmem, i), reduction_op="add" if add else None
        )

    def _tile(self, gmem, i):
        pl, _ = pallas()
        rows = pl.ds(self.row, self.tiles.wg_tile_m)
        return gmem.at[rows, pl.ds(self.column + i * self.part, self.part)]


def part_columns(dtype: Any) -> int:
    """Return the columns of a part: `ROW_BYTES` of them."""
    return ROW_BYTES // jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class Barriers:
    """One warpgroup's share of an array of barriers."""

    all: Any
    first: Any

    @property
    def at(self):
        return self

    def __getitem__(self, i):
        return self.all.at[self.first + i]


def swizzled(dtype: Any, row_bytes: int = ROW_BYTES) -> tuple[Any, ...]:
    """Return the transforms of shared memory in rows of 64 or 128 bytes, for wgmma."""
    _, plgpu = pallas()
    tiling = plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(row_bytes)


def pallas() -> tuple[Any, Any]:
    """Return Pallas and its Mosaic GPU part.

    Not at the top of a file: JAX 0.10 has another API, and a CPU has no need of it.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return pl, plgpu
