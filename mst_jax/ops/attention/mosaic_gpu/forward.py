"""The forward pass of causal attention as one Mosaic GPU kernel, for Hopper.

    s = q k^T / sqrt(H)   p = exp(s - m)   out = p v / sum(p)   lse = m + log(sum(p))

m is the largest score of a query so far; when it grows, what was summed up before is
scaled (online softmax). A thread block has 128 queries of a head and walks the keys
that they see, `KEYS` at a time, from the diagonal down. Two warpgroups have 64 queries
each, and their out in registers. They take turns at the tensor cores: out += p v of one
step and s of the next in a row, while the other makes p of its s. A third warpgroup
loads (TMA), ahead into the next tile.

Two blocks of a cluster have two heads of one group, and share its keys and values (TMA
multicast). Each cluster walks its tiles, the longest first.

Documents and windows: a block stops at the first key that some of its queries see, and
masks a step only where some query does not see some key.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mst_jax.ops import matmul as mm
from mst_jax.ops.attention.mosaic_gpu import primitives
from mst_jax.ops.attention.mosaic_gpu.limits import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    REGISTERS_MOVE,
)
from mst_jax.ops.attention.mosaic_gpu.primitives import LOG2_E, ROWS, smem

QUERIES = 2 * ROWS
"""Of a thread block, half of them a warpgroup's."""
KEYS = {128: 128 if REGISTERS_MOVE else 64, 64: 128}
"""Of a step, by head size: as many as registers have room for."""
SLOT_KEYS = 256
"""Keys, and values, that are in shared memory."""
LOWEST = -1e30
"""Below every score, and finite: exp(-inf - LOWEST) is 0."""


def flash_forward(q, k, v, *, segment_ids=None, window=None):
    """Return (out like q, logsumexp f32 [B, N, T]) of causal attention.

    Args:
        q: bf16 [B, T, N, H].
        k: bf16 [B, T, K, H], like v.
        v: the values.
        segment_ids: int [B, T], a run of equal ones is a document; or None.
        window: tokens that a token sees to its left, itself included; or None.
    """
    B, T, _, H = q.shape
    seen = ()
    if segment_ids is not None or window is not None:
        first = jnp.broadcast_to(_first_key(segment_ids, window, T), (B, T))
        first = jnp.pad(first, ((0, 0), (0, -T % QUERIES)), mode="edge")
        seen = _blocks(first, KEYS[H])
    # Else XLA runs the kernel twice where a result is kept in a stack: once more in one
    # fusion with the write.
    out, lse = lax.optimization_barrier(_kernel(q, k, v, *seen))
    return out, lse[..., :T]


def _first_key(ids, window, T):
    """Return int32 [B or 1, T], the first key that each query sees."""
    t = jnp.arange(T, dtype=jnp.int32)
    first = jnp.zeros((1, T), jnp.int32)
    if ids is not None:
        begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        first = lax.cummax(jnp.where(begins, t, 0), axis=1)
    return first if window is None else jnp.maximum(first, t - (window - 1))


def _blocks(first, span):
    """[B, T'] -> itself, and of each block of queries int32 [B, T' / QUERIES].

    They are the steps of `span` keys that some of it sees, and the first key that all
    of it sees, but for the diagonal.
    """
    by_block = first.reshape(first.shape[0], -1, QUERIES)
    ends = (jnp.arange(by_block.shape[1], dtype=jnp.int32) + 1) * (QUERIES // span)
    return first, ends - by_block.min(-1) // span, by_block.max(-1)


def _kernel(q, k, v, *seen):
    """Return (out, lse [B, N, T']), T' a multiple of QUERIES.

    `seen` is of `_blocks`, or nothing if all queries see all keys before them.
    """
    pl, plgpu = mm.pallas()
    B, T, N, H = q.shape
    K, blocks = k.shape[2], pl.cdiv(T, QUERIES)
    span = KEYS[H]  # of a step
    slots = SLOT_KEYS // span
    group = N // K
    cluster = 2 if group % 2 == 0 else 1
    shares = B * N // cluster
    num_tiles = blocks * shares
    clusters = min(num_tiles, mm.num_sms() // cluster)

    def attention_forward(*gmems):
        q_gmem, k_gmem, v_gmem, *seen_gmems, out_gmem, lse_gmem = gmems

        def for_tiles(body):
            """Run body(tiles before, steps before, *tile) on each tile of the cluster.

            Return the steps of all of them.
            """

            @plgpu.nd_loop(
                (num_tiles,), collective_axes="clusters", init_carry=jnp.int32(0)
            )
            def _tile(info, carry):
                before, (n,) = info.local_index, info.index
                # Every second round goes back, so that all have as much to do.
                begin = before * clusters
                back = (lax.rem(before, 2) == 1) & (begin + clusters <= num_tiles)
                n = jnp.where(back, 2 * begin + clusters - 1 - n, n)
                i, rest = blocks - 1 - lax.div(n, shares), lax.rem(n, shares)
                head = rest * cluster + lax.axis_index("cluster")
                b, head = lax.div(head, N), lax.rem(head, N)
                steps = (i + 1) * (QUERIES // span)
                if seen:
                    steps = seen_gmems[1][b, i]
                body(before, carry, b, i, head, steps)
                return carry + steps

            return _tile

        loads = partial(plgpu.Barrier, num_arrivals=1, num_barriers=slots)
        used = {"num_arrivals": 2, "num_barriers": slots}
        shared = {"collective_axes": "cluster"} if cluster > 1 else {}
        given_back = (
            plgpu.ClusterBarrier(collective_axes=("cluster",), **used)
            if cluster > 1
            else plgpu.Barrier(**used)
        )

        @partial(
            pl.run_scoped,
            q_smem=smem(QUERIES, H), out_smem=smem(QUERIES, H),
            k_smem=smem(slots, span, H), v_smem=smem(slots, span, H),
            lse_smem=plgpu.SMEM((2, ROWS), jnp.float32),
            q_loaded=plgpu.Barrier(num_arrivals=1), k_loaded=loads(), v_loaded=loads(),
            q_used=plgpu.Barrier(num_arrivals=2), k_used=given_back, v_used=given_back,
            turn=plgpu.Barrier(num_arrivals=1, num_barriers=2),
            collective_axes="wg",
        )  # fmt: skip
        def _scope(
            q_smem, out_smem, k_smem, v_smem, lse_smem,
            q_loaded, k_loaded, v_loaded, q_used, k_used, v_used, turn,
        ):  # fmt: skip
            wg = lax.axis_index("wg")

            @pl.when(wg == 2)
            def _load():
                if REGISTERS_MOVE:
                    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

                def load(before, first_step, b, i, head, steps):
                    @pl.when(before > 0)
                    def _wait():
                        plgpu.barrier_wait(q_used)

                    queries = pl.ds(pl.multiple_of(i * QUERIES, QUERIES), QUERIES)
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[b, queries, head], q_smem, q_loaded
                    )
                    last = (i + 1) * (QUERIES // span) - 1

                    def step(t, _):
                        place = first_step + t
                        slot, has_been = lax.rem(place, slots), place >= slots
                        start = pl.multiple_of((last - t) * span, span)
                        where = b, pl.ds(start, span), lax.div(head, group)
                        for gmem, to, loaded, used in (
                            (k_gmem, k_smem, k_loaded, k_used),
                            (v_gmem, v_smem, v_loaded, v_used),
                        ):
                            pl.when(has_been)(
                                partial(plgpu.barrier_wait, used.at[slot])
                            )
                            plgpu.copy_gmem_to_smem(
                                gmem.at[where], to.at[slot], loaded.at[slot], **shared
                            )

                    lax.fori_loop(0, steps, step, None)

                total = for_tiles(load)

                def drain(place, _):
                    for used in (k_used, v_used):
                        plgpu.barrier_wait(used.at[lax.rem(place, slots)])

                # A block must live until the other has given back to it.
                lax.fori_loop(lax.max(total - slots, 0), total, drain, None)
                plgpu.barrier_wait(q_used)

            @pl.when(wg != 2)
            def _compute():
                if REGISTERS_MOVE:
                    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                layout, shape = plgpu.Layout.WGMMA, (ROWS, span)
                own = pl.ds(pl.multiple_of(wg * ROWS, ROWS), ROWS)

                def by_query(a, columns):
                    return lax.broadcast_in_dim(a, (ROWS, columns), (0,))

                def softmax(s, m):
                    """Return m with this step's scores, in base 2, and p."""
                    scale = H**-0.5 * LOG2_E
                    m = jnp.maximum(m, s.max(axis=1) * scale)
                    return m, jnp.exp2(s * scale - by_query(m, span))

                def compute(before, first_step, b, i, head, steps):
                    start = i * QUERIES + wg * ROWS
                    queries = pl.ds(pl.multiple_of(start, ROWS), ROWS)
                    last = (i + 1) * (QUERIES // span) - 1
                    if seen:
                        first = plgpu.load(
                            seen_gmems[0].at[b, queries], layout=layout.reduce(1),
                            optimized=False,
                        )  # fmt: skip
                        highest = seen_gmems[2][b, i]

                    def mask(s, t):
                        query, key = (
                            plgpu.broadcasted_iota(jnp.int32, shape, d, layout=layout)
                            for d in range(2)
                        )
                        key += (last - t) * span
                        s = jnp.where(key <= query + start, s, -jnp.inf)
                        if seen:
                            s = jnp.where(key >= by_query(first, span), s, -jnp.inf)
                        return s

                    def mask_if_cut(s, t):
                        """Mask a step if some query does not see some key."""
                        diagonal = QUERIES // span
                        if not seen and diagonal == 1:
                            return s
                        cut = t < diagonal
                        if seen:
                            cut |= (last - t) * span < highest
                        return lax.cond(cut, mask, lambda s, _: s, s, t)

                    def slot(t):
                        return lax.rem(first_step + t, slots)

                    def product_s(s_acc, t):
                        plgpu.barrier_wait(k_loaded.at[slot(t)])
                        keys = k_smem.at[slot(t)].transpose((1, 0))
                        plgpu.wgmma(s_acc, q_smem.at[own], keys)

                    def product_out(out_acc, p, t):
                        plgpu.barrier_wait(turn.at[wg])
                        plgpu.barrier_wait(v_loaded.at[slot(t)])
                        free = out_smem.at[own, pl.ds(0, min(span, H))]
                        primitives.multiply(out_acc, p, v_smem.at[slot(t)], free)

                    def give_back(used, t):
                        plgpu.barrier_arrive(used.at[slot(t)])

                    def pass_turn():
                        plgpu.barrier_arrive(turn.at[1 - wg])

                    def first_s(s_acc):
                        product_s(s_acc, 0)
                        return s_acc[...]

                    def step(t, carry):
                        out, m, total, p = carry

                        def products(out_acc, s_acc):
                            product_out(out_acc, p, t)
                            product_s(s_acc, t + 1)
                            pass_turn()

                        out, s = primitives.accumulate(products, out, shape)
                        give_back(v_used, t)
                        give_back(k_used, t + 1)
                        old = m
                        m, p = softmax(mask_if_cut(s, t + 1), m)
                        scale = jnp.exp2(old - m)
                        total = total * scale + p.sum(axis=1)
                        out = out * by_query(scale, H)
                        return out, m, total, p.astype(jnp.bfloat16)

                    plgpu.barrier_wait(q_loaded)
                    s = pl.run_scoped(first_s, plgpu.ACC(shape, jnp.float32))
                    give_back(k_used, 0)
                    lowest = jnp.full(ROWS, LOWEST, jnp.float32)
                    lowest = plgpu.layout_cast(lowest, layout.reduce(1))
                    m, p = softmax(mask(s, 0), lowest)
                    total = p.sum(axis=1)
                    out = jnp.zeros((ROWS, H), jnp.float32)
                    out = plgpu.layout_cast(out, layout)
                    carry = out, m, total, p.astype(jnp.bfloat16)
                    out, m, total, p = lax.fori_loop(0, steps - 1, step, carry)
                    plgpu.barrier_arrive(q_used)

                    def last_product(out_acc):
                        product_out(out_acc, p, steps - 1)
                        pass_turn()

                    (out,) = primitives.accumulate(last_product, out)
                    give_back(v_used, steps - 1)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[own] = (out * by_query(1 / total, H)).astype(jnp.bfloat16)
                    lse_smem[wg] = (m + jnp.log2(total)) * (1 / LOG2_E)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[own], out_gmem.at[b, queries, head]
                    )
                    plgpu.copy_smem_to_gmem(
                        lse_smem.at[wg], lse_gmem.at[b, head, queries]
                    )

                @pl.when(wg == 1)
                def _begin():
                    plgpu.barrier_arrive(turn.at[0])

                for_tiles(compute)

                @pl.when(wg == 0)
                def _end():
                    plgpu.barrier_wait(turn.at[0])

                plgpu.wait_smem_to_gmem(0)

    lse = jax.ShapeDtypeStruct((B, N, blocks * QUERIES), jnp.float32)
    return plgpu.kernel(
        attention_forward,
        out_type=(q, lse),
        grid=(clusters,),
        grid_names=("clusters",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Each store is between a wait and `commit_smem`, which are barriers.
            unsafe_no_auto_barriers=True,
        ),
    )(q, k, v, *seen)
