"""The Hopper kernels of the head's loss: interpreted, lowered, compiled, on a GPU."""

from contextlib import contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from mosaic import ON_GPU, compile_for_h200, errors, needs_pallas, sometimes

from mst_jax import linear_cross_entropy
from mst_jax.ops.linear_cross_entropy import (
    api,
    choose_implementation,
    mosaic_gpu,
)
from mst_jax.ops.linear_cross_entropy.loss import Options
from mst_jax.ops.matmul import mosaic_gpu as core

OPTIONS = [
    {},
    {"z_loss": 1e-2},
    {"logit_softcap": 3.0},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "label_smoothing": 0.2},
    {"z_loss": 1e-2, "logit_softcap": 2.0},
]


@pytest.fixture
def kernels(monkeypatch):
    """Let the kernels run here: as they are on a GPU, interpreted elsewhere."""
    if ON_GPU:
        return
    monkeypatch.setattr(api, "device_obstacle", lambda *_: None)


@contextmanager
def interpreted():
    kernel = mosaic_gpu.matmul

    def matmul(a, b, *, transpose_a=False, transpose_b=False, total=None, **options):
        if total is None:
            options |= {"transpose_a": transpose_a, "transpose_b": transpose_b}
            return kernel(a, b, **options)
        # test_matmul has the sums in f32: slow in the interpreter.
        assert transpose_a and not transpose_b
        return total + jnp.matmul(a.T, b, preferred_element_type=jnp.float32)

    with mosaic.interpreted(), pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(mosaic_gpu, "matmul", matmul)
        yield


def make(T, D, V, B=1, scale=2.0, masked=0.2):
    keys = jax.random.split(jax.random.key(T * V), 4)
    x = jax.random.normal(keys[0], (B, T, D)).astype(jnp.bfloat16)
    w = (jax.random.normal(keys[1], (D, V)) * scale / D**0.5).astype(jnp.bfloat16)
    y = jax.random.randint(keys[2], (B, T), 0, V)
    return x, w, jnp.where(jax.random.bernoulli(keys[3], masked, y.shape), -100, y)


def run(implementation, x, w, y, argnums=(0, 1), weights=None, **options):
    """Return (the sum, its gradients)."""

    def loss(x, w, weights):
        return linear_cross_entropy(
            x, w, y, token_weights=weights, implementation=implementation, **options
        )[0]

    if weights is None:
        weights = jnp.ones(y.shape)
    with interpreted() if implementation == "mosaic_gpu" else nullcontext():
        return jax.block_until_ready(jax.value_and_grad(loss, argnums)(x, w, weights))


def exact(x, w, y, weights=None, z_loss=0.0, logit_softcap=None, label_smoothing=0.0):
    """The same in f64, of the sum and of its gradients to x, w and the weights."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    D, V = w.shape
    shape, x, y = x.shape, x.reshape(-1, D), np.asarray(y).reshape(-1)
    keep = y != -100
    weights = np.ones(y.shape) if weights is None else np.asarray(weights).reshape(-1)
    weights = keep * weights.astype(np.float64)
    logits = x @ w
    slope = 1.0
    if cap := logit_softcap:
        logits = cap * np.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    target = np.full((len(y), V), label_smoothing / V)
    target[np.arange(len(y)), np.where(keep, y, 0)] += 1 - label_smoothing
    losses = lse - (target * logits).sum(-1) + z_loss * lse**2
    dlogits = np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - target
    dlogits *= slope * weights[:, None]
    gradients = (dlogits @ w.T).reshape(shape), x.T @ dlogits
    return (losses * weights).sum(), (*gradients, (losses * keep).reshape(shape[:-1]))


def assert_no_worse_than_xla(
    x, w, y, chunk_size=None, vocab_chunk_size=None, weights=None, **options
):
    want = exact(x, w, y, weights, **options)
    options |= {"chunk_size": chunk_size, "vocab_chunk_size": vocab_chunk_size}
    options |= {"weights": weights}
    argnums = (0, 1, 2)
    theirs = errors(run("xla", x, w, y, argnums, **options), want)
    ours = errors(run("mosaic_gpu", x, w, y, argnums, **options), want)
    theirs[0] = max(theirs[0], theirs[-1])  # a sum may be lucky, its terms are not
    for our, their in zip(ours, theirs, strict=True):
        # 1%: the rounding of p adds 1/64 to the variance of that to bf16. 1e-6: the
        # last bits of f32 in another order.
        assert our <= 1.01 * their + 1e-6, (ours, theirs)


@needs_pallas
@pytest.mark.parametrize(
    "T, D, V, B, chunk_size",
    sometimes(
        [
            (1, 64, 8, 1, None),
            (130, 192, 523, 1, None),  # no dimension fits a tile
            (300, 64, 512, 2, 77),
            (257, 128, 1000, 1, 256),
        ],
        always=[(1, 64, 8, 1, None)],
    ),
)
def test_value_and_gradients(kernels, T, D, V, B, chunk_size):
    x, w, y = make(T, D, V, B)
    assert_no_worse_than_xla(x, w, y, chunk_size=chunk_size)


@needs_pallas
@pytest.mark.parametrize(
    "T, D, V, size",
    sometimes(
        [
            (1, 64, 8, 8),
            (130, 192, 523, 256),  # the last chunk has 11 columns
            (257, 64, 1000, 300),  # no chunk is TMA's, labels beyond it or before
        ],
        always=[(1, 64, 8, 8)],
    ),
)
def test_gradient_by_columns(kernels, T, D, V, size):
    x, w, y = make(T, D, V)
    assert_no_worse_than_xla(x, w, y, vocab_chunk_size=size)


@needs_pallas
@pytest.mark.interpreted
def test_columns_of_padding_do_not_count(kernels):
    # Logits of -60 in a chunk of 11 columns, beside 53 of TMA's that would be 0.
    x, w, y = make(64, 64, 267, masked=0.0)
    x = x.at[..., 0].set(8)
    w = w.at[0].set(-7.5)
    assert_no_worse_than_xla(x, w, y, vocab_chunk_size=256)


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS)
def test_options_by_columns(kernels, options):
    x, w, y = make(130, 64, 523)
    weights = jax.random.uniform(jax.random.key(9), y.shape)
    assert_no_worse_than_xla(x, w, y, weights=weights, vocab_chunk_size=192, **options)


@needs_pallas
@pytest.mark.interpreted
def test_columns_of_a_transposed_head(kernels):
    x, w, y = make(70, 64, 523)
    total, (dx, dw) = run("mosaic_gpu", x, w, y, vocab_chunk_size=200)
    found, (dx_too, dw_too) = run(
        "mosaic_gpu", x, w.T, y, vocab_chunk_size=200, transposed=True
    )
    assert found == total and (dx_too == dx).all() and (dw_too.T == dw).all()


@needs_pallas
@pytest.mark.interpreted
def test_a_transposed_head_is_the_same_head(kernels):
    x, w, y = make(70, 64, 523)
    total, (dx, dw) = run("mosaic_gpu", x, w, y)
    found, (dx_too, dw_too) = run("mosaic_gpu", x, w.T, y, transposed=True)
    assert found == total and (dx_too == dx).all() and (dw_too.T == dw).all()


@needs_pallas
@pytest.mark.interpreted
def test_tiles_one_after_the_other(kernels, monkeypatch):
    # Few multiprocessors, and a depth of one step: do the loads of a block's next tile
    # wait for this one to be read?
    monkeypatch.setattr(core, "num_sms", lambda: 2)
    x, w, y = make(40, 64, 700)
    assert_no_worse_than_xla(x, w, y)


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kernels, options):
    x, w, y = make(130, 64, 523)
    weights = jax.random.uniform(jax.random.key(9), y.shape)
    assert_no_worse_than_xla(x, w, y, weights=weights, **options)


@needs_pallas
@pytest.mark.parametrize(
    "scale", sometimes([(0.0,), (100.0,), (1e4,)], always=[(100.0,)])
)
def test_all_equal_and_large_logits(kernels, scale):
    x, w, y = make(40, 64, 300, scale=scale, masked=0.0)
    assert_no_worse_than_xla(x, w, y)


@needs_pallas
@pytest.mark.interpreted
def test_a_confident_model(kernels):
    # p of the label close to 1: dlogits is a small difference there.
    x, w, _ = make(64, 64, 300, scale=20.0)
    logits = jnp.einsum("BTD,DV->BTV", x, w, preferred_element_type=jnp.float32)
    assert_no_worse_than_xla(x, w, logits.argmax(-1))


@needs_pallas
@pytest.mark.interpreted
def test_vocabulary_masked_with_minus_infinity(kernels):
    # A head whose columns 3 and 256.. are -inf, so that a whole tile is.
    x, w, y = make(64, 64, 600, masked=0.0)
    x, y = jnp.abs(x)[0], y[0] % 3
    w = w.at[:, 3].set(-jnp.inf).at[:, 256:].set(-jnp.inf)
    options = Options(0.0, None, 0.0, "mosaic_gpu")
    prepared = mosaic_gpu.prepare(options, w)
    weights, dweight = jnp.ones(y.shape), jnp.zeros(prepared.shape)
    arguments = x, prepared, y, weights, dweight, False, 600
    with interpreted():
        losses, found, _, dweight = mosaic_gpu.chunk_gradients(options, *arguments)
        masked = mosaic_gpu.columns_gradient(
            options, x, prepared[:, 256:], y - 256, weights, found, 344, jnp.float32,
            600,
        )  # fmt: skip
    logits = x.astype(jnp.float32) @ w.astype(jnp.float32)
    want = -jax.nn.log_softmax(logits)[jnp.arange(64), y]
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    dlogits = jax.nn.softmax(logits) - jax.nn.one_hot(y, 600)
    want, dweight = x.astype(jnp.float32).T @ dlogits, dweight[:, :600]
    assert errors(dweight, want)[0] < 4e-3
    assert (dweight[:, 3] == 0).all() and (dweight[:, 256:] == 0).all()
    assert (masked == 0).all()


@needs_pallas
@pytest.mark.interpreted
def test_an_ignored_row_may_hold_anything(kernels):
    x, w, y = make(40, 64, 300, masked=0.0)
    y = y.at[0, 5].set(-100)
    value, grads = run("mosaic_gpu", x.at[0, 5].set(jnp.nan), w, y)
    want, want_grads = run("mosaic_gpu", x.at[0, 5].set(0), w, y)
    assert value == want
    assert (grads[0] == want_grads[0]).all()


@needs_pallas
def test_all_masked_is_zero_not_nan(kernels):
    x, w, y = make(40, 64, 300)
    value, grads = run("mosaic_gpu", x, w, jnp.full_like(y, -100))
    assert value == 0 and all((g == 0).all() for g in grads)


@needs_pallas
@pytest.mark.interpreted
@pytest.mark.parametrize("label", [-1, 300, 10**6])
def test_label_outside_the_vocabulary_is_nan(kernels, label):
    x, w, y = make(40, 64, 300)
    assert np.isnan(run("mosaic_gpu", x, w, y.at[0, 3].set(label))[0])


@needs_pallas
@pytest.mark.interpreted
def test_value_alone_is_the_same_and_writes_no_logits(kernels):
    x, w, y = make(130, 64, 1000)

    def loss(x, w):
        return linear_cross_entropy(x, w, y, implementation="mosaic_gpu")[0]

    with interpreted():
        assert loss(x, w) == jax.value_and_grad(loss)(x, w)[0]
    # Rows and columns in TMA's multiples of 8 and 64.
    assert "[136,1024]" not in str(jax.make_jaxpr(loss)(x, w))
    assert "[136,1024]" in str(jax.make_jaxpr(jax.grad(loss))(x, w))


@needs_pallas
def test_what_is_frozen_costs_nothing(kernels, monkeypatch):
    x, w, y = make(130, 64, 1000)
    kernel, calls = mosaic_gpu.matmul, []

    def matmul(*args, **options):
        calls.append(options)
        return kernel(*args, **options)

    monkeypatch.setattr(mosaic_gpu, "matmul", matmul)

    def products(argnums):
        calls.clear()

        def loss(x, w):
            return linear_cross_entropy(x, w, y, implementation="mosaic_gpu")[0]

        jax.make_jaxpr(jax.grad(loss, argnums))(x, w)
        return len(calls)

    assert [products((0, 1)), products(0), products(1)] == [2, 1, 1]


@needs_pallas
def test_obstacles_have_names(kernels):
    x, w, y = make(16, 64, 256)
    cases = [
        ((x.astype(jnp.float32), w), {}, "float32"),
        ((x[..., :60], w[:60]), {}, "D=60"),
        ((x, w), {"logit_softcap": 3.0, "label_smoothing": 0.1}, "together"),
    ]
    for (x, w), options, message in cases:
        with pytest.raises(NotImplementedError, match=message):
            linear_cross_entropy(x, w, y, implementation="mosaic_gpu", **options)


def test_this_machine_is_the_obstacle():
    if ON_GPU:
        pytest.skip("there is a GPU")
    x, w, y = make(16, 64, 256)
    with pytest.raises(NotImplementedError, match="no GPU|older than 0.11.2"):
        linear_cross_entropy(x, w, y, implementation="mosaic_gpu")
    assert linear_cross_entropy(x, w, y)[1] > 0
    name, why = choose_implementation(64, jnp.bfloat16)
    assert name == "xla" and why


@needs_pallas
@pytest.mark.parametrize("options", OPTIONS)
def test_lowers_for_cuda_at_8b_width(kernels, options):
    if ON_GPU:
        pytest.skip("the GPU tests run it")

    def loss(x, w, y):
        return linear_cross_entropy(
            x, w, y, implementation="mosaic_gpu", chunk_size=4096, **options
        )[0]

    shapes = [
        jax.ShapeDtypeStruct((1, 8192, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096, 128256), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 8192), jnp.int32),
    ]
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 4  # statistics, dlogits, dX, dW


COMPILE = """
from mst_jax import linear_cross_entropy
from mst_jax.ops.linear_cross_entropy import api
api.device_obstacle = lambda *_: None
def loss(x, w, y):
    return linear_cross_entropy(
        x, w, y, CHUNKS, implementation="mosaic_gpu")[0]
compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
    array((1, 8192, 4096), jnp.bfloat16), array((4096, 128256), jnp.bfloat16),
    array((1, 8192), jnp.int32)).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
print(compiled.as_text())
"""


@needs_pallas
@pytest.mark.compiled
def test_compiled_for_an_h200_no_logits_are_copied():
    temporaries, _, hlo = compile_for_h200(
        COMPILE.replace("CHUNKS", "chunk_size=4096")
    ).partition("\n")
    kernels = [line for line in hlo.splitlines() if "mosaic_gpu_v2" in line]
    in_place = [k for k in kernels if "output_to_operand_aliasing={{}: (0, {})}" in k]
    assert len(in_place) == 1 and "ROOT" not in in_place[0], in_place
    copies = [line for line in hlo.splitlines() if " = bf16[4096,128256]" in line]
    assert not any(" copy(" in line for line in copies), copies
    # The f32 gradient of the head, one chunk's logits at most, and little else.
    assert int(temporaries) < 4 * 4096 * 128256 + 2 * 4096 * 128256 + 2**27


@needs_pallas
@pytest.mark.compiled
def test_compiled_by_columns_the_head_is_not_copied():
    how = "chunk_size=1024, vocab_chunk_size=8192"
    text = compile_for_h200(COMPILE.replace("CHUNKS", how))
    temporaries, _, hlo = text.partition("\n")
    made = [line for line in hlo.splitlines() if " = bf16[4096,128256]" in line]
    assert not any(" copy(" in line for line in made), made
    assert "f32[4096,128256]" not in hlo
    # Some columns of the head or of its gradient and their logits, and little else.
    assert int(temporaries) < 2 * 8192 * (4096 + 8192) + 2**24


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [None, 8192])
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 2, 4)])
def test_at_8b_width(options, columns):
    x, w, y = make(512, 4096, 128256)
    options = options | {"chunk_size": 200, "vocab_chunk_size": columns}
    assert_no_worse_than_xla(x, w, y, **options)


@pytest.mark.gpu
def test_runs_are_bit_equal():
    x, w, y = make(4096, 4096, 128256)
    loss = jax.jit(
        jax.value_and_grad(
            partial(
                lambda x, w, y: linear_cross_entropy(
                    x, w, y, implementation="mosaic_gpu", chunk_size=4096
                )[0]
            ),
            (0, 1),
        )
    )
    first = loss(x, w, y)
    for _ in range(20):
        again = loss(x, w, y)
        assert all(
            bool((a == b).all())
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
        )


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_in_a_chunk():
    T, D, V = 17408, 512, 128256
    assert T * V > 2**31
    x, w, y = make(T, D, V)
    value, (dx, dw) = run("mosaic_gpu", x, w, y, chunk_size=T)
    want, (want_dx, want_dw) = run("xla", x, w, y, chunk_size=2048)
    assert abs(float(value / want) - 1) < 1e-5
    assert max(errors((dx, dw), (want_dx, want_dw))) < 5e-3
    last = slice(T - 300, T)
    assert errors(dx[:, last], want_dx[:, last])[0] < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("V", [8, 64, 128, 192, 523])
def test_vocabularies_smaller_than_a_tile(V):
    assert_no_worse_than_xla(*make(1000, 1024, V))
