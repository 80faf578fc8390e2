"""Packed documents on cuDNN: which call runs which document, and what comes of it.

cuDNN's calls are replaced by what they promise: attention inside each segment, and
NaN everywhere else. `test_gpu.py` has the real ones.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.compile_only import compile_step
from mst_jax.config import PRESETS, Config, DataConfig, OptimConfig, TrainConfig
from mst_jax.gpus import GPUS
from mst_jax.ops.attention import (
    attention_backward,
    attention_forward,
    cudnn,
    packed,
    reference_attention,
)
from tests.test_attention import errors, make

FAST = {"xla_backend_optimization_level": 0}


# --- the calls, as they are promised ---


def segment_attention(q, k, v, starts, lengths, size, *, causal, window):
    """Return out (NaN where undefined), logsumexp [S, N, L], and the weights' parts."""
    B, T, N, H = q.shape
    rows = B * T // size
    assert B * T == rows * size and starts.size % rows == 0 and starts.size >= 2 * rows
    tokens = starts[:, None] + jnp.arange(size)
    inside = jnp.arange(size) < lengths[:, None]
    qs, ks, vs = (
        a.reshape(B * T, *a.shape[2:]).at[tokens].get(mode="clip") for a in (q, k, v)
    )
    ks, vs = (jnp.repeat(a, N // k.shape[2], axis=2) for a in (ks, vs))
    scores = jnp.einsum("SQNH,SCNH->SNQC", qs, ks) / H**0.5
    distance = jnp.arange(size)[:, None] - jnp.arange(size)
    mask = inside[:, None, None]
    if causal:
        mask = mask & (distance >= 0)
    if window:
        mask = mask & (abs(distance) < window)
    scores = jnp.where(mask, scores, -1e30)  # a segment may have no key
    lse = jax.nn.logsumexp(scores, axis=-1)
    out = jnp.einsum("SNQC,SCNH->SQNH", jnp.exp(scores - lse[..., None]), vs)
    target = jnp.where(inside, tokens, B * T)
    flat = jnp.full((B * T, N, H), jnp.nan, q.dtype)
    flat = flat.at[target].set(out.astype(q.dtype), mode="drop")
    return flat.reshape(q.shape), jnp.where(inside[:, None], lse, jnp.nan)


def fake_forward(q, k, v, starts, lengths, size, **options):
    return segment_attention(q, k, v, starts, lengths, size, **options)


def fake_backward(q, k, v, out, stats, d_out, starts, lengths, size, **options):
    """The gradient of the segments, from the statistics that came back."""

    def fn(q, k, v):
        new, lse = segment_attention(q, k, v, starts, lengths, size, **options)
        return jnp.where(jnp.isnan(new), 0, new), (new, lse)

    _, vjp, (new, lse) = jax.vjp(fn, q, k, v, has_aux=True)
    covered = ~jnp.isnan(new).any((2, 3), keepdims=True)
    # What came back must be what the forward call gave, in its place.
    same = jnp.where(jnp.isnan(lse), 0, jnp.abs(lse - stats)).max() < 1e-5
    same &= jnp.where(covered, jnp.abs(new - out), 0).max() < 1e-5
    gradients = vjp(jnp.where(covered, d_out, 0))
    return [jnp.where(covered & same, a, jnp.nan) for a in gradients]


@pytest.fixture
def calls(monkeypatch):
    """Replace cuDNN's calls."""
    monkeypatch.setattr(cudnn, "segments_forward", fake_forward)
    monkeypatch.setattr(cudnn, "segments_backward", fake_backward)


def run(ids, N=2, K=1, causal=True, window=None):
    """Return ([out, dq, dk, dv], the same of the reference) for ids [B, T]."""
    ids = jnp.asarray(ids, jnp.int32)
    args, d_out = make(ids.shape[1], N=N, K=K, B=ids.shape[0])
    options = {"causal": causal, "window": window}

    @partial(jax.jit, compiler_options=FAST)
    def ours(args, d_out, ids):
        documents = packed.find_documents(ids)
        out, lse = packed.forward(*args, documents, **options)
        return out, *packed.backward(*args, documents, out, lse, d_out, **options)

    @partial(jax.jit, compiler_options=FAST)
    def theirs(args, d_out, ids):
        fn = partial(
            reference_attention, segment_ids=ids, causal=causal, sliding_window=window
        )
        out, vjp = jax.vjp(fn, *args)
        return out, *vjp(d_out)

    return ours(args, d_out, ids), theirs(args, d_out, ids)


def check(ids, **options):
    got, want = run(ids, **options)
    assert max(errors(got, want)) < 1e-5


def row(*lengths, padding=0):
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return np.append(ids, np.zeros(padding, int))


# --- values and gradients ---

ROWS = {
    "one": row(64),
    "halves": row(32, 32),
    "all levels": row(33, 16, 8, 4, 2, 1),
    "falling pad": row(20, 9, padding=35),
    "one token each end": row(1, 62, 1),
    "all pad": np.zeros(64, int),
    "just over a level": row(17, 17, 17, 13),
}


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
def test_documents(calls, monkeypatch, ids):
    monkeypatch.setattr(packed, "SMALLEST", 8)
    check(ids[None])


def test_rows_differ(calls, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 8)
    rows = [row(64), row(7, 50, 7), row(16, 16, 16, padding=16), row(*[8] * 8)]
    check(np.stack(rows), N=4, K=2)


@pytest.mark.parametrize("T", [1, 5, 17, 50, 61, 100])
@pytest.mark.parametrize("ratio", [2, 4])
def test_lengths_that_no_level_divides(calls, monkeypatch, T, ratio):
    monkeypatch.setattr(packed, "RATIO", ratio)
    monkeypatch.setattr(packed, "SMALLEST", 6)
    parts = [T] if T < 9 else [T // 2, T // 4, T - T // 2 - T // 4 - 3]
    check(np.stack([row(*parts, padding=T - sum(parts)), row(T)]))


@pytest.mark.parametrize("causal, window", [(False, None), (True, 5), (True, 1)])
def test_options(calls, monkeypatch, causal, window):
    monkeypatch.setattr(packed, "SMALLEST", 8)
    check(np.stack([row(40, 10, 14), row(64)]), causal=causal, window=window)


@pytest.mark.parametrize("seed", range(4))
def test_random_rows(calls, monkeypatch, seed):
    monkeypatch.setattr(packed, "SMALLEST", 8)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        ends = np.sort(rng.choice(np.arange(1, 80), rng.integers(1, 12), False))
        rows.append(np.searchsorted(ends, np.arange(80), "right") + 1)
        rows[-1][rng.integers(60, 81) :] = 0
    monkeypatch.setattr(packed, "RATIO", [2, 3, 4, 8][seed])
    check(np.stack(rows), N=2, K=2)


IRREGULAR = {
    "more short documents than the last level holds": np.arange(64) + 1,
    "ids fall": 100 - np.arange(64) // 16,
    "an id comes back": (np.arange(64) // 13) % 3 + 1,
    "zero comes back": np.repeat([0, 1, 0], [20, 24, 20]),
}


@pytest.mark.parametrize("ids", IRREGULAR.values(), ids=IRREGULAR)
def test_what_the_levels_do_not_hold_is_right_all_the_same(monkeypatch, ids):
    def poison(documents, lengths, one_level, carry, *arrays):
        return [jnp.full_like(a, jnp.nan) for a in carry]

    monkeypatch.setattr(packed, "SMALLEST", 8)
    monkeypatch.setattr(packed, "_for_levels", poison)
    check(np.stack([ids, row(40, 24)]))


def test_halves_and_head_groups(calls, monkeypatch):
    # What layer.py does: two heads' worth at a time, through the public functions.
    monkeypatch.setattr(packed, "SMALLEST", 8)
    monkeypatch.setattr("mst_jax.ops.attention.api._obstacle", lambda *_, **__: None)
    ids = jnp.asarray(row(30, 20, 10, padding=4)[None], jnp.int32)
    (q, k, v), d_out = make(64, N=4, K=2, B=1)
    options = {"segment_ids": packed.find_documents(ids), "implementation": "cudnn"}
    got = []
    for g in range(2):
        q_g, k_g, v_g = (
            q[:, :, 2 * g :][:, :, :2],
            k[:, :, g : g + 1],
            v[:, :, g : g + 1],
        )
        out, lse = attention_forward(q_g, k_g, v_g, **options)
        d = d_out[:, :, 2 * g :][:, :, :2]
        got.append((out, *attention_backward(q_g, k_g, v_g, out, lse, d, **options)))
    got = [jnp.concatenate(parts, 2) for parts in zip(*got, strict=True)]
    out, vjp = jax.vjp(partial(reference_attention, segment_ids=ids), q, k, v)
    assert max(errors(got, (out, *vjp(d_out)))) < 1e-5


# --- documents and levels ---


def test_level_lengths():
    assert packed.level_lengths(32768, 2, 16) == [2**i for i in range(15, 3, -1)]
    assert packed.level_lengths(32768, 4, 16) == [2**i for i in range(15, 4, -2)]
    assert packed.level_lengths(24576, 2, 16)[-1] == 24
    assert packed.level_lengths(100_000, 2, 16)[0] == 102_400
    assert packed.level_lengths(8, 2, 16) == [8]
    for T in range(1, 500):
        lengths = packed.level_lengths(T, 2, 16)
        assert T <= lengths[0] < T * (1 + 1 / 16) + 1
        assert all(a == 2 * b for a, b in zip(lengths, lengths[1:], strict=False))


@pytest.mark.parametrize("T, ratio", [(48, 2), (50, 2), (64, 4), (7, 2), (97, 3)])
def test_find_documents(monkeypatch, T, ratio):
    monkeypatch.setattr(packed, "RATIO", ratio)
    monkeypatch.setattr(packed, "SMALLEST", 8)
    rng = np.random.default_rng(T)
    ids = np.sort(rng.integers(0, 2 + T // 10, (3, T)))
    ids[1] = 1
    lengths = packed.level_lengths(T, ratio, 8)
    documents = packed.find_documents(jnp.asarray(ids))
    width = lengths[0]
    _, level, slot, inside, starts, sizes, *_ = map(np.asarray, documents)
    want = {i: [] for i in range(len(lengths))}
    for r, row in enumerate(ids):
        for t in range(width):
            at = r * width + t
            if t >= T:
                assert level[at] == -1
                continue
            if t == 0 or row[t] != row[t - 1]:
                size = sum(row[t:] == row[t])  # ids rise
                own = max(i for i, most in enumerate(lengths) if size <= most)
                want[own].append((at, size))
            assert level[at] == own
            assert slot[at] == len(want[own]) - 1
            assert inside[at] == at - want[own][-1][0]
    base = 0
    for i, found in want.items():
        count = packed._capacity(3, lengths, i)
        unused = [(3 * width, 0)] * (count - len(found))
        part = slice(base, base + count)
        assert list(zip(starts[part], sizes[part], strict=True)) == found + unused
        base += count
    assert base == starts.size


@pytest.mark.parametrize(
    "ids, regular",
    [
        ([[1, 1, 2, 3]], True),
        ([[1, 1, 2, 0]], True),
        ([[0, 0, 0, 0], [5, 5, 7, 7]], True),
        ([[0, 0, 1, 1]], True),
        ([[-1, 0, 2, 2]], True),
        ([[0, 1, 1, 0]], False),
        ([[1, 0, 2, 0]], False),
        ([[2, 2, 1, 1]], False),
        ([[1, 1, 1, 1], [1, 2, 1, 1]], False),
    ],
)
def test_regular(monkeypatch, ids, regular):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    documents = packed.find_documents(jnp.asarray(ids, jnp.int32))
    assert bool(documents.regular) == regular


def test_a_level_holds_every_packing(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 8)
    # As many documents as can be just longer than the next level, at every level.
    lengths = packed.level_lengths(256, 2, 8)
    for level, size in enumerate(lengths[:-1]):
        each = lengths[level + 1] + 1
        most = 256 // each
        assert most <= packed._capacity(1, lengths, level)
        ids = jnp.asarray(row(*[each] * most, padding=256 - most * each)[None])
        documents = packed.find_documents(ids)
        own, (starts, sizes, L) = packed._segments(documents, level, 1, lengths)
        assert L == size and bool(documents.held)
        assert own.sum() == most * each
        np.testing.assert_array_equal(starts[:most], np.arange(most) * each)
        np.testing.assert_array_equal(sizes[:most], each)
        np.testing.assert_array_equal(starts[most:], 256)
        np.testing.assert_array_equal(sizes[most:], 0)


def test_offsets_count_elements():
    q, k = jnp.zeros((2, 8, 6, 16)), jnp.zeros((2, 8, 2, 16))
    starts = jnp.array([0, 3, 8, 16, 16, 16, 16, 16], jnp.int32)
    lengths = jnp.array([3, 4, 8, 0, 0, 0, 0, 0], jnp.int32)
    arrays, operands = cudnn._segment_operands((q, k, k), starts, lengths, 4)
    assert arrays[0].shape == (4, 4, 6, 16) and arrays[1].shape == (4, 4, 2, 16)
    _, q_lengths, k_lengths, q_offsets, k_offsets, *_ = operands
    assert q_lengths.shape == (4, 2) and q_offsets.shape == (4, 3)
    np.testing.assert_array_equal(q_lengths.ravel(), lengths)
    np.testing.assert_array_equal(k_lengths.ravel(), lengths)
    ends = np.append(starts, [16] * 4)
    np.testing.assert_array_equal(q_offsets.ravel(), ends * 6 * 16)
    np.testing.assert_array_equal(k_offsets.ravel(), ends * 2 * 16)
    assert q_offsets.dtype == k_offsets.dtype == q_lengths.dtype == jnp.int32


# --- the real step, compiled for GPUs that are not there ---


@pytest.mark.compiled
@pytest.mark.parametrize(
    "gpu, attention, levels",
    [("h200", "cudnn", 6), ("h200", "xla", 0), ("a100-80gb", "auto", 0)],
)
def test_step_with_packing_runs_on_cudnn(gpu, attention, levels):
    model = PRESETS["tiny"]
    cfg = Config(
        model=model,
        data=DataConfig(seq_len=512, batch_size=2),
        optim=OptimConfig(param_dtype="bfloat16"),
        train=TrainConfig(
            compute_dtype="bfloat16", plan="save_attention", attention=attention
        ),
    )
    assert cfg.data.packing
    hlo = compile_step(cfg, model, GPUS[gpu]).hlo
    lines = [line for line in hlo.splitlines() if "custom_call_target" in line]
    calls = [line for line in lines if "__cudnn$fmhaSoftmax" in line]
    backward = sum("Backward" in line for line in calls)
    assert (len(calls) - backward, backward) == (levels, levels)
