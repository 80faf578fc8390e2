"""The method is exact: loss and all gradients are those of the unchunked model.

The reference below shares no code with the package: one sequence, a T x T mask, the MLP
whole, all logits, differentiated by `jax.grad`. The loss of a batch, and of its
micro-batches, is the sum over its sequences, so the reference's gradients add up too.

T x chunk sizes x batch x accumulation x head x masks, the full product, four masks in a
test. Compilation is the cost: the default suite takes an orthogonal array, in which any
two values meet, `-m slow` all the others.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from mst_jax.loss import next_token_loss
from mst_jax.mini_sequence import split_length
from mst_jax.model import from_params
from mst_jax.sharding import make_mesh
from mst_jax.train_step import make_gradients

D, F, V, L, N, K, H = 16, 24, 256, 2, 4, 2, 4
LENGTHS = [1, 40, 63, 64, 127, 191, 256, 257, 300]
# Tokens of an MLP chunk and of a loss chunk, and what a layer keeps. 24 and 33 divide
# no length; 100 divides one and 64 two; 280 holds all but the longest, 256 all but two.
CHUNKS = [(24, 33, "full"), (100, 64, "save_attention"), (280, 256, "none")]
# A frozen head in the training path, and by `jax.grad` of the model one reads.
HEADS = ["untied", "tied", "frozen", "frozen_by_hand"]
MASKS = ["none", "some", "chunk", "all"]
ROWS = 9  # of the largest case: 3 micro-batches of 3


def all_cases():
    for (t, T), (c, chunks), (b, B), A, (h, head) in itertools.product(
        enumerate(LENGTHS), enumerate(CHUNKS), enumerate((1, 3)), (1, 2, 3),
        enumerate(HEADS),
    ):  # fmt: skip
        # Linear in t // 3, t and c modulo 3: any two of the columns are independent.
        columns = A % 3, min(h, 2), b
        default = columns == (-(t // 3 + c) % 3, (t + c) % 3, (t // 3 + t + c) % 3 > 0)
        yield pytest.param(
            T, chunks, B, A, head,
            marks=() if default else pytest.mark.slow,
            id=f"T{T}-mlp{chunks[0]}-loss{chunks[1]}-B{B}-A{A}-{head}",
        )  # fmt: skip


# Without optimisations a program compiles in a quarter of the time on JAX 0.10, where
# the old emitters can still be had, and in half of it on 0.12.
COMPILER = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):
    COMPILER["xla_cpu_use_fusion_emitters"] = False


def reference_loss(params, tokens, labels):
    """tokens and labels [T] -> sum of the losses, f32."""
    T = len(tokens)
    x = params["embed"]["embedding"][tokens]
    for i in range(L):
        layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        x = x + reference_attention(layer, norm(x, layer["attention_norm"]))
        mlp, h = layer["mlp"], norm(x, layer["mlp_norm"])
        gate, up = h @ mlp["w_gate"], h @ mlp["w_up"]
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ mlp["w_down"]
    embedding = params["embed"]["embedding"]
    head = params["lm_head"]["kernel"] if "lm_head" in params else embedding.T
    log_probs = jax.nn.log_softmax(norm(x, params["final_norm"]) @ head)
    picked = log_probs[jnp.arange(T), jnp.maximum(labels, 0)]
    return -jnp.where(labels == -100, 0, picked).sum()


def reference_attention(layer, h):
    T, weights = len(h), layer["attention"]
    q, k, v = ((h @ weights[n]).reshape(T, -1, H) for n in ("wq", "wk", "wv"))
    k, v = (jnp.repeat(a, N // K, axis=1) for a in (rotate(k), v))
    scores = jnp.einsum("qnh,knh->nqk", rotate(q), k) / H**0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    out = jnp.einsum("nqk,knh->qnh", jax.nn.softmax(scores), v)
    return out.reshape(T, -1) @ weights["wo"]


def rotate(x):
    angle = jnp.arange(len(x))[:, None] * 10000.0 ** (-jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def norm(x, module):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * module["scale"]


@functools.cache
def make_params(tied):
    """Weights large enough that attention and the MLP are far from linear."""
    rng = np.random.default_rng(0)

    def weight(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

    def scale(*shape):
        return {"scale": jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)}

    params = {
        "embed": {"embedding": weight(V, D) * V**0.5},
        "layers": {
            "attention_norm": scale(L, D),
            "attention": {
                "wq": weight(L, D, N * H), "wk": weight(L, D, K * H),
                "wv": weight(L, D, K * H), "wo": weight(L, N * H, D),
            },
            "mlp_norm": scale(L, D),
            "mlp": {
                "w_gate": weight(L, D, F), "w_up": weight(L, D, F),
                "w_down": weight(L, F, D),
            },
        },
        "final_norm": scale(D),
        "lm_head": {"kernel": weight(D, V)},
    }  # fmt: skip
    if tied:
        del params["lm_head"]
        params["embed"]["embedding"] /= D**0.5
    return params


@functools.cache
def make_rows(T):
    """Return tokens and labels [ROWS, T], and the rows' labels of mask 'some'."""
    rng = np.random.default_rng(T)
    tokens, labels = rng.integers(0, V, (2, ROWS, T), np.int32)
    keep = rng.uniform(size=(ROWS, T)) < rng.permutation(np.linspace(0.1, 0.9, ROWS))[
        :, None
    ]  # fmt: skip
    return tokens, labels, np.where(keep, labels, -100)


def make_batch(T, B, A, loss_chunk, mask):
    """Return tokens and labels [A, B, T]; 'chunk' masks chunks a to 2a of batch a.

    So micro-batches lose one, two and three whole chunks, and where there is only one
    chunk the first loses all of it and the others nothing.
    """
    tokens, labels, some = (a[: A * B].reshape(A, B, T) for a in make_rows(T))
    if mask == "some":
        labels = some
    elif mask == "all":
        labels = np.full_like(labels, -100)
    elif mask == "chunk":
        labels, size = labels.copy(), split_length(T, loss_chunk)[1]
        for a in range(A):
            labels[a, :, a * size : (2 * a + 1) * size] = -100
    return tokens, labels


@functools.cache
def reference_gradients():
    return jax.jit(jax.value_and_grad(reference_loss), compiler_options=COMPILER)


@functools.cache
def reference_row(tied, T, row, labels):
    """labels: bytes, so that a row shared by several cases is computed once."""
    tokens, labels = make_rows(T)[0][row], np.frombuffer(labels, np.int32)
    # One program for all lengths: no token sees those behind it, which count nothing.
    behind = 0, max(LENGTHS) - T
    tokens = np.pad(tokens, behind)
    labels = np.pad(labels, behind, constant_values=-100)
    out = reference_gradients()(make_params(tied), tokens, labels)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), out)


def reference(tied, T, labels):
    rows = [
        reference_row(tied, T, i, row.tobytes())
        for i, row in enumerate(labels.reshape(-1, T))
    ]
    return jax.tree.map(lambda *leaves: sum(leaves), *rows)


# One for each head: hundreds of programs kept would exhaust the process's memory maps.
@functools.lru_cache(maxsize=len(HEADS))
def compiled(head, chunks, A):
    """Return gradients(params, tokens, labels [A, B, T]) -> (sum, count, gradients)."""
    model = ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=N,
        num_kv_heads=K, tie_embeddings=head == "tied",
    )  # fmt: skip
    train = TrainConfig(
        compute_dtype="float32", accumulate=A, mlp_chunk_size=chunks[0],
        loss_chunk_size=chunks[1], plan=chunks[2],
    )  # fmt: skip
    optim = OptimConfig(freeze=("lm_head",) if head == "frozen" else ())
    cfg = Config(model=model, train=train, optim=optim)
    of_batch = make_gradients(cfg, model, make_mesh(MeshConfig()))

    def trained(params, tokens, labels):
        return of_batch(params, {"tokens": tokens, "labels": labels})

    def by_hand(params, tokens, labels):
        head, rest = params["lm_head"], {k: params[k] for k in params if k != "lm_head"}

        def loss(rest):
            whole = from_params(model, {**rest, "lm_head": head})
            batch = {"tokens": tokens[0], "labels": labels[0]}
            return next_token_loss(whole, batch, train)

        (total, count), grads = jax.value_and_grad(loss, has_aux=True)(rest)
        return total, count, grads

    fn = by_hand if head == "frozen_by_hand" else trained
    return jax.jit(fn, compiler_options=COMPILER)


def gradients(head, chunks, tokens, labels):
    params, A = make_params(head == "tied"), len(tokens)
    if head != "frozen_by_hand":
        return compiled(head, chunks, A)(params, tokens, labels)
    # A loss is a sum: the caller adds up the micro-batches.
    fn = compiled(head, chunks, 1)
    parts = [fn(params, tokens[a : a + 1], labels[a : a + 1]) for a in range(A)]
    return jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)), *parts)


def assert_close(got, want, where):
    """Each leaf to 2e-5, or, where it is zero but for rounding, to f32's epsilon."""
    named = jax.tree_util.tree_leaves_with_path(got)
    whole = np.sqrt(sum((b**2).sum() for b in jax.tree.leaves(want)))
    for (path, a), b in zip(named, jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b)
        bound = max(2e-5 * np.linalg.norm(b), 1.2e-7 * whole)
        assert error <= bound, (where, jax.tree_util.keystr(path), error, bound)


@pytest.mark.parametrize("T, chunks, B, A, head", list(all_cases()))
def test_loss_and_gradients_are_those_of_the_unchunked_model(T, chunks, B, A, head):
    for mask in MASKS:
        tokens, labels = make_batch(T, B, A, chunks[1], mask)
        total, count, grads = gradients(head, chunks, tokens, labels)
        assert count == (labels != -100).sum(), mask
        if mask == "all":
            assert total == 0 and count == 0
            assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))
            continue
        want, want_grads = reference(head == "tied", T, labels)
        if head.startswith("frozen"):
            del want_grads["lm_head"]
        assert abs(total - want) <= 2e-5 * want, mask
        assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
        assert_close(grads, want_grads, mask)
