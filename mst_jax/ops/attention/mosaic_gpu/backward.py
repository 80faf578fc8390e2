"""The backward pass of causal attention as one Mosaic GPU kernel, for Hopper.

    s = k q^T    p = exp(s - lse)    dp = v do^T    ds = p (dp - delta)
    dv += p do          dk += ds q          dq += ds^T k

A thread block has 128 keys and walks the queries that see them, `QUERIES` at a time, of
every head of its group. Scores are transposed, keys are their rows: p and ds leave the
tensor cores as operands. Two warpgroups have 64 keys each, with their dk and dv in
registers. Each writes its rows of ds to shared memory and takes all rows for its half
of dq's columns, a step later, so that neither waits for the other. dq is summed in f32
in global memory (TMA adds in L2). Five products a pair of blocks: one kernel for dq and
one for dk and dv would take seven.

A third warpgroup loads (TMA) and leaves its registers to the two. JAX 0.12 compiles
kernels so that registers cannot move; the two, with half of them each, load themselves
then, and are 6 to 9% slower (16,384 and 32,768 tokens).

Documents and windows: a block stops at the last query that sees some of its keys, and
masks a step only where some query does not see some key.

The sums of dq come in no fixed order: its last bits differ from run to run.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from mst_jax.ops import matmul as mm
from mst_jax.ops.attention.mosaic_gpu import primitives
from mst_jax.ops.attention.mosaic_gpu.limits import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    REGISTERS_MOVE,
)
from mst_jax.ops.attention.mosaic_gpu.primitives import LOG2_E, ROWS, smem

QUERIES = {128: 64, 64: 128}
"""Of a step, by head size: as many as registers have room for."""
KEYS = 2 * ROWS
"""Of a thread block, half of them a warpgroup's."""
SLOTS = {128: 3, 64: 2}
"""Steps whose queries are in shared memory, by head size."""


@jax.named_scope("attention")
def flash_backward(q, k, v, out, lse, d_out, *, segment_ids=None, window=None):
    """Return (dq, dk, dv) of causal attention; a block costs the pairs that it has.

    Args:
        q: bf16 [B, T, N, H].
        k: bf16 [B, T, K, H], like v.
        v: the values.
        out: like q, what the forward pass returned.
        lse: f32 [B, N, T], the logsumexp of each query's scores.
        d_out: like q.
        segment_ids: int [B, T], a run of equal ones is a document; or None.
        window: tokens that a token sees to its left, itself included; or None.
    """
    B, T, _, H = q.shape
    # Not as a dot: XLA would turn a stack that `out` is in to heads first for it.
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    # For the layout that the kernel reads, JAX 0.12 would turn it all the same.
    delta = with_layout_constraint(delta, Layout((0, 1, 2)))
    # Turned apart: in one kernel with the sum it takes five times as long. Zeros after
    # it: XLA makes constant ones long before they are needed.
    delta, zero = lax.optimization_barrier((delta, jnp.float32(0)))
    delta = delta.swapaxes(1, 2)
    # A block of keys walks whole blocks of queries: exp(0 - inf) = 0 beyond the end.
    pad = ((0, 0), (0, 0), (0, -T % KEYS))
    lse = jnp.pad(lse * LOG2_E, pad, constant_values=jnp.inf)
    delta = jnp.pad(delta, pad)
    dq = jnp.full(q.shape, zero)
    seen = ()
    if segment_ids is not None or window is not None:
        last = jnp.broadcast_to(_last_query(segment_ids, window, T), (B, T))
        seen = _blocks(jnp.pad(last, pad[1:]), QUERIES[H])
    dq, (dk, dv) = mm.in_place(_kernel, dq, q, k, v, d_out, lse, delta, *seen)
    return (dq * H**-0.5).astype(q.dtype), dk, dv


def _last_query(ids, window, T):
    """Return int32 [B or 1, T], the last query that sees each key."""
    t = jnp.arange(T, dtype=jnp.int32)
    last = jnp.full((1, T), T - 1, jnp.int32)
    if ids is not None:
        ends = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (0, 1)))
        last = lax.cummin(jnp.where(ends, t, T - 1), axis=1, reverse=True)
    return last if window is None else jnp.minimum(last, t + (window - 1))


def _blocks(last, Q):
    """[B, T'] -> itself, and of each block of keys int32 [B, T' / KEYS].

    They are the blocks of Q queries that see some of it, and the last query that sees
    all of it.
    """
    by_block = last.reshape(last.shape[0], -1, KEYS)
    first = jnp.arange(by_block.shape[1], dtype=jnp.int32) * (KEYS // Q)
    return last, by_block.max(-1) // Q + 1 - first, by_block.min(-1)


def _kernel(dq_ref, q, k, v, d_out, lse, delta, *seen):
    """Add dq / scale to `dq_ref`, f32 like q, and return dk and dv.

    lse and delta are [B, N, T'], T' a multiple of KEYS; lse is in base 2. `seen` is of
    `_blocks`, or nothing if all queries see all keys before them.
    """
    pl, plgpu = mm.pallas()
    B, T, N, H = q.shape
    K, kv_blocks = k.shape[2], pl.cdiv(T, KEYS)
    group, half = N // K, H // 2
    Q, slots = QUERIES[H], SLOTS[H]
    # A row is what a warpgroup takes of k for its half of dq.
    tile = partial(smem, row_bytes=half * k.dtype.itemsize)

    def attention_backward(*gmems):
        block = lax.axis_index("block")
        # The longest first, so that few blocks run alone at the end.
        j, rest = lax.div(block, B * K), lax.rem(block, B * K)
        b, kv_head = lax.div(rest, K), lax.rem(rest, K)
        first, count = j * (KEYS // Q), (kv_blocks - j) * (KEYS // Q)
        if seen:
            last_gmem, count_gmem, lowest_gmem = gmems[6:9]
            count, lowest = count_gmem[b, j], lowest_gmem[b, j]
        steps = group * count

        def place(t):
            """Return the (batch, queries, head) of a step."""
            start = (first + lax.rem(t, count)) * Q
            queries = pl.ds(pl.multiple_of(start, Q), Q)
            return b, queries, kv_head * group + lax.div(t, count)

        statistic = plgpu.SMEM((slots, Q), jnp.float32)
        by_slot = partial(plgpu.Barrier, num_arrivals=2, num_barriers=slots)

        @partial(
            pl.run_scoped,
            k_smem=tile(KEYS, H), v_smem=tile(KEYS, H),
            q_smem=tile(slots, Q, H), do_smem=tile(slots, Q, H),
            lse_smem=statistic, delta_smem=statistic,
            ds_smem=tile(2, KEYS, Q),
            dq_smem=smem(2, Q, half, dtype=jnp.float32),
            kv_loaded=plgpu.Barrier(num_arrivals=2),
            q_loaded=by_slot(), do_loaded=by_slot(), used=by_slot(),
            ds_written=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            done=plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )  # fmt: skip
        def _scope(
            k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem,
            kv_loaded, q_loaded, do_loaded, used, ds_written, done,
        ):  # fmt: skip
            q_gmem, k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem = gmems[:6]
            dq_gmem, dk_gmem, dv_gmem = gmems[-3:]
            wg = lax.axis_index("wg")

            def loader(i):
                """Of q (0) or d_out (1) and what goes with it."""
                return pl.when(wg == (2 if REGISTERS_MOVE else i))

            def load(t):
                slot, (b, queries, head) = lax.rem(t, slots), place(t)
                for i, (rows, to, statistic, its, loaded) in enumerate(
                    (
                        (q_gmem, q_smem, lse_gmem, lse_smem, q_loaded),
                        (do_gmem, do_smem, delta_gmem, delta_smem, do_loaded),
                    )
                ):

                    @loader(i)
                    def _copy(
                        rows=rows.at[b, queries, head], to=to.at[slot],
                        statistic=statistic.at[b, head, queries], its=its.at[slot],
                        loaded=loaded.at[slot],
                    ):  # fmt: skip
                        plgpu.copy_gmem_to_smem(rows, to, loaded)
                        plgpu.copy_gmem_to_smem(statistic, its, loaded)

            def load_first():
                keys = pl.ds(pl.multiple_of(j * KEYS, KEYS), KEYS)
                for i, (gmem, to) in enumerate(((k_gmem, k_smem), (v_gmem, v_smem))):

                    @loader(i)
                    def _copy(rows=gmem.at[b, keys, kv_head], to=to):
                        plgpu.copy_gmem_to_smem(rows, to, kv_loaded)

                for t in range(slots):
                    pl.when(t < steps)(partial(load, t))

            def is_followed(t):
                """Whether a step will take the slot that step t - 1 took."""
                return (t > 0) & (t - 1 + slots < steps)

            def load_next(t):
                """Load into the slot of step t - 1, once nobody uses it."""

                @pl.when(is_followed(t))
                def _next():
                    plgpu.barrier_wait(used.at[lax.rem(t - 1, slots)])
                    load(t - 1 + slots)

            @pl.when(REGISTERS_MOVE and wg == 2)
            def _load():
                plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
                load_first()
                lax.fori_loop(1, steps, lambda t, _: load_next(t), None)

            @pl.when(wg != 2)
            def _compute():
                if REGISTERS_MOVE:
                    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                else:
                    load_first()
                layout, shape = plgpu.Layout.WGMMA, (ROWS, Q)

                def share(wg, size):
                    return pl.ds(pl.multiple_of(wg * size, size), size)

                def by_query(statistic):
                    value = plgpu.load(statistic, layout=layout.reduce(0))
                    return lax.broadcast_in_dim(value, shape, (1,))

                own_keys = pl.ds(pl.multiple_of(j * KEYS + wg * ROWS, ROWS), ROWS)
                if seen:
                    last = plgpu.load(
                        last_gmem.at[b, own_keys], layout=layout.reduce(1),
                        optimized=False,
                    )  # fmt: skip

                def mask(s, t):
                    key, query = (
                        plgpu.broadcasted_iota(jnp.int32, shape, i, layout=layout)
                        for i in range(2)
                    )
                    query += (first + lax.rem(t, count)) * Q
                    s = jnp.where(key + (j * KEYS + wg * ROWS) <= query, s, -jnp.inf)
                    if seen:
                        ends = lax.broadcast_in_dim(last, shape, (0,))
                        s = jnp.where(query <= ends, s, -jnp.inf)
                    return s

                def is_cut(t):
                    """Whether some query of a step does not see some key."""
                    place = lax.rem(t, count)
                    cut = place < KEYS // Q  # on the diagonal
                    if seen:
                        cut |= (first + place + 1) * Q > lowest + 1
                    return cut

                def product_dq(acc, slot, wg):
                    plgpu.barrier_wait(ds_written.at[slot])
                    ds = ds_smem.at[slot].transpose((1, 0))
                    plgpu.wgmma(acc, ds, k_smem.at[:, share(wg, half)])

                def add_dq(dq, t):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_smem[wg] = dq
                    plgpu.commit_smem()
                    where = (*place(t), share(wg, half))
                    primitives.add(dq_smem.at[wg], dq_gmem.at[where])

                def step(t, _, dk_acc, dv_acc):
                    slot, ds_slot = lax.rem(t, slots), lax.rem(t, 2)
                    before = lax.max(t - 1, 0)
                    q_slot, do_slot = q_smem.at[slot], do_smem.at[slot]
                    # Always wg. But as t is in it, the compiler does not keep the
                    # descriptors of all parts of k and v in registers, for which there
                    # is no room.
                    wg_t = wg + lax.shift_right_logical(t, 30)
                    own = share(wg_t, ROWS)

                    def old_dq(dq_acc):
                        product_dq(dq_acc, 1 - ds_slot, wg_t)
                        return pl.run_scoped(partial(scores, dq_acc), acc)

                    def scores(dq_acc, s_acc):
                        plgpu.barrier_wait(q_loaded.at[slot])
                        plgpu.wgmma(s_acc, k_smem.at[own], q_slot.transpose((1, 0)))
                        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)

                        @pl.when(is_followed(t))
                        def _release():
                            plgpu.barrier_arrive(used.at[lax.rem(t - 1, slots)])

                        add_dq(dq, before)
                        plgpu.barrier_wait(do_loaded.at[slot])
                        return pl.run_scoped(partial(gradients, s_acc), acc)

                    def gradients(s_acc, dp_acc):
                        plgpu.wgmma(dp_acc, v_smem.at[own], do_slot.transpose((1, 0)))
                        lse = by_query(lse_smem.at[slot])
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        s = s * (H**-0.5 * LOG2_E) - lse
                        p = jnp.exp2(lax.cond(is_cut(t), mask, lambda s, _: s, s, t))
                        delta = by_query(delta_smem.at[slot])
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        ds = (p * (dp - delta)).astype(jnp.bfloat16)
                        return p.astype(jnp.bfloat16), ds

                    acc = plgpu.ACC(shape, jnp.float32)
                    dq_acc = plgpu.ACC((Q, half), jnp.float32)
                    p, ds = pl.run_scoped(old_dq, dq_acc)
                    if not REGISTERS_MOVE:
                        load_next(t)
                    own_ds = ds_smem.at[ds_slot, own]
                    primitives.multiply(dv_acc, p, do_slot, own_ds)
                    own_ds[...] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_written.at[ds_slot])
                    plgpu.wgmma(dk_acc, own_ds, q_slot)

                def sums(dk_acc, dv_acc):
                    # The first step adds 0, of a step before it.
                    zeros = jnp.zeros(shape, jnp.bfloat16)
                    ds_smem[1, share(wg, ROWS)] = plgpu.layout_cast(zeros, layout)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_written.at[1])
                    body = partial(step, dk_acc=dk_acc, dv_acc=dv_acc)
                    lax.fori_loop(0, steps, body, None)

                    def last_dq(dq_acc):
                        product_dq(dq_acc, lax.rem(steps - 1, 2), wg)
                        return dq_acc[...]

                    dq_acc = plgpu.ACC((Q, half), jnp.float32)
                    add_dq(pl.run_scoped(last_dq, dq_acc), steps - 1)
                    return dk_acc[...], dv_acc[...]

                plgpu.barrier_wait(kv_loaded)
                acc = plgpu.ACC((ROWS, H), jnp.float32)
                dk, dv = pl.run_scoped(sums, acc, acc)
                # The other warpgroup has read all of k.
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
                own = share(wg, ROWS)
                k_smem[own] = (dk * H**-0.5).astype(jnp.bfloat16)
                v_smem[own] = dv.astype(jnp.bfloat16)
                plgpu.commit_smem()
                target = b, own_keys, kv_head
                plgpu.copy_smem_to_gmem(k_smem.at[own], dk_gmem.at[target])
                plgpu.copy_smem_to_gmem(v_smem.at[own], dv_gmem.at[target])
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        attention_backward,
        out_type=(k, v),
        grid=(kv_blocks * B * K,),
        grid_names=("block",),
        num_threads=3 if REGISTERS_MOVE else 2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Each store is between a wait and `commit_smem`, which are barriers.
            unsafe_no_auto_barriers=True,
        ),
    )(q, k, v, d_out, lse, delta, *seen, dq_ref)
