"""Attention's Hopper kernels: interpreted, compiled for an H200, on a GPU."""

import re
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import (
    ON_GPU,
    compile_for_h200,
    errors,
    interpreted,
    needs_pallas,
    sometimes,
)

from mst_jax.ops import matmul
from mst_jax.ops.attention import (
    attention_forward,
    cudnn,
    mosaic_gpu,
    reference_attention,
    xla,
)

BF16, F32 = jnp.bfloat16, jnp.float32
HEAD_SIZES = pytest.mark.parametrize("H", [128, 64])
CAUSAL = {"causal": True, "window": None}


@contextmanager
def kernels():
    """The kernels; interpreted, with what the interpreter lacks, but on a GPU."""
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            for replaced in (multiply, accumulate, add):
                patch.setattr(mosaic_gpu.primitives, replaced.__name__, replaced)
        yield


def multiply(acc, a, b, free):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    columns = free.shape[1]
    for start in range(0, a.shape[1], columns):
        part = slice(start, start + columns)
        free[...] = a[:, part]
        plgpu.wgmma(acc, free, b.at[part])


def accumulate(products, start, *shapes):
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def run(*accs):
        products(*accs)
        return [acc[...] for acc in accs]

    accs = [plgpu.ACC(shape, F32) for shape in (start.shape, *shapes)]
    first, *others = pl.run_scoped(run, *accs)
    return start + first, *others


def add(smem, gmem):
    gmem[...] = gmem[...] + smem[...]


def make(T, N=2, K=1, B=1, H=128, scale=1.0):
    """Return q, k, v, out, the logsumexp, the gradient of out."""
    keys = jax.random.split(jax.random.key(T + N), 4)
    q, k, v, d_out = (
        jax.random.normal(key, (B, T, n, H)).astype(BF16)
        for key, n in zip(keys, (N, K, K, N), strict=True)
    )
    q = (q * scale).astype(BF16)
    return q, k, v, *forward(q, k, v), d_out


def forward(q, k, v):
    if ON_GPU:
        return jax.jit(partial(cudnn.flash_forward, **CAUSAL))(q, k, v)
    return xla.flash_forward(q, k, v, None, softcap=None, **CAUSAL)


def theirs(q, k, v, out, lse, d_out, segment_ids=None, window=None):
    """What cuDNN, or XLA, makes of the same 16-bit arrays."""
    if ON_GPU and segment_ids is None:
        fn = partial(cudnn.flash_backward, causal=True, window=window)
        return jax.jit(fn)(q, k, v, out, lse, d_out)
    options = {"causal": True, "window": window, "softcap": None}
    return xla.flash_backward(q, k, v, segment_ids, out, lse, d_out, **options)


def exact(q, k, v, d_out, segment_ids=None, window=None):
    """The formula in f32."""
    options = {"segment_ids": segment_ids, "sliding_window": window}

    @jax.jit
    def run(q, k, v, d_out):
        with jax.default_matmul_precision("highest"):
            return jax.vjp(partial(reference_attention, **options), q, k, v)[1](d_out)

    return run(*(a.astype(F32) for a in (q, k, v, d_out)))


def check(q, k, v, out, lse, d_out, factor=1.1, **masks):
    want = exact(q, k, v, d_out, **masks)
    limits = errors(theirs(q, k, v, out, lse, d_out, **masks), want)
    with kernels():
        fn = jax.jit(partial(mosaic_gpu.flash_backward, **masks))
        got = fn(q, k, v, out, lse, d_out)
        got = jax.block_until_ready(got)
    assert [a.dtype for a in got] == [BF16] * 3
    found = errors(got, want)
    assert all(np.isfinite(found)), found
    for our, their in zip(found, limits, strict=True):
        assert our < factor * their + 1e-6, (found, limits)


def check_forward(q, k, v, factor=1.02, **masks):
    options = {"causal": True, "window": masks.get("window"), "softcap": None}
    ids = masks.get("segment_ids")
    wide = (a.astype(F32) for a in (q, k, v))
    with jax.default_matmul_precision("highest"):
        want = xla.flash_forward(*wide, ids, **options)
    limit = errors(xla.flash_forward(q, k, v, ids, **options)[0], want[0])[0]
    with kernels():
        fn = jax.jit(partial(mosaic_gpu.flash_forward, **masks))
        out, lse = jax.block_until_ready(fn(q, k, v))
    assert out.dtype == BF16 and lse.dtype == F32 and lse.shape == want[1].shape
    assert errors(out, want[0])[0] < factor * limit + 1e-6
    np.testing.assert_allclose(lse, want[1], rtol=2e-6, atol=2e-5)


def documents(*lengths):
    """Ids 1, 2, ... of one row."""
    return jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)


DOCUMENTS = {"segment_ids": documents(100, 1, 91, 128, 64)}  # within, across, whole
WINDOW = {"window": 70}
BOTH = {"segment_ids": documents(200, 184), "window": 130}


@needs_pallas
@pytest.mark.parametrize(
    "masks, H",
    [
        pytest.param(DOCUMENTS, 128, id="documents", marks=pytest.mark.interpreted),
        pytest.param(DOCUMENTS, 64, id="documents-64", marks=pytest.mark.interpreted),
        pytest.param(WINDOW, 128, id="window", marks=pytest.mark.interpreted),
        pytest.param(WINDOW, 64, id="window-64", marks=pytest.mark.interpreted),
        pytest.param(BOTH, 128, id="both", marks=pytest.mark.interpreted),
        pytest.param(BOTH, 64, id="both-64", marks=pytest.mark.interpreted),
    ],
)
def test_documents_and_windows(masks, H):
    ids, window = masks.get("segment_ids"), masks.get("window")
    q, k, v, _, _, d_out = make(384, 1, 1, H=H)
    options = {"causal": True, "window": window, "softcap": None}
    out, lse = xla.flash_forward(q, k, v, ids, **options)
    check_forward(q, k, v, **masks)
    check(q, k, v, out, lse, d_out, factor=1.02, **masks)


def test_blocks_that_see_each_other():
    last = mosaic_gpu.backward._last_query(documents(100, 1, 91, 128, 64), 90, 384)
    t = np.arange(384)
    ends = np.repeat([99, 100, 191, 319, 383], [100, 1, 91, 128, 64])
    np.testing.assert_array_equal(last[0], np.minimum(ends, t + 89))
    # Keys 0-127 are seen up to 191, 128-255 up to 319.
    for queries, steps in ((64, [3, 3, 2]), (128, [2, 2, 1])):
        _, count, lowest = mosaic_gpu.backward._blocks(last, queries)
        np.testing.assert_array_equal(count[0], steps)
        np.testing.assert_array_equal(lowest[0], [89, 191, 319])

    first = mosaic_gpu.forward._first_key(documents(100, 1, 91, 128, 64), 90, 384)
    begins = np.repeat([0, 100, 101, 192, 320], [100, 1, 91, 128, 64])
    np.testing.assert_array_equal(first[0], np.maximum(begins, t - 89))
    # Queries 0-127 see from 0 on, 128-255 from 101, 256-383 from 192.
    for keys, steps in ((64, [2, 3, 3]), (128, [1, 2, 2])):
        _, count, highest = mosaic_gpu.forward._blocks(first, keys)
        np.testing.assert_array_equal(count[0], steps)
        np.testing.assert_array_equal(highest[0], [101, 192, 320])


@needs_pallas
@pytest.mark.parametrize(
    "T, N, K, B, H",
    sometimes(
        [(256, 2, 1, 1, 128), (128, 2, 2, 2, 128), (384, 1, 1, 1, 64)],
        always=[(256, 2, 1, 1, 128), (384, 1, 1, 1, 64)],  # even and odd steps
    ),
)
def test_gradients(T, N, K, B, H):
    check(*make(T, N, K, B, H), factor=1.02)


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize(
    "T, N, K, B, H, keys",
    [
        (384, 4, 1, 1, 128, 128),  # two heads a cluster
        (200, 1, 1, 2, 128, 64),  # one
        (384, 2, 1, 1, 64, 128),
    ],
)
def test_forward(monkeypatch, T, N, K, B, H, keys):
    # Two clusters, or four: some have several tiles, the next loaded during the last.
    monkeypatch.setattr(matmul, "num_sms", lambda: 4)
    monkeypatch.setattr(mosaic_gpu.forward, "KEYS", {H: keys})
    check_forward(*make(T, N, K, B, H)[:3])


FORWARD = """
from mst_jax.ops.attention.mosaic_gpu import flash_forward
q, k = array((1, 8192, 32, H)), array((1, 8192, 8, H))
ids = array((1, 8192), jnp.int32)
fn = jax.jit(lambda q, k, v, ids: flash_forward(q, k, v, segment_ids=ids))
fn.lower(q, k, k, IDS).compile()
"""
BACKWARD = """
from mst_jax.ops.attention.mosaic_gpu import flash_backward
q, k = array((1, 8192, 32, H)), array((1, 8192, 8, H))
lse = array((1, 32, 8192), jnp.float32)
jax.jit(flash_backward).lower(q, k, k, q, lse, q).compile()
"""


# Bytes a thread that registers have no room for. Heads of 128: the backward pass 64 on
# JAX 0.11.2 and 28 on 0.12, the forward pass 8 to 16; of 64: 184 and 256, and up to 80,
# in steps of twice as many queries. A form that spilled 500 took half as long again.
@pytest.mark.compiled
@needs_pallas
@pytest.mark.parametrize(
    "program, kernel, H, most",
    [
        (FORWARD.replace("IDS", "None"), "attention_forward", 128, 32),
        (FORWARD.replace("IDS", "ids"), "attention_forward", 128, 32),
        (FORWARD.replace("IDS", "ids"), "attention_forward", 64, 96),
        (BACKWARD, "attention_backward", 128, 128),
        (BACKWARD, "attention_backward", 64, 256),
    ],
    ids=["forward", "forward, documents", "documents, 64", "backward", "backward, 64"],
)
def test_compiled_for_an_h200(program, kernel, H, most):
    said = compile_for_h200(f"H = {H}{program}", MOSAIC_GPU_DUMP_PTXAS="1")
    assert f"Compiling entry function '{kernel}_mosaic_gpu_kernel'" in said
    # Its products run beside each other.
    assert "wgmma.mma_async instructions are serialized" not in said, said
    assert "setmaxnreg' ignored" not in said, said
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)[-1:]
    assert int(spilled) <= most, said


@pytest.mark.gpu
@HEAD_SIZES
@pytest.mark.parametrize(
    "T, N, K, B", [(1000, 4, 2, 2), (8, 2, 1, 1), (128, 2, 1, 1), (4096, 8, 1, 2)]
)
def test_lengths_and_heads(T, N, K, B, H):
    arrays = make(T, N, K, B, H)
    check_forward(*arrays[:3], factor=1.05)
    check(*arrays, factor=1.05 if T > 100 else 1.5)  # few elements vary


@pytest.mark.gpu
@HEAD_SIZES
@pytest.mark.parametrize(
    "masks",
    [
        {"segment_ids": documents(1000, 1, 2, 1500, 64, 1529)},
        {"window": 1000},
        {"segment_ids": documents(3000, 1096), "window": 100},
    ],
    ids=["documents", "window", "both"],
)
def test_long_documents_and_windows(masks, H):
    q, k, v, _, _, d_out = make(4096, 8, 2, H=H)
    ids, window = masks.get("segment_ids"), masks.get("window")
    check_forward(q, k, v, factor=1.05, **masks)
    out, lse = attention_forward(
        q, k, v, segment_ids=ids, sliding_window=window, implementation="mosaic_gpu"
    )
    check(q, k, v, out, lse, d_out, factor=1.05, **masks)


@pytest.mark.gpu
@HEAD_SIZES
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_scores_that_are_equal_or_far_apart(scale, H):
    arrays = make(1000, H=H, scale=scale)
    check_forward(*arrays[:3], factor=1.1)
    check(*arrays, factor=1.1)


@pytest.mark.gpu
@HEAD_SIZES
def test_runs_are_equal(H):
    # To the last bit, but dq, whose sums come in any order.
    args = make(4096, 8, 2, H=H)
    forward = jax.jit(mosaic_gpu.flash_forward)
    out, lse = forward(*args[:3])
    for _ in range(5):
        again = forward(*args[:3])
        assert (again[0] == out).all() and (again[1] == lse).all()
    fn = jax.jit(mosaic_gpu.flash_backward)
    first = fn(*args)
    for _ in range(5):
        dq, dk, dv = fn(*args)
        assert (dk == first[1]).all() and (dv == first[2]).all()
        assert errors(dq, first[0])[0] < 1e-4


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    B, T, N, K, H = 4112, 128, 32, 8, 128
    q, k, v, d_out = (
        jax.random.normal(jax.random.key(i), (B, T, n, H), BF16)
        for i, n in enumerate((N, K, K, N))
    )
    assert q.size > 2**31
    out, lse = jax.jit(mosaic_gpu.flash_forward)(q, k, v)
    got = jax.jit(mosaic_gpu.flash_backward)(q, k, v, out, lse, d_out)

    def ends(*arrays):
        return [jnp.concatenate([a[:2], a[-2:]]) for a in arrays]

    want = forward(*ends(q, k, v))
    assert max(errors(ends(out, lse), list(want))) < 1e-2
    want = theirs(*ends(q, k, v), *want, *ends(d_out))
    assert max(errors(ends(*got), list(want))) < 1e-2
