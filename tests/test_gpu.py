"""What only a GPU shows: cuDNN, bf16 at the width of an 8B model, long sequences.

Llama3-8B's width: D=4096, F=14336, V=128256, 32 query and 8 key/value heads of 128.
References are computed in f32 on the GPU too, in blocks that fit.
"""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic import jit_reference, norms

from mst_jax.checkpoint import Checkpoints
from mst_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.loss import next_token_loss
from mst_jax.model import from_params, init_params
from mst_jax.ops.attention import attention, choose_implementation
from mst_jax.ops.linear_cross_entropy import linear_cross_entropy
from mst_jax.ops.matmul import device_obstacle, obstacle
from mst_jax.ops.swiglu import swiglu
from mst_jax.sharding import make_mesh
from mst_jax.train_step import init_train_state, make_gradients, make_train_step

pytestmark = pytest.mark.gpu

N, K, H = 32, 8, 128
D, F, V = 4096, 14336, 128256
LENGTHS = (4096, 8192)
BLOCK = 1024  # of the references
OP_LENGTH = 4096  # of swiglu and linear_cross_entropy
MODEL_LENGTH = 4096
STEP_LENGTH = 16384


def errors(got, want):
    """Return relative errors, of the norms, each computed on the device."""
    pairs = (norms(a, b) for a, b in zip(got, want, strict=True))
    found = [float(difference / norm) for difference, norm in pairs]
    assert np.isfinite(found).all()
    return found


def assert_no_worse(ours, theirs, factor=1.2, epsilon=1e-4):
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our < factor * their + epsilon, (i, ours, theirs)


def normal(seed, *shape, scale=1.0, dtype=jnp.bfloat16):
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def blockwise(q, k, v, segment_ids, *, block=BLOCK):
    """Causal attention in the dtype of q, scores and softmax of a query block in f32.

    In f32 the reference, in bf16 what one would write without flash attention.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, groups, axis=2) for a in (k, v))
    precision = "highest" if q.dtype == jnp.float32 else None

    @jax.checkpoint
    def one(start):
        q_i = jax.lax.dynamic_slice_in_dim(q, start, block, 1)
        index = start + jnp.arange(block)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q_i, k, precision=precision)
        scores = scores.astype(jnp.float32) * q.shape[-1] ** -0.5
        mask = (index[:, None] >= jnp.arange(q.shape[1]))[None]
        if segment_ids is not None:
            segment_i = jax.lax.dynamic_slice_in_dim(segment_ids, start, block, 1)
            mask = mask & (segment_i[:, :, None] == segment_ids[:, None])
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        weights = weights.astype(q.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision=precision)

    out = jax.lax.map(one, jnp.arange(0, q.shape[1], block))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def jit_for(x):
    return jit_reference if x.dtype == jnp.float32 else jax.jit


def out_and_gradients(fn, args, d_out):
    @jit_for(args[0])
    def run(args, d_out):
        out, vjp = jax.vjp(fn, *args)
        return out, *vjp(d_out.astype(out.dtype))

    return run(args, d_out)


def make_attention(T):
    heads = enumerate((N, K, K, N))
    q, k, v, d_out = (normal(seed, 1, T, n, H) for seed, n in heads)
    return (q, k, v), d_out


def check_attention(T, implementation):
    args, d_out = make_attention(T)
    wide = [a.astype(jnp.float32) for a in args]
    plain = partial(blockwise, segment_ids=None, block=min(BLOCK, T))
    want = out_and_gradients(plain, wide, d_out)
    theirs = errors(out_and_gradients(plain, args, d_out), want)
    fn = partial(attention, implementation=implementation)
    got = out_and_gradients(fn, args, d_out)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 4
    assert_no_worse(errors(got, want), theirs)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "cudnn", "xla"])
def test_attention(T, implementation):
    check_attention(T, implementation)


def documents(T, *lengths):
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[:T]
    return jnp.asarray(np.pad(ids, (0, T - len(ids)))[None], jnp.int32)


def packings(T):
    random = np.random.default_rng(0).integers(1, T // 4, 32)
    yield documents(T, *random)
    yield documents(T, T)
    yield documents(T, 1, T // 2 + 1, 1, 1, 17, T // 3, 2)  # and padding
    yield documents(T, *[T // 8] * 8)[:, ::-1]  # what the levels do not take


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "cudnn", "xla"])
def test_packed_attention(T, implementation):
    args, d_out = make_attention(T)

    def program(fn, jit=jax.jit):
        @jit
        def run(args, d_out, ids):
            out, vjp = jax.vjp(partial(fn, segment_ids=ids), *args)
            return out, *vjp(d_out.astype(out.dtype))

        return run

    plain = program(partial(blockwise, block=BLOCK), jit_reference)
    ours = program(partial(attention, implementation=implementation))
    for ids in packings(T):
        want = plain([a.astype(jnp.float32) for a in args], d_out, ids)
        theirs = errors(plain(args, d_out, ids), want)
        assert_no_worse(errors(ours(args, d_out, ids), want), theirs)


@pytest.mark.parametrize("T, window, head_size", [(4096, 100, H), (5000, 1000, 64)])
def test_packed_attention_is_that_of_xla(T, window, head_size):
    # Sliding windows, another head size, a length that the levels do not divide, and
    # two rows.
    heads = enumerate((N, K, K, N))
    q, k, v, d_out = (normal(seed, 2, T, n, head_size) for seed, n in heads)
    rows = [documents(T, 700, 3, 1800, 1, 1, 900), documents(T, T - 40)]
    options = {"segment_ids": jnp.concatenate(rows), "sliding_window": window}

    def run(implementation):
        fn = partial(attention, implementation=implementation, **options)
        return out_and_gradients(fn, (q, k, v), d_out)

    assert max(errors(run("cudnn"), run("xla"))) < 1e-2  # both are within 5e-3 of f32


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "cudnn"])
def test_packed_documents_cost_what_their_lengths_cost(implementation):
    T = 32768
    args, d_out = make_attention(T)

    @jax.jit
    def step(args, d_out, segment_ids):
        fn = partial(attention, segment_ids=segment_ids, implementation=implementation)
        return jax.vjp(fn, *args)[1](d_out)

    def seconds(segment_ids):
        began = time.perf_counter()
        jax.block_until_ready(step(args, d_out, segment_ids))
        return time.perf_counter() - began

    rows = documents(T, T), documents(T, T // 2, T // 2)
    rounds = [[seconds(ids) for ids in rows] for _ in range(11)]
    one, two = map(min, zip(*rounds[1:], strict=True))  # the first compiles
    assert two < 0.6 * one, (two, one)


@pytest.mark.parametrize("window", [1, 1000])
def test_cudnn_window_is_that_of_xla(window):
    args, d_out = make_attention(LENGTHS[0])

    def run(implementation):
        fn = partial(attention, implementation=implementation, sliding_window=window)
        return out_and_gradients(fn, args, d_out)

    got, want = run("cudnn"), run("xla")
    if window == 1:  # out is v; the gradients of q and k are 0
        got, want = (got[0], got[3]), (want[0], want[3])
    assert max(errors(got, want)) < 1e-2  # both are within 5e-3 of f32


@pytest.mark.parametrize("H", [64, 128])
def test_what_runs(H):
    kernels = not (obstacle() or device_obstacle())
    args = [a[..., :H] for a in make_attention(LENGTHS[0])[0]]
    for ids in (None, documents(LENGTHS[0], 1000)):
        segmented = ids is not None
        name, why = choose_implementation(H, jnp.bfloat16, segmented=segmented)
        assert name == ("mosaic_gpu" if kernels else "cudnn"), why
        fn = jax.jit(partial(attention, segment_ids=ids))
        text = fn.lower(*args).compile().as_text()
        # Of heads of 64 cuDNN's forward pass is faster, without documents.
        forward = kernels and (segmented or H == 128)
        assert ("attention_forward" in text) == forward
        assert ("cudnn$fmha" in text) != forward


def test_swiglu_at_8b_width():
    T = OP_LENGTH
    weights = [
        normal(1, D, F, scale=D**-0.5),
        normal(2, D, F, scale=D**-0.5),
        normal(3, F, D, scale=F**-0.5),
    ]
    args, dy = (normal(0, 1, T, D), *weights), normal(4, 1, T, D)

    def run(args, chunk_size):
        with jax.default_matmul_precision("highest"):
            fn = partial(swiglu, chunk_size=chunk_size)
            return out_and_gradients(fn, args, dy)

    want = run([a.astype(jnp.float32) for a in args], 0)
    theirs = errors(run(args, 0), want)
    for chunk_size in (T // 8, T // 4 - 24, None):
        assert_no_worse(errors(run(args, chunk_size), want), theirs)


def plain_loss(x, w, labels):
    """The loss as one writes it: logits in the dtype of x, log-softmax in f32."""

    @jax.checkpoint
    def one(x, labels):
        precision = "highest" if x.dtype == jnp.float32 else None
        logits = jnp.matmul(x, w, precision=precision).astype(jnp.float32)
        label_logit = jnp.take_along_axis(
            logits, jnp.maximum(labels, 0)[:, None], axis=-1
        )[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - label_logit
        return jnp.where(labels == -100, 0, loss).sum()

    size = min(BLOCK, x.shape[1])
    blocks = x.reshape(-1, size, x.shape[-1]), labels.reshape(-1, size)
    return jax.lax.map(lambda block: one(*block), blocks).sum()


def test_linear_cross_entropy_at_8b_width():
    T = OP_LENGTH
    x, w = normal(0, 1, T, D), normal(1, D, V, scale=2 * D**-0.5)
    labels = jax.random.randint(jax.random.key(2), (1, T), 0, V)
    labels = jnp.where(
        jax.random.bernoulli(jax.random.key(3), 0.2, (1, T)), -100, labels
    )

    def run(fn, *args):
        value, grads = jit_for(args[0])(jax.value_and_grad(fn, (0, 1)))(*args)
        return value, *grads

    want = run(
        partial(plain_loss, labels=labels), x.astype(jnp.float32), w.astype(jnp.float32)
    )
    theirs = errors(run(partial(plain_loss, labels=labels), x, w), want)
    for chunk_size in (T // 8, T // 4 - 24, None):

        def ours(x, w, chunk_size=chunk_size):
            return linear_cross_entropy(x, w, labels, chunk_size=chunk_size)[0]

        assert_no_worse(errors(run(ours, x, w), want), theirs)


def two_layers():
    return ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=2, num_heads=N,
        num_kv_heads=K, head_dim=H,
    )  # fmt: skip


def make_batch(T, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (1, T + 1), 0, V)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def step_config(plan, **train):
    return Config(
        model=two_layers(),
        data=DataConfig(batch_size=1),
        train=TrainConfig(plan=plan, **train),
    )


@pytest.mark.parametrize("head_groups", [1, 4])
def test_training_gradients_equal_the_plain_models(head_groups):
    cfg, batch = two_layers(), make_batch(MODEL_LENGTH)
    whole = TrainConfig(mlp_chunk_size=0, loss_chunk_size=MODEL_LENGTH)

    @partial(jit_reference, static_argnums=1)
    def plain(params, implementation):
        def loss(params):
            model = from_params(cfg, params)
            total, count = next_token_loss(
                model, batch, whole, implementation=implementation
            )
            return total / count

        return jax.value_and_grad(loss)(params)

    def in_bf16():
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params(cfg, 0))

    params = jax.jit(in_bf16)()
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        want = jax.tree.leaves(plain(wide, "xla"))
    del wide
    theirs = errors(jax.tree.leaves(plain(params, None)), want)
    chunks = {"mlp_chunk_size": 600, "loss_chunk_size": 1000}  # neither divides it
    for plan in ("full", "save_attention", "offload_attention"):
        train = step_config(plan, head_groups=head_groups, **chunks)
        fn = jax.jit(make_gradients(train, cfg, make_mesh(train.mesh)))
        total, count, grads = fn(params, jax.tree.map(lambda a: a[None], batch))
        assert count == MODEL_LENGTH  # a power of two: dividing by it rounds nothing
        got = [a / MODEL_LENGTH for a in (total, *jax.tree.leaves(grads))]
        assert_no_worse(errors(got, want), theirs)


def cudnn_calls(plan):
    """Count cuDNN's forward and backward calls in the compiled gradients."""
    cfg, model = step_config(plan, attention="cudnn"), two_layers()
    params = jax.eval_shape(
        lambda: jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params(model, 0))
    )
    ids = jax.ShapeDtypeStruct((1, 1, 1024), jnp.int32)
    fn = jax.jit(make_gradients(cfg, model, make_mesh(cfg.mesh)))
    text = fn.lower(params, {"tokens": ids, "labels": ids}).compile().as_text()
    calls = [line for line in text.splitlines() if "custom_call_target" in line]
    calls = [line for line in calls if "fmhaSoftmax" in line]
    backward = sum("Backward" in line for line in calls)
    return len(calls) - backward, backward


def test_save_attention_does_not_run_cudnn_twice():
    plans = ("full", "save_attention", "none")
    forwards, backwards = zip(*map(cudnn_calls, plans), strict=True)
    assert forwards[1] == forwards[2] > 0, forwards
    assert forwards[0] == 2 * forwards[2], forwards
    assert len(set(backwards)) == 1 and backwards[0] > 0, backwards


def test_long_train_step_learns():
    T = STEP_LENGTH
    model = two_layers()
    cfg = Config(
        model=model,
        data=DataConfig(seq_len=T, batch_size=1),
        optim=OptimConfig(
            name="adafactor", learning_rate=2e-4, warmup_steps=0,
            param_dtype="bfloat16", schedule="constant",
        ),
        train=TrainConfig(steps=3),
    )  # fmt: skip
    batch = {k: v[None] for k, v in make_batch(T).items()}
    mesh = make_mesh(cfg.mesh)
    state = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))()
    step = make_train_step(cfg, model, mesh)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert np.isfinite(float(metrics["grad_norm"])) and metrics["tokens"] == T
    assert abs(losses[0] - np.log(V)) < 1.5  # fresh weights know nothing
    assert losses[0] > losses[1] > losses[2], losses


def test_more_than_2_to_the_31_elements():
    # Llama3-8B's hidden states beyond 524,288 tokens. The ends must be what they are
    # alone: an index that wraps around reads or writes elsewhere.
    T, F, V = 2**31 // D + 3000, 512, 1000
    x = jax.jit(lambda: normal(0, 1, T, D))()
    weights = [normal(i, *s, scale=0.02) for i, s in enumerate([(D, F)] * 2 + [(F, D)])]
    head = normal(9, D, V, scale=0.02)
    assert x.size > 2**31

    @jax.jit
    def run(x):
        y, vjp = jax.vjp(lambda x: swiglu(x, *weights, chunk_size=32768), x)
        labels = jnp.full(x.shape[:2], -100).at[:, -500:].set(7)
        total, dhidden = jax.value_and_grad(
            lambda x: linear_cross_entropy(x, head, labels, chunk_size=32768)[0]
        )(x)
        return y, *vjp(x), dhidden, total

    *whole, total = run(x)
    *last, last_total = run(x[:, -600:])
    *first, _ = run(x[:, :600])
    assert max(errors([a[:, -600:] for a in whole], last)) < 1e-2
    assert max(errors([a[:, :600] for a in whole[:2]], first[:2])) < 1e-2
    assert abs(float(total) / float(last_total) - 1) < 1e-3


@pytest.mark.parametrize("what", ["residuals", "state"])
def test_what_goes_to_the_host_costs_little(what):
    # Residuals of 36 KiB a token, moments of 0.8 GB: waited for, a third of the step.
    model, T = dataclasses.replace(two_layers(), num_layers=6), STEP_LENGTH
    batch = {k: v[None] for k, v in make_batch(T).items()}
    options = {"name": "adamw", "param_dtype": "bfloat16", "moment_dtype": "bfloat16"}
    lean = "* offload=input+qkv+attention+mlp_input save=gate_up"

    def run(away):
        plan = lean if away and what == "residuals" else "none"
        options["state_on_host"] = away and what == "state"
        cfg = Config(
            model=model, data=DataConfig(seq_len=T, batch_size=1),
            optim=OptimConfig(in_backward=True, clip="layer", **options),
            train=TrainConfig(plan=plan, prefetch=True, mlp_chunk_size=0),
        )  # fmt: skip
        mesh = make_mesh(cfg.mesh)
        state = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))()
        step, seconds, norms = make_train_step(cfg, model, mesh), [], []
        for _ in range(6):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            norms.append(float(metrics["grad_norm"]))  # waits
            seconds.append(time.perf_counter() - began)
        return norms[0], min(seconds)

    (norm, saved), (norm_away, away) = run(False), run(True)
    assert norm_away == pytest.approx(norm, rel=1e-3) and away < 1.15 * saved


def test_optimizer_state_on_the_host_changes_nothing():
    T, model = 2048, two_layers()
    batch = {k: v[None] for k, v in make_batch(T).items()}
    found = []
    for on_host in (False, True):
        cfg = Config(
            model=model,
            data=DataConfig(seq_len=T, batch_size=1),
            optim=OptimConfig(
                warmup_steps=0, param_dtype="bfloat16", moment_dtype="int8",
                in_backward=True, clip="layer", state_on_host=on_host,
            ),
            train=TrainConfig(steps=2, plan="offload", head_groups=2),
        )  # fmt: skip
        mesh = make_mesh(cfg.mesh)
        fresh = partial(init_train_state, cfg, mesh=mesh)
        state = jax.jit(lambda fresh=fresh: fresh(init_params(model, 0)))()
        step = make_train_step(cfg, model, mesh)
        for _ in range(2):
            state, metrics = step(state, batch)
        codes = [a for a in jax.tree.leaves(state["opt"]["layers"]) if a.ndim > 2]
        kind = "pinned_host" if on_host else "device"
        assert {a.sharding.memory_kind for a in codes} == {kind}
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert np.allclose(found[0], found[1], rtol=1e-3), found


@pytest.mark.parametrize("on_host", [False, True])
def test_a_save_is_of_its_step_while_the_next_ones_run(tmp_path, on_host):
    model, mesh = PRESETS["tiny"], make_mesh(MeshConfig())
    cfg = Config(
        model=model,
        data=DataConfig(seq_len=1024, batch_size=1),
        optim=OptimConfig(
            warmup_steps=0, in_backward=True, clip="layer", state_on_host=on_host
        ),
    )
    batch = {k: v[None] % model.vocab_size for k, v in make_batch(1024).items()}
    state = jax.jit(lambda: init_train_state(cfg, init_params(model, 0), mesh))()
    step = make_train_step(cfg, model, mesh)
    state, _ = step(state, batch)
    want = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state, _ = step(state, batch)
        checkpoints.wait()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
        _, got, _ = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, got, want)
