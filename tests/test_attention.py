"""Attention against the formula in f32: values, gradients, masks, memory, errors."""

import inspect
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import needs_pallas

from mst_jax.ops.attention import (
    api,
    attention,
    attention_backward,
    attention_forward,
    choose_implementation,
    reference_attention,
)
from mst_jax.ops.attention.xla import _Mask, _mask, flash_backward, flash_forward


def make(T, N=2, K=1, H=16, B=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T), 4)
    heads = (N, K, K, N)
    arrays = [
        jax.random.normal(key, (B, T, n, H)).astype(dtype)
        for key, n in zip(keys, heads, strict=True)
    ]
    return arrays[:3], arrays[3]


def make_segments(kind, T, B=2):
    """Two different rows of segment ids."""
    t = np.arange(T)
    if kind == "packed":  # documents of uneven lengths, ids rise
        rows = [np.searchsorted(np.cumsum([5, T // 3, 1]), t, "right") + 1, t // 20]
    elif kind == "padded":  # the tail is padding, id 0
        rows = [np.where(t < T * 3 // 4, 1 + t // 40, 0), np.where(t < 3, 1, 0)]
    elif kind == "non_monotone":  # ids fall, and come back after another document
        rows = [(t // 13) % 3, 100 - t // 30]
    else:
        return None
    return jnp.asarray(np.stack(rows[:B]), jnp.int32)


def run(fn, args, d_out):
    """Return [out, dq, dk, dv] of fn(q, k, v), compiled fast rather than to be fast."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def all_of(args, d_out):
        out, vjp = jax.vjp(fn, *args)
        return out, *vjp(d_out.astype(out.dtype))

    return all_of(args, d_out)


def errors(got, want):
    def relative(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        # Where a gradient is zero (one key: softmax is 1), the output's size counts.
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.1 * math.sqrt(b.size))

    return [relative(a, b) for a, b in zip(got, want, strict=True)]


def flash(block, causal=True, sliding_window=None, segment_ids=None, softcap=None):
    """Return fn(q, k, v) -> out, differentiable, on blocks of this size."""
    options = {
        "causal": causal, "window": sliding_window, "softcap": softcap, "block": block,
    }  # fmt: skip

    @jax.custom_vjp
    def fn(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        out, lse = flash_forward(q, k, v, segment_ids, **options)
        return out, (q, k, v, segment_ids, out, lse)

    fn.defvjp(forward, lambda kept, d_out: flash_backward(*kept, d_out, **options))
    return fn


def check(T, options, segments=None, block=None, tolerance=1e-5, **shape):
    args, d_out = make(T, **shape)
    options = options | {"segment_ids": make_segments(segments, T)}
    if block is None:
        fn = partial(attention, implementation="xla", **options)
    else:
        fn = flash(block, **options)
    got = run(fn, args, d_out)
    want = run(partial(reference_attention, **options), args, d_out)
    assert max(errors(got, want)) < tolerance


@pytest.mark.parametrize("T", [1, 17, 64, 511, 512, 513])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(T, causal):
    check(T, {"causal": causal})


def test_several_blocks_of_the_default_size():
    check(1300, {}, segments="packed", B=2)


@pytest.mark.parametrize("N, K", [(1, 1), (4, 4), (4, 2), (6, 1)])
def test_groups(N, K):
    check(64, {}, N=N, K=K, block=16)


@pytest.mark.parametrize("T", [17, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_window(T, causal, window):
    check(T, {"causal": causal, "sliding_window": window}, block=32)


def test_window_with_the_default_block():
    # The last block's pad rows are farther from the last key than the window.
    check(513, {"sliding_window": 7})


@pytest.mark.parametrize("T", [17, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", ["packed", "padded", "non_monotone"])
def test_segments(T, causal, segments):
    check(T, {"causal": causal}, segments=segments, block=32)


@pytest.mark.parametrize("causal", [True, False])
def test_softcap(causal):
    check(130, {"causal": causal, "softcap": 1.5}, block=32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", ["packed", "padded", "non_monotone"])
@pytest.mark.parametrize("T, block", [(100, 16), (130, 32)])
def test_everything_together(causal, segments, T, block):
    options = {"causal": causal, "sliding_window": 7, "softcap": 2.0}
    check(T, options, segments=segments, block=block, N=4, K=2)


@pytest.mark.parametrize(
    "T, N, K, options, segments",
    [
        (64, 4, 4, {}, None),
        (17, 6, 1, {}, None),
        (130, 4, 2, {"sliding_window": 7}, "non_monotone"),
        (600, 2, 1, {"sliding_window": 100}, "packed"),
    ],
)
def test_the_two_halves_are_attention(T, N, K, options, segments):
    args, d_out = make(T, N=N, K=K)
    options = options | {
        "segment_ids": make_segments(segments, T),
        "implementation": "xla",
    }

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def halves(q, k, v, d_out):
        out, lse = attention_forward(q, k, v, **options)
        return lse, out, *attention_backward(q, k, v, out, lse, d_out, **options)

    lse, *got = halves(*args, d_out)
    want = run(partial(attention, **options), args, d_out)
    assert max(errors(got, want)) < 1e-6
    q, k = args[0], jnp.repeat(args[1], N // K, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
    t, s = np.mgrid[:T, :T]
    seen = (s <= t) & (t - s < options.get("sliding_window", T))
    if segments:
        ids = options["segment_ids"]
        seen = seen & (ids[:, :, None] == ids[:, None])[:, None]
    want = jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want, rtol=1e-5, atol=1e-5)


def plain(q, k, v, *, causal=True, sliding_window=None, segment_ids=None, softcap=None):
    """Attention in the dtype of its arguments, softmax in f32: what one writes."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q * q.shape[-1] ** -0.5, k)
    scores = scores.astype(jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    mask = distance[None] >= (0 if causal else -q.shape[1])
    if sliding_window:
        mask &= abs(distance) < sliding_window
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(q.dtype), v)


@pytest.mark.parametrize(
    "options, segments",
    [
        ({}, None),
        ({"causal": False}, None),
        ({}, "packed"),
        ({"sliding_window": 7}, "non_monotone"),
        ({"softcap": 2.0}, None),
    ],
)
@pytest.mark.parametrize("T, H", [(64, 16), (300, 24)])
def test_bf16_error_is_that_of_plain_bf16(options, segments, T, H):
    args, d_out = make(T, N=4, K=2, H=H, dtype=jnp.bfloat16)
    options = options | {"segment_ids": make_segments(segments, T)}
    want = run(partial(reference_attention, **options), args, d_out)
    ours = errors(run(flash(32, **options), args, d_out), want)
    theirs = errors(run(partial(plain, **options), args, d_out), want)
    for our, their in zip(ours, theirs, strict=True):
        assert our < 1.1 * their + 1e-4


def test_large_scores_stay_finite():
    args, d_out = make(100)
    q, k, v = args
    got = run(flash(32), (1e4 * q, 1e4 * k, v), d_out)
    assert all(np.isfinite(a).all() for a in got)
    # softmax is a one-hot there: every output is one of the values
    want = reference_attention(1e4 * q, 1e4 * k, v)
    assert errors(got[:1], [want])[0] < 1e-5


def test_no_quadratic_buffer():
    def compiled(T):
        args, d_out = jax.eval_shape(lambda: make(T, B=1))
        fn = jax.jit(lambda args, d_out: jax.vjp(flash(128), *args)[1](d_out))
        return fn.lower(args, d_out).compile()

    T = 2048
    gradient = compiled(T)
    assert f"{T},{T}]" not in gradient.as_text()
    sizes = [
        c.memory_analysis().temp_size_in_bytes for c in (gradient, compiled(2 * T))
    ]
    assert sizes[1] < 2.1 * sizes[0], sizes


@pytest.mark.parametrize(
    "T, block", [(1, 16), (40, 48), (512, 128), (1000, 256), (2048, 512), (65536, 512)]
)
def test_no_block_is_longer_than_a_quarter_of_a_sequence(T, block):
    # At 512 tokens one block was the whole T x T array, half of it masked.
    found, pad = _mask(jax.ShapeDtypeStruct((1, T, 1, 8), "float32"), None, {
        "causal": True, "window": None, "softcap": None,
    })  # fmt: skip
    assert found.block == block and (T + pad) % block == 0 and pad < block
    assert block <= 128 or block <= T // 4 + 16


def pairs(segments, block, causal=True, window=None):
    segments = jnp.asarray(segments, jnp.int32)
    mask = _Mask(segments.shape[1], block, causal, window, None)
    return np.asarray(mask.pairs(segments))


def test_blocks_of_different_documents_are_skipped():
    segments = np.repeat([[1, 2, 3, 4]], 16, axis=1)  # 4 documents, 2 blocks each
    blocks = pairs(segments, 8)
    want = np.kron(np.eye(4, dtype=bool), np.tril(np.ones((2, 2), bool)))
    np.testing.assert_array_equal(blocks, want)
    # One row of the batch that needs a pair is enough.
    both = pairs(np.concatenate([segments, np.ones_like(segments)]), 8)
    np.testing.assert_array_equal(both, np.tril(np.ones((8, 8), bool)))


def test_blocks_outside_the_window_are_skipped():
    one = np.ones((1, 64))
    i, j = np.mgrid[:8, :8]
    # The first query of a block sees itself and 7 more: the block before, not two.
    np.testing.assert_array_equal(pairs(one, 8, window=8), (i - j >= 0) & (i - j <= 1))
    np.testing.assert_array_equal(
        pairs(one, 8, causal=False, window=8), abs(i - j) <= 1
    )
    np.testing.assert_array_equal(pairs(one, 8, window=1), i == j)
    np.testing.assert_array_equal(pairs(one, 8), i >= j)


def test_skipped_blocks_are_not_read():
    # A NaN in one document stays there: a computed pair would spread 0 * NaN.
    (q, k, v), d_out = make(64, B=1)
    segments = jnp.repeat(jnp.array([[1, 2]]), 32, axis=1)
    v = v.at[:, :32].set(jnp.nan)
    out, dq, dk, _ = run(flash(16, segment_ids=segments), (q, k, v), d_out)
    assert np.isnan(out[:, :32]).all()
    for a in (out, dq, dk):
        assert np.isfinite(a[:, 32:]).all()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float32}, "not float32"),
        ({"H": 12}, "head size 12"),
        ({"H": 264}, "head size 264"),
        ({"softcap": 2.0}, "softcap"),
        ({"sliding_window": 2, "causal": False}, "window only with causal"),
    ],
)
def test_explicit_cudnn_says_why_it_cannot(change, reason):
    shape = {k: v for k, v in change.items() if k in ("dtype", "H")}
    options = {k: v for k, v in change.items() if k not in shape}
    args, _ = make(8, **{"dtype": jnp.bfloat16, **shape})
    with pytest.raises(NotImplementedError, match=reason):
        attention(*args, implementation="cudnn", **options)


def test_choice_says_why():
    assert choose_implementation(64, jnp.float32, segmented=False) == (
        "xla",
        "not cudnn: takes bfloat16 and float16, not float32",
    )
    choice = choose_implementation(64, jnp.bfloat16, segmented=False, softcap=1.0)
    assert choice == ("xla", "not cudnn: has no softcap")
    if jax.default_backend() == "cpu":
        choice = choose_implementation(64, jnp.bfloat16, segmented=False)
        assert choice == ("xla", "not cudnn: there is no GPU (cpu)")


@needs_pallas
def test_hopper_takes_the_kernel_where_it_can(monkeypatch):
    def choose(H=128, dtype=jnp.bfloat16, T=8192, capability=(9, 0), **options):
        options = {"segmented": False, "shape": (1, T, 32), **options}
        return choose_implementation(H, dtype, capability=capability, **options)

    limits = api.mosaic_gpu.limits
    monkeypatch.setattr(limits, "REGISTERS_MOVE", True)
    assert choose() == ("mosaic_gpu", "this GPU has it")
    for options, why in (
        ({"H": 96}, "head size 96 is none of (64, 128)"),
        ({"dtype": jnp.float16}, "takes bfloat16, not float16"),
        ({"T": 100}, "T=100 is no multiple of 8"),
        ({"capability": (8, 0)}, "compute capability 8.0 is not 9.0 (Hopper)"),
    ):
        name, said = choose(**options)
        assert name == "cudnn" and said.startswith("not mosaic_gpu: ") and why in said
        with pytest.raises(NotImplementedError, match=re.escape(why)):
            choose(**options, asked="mosaic_gpu")
        assert choose(**options, asked="cudnn") == ("cudnn", "as asked for")
    for options in ({"segmented": True}, {"sliding_window": 4096}, {"T": 2**19}):
        assert choose(**options, asked="mosaic_gpu") == ("mosaic_gpu", "as asked for")
    for registers_move, why in (
        (True, "this GPU has it"),
        (False, "not mosaic_gpu: on JAX 0.12 it is faster than cuDNN only up to 8192"),
    ):
        monkeypatch.setattr(limits, "REGISTERS_MOVE", registers_move)
        assert choose(T=32768)[1].startswith(why)
        for options, own in (
            ({"segmented": True}, True), ({"segmented": True, "H": 64}, True),
            ({"sliding_window": 4096}, registers_move), ({"H": 64}, False),
        ):  # fmt: skip
            for asked, why in (
                (None, "this GPU has it"),
                ("mosaic_gpu", "as asked for"),
            ):
                name, said = choose(T=32768, **options, asked=asked)
                assert name == "mosaic_gpu" and said.startswith(why)
                assert ("forward in cuDNN" in said) != own, (options, said)
    for value in ("", "=true", "=True", "=1", "=1 --c=2"):
        monkeypatch.setenv("XLA_FLAGS", f"--a=1 --xla_gpu_deterministic_ops{value}")
        assert choose()[1].startswith("not mosaic_gpu: adds up dq in no fixed order")
    for value in ("--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_opsx"):
        monkeypatch.setenv("XLA_FLAGS", value)
        assert choose()[0] == "mosaic_gpu"


@pytest.mark.parametrize(
    "capability, head_size, segmented, reason",
    [
        ((7, 5), 64, False, "compute capability 7.5 is below 8.0"),
        ((8, 6), 128, False, None),
        ((8, 6), 256, False, "head size 256 needs compute capability 9.0"),
        ((8, 6), 128, True, "packed documents need compute capability 9.0, this is 8"),
        ((9, 0), 128, True, None),
        ((10, 0), 256, True, None),
    ],
)
def test_choice_by_device(monkeypatch, capability, head_size, segmented, reason):
    monkeypatch.setattr(api, "compute_capability", lambda: capability)
    monkeypatch.setattr(api.mosaic_gpu, "obstacle", lambda *_, **__: "a test")
    name, why = choose_implementation(head_size, jnp.bfloat16, segmented=segmented)
    assert name == ("xla" if reason else "cudnn")
    assert why.startswith(
        f"not cudnn: {reason}" if reason else "not mosaic_gpu: a test"
    )
    if segmented and reason:
        args, _ = make(8, dtype=jnp.bfloat16)
        ids = jnp.ones((2, 8), jnp.int32)
        with pytest.raises(NotImplementedError, match=reason):
            attention(*args, segment_ids=ids, implementation="cudnn")


def test_packed_documents_run_on_cudnn(monkeypatch):
    monkeypatch.setattr(api, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(api.mosaic_gpu, "obstacle", lambda *_, **__: "a test")
    args, _ = make(8, dtype=jnp.bfloat16)
    ids, options = jnp.ones((2, 8), jnp.int32), (True, None)
    for asked, used in ((None, "cudnn"), ("cudnn", "cudnn"), ("xla", "xla")):
        assert api._choose(*args, *options, ids, None, asked).implementation == used


def test_packed_offsets_have_32_bits(monkeypatch):
    monkeypatch.setattr(api, "compute_capability", lambda: (9, 0))

    def choose(T, N, segmented=True):
        options = {"segmented": segmented, "shape": (1, T, N)}
        return choose_implementation(128, jnp.bfloat16, **options)

    monkeypatch.setattr(api.mosaic_gpu, "obstacle", lambda *_, **__: "a test")
    assert choose(400_000, 32) == ("cudnn", "not mosaic_gpu: a test")
    assert choose(524_288, 32, segmented=False)[0] == "cudnn"
    name, why = choose(524_288, 32)
    assert name == "xla" and why.endswith("take more head groups")
    assert choose(524_288, 4)[0] == "cudnn"


def test_unknown_implementation():
    args, _ = make(8)
    with pytest.raises(NotImplementedError, match="implementation='triton'"):
        attention(*args, implementation="triton")


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 8, 3, 16), (2, 8, 2, 16), (2, 8, 2, 16)],  # K does not divide N
        [(2, 8, 2, 16), (2, 8, 2, 8), (2, 8, 2, 8)],  # another head size
        [(2, 8, 2, 16), (2, 9, 2, 16), (2, 9, 2, 16)],  # another length
        [(2, 8, 2, 16), (2, 8, 2, 16), (2, 8, 1, 16)],  # k is not like v
        [(8, 2, 16), (8, 2, 16), (8, 2, 16)],  # no batch
    ],
)
def test_bad_shapes(shapes):
    unchecked = inspect.unwrap(attention)  # jaxtyping would be first to complain
    with pytest.raises(ValueError, match="shape"):
        unchecked(*(jnp.ones(s) for s in shapes))


@pytest.mark.parametrize("shape", [(2, 16), (1, 8), (2, 4), (8,)])
def test_segment_ids_of_another_shape(shape):
    args, _ = make(8)
    with pytest.raises(ValueError, match=r"segment_ids of .* do not fit"):
        inspect.unwrap(attention)(*args, segment_ids=jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("name", ["cudnn", "mosaic_gpu"])
@pytest.mark.parametrize("segmented", [False, True])
def test_what_is_asked_for_needs_its_gpu(monkeypatch, name, segmented):
    args, _ = make(8, dtype=jnp.bfloat16, H=128)
    ids = jnp.ones((2, 8), jnp.int32) if segmented else None
    for there, why in ((None, "there is no GPU"), ((7, 5), "compute capability 7.5")):
        monkeypatch.setattr(api, "compute_capability", lambda there=there: there)
        monkeypatch.setattr(api.mosaic_gpu, "obstacle", lambda *_, **__: None)
        with pytest.raises(NotImplementedError, match=f"{name}'.*{why}.*use 'xla'"):
            attention(*args, segment_ids=ids, implementation=name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window": -3}, "sliding_window=-3"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_bad_options(options, message):
    args, _ = make(8)
    with pytest.raises(ValueError, match=message):
        attention(*args, **options)
