"""The Hopper matrix product: interpreted here, compiled for an H200, on a GPU."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import compile_for_h200, errors, interpreted, needs_pallas, sometimes

from mst_jax.ops.matmul import Tiles, matmul, obstacle, sum_of_products
from mst_jax.ops.matmul import mosaic_gpu as core

BF16, F32 = jnp.bfloat16, jnp.float32
ORDERS = ["nn", "nt", "tn", "tt"]
TOTALS = [None, BF16, F32]
RAGGED = 1000, 1344, 2112  # M, K, N on a GPU
LONG, WIDE = 160_000, 14336  # more than 2^31 elements


def make(M, K, N, order="nn", total=None):
    """Return A, B, the sum so far, all as they are given, on the device."""
    a_shape = (K, M) if order[0] == "t" else (M, K)
    b_shape = (N, K) if order[1] == "t" else (K, N)
    keys = jax.random.split(jax.random.key(M + K + N), 3)
    a, b = (
        jax.random.normal(k, s).astype(BF16)
        for k, s in zip(keys, (a_shape, b_shape), strict=False)
    )
    if total is not None:
        # As large as the product, so that an error in either shows.
        total = (jax.random.normal(keys[2], (M, N)) * K**0.5).astype(total)
    return a, b, total


def plain(a, b, total, order):
    """The product in XLA, in f32 inside and rounded as often as it is stored."""
    a = a.T if order[0] == "t" else a
    b = b.T if order[1] == "t" else b
    if total is None:
        return a @ b
    if total.dtype == F32:
        return total + jnp.matmul(a, b, preferred_element_type=F32)
    return total + a @ b


@partial(jax.jit, static_argnames=("order", "tiles"))
def ours(a, b, total, order="nn", tiles=None):
    transposed = {"transpose_a": order[0] == "t", "transpose_b": order[1] == "t"}
    return matmul(a, b, total=total, tiles=tiles, **transposed)


def check(M, K, N, order="nn", total=None, tiles=None, factor=1.01, epsilon=1e-6):
    """Compare with f32: no worse than XLA, but for the last bits of f32."""
    arrays = make(M, K, N, order, total)
    wide = jax.tree.map(lambda a: a.astype(F32), arrays)
    with jax.default_matmul_precision("highest"):
        want = plain(*wide, order)
    (theirs,) = errors(jax.jit(plain, static_argnums=3)(*arrays, order), want)
    with interpreted():
        got = ours(*arrays, order=order, tiles=tiles)
    assert got.dtype == (total or BF16) and got.shape == (M, N)
    assert errors(got, want)[0] <= factor * theirs + epsilon, (
        errors(got, want),
        theirs,
    )


@needs_pallas
@pytest.mark.parametrize(
    "order, total",
    sometimes(
        [*itertools.product(ORDERS[:3], TOTALS), ("tt", None)],
        always=[("nt", None), ("tn", F32)],
    ),
)
def test_every_order(order, total):
    # Rows, columns and, for "tn", the depth end within a tile.
    check(
        264 if order[0] == "n" else 320, 136 if order == "tn" else 192, 320,
        order, total,
    )  # fmt: skip


@needs_pallas
@pytest.mark.parametrize("total", [None, BF16])
def test_smaller_than_a_tile(total):
    check(8, 64, 64, total=total)


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize(
    "tiles, K, total",
    [
        (Tiles(cluster=1, snake=2), 320, None),
        (Tiles(wg_tile_m=128, tile_n=128, slots=1), 64, None),
        (Tiles(tile_n=64, tile_k=128, stages=2, slots=1), 192, F32),
        (Tiles(tile_n=192, stages=3, slots=3, snake_m=False), 64, BF16),
    ],
)
def test_tiles_one_after_the_other(tiles, K, total, monkeypatch):
    # Few multiprocessors, so that a block computes several tiles. A depth of one step
    # shows whether the loads of the next tile wait for this one to be read.
    monkeypatch.setattr(core, "num_sms", lambda: 4)
    check(776, K, 320, total=total, tiles=tiles)


def check_several(order, total, M, depths, N, factor=1.01, epsilon=2e-6):
    """Compare a sum of products of different depths with f32: rounded once."""
    pairs = [make(M, K, N, order)[:2] for K in depths]
    if total is not None:
        total = make(M, 64, N, order, total)[2]

    def run(pairs, total):
        (a, b), *also = pairs
        options = {"transpose_a": order[0] == "t", "transpose_b": order[1] == "t"}
        return matmul(a, b, also=tuple(also), total=total, **options)

    def summed(pairs, total):
        wide = [[x.astype(F32) for x in pair] for pair in pairs]
        want = sum(plain(a, b, None, order) for a, b in wide)
        return want if total is None else want + total.astype(F32)

    with jax.default_matmul_precision("highest"):
        want = summed(pairs, total)
    dtype = BF16 if total is None else total.dtype
    rounded = errors(want.astype(dtype), want)[0]
    with interpreted():
        got = jax.jit(run)(pairs, total)
    assert got.dtype == dtype and got.shape == (M, N)
    assert errors(got, want)[0] <= factor * rounded + epsilon


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize("order, total", [("nt", None), ("nn", BF16), ("tn", F32)])
def test_several_products_are_added_before_they_are_rounded(order, total, monkeypatch):
    monkeypatch.setattr(core, "num_sms", lambda: 4)
    check_several(order, total, 320, (192, 64, 320), 320)


@needs_pallas
def test_a_further_product_has_obstacles_too():
    a, b, _ = make(8, 64, 64)
    with pytest.raises(NotImplementedError, match="float32"):
        matmul(a, b, also=((a, b.astype(F32)),))


@needs_pallas
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_sum_so_far_is_kept_if_it_is_still_needed(dtype):
    a, b, total = make(64, 64, 64, "nn", dtype)
    before = np.asarray(total)
    with interpreted():
        got, same = jax.jit(lambda a, b, t: (matmul(a, b, total=t), t))(a, b, total)
    assert (np.asarray(same) == before).all() and (np.asarray(got) != before).any()
    assert (np.asarray(total) == before).all()


def check_f32_product(M, K, N):
    """A product in f32 is the one that is added to zeros, bit for bit, with squares."""
    a, b, total = make(M, K, N, "tn", F32)
    product = partial(matmul, a, b, transpose_a=True)
    with interpreted():
        got = jax.jit(partial(product, dtype=F32))()
        want = jax.jit(product)(total=jnp.zeros_like(total))
        same, squares = jax.jit(partial(product, dtype=F32, squares=True))()
    assert got.dtype == F32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(same, want)
    np.testing.assert_allclose(squares, np.square(want, dtype=np.float64).sum(), 1e-5)


@needs_pallas
@pytest.mark.interpreted
def test_a_product_in_f32():
    check_f32_product(320, 192, 320)


@pytest.mark.gpu
def test_a_product_in_f32_at_8b_width():
    check_f32_product(4096, 8192, 14336)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wg_tile_m": 32}, "wg_tile_m of 64 or 128"),
        ({"tile_n": 96}, "multiples of 64"),
        ({"tile_k": 32}, "multiples of 64"),
        ({"cluster": 4}, "a cluster of 1 or 2"),
        ({"stages": 1}, "2 stages"),
        ({"slots": 0}, "1 slot"),
        ({"wg_tile_m": 128}, "registers"),
        ({"stages": 5}, "bytes of shared memory"),
        ({"slots": 5}, "bytes of shared memory"),
    ],
)
def test_tiles_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**change)


@needs_pallas
def test_reading_needs_a_slot_for_each_part():
    with pytest.raises(ValueError, match="reads 4 parts"), interpreted():
        ours(*make(64, 64, 64, total=BF16), tiles=Tiles())


@needs_pallas
@pytest.mark.interpreted
def test_sum_of_products():
    pairs = [make(320, K, 192, "nt")[:2] for K in (128, 64, 64)]

    def run(pairs, how):
        pairs = [(a.reshape(2, 160, -1), b) for a, b in pairs]
        return sum_of_products(*pairs, implementation=how)

    wide = [[x.astype(F32) for x in pair] for pair in pairs]
    with jax.default_matmul_precision("highest"):
        want = sum(a @ b.T for a, b in wide).reshape(2, 160, 192)
    rounded = errors(want.astype(BF16), want)[0]
    for how in ("xla", "mosaic_gpu"):
        with pytest.MonkeyPatch.context() as patch, interpreted():
            patch.setattr(core, "compute_capability", lambda: (9, 0))
            got = jax.jit(run, static_argnums=1)(pairs, how)
        assert got.dtype == BF16
        assert errors(got, want)[0] <= 1.01 * rounded + 2e-6


def test_sum_of_products_says_why_not():
    x = jnp.ones((8, 64))
    with pytest.raises(NotImplementedError, match="use 'xla'"):
        sum_of_products((x, x), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="'triton' is not"):
        sum_of_products((x, x), implementation="triton")


@needs_pallas
def test_a_sum_whose_result_no_kernel_writes_is_xlas(monkeypatch):
    # 72 columns, of operands that kernels take.
    monkeypatch.setattr(core, "compute_capability", lambda: (9, 0))
    a, b, _ = make(16, 128, 72, "nt")
    want = sum_of_products((a, b), implementation="xla")
    np.testing.assert_array_equal(sum_of_products((a, b)), want)
    with pytest.raises(NotImplementedError, match=r"\(16, 72\)"):
        sum_of_products((a, b), implementation="mosaic_gpu")


@needs_pallas
def test_obstacles():
    def array(*shape, dtype=BF16):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert obstacle(array(8, 64), array(64, 128)) is None
    assert "float32" in obstacle(array(8, 64), array(64, 64, dtype=F32))
    assert "(12, 64)" in obstacle(array(12, 64))
    assert "(8, 32)" in obstacle(array(8, 64), array(8, 32))


def test_an_old_jax_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    assert "older than 0.11.2" in obstacle(jax.ShapeDtypeStruct((8, 64), BF16))
    with pytest.raises(NotImplementedError, match="older than 0.11.2"):
        matmul(*make(8, 64, 64)[:2])


@needs_pallas
@pytest.mark.parametrize(
    "M, K, N, order",
    [(12, 64, 64, "nn"), (8, 72, 64, "nn"), (8, 64, 72, "nt"), (72, 64, 64, "tn")],
)
def test_what_tma_cannot_move_raises(M, K, N, order):
    with pytest.raises(NotImplementedError, match="multiples of 8 and 64"):
        ours(*make(M, K, N, order), order=order)


PRODUCTS = """
from functools import partial
from mst_jax.ops.matmul import matmul
from mst_jax.ops.swiglu import mosaic_gpu as mlp
def product(order, total=False):
    transposed = {f"transpose_{x}": o == "t" for x, o in zip("ab", order)}
    if total:
        return lambda a, b, t: matmul(a, b, total=t, **transposed)
    return partial(matmul, **transposed)
def products(C, D, F):
    x, wide, up, down = (array(s) for s in ((C, D), (C, F), (D, F), (F, D)))
    yield product("nn"), (wide, down)
    yield product("nn", True), (wide, down, x)
    yield product("nt"), (x, down)
    yield product("nt"), (wide, up)
    yield product("nt", True), (wide, up, x)
    yield (lambda q, k, wq, wk: matmul(q, wq, also=((k, wk),) * 2, transpose_b=True)), (
        x, array((C, D // 4)), array((D, D)), array((D, D // 4)))
    yield (lambda a, b, c, d: matmul(a, b, also=((c, d),), transpose_b=True)), (
        wide, up, wide, up)
    yield product("tn", True), (x, wide, array((D, F), jnp.float32))
    yield product("tn", True), (wide, x, array((F, D), jnp.float32))
    yield partial(product("tn"), dtype=jnp.float32), (x, wide)
    yield partial(product("tn"), dtype=jnp.float32, squares=True), (x, wide)
    yield partial(mlp.gate_up, keep=False), (x, up, up)
    yield partial(mlp.gate_up, keep=True), (x, up, up)
    yield mlp.gate_up_backward, (x, up, up, wide)
for fn, arguments in products(*SIZES):
    jax.jit(fn).lower(*arguments).compile()
"""


@needs_pallas
@pytest.mark.compiled
@pytest.mark.parametrize(
    "D, F",
    [
        (4096, 14336),
        pytest.param(2048, 8192, marks=pytest.mark.slow),
        pytest.param(8192, 28672, marks=pytest.mark.slow),
    ],
)
def test_compiled_for_an_h200(D, F):
    program = PRODUCTS.replace("SIZES", str((16384, D, F)))
    said = compile_for_h200(program, MOSAIC_GPU_DUMP_PTXAS="1")
    assert len(re.findall(r"Compiling entry function '\w+_mosaic_gpu_", said)) == 14
    spilled = re.findall(r"memory in function '(\w+)_mosaic_gpu_.*?, (\d+) bytes", said)
    # What is read beside two accumulators takes registers in the epilogue, once a
    # tile: 16 bytes a thread on JAX 0.11.2, 424 on 0.12. Other products: none.
    assert {name for name, _ in spilled} <= {"gate_up_backward"}, spilled
    assert all(int(size) <= 512 for _, size in spilled), spilled


@pytest.mark.gpu
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("order", ORDERS)
def test_ragged(order, total):
    M, K, N = RAGGED
    check(M + 24 if order[0] == "t" else M, K, N, order, total, factor=1.2)


@pytest.mark.gpu
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("order", ["nn", "nt", "tn"])
def test_ragged_several(order, total):
    # The tensor cores' sums of 3,520 terms in f32 have an error of about 2e-6.
    check_several(order, total, 1024, (1344, 64, 2112), 2112, 1.01, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("order", ["nn", "nt", "tn"])
def test_runs_are_bit_equal(order, total):
    M, K, N = RAGGED
    arrays = make(M + 24, K, N, order, total)
    first = ours(*arrays, order=order)
    assert all(bool((ours(*arrays, order=order) == first).all()) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["nn", "nt", "tn"])
def test_every_element_is_written(order):
    M, K, N = RAGGED
    a, b, _ = make(M + 24, K, N, order)

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def into(poison, a, b):
        return ours(a, b, None, order=order)

    poison = jnp.full((M + 24, N), jnp.nan, BF16)
    place = poison.unsafe_buffer_pointer()
    got = into(poison, a, b)
    assert got.unsafe_buffer_pointer() == place
    assert bool((got == ours(a, b, None, order=order)).all())


def ends(length):
    """Rows to look at: the first, those about element 2^31, the last."""
    middle = 2**31 // WIDE - 100
    return [slice(0, 300), slice(middle, middle + 200), slice(length - 300, length)]


@pytest.mark.gpu
@pytest.mark.parametrize("total", TOTALS)
def test_more_than_2_to_the_31_elements_written(total):
    assert LONG * WIDE > 2**31
    a, b, _ = make(LONG, 64, WIDE, "tn")
    if total is not None:
        total = jax.jit(lambda: jnp.full((LONG, WIDE), 3, total))()
    got = jax.jit(partial(matmul, transpose_a=True), donate_argnames="total")(
        a, b, total=total
    )
    for rows in ends(LONG):
        want = plain(a[:, rows].astype(F32), b.astype(F32), None, "tn")
        want += 0 if total is None else 3
        assert errors(got[rows], want)[0] < 2e-3  # bf16 has 1.7e-3


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_read():
    assert LONG * WIDE > 2**31
    a, b, _ = make(LONG, 64, WIDE)
    wide = ours(a, b, None)
    narrow = make(WIDE, WIDE, 64)[1]
    got = ours(wide, narrow, None)
    for rows in ends(LONG):
        want = plain(wide[rows].astype(F32), narrow.astype(F32), None, "nn")
        assert errors(got[rows], want)[0] < 2e-3  # bf16 has 1.7e-3
    # Transposed, the long side is the depth: the sum over all rows.
    got = ours(a, wide, jnp.zeros((64, WIDE), F32), order="tn")
    want = plain(a, wide, jnp.zeros((64, WIDE), F32), "tn")
    # The tensor cores' sums of 160,000 terms, in two orders; a lost end would be 0.25.
    assert errors(got, want)[0] < 1e-3
