"""How a Hopper matrix product is cut, held to what a thread block has."""

from dataclasses import dataclass

SMEM_BYTES = 227 * 1024
ROW_BYTES = 128
"""A row of a staged part: the widest swizzle."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut. Two compute warpgroups lie one above the other."""

    wg_tile_m: int = 64
    """Rows of one warpgroup."""
    tile_n: int = 256
    """Columns of a thread block, of all its accumulators together."""
    tile_k: int = 64
    """Depth of one step of the pipeline."""
    stages: int = 4
    """Steps that are in shared memory at once."""
    slots: int = 2
    """Parts of a result, of `ROW_BYTES` a row, that wait in shared memory."""
    cluster: int = 2
    """Thread blocks that share the tiles of B; each has its own rows."""
    snake: int = 8
    """Clusters that are walked along `snake_m` before turning."""
    snake_m: bool = True
    """Whether the walk goes along the rows of C first, or its columns."""

    def __post_init__(self):
        if self.wg_tile_m not in (64, 128) or self.tile_n % 64 or self.tile_k % 64:
            raise ValueError(
                f"{self}: wg_tile_m of 64 or 128, tile_n and tile_k multiples of 64"
            )
        if self.cluster not in (1, 2) or self.stages < 2 or self.slots < 1:
            raise ValueError(f"{self}: a cluster of 1 or 2, 2 stages, 1 slot at least")
        if self.wg_tile_m * self.tile_n > 64 * 256:
            raise ValueError(f"{self}: the accumulators do not fit the registers")
        if self.smem_bytes > SMEM_BYTES:
            raise ValueError(
                f"{self}: {self.smem_bytes} bytes of shared memory, a block has "
                f"{SMEM_BYTES}; take fewer stages or slots"
            )

    @property
    def cta_tile_m(self) -> int:
        """Rows of one thread block."""
        return 2 * self.wg_tile_m

    @property
    def cluster_tile_m(self) -> int:
        """Rows of one cluster."""
        return self.cluster * self.cta_tile_m

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block, for 16-bit operands."""
        operands = self.stages * self.tile_k * (self.cta_tile_m + self.tile_n) * 2
        return operands + self.slots * self.cta_tile_m * ROW_BYTES + 1024
