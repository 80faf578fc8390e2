"""How the operands of a matrix product reach the tensor cores.

The steps [tile_k deep] of all tiles of a block are one sequence, and step t uses slot
t % stages of shared memory. The loading warpgroup waits until a slot's last step has
been used, by both multiplying warpgroups and, since tiles of B are shared, by those of
the whole cluster; so it is ahead by `stages` steps, into the next tile too, while the
epilogue still runs. A step is given back when the next one has been issued, the last
of a tile when its accumulators are done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops.matmul.epilogue import pallas, swizzled
from mst_jax.ops.matmul.tiles import Tiles

LOAD_REGISTERS, COMPUTE_REGISTERS = 40, 232
"""Of a thread, while the three warpgroups share 65,536."""
CALL_STEP = 2
"""The step of a tile at which `Pipeline.multiply` calls back."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The steps of a product, or of several that are added up."""

    tiles: Tiles
    transpose_a: bool
    transpose_b: bool
    width: int
    """Columns of one accumulator."""
    depths: tuple[int, ...]
    """Steps of each product; a tile has all of them."""

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return sum(self.depths)

    def allocations(self, num_bs: int) -> dict[str, Any]:
        """Describe the shared memory and barriers that `load` and `multiply` take."""
        _, plgpu = pallas()
        tiles, stages = self.tiles, self.tiles.stages

        def slots(outer: int, depth_first: bool) -> Any:
            sizes = (tiles.tile_k, outer) if depth_first else (outer, tiles.tile_k)
            transforms = swizzled(jnp.bfloat16)
            return plgpu.SMEM((stages, *sizes), jnp.bfloat16, transforms=transforms)

        # Both multiplying warpgroups give a step back, those of the cluster to all.
        used: dict[str, Any] = {"num_arrivals": 2, "num_barriers": stages}
        return {
            "a_smem": slots(tiles.cta_tile_m, self.transpose_a),
            "b_smems": [slots(self.width, not self.transpose_b) for _ in range(num_bs)],
            "loaded": plgpu.Barrier(num_arrivals=1 + num_bs, num_barriers=stages),
            "used": plgpu.ClusterBarrier(collective_axes=("cluster",), **used)
            if tiles.cluster > 1
            else plgpu.Barrier(**used),
        }

    def load(
        self, pairs: Sequence[Sequence[Any]], tile: Any, mi: Any, ni: Any, *,
        a_smem: Any, b_smems: list[Any], loaded: Any, used: Any,
    ) -> None:  # fmt: skip
        """Load the steps of a tile.

        Args:
            pairs: (A, B, ...) of each product, in global memory.
            tile: how many tiles this block has had before.
            mi, ni: its place in C, in tiles.
            a_smem, b_smems, loaded, used: of `allocations`.
        """
        pl, plgpu = pallas()
        tiles, stages = self.tiles, self.tiles.stages
        rows = pl.ds(mi * tiles.cta_tile_m, tiles.cta_tile_m)
        columns = pl.ds(ni * self.width, self.width)
        shared = {"collective_axes": "cluster"} if tiles.cluster > 1 else {}
        first = tile * self.steps
        for (a, *bs), depth in zip(pairs, self.depths, strict=True):

            def step(k, _, a=a, bs=bs, first=first):
                slot = lax.rem(first + k, stages)

                @pl.when(first + k >= stages)
                def _wait():
                    plgpu.barrier_wait(used.at[slot])

                inner = pl.ds(k * tiles.tile_k, tiles.tile_k)
                part = a.at[inner, rows] if self.transpose_a else a.at[rows, inner]
                plgpu.copy_gmem_to_smem(part, a_smem.at[slot], loaded.at[slot])
                for b, b_smem in zip(bs, b_smems, strict=True):
                    part = (
                        b.at[columns, inner]
                        if self.transpose_b
                        else b.at[inner, columns]
                    )
                    plgpu.copy_gmem_to_smem(
                        part, b_smem.at[slot], loaded.at[slot], **shared
                    )

            lax.fori_loop(0, depth, step, None)
            first += depth

    def drain(self, num_tiles: Any, used: Any) -> None:
        """Wait until the last steps were used.

        A block must live until the others of its cluster have given them back to it.
        """
        pl, plgpu = pallas()
        total, stages = num_tiles * self.steps, self.tiles.stages

        def step(t, _):
            @pl.when(t >= 0)
            def _wait():
                plgpu.barrier_wait(used.at[lax.rem(t, stages)])

        lax.fori_loop(total - stages, total, step, None)

    def multiply(
        self, tile: Any, warpgroup: Any, call: Callable[[], None] | None, *,
        a_smem: Any, b_smems: list[Any], loaded: Any, used: Any,
    ) -> list[jax.Array]:  # fmt: skip
        """Return the f32 accumulators of a tile, one for each B.

        Args:
            tile: how many tiles this block has had before.
            warpgroup: 0 or 1, this one.
            call: called at step `CALL_STEP`, while the tensor cores are busy and the
                results of the last tile have left shared memory.
            a_smem, b_smems, loaded, used: of `allocations`.
        """
        pl, plgpu = pallas()
        rows, stages = self.tiles.wg_tile_m, self.tiles.stages
        own = pl.ds(pl.multiple_of(warpgroup * rows, rows), rows)
        first = tile * self.steps

        def products(*accs):
            def step(k, _):
                slot = lax.rem(first + k, stages)
                plgpu.barrier_wait(loaded.at[slot])
                if self.transpose_a:
                    left = a_smem.at[slot, :, own].transpose((1, 0))
                else:
                    left = a_smem.at[slot, own]
                for acc, b_smem in zip(accs, b_smems, strict=True):
                    right = b_smem.at[slot]
                    right = right.transpose((1, 0)) if self.transpose_b else right
                    plgpu.wgmma(acc, left, right)
                if call:
                    pl.when(k == min(CALL_STEP, self.steps - 1))(call)
                plgpu.wgmma_wait(len(accs))

                @pl.when(k > 0)
                def _release():
                    plgpu.barrier_arrive(used.at[lax.rem(first + k - 1, stages)])

            lax.fori_loop(0, self.steps, step, None)
            return [acc[...] for acc in accs]

        acc = plgpu.ACC((rows, self.width), jnp.float32)
        accs = pl.run_scoped(products, *[acc] * len(b_smems))
        plgpu.barrier_arrive(used.at[lax.rem(first + self.steps - 1, stages)])
        return accs
