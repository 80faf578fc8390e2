"""One decoder layer in stages, forward and backward, in little memory.

    q, k, v = rope(norm(x) W_q, ...)                       chunks of tokens
    out, lse = attention(q, k, v)                          groups of key/value heads
    h = x + out W_o;   y = h + swiglu(norm(h))             chunks of tokens

The maths of `model.DecoderLayer`, with the backward pass written out, so that a plan
decides what is kept and nothing else lives longer than it must. Beside the residuals
the backward pass holds, in bytes a token of 16-bit activations,

    x, out (then dq), dh (then dx):  3 * 2 D       dk, dv:  4 K H
    one group's q, k, v, out, their gradients and attention's workspace, over the groups

against 2 (7 D + 4 K H) and the whole workspace when nothing is cut. Weight gradients
accumulate over the chunks in f32 and are returned so. `benchmarks/trace.py` knows a
kernel by its named scopes.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.chunk_loop import for_chunks, loop_chunks, put_tokens, take_tokens
from mst_jax.config import ModelConfig
from mst_jax.ops.attention import Documents, attention_backward, attention_forward
from mst_jax.ops.matmul import sum_of_products
from mst_jax.ops.rms_norm import rms_norm
from mst_jax.ops.rope import apply_rope
from mst_jax.ops.swiglu import mlp_backward, mlp_forward

Weights = dict[str, Any]
Residuals = dict[str, jax.Array]


@dataclass(frozen=True)
class Context:
    """What all layers of a step share."""

    cfg: ModelConfig
    rope: tuple[jax.Array, jax.Array]
    """cos and sin, f32 [B, T, H/2]."""
    segment_ids: jax.Array | Documents | None
    """Documents of packed rows, [B, T] or as `find_documents` finds them; or None."""
    chunk_size: int
    """Tokens of a chunk."""
    head_groups: int = 1
    """Groups of key/value heads that attention runs on one after the other."""
    attention_implementation: str | None = None
    """See `ops.attention`."""
    implementation: str | None = None
    """Of the matrix products, see `ops.swiglu`."""


@jax.named_scope("forward")
def layer_forward(
    p: Weights, x: jax.Array, ctx: Context, keep: Collection[str] = ()
) -> tuple[jax.Array, Residuals]:
    """Run a layer.

    Args:
        p: one layer's weights, as `model.DecoderLayer` names them; the matrices in
            x's dtype.
        x: [B, T, D].
        ctx: see `Context`.
        keep: the residuals to return, see `plan.RESIDUALS`.

    Returns:
        (y, kept), kept by name: input; q, k, v; out, lse; mlp_input; gate, up.
    """
    kept = {"input": x} if "input" in keep else {}
    out, lse, qkv = _attend(p, x, ctx, keep_qkv="qkv" in keep)
    kept |= qkv
    if "attention" in keep:
        # What is kept is what is used: the reshape that cuDNN's out takes to be kept
        # would be put off, and with it its way to the host.
        out, lse = jax.lax.optimization_barrier((out, lse))
        kept |= {"out": out, "lse": lse}
    y, after = _after(p, x, out, ctx, keep)
    return y, kept | after


@jax.named_scope("backward")
def layer_backward(
    p: Weights,
    kept: Residuals,
    dy: jax.Array,
    ctx: Context,
    between: Callable[[jax.Array], jax.Array] = lambda dh: dh,
) -> tuple[Weights, dict[str, Any], jax.Array]:
    """Differentiate a layer from what was kept.

    Args:
        p, kept, ctx: see `layer_forward`.
        dy: gradient of its result, overwritten.
        between: called with the gradient of the MLP's residual stream before
            attention's part begins, which takes what it returns.

    Returns:
        (f32 gradients of p, the sums of the squares of those for which kernels have
        them: a part of the same tree, gradient of the input).
    """
    kept = dict(kept)
    x = kept["input"]
    if "out" not in kept:
        with jax.named_scope("recompute"):
            out, lse, _ = _attend(p, x, ctx, kept=kept)
        kept |= {"out": out, "lse": lse}
    d_mlp, squares, d_mlp_norm, dwo, dh = _after_backward(p, kept, dy, ctx)
    if loop_chunks(x.shape[1], ctx.chunk_size)[0] == x.shape[1]:
        # Without a loop XLA's scheduler puts off the MLP's weight gradients, and
        # [T, F] arrays wait for them through attention: 2 GiB at 65,536 tokens of 8B.
        d_mlp, dwo, dh = jax.lax.optimization_barrier((d_mlp, dwo, dh))
        if "q" not in kept:  # nor are q, k and v computed again in front of the MLP
            dh, x = jax.lax.optimization_barrier((dh, x))
            kept["input"] = x
    dh = between(dh)
    dq, dk, dv = _attend_backward(p, kept, dh, ctx)
    d_norm, d_attention, dx = _before_backward(p, x, (dq, dk, dv), dh, ctx)
    gradients = {
        "attention_norm": d_norm,
        "attention": {**d_attention, "wo": dwo},
        "mlp_norm": d_mlp_norm,
        "mlp": d_mlp,
    }
    return gradients, {"mlp": squares}, dx


# --- before attention: norm, projections, RoPE ---


@jax.named_scope("qkv")
def _project(p: Weights, x: jax.Array, ctx: Context) -> tuple[jax.Array, ...]:
    """Return q, k, v of p's heads, all tokens."""
    B, T, _ = x.shape
    weights = [p["attention"][name] for name in ("wq", "wk", "wv")]
    H = ctx.cfg.head_size

    def body(qkv, start, size):
        normed = _norm(p["attention_norm"], take_tokens(x, start, size), ctx)
        rope = [take_tokens(table, start, size) for table in ctx.rope]
        q, k, v = ((normed @ w).reshape(B, size, -1, H) for w in weights)
        new = (_rope(q, *rope), _rope(k, *rope), v)
        return [put_tokens(a, b, start) for a, b in zip(qkv, new, strict=True)]

    # Zeros, though each is written: XLA's scheduler makes arrays that are not filled
    # as early as it can, before the MLP's backward pass.
    zeros = [jnp.zeros((B, T, w.shape[1] // H, H), x.dtype) for w in weights]
    return tuple(for_chunks(T, ctx.chunk_size, body, zeros))


@jax.named_scope("qkv")
def _before_backward(p, x, d_qkv, dh, ctx):
    """Return the gradients of the norm, of wq, wk, wv, and of x; dh is overwritten."""
    B, T, _ = x.shape
    names = ("wq", "wk", "wv")
    # The kernels are asked for by the MLP's name; heads may be too narrow for them.
    how = "xla" if ctx.implementation == "xla" else None

    def body(carry, start, size):
        d, d_norm, totals = carry
        normed, norm_vjp = _norm_vjp(p, "attention_norm", x, start, size, ctx)
        cos, sin = (take_tokens(table, start, size) for table in ctx.rope)
        dq, dk, dv = (take_tokens(a, start, size) for a in d_qkv)
        flat = [
            a.reshape(B, size, -1)  # the rotation's transpose turns back
            for a in (_rope(dq, cos, -sin), _rope(dk, cos, -sin), dv)
        ]
        weights = (p["attention"][name] for name in names)
        d_normed = sum_of_products(*zip(flat, weights, strict=True), implementation=how)
        totals = [t + _outer(normed, a) for t, a in zip(totals, flat, strict=True)]
        d_scale, dx = norm_vjp(d_normed)
        d = put_tokens(d, take_tokens(d, start, size) + dx, start)
        return d, d_norm + d_scale, totals

    zeros = [jnp.zeros(p["attention"][name].shape, jnp.float32) for name in names]
    d_norm = jnp.zeros(p["attention_norm"]["scale"].shape, jnp.float32)
    dx, d_norm, totals = for_chunks(T, ctx.chunk_size, body, (dh, d_norm, zeros))
    return {"scale": d_norm}, dict(zip(names, totals, strict=True)), dx


# --- attention, one group of heads at a time ---


def _attend(p, x, ctx, *, keep_qkv=False, kept=None):
    """Return out [B, T, N, H], lse [B, N, T], and q, k, v if they are to be kept."""
    kept = kept or {}
    groups = ctx.head_groups
    options = _attention_options(ctx)
    if groups == 1:
        qkv = _heads(p, x, kept, 0, ctx)
        if keep_qkv:  # else XLA may compute v twice, once for its stack
            qkv = jax.lax.optimization_barrier(qkv)
        out, lse = attention_forward(*qkv, **options)
        return out, lse, dict(zip("qkv", qkv, strict=True)) if keep_qkv else {}

    def body(g, carry):
        out, lse, stored = carry
        qkv = _heads(p, x, kept, g, ctx)
        out_g, lse_g = attention_forward(*qkv, **options)
        stored = [_put_heads(a, b, g, 2) for a, b in zip(stored, qkv, strict=False)]
        return _put_heads(out, out_g, g, 2), _put_heads(lse, lse_g, g, 1), stored

    B, T, _ = x.shape
    N, K, H = ctx.cfg.num_heads, ctx.cfg.num_kv_heads, ctx.cfg.head_size
    heads = (N, K, K) if keep_qkv else ()
    stored = [jax.lax.empty((B, T, n, H), x.dtype) for n in heads]
    out = jax.lax.empty((B, T, N, H), x.dtype)
    lse = jax.lax.empty((B, N, T), jnp.float32)
    out, lse, stored = jax.lax.fori_loop(0, groups, body, (out, lse, stored))
    return out, lse, dict(zip("qkv", stored, strict=False))


def _attend_backward(p, kept, dh, ctx):
    """Return dq, dk, dv [B, T, heads, H]; out's buffer becomes dq's."""
    x, out, lse = kept["input"], kept["out"], kept["lse"]
    B, T, N, H = out.shape
    K = ctx.cfg.num_kv_heads
    groups = ctx.head_groups

    def one(g, out_g, lse_g):
        with jax.named_scope("recompute"):
            q, k, v = _heads(p, x, kept, g, ctx)
        wo = _slice(p["attention"]["wo"], g, groups, 0)
        with jax.named_scope("output"):
            d_out = jnp.einsum("BTD,ID->BTI", dh, wo).reshape(out_g.shape)
        options = _attention_options(ctx)
        return attention_backward(q, k, v, out_g, lse_g, d_out, **options)

    if groups == 1:
        return one(0, out, lse)

    def body(g, carry):
        dq, dk, dv = carry
        new = one(g, _slice(dq, g, groups, 2), _slice(lse, g, groups, 1))
        return tuple(
            _put_heads(a, b, g, 2) for a, b in zip((dq, dk, dv), new, strict=True)
        )

    empty = jax.lax.empty((B, T, K, H), out.dtype)
    return jax.lax.fori_loop(0, groups, body, (out, empty, empty))


def _heads(p, x, kept, g, ctx):
    """q, k, v of group g: kept ones, or projected from x."""
    groups = ctx.head_groups
    if "q" in kept:
        return [_slice(kept[name], g, groups, 2) for name in "qkv"]
    sliced = {n: _slice(p["attention"][n], g, groups, 1) for n in ("wq", "wk", "wv")}
    return _project({**p, "attention": sliced}, x, ctx)


def _attention_options(ctx: Context) -> dict[str, Any]:
    return {
        "segment_ids": ctx.segment_ids,
        "sliding_window": ctx.cfg.sliding_window,
        "implementation": ctx.attention_implementation,
    }


def _slice(a, g, groups, axis):
    if groups == 1:
        return a
    size = a.shape[axis] // groups
    return jax.lax.dynamic_slice_in_dim(a, g * size, size, axis)


def _put_heads(a, part, g, axis):
    return jax.lax.dynamic_update_slice_in_dim(a, part, g * part.shape[axis], axis)


# --- after attention: output projection, MLP ---


@jax.named_scope("output")
def _after(p, x, out, ctx, keep):
    """Return y, and of mlp_input, gate and up what is to be kept."""
    B, T, D = x.shape
    mlp, wo = p["mlp"], p["attention"]["wo"]
    weights = (mlp["w_gate"], mlp["w_up"], mlp["w_down"])
    F = mlp["w_gate"].shape[1]

    def body(carry, start, size):
        y, kept = carry
        h = take_tokens(y, start, size)  # still x there
        h = h + take_tokens(out, start, size).reshape(B, size, -1) @ wo
        if "mlp_input" in keep:  # else XLA may compute it twice, once for its stack
            h = jax.lax.optimization_barrier(h)
        normed = _norm(p["mlp_norm"], h, ctx)
        with jax.named_scope("mlp"):
            z, gate_up = mlp_forward(
                normed, weights, residual=h, keep="gate_up" in keep,
                implementation=ctx.implementation,
            )  # fmt: skip
        new = {"mlp_input": h}
        if gate_up is not None:
            new["gate"], new["up"] = gate_up
        kept = {name: put_tokens(a, new[name], start) for name, a in kept.items()}
        return put_tokens(y, z, start), kept

    widths = {"mlp_input": D} if "mlp_input" in keep else {}
    widths |= {"gate": F, "up": F} if "gate_up" in keep else {}
    empty = {name: jax.lax.empty((B, T, n), x.dtype) for name, n in widths.items()}
    return for_chunks(T, ctx.chunk_size, body, (x, empty))


@jax.named_scope("output")
def _after_backward(p, kept, dy, ctx):
    """Return the gradients of mlp, the sums of their squares if they are known, the
    gradients of mlp_norm, wo, and of h; dy is overwritten."""
    x, out = kept["input"], kept["out"]
    B, T, _ = x.shape
    mlp, wo = p["mlp"], p["attention"]["wo"]
    names = ("w_gate", "w_up", "w_down")
    weights = tuple(mlp[name] for name in names)

    def body(carry, start, size):
        d, totals, _, d_norm, dwo = carry
        out_c = take_tokens(out, start, size).reshape(B, size, -1)
        if "mlp_input" in kept:
            h = take_tokens(kept["mlp_input"], start, size)
        else:
            with jax.named_scope("recompute"):
                h = take_tokens(x, start, size) + out_c @ wo
        normed, norm_vjp = _norm_vjp(p, "mlp_norm", h, 0, size, ctx)
        gate_up = None
        if "gate" in kept:
            gate, up = (take_tokens(kept[n], start, size) for n in ("gate", "up"))
            gate_up = gate, up
        dy = take_tokens(d, start, size)
        with jax.named_scope("mlp"):
            d_normed, totals, squares = mlp_backward(
                normed, gate_up, dy, weights, totals,
                implementation=ctx.implementation,
            )  # fmt: skip
        d_scale, dh = norm_vjp(d_normed)
        dh = dy + dh
        return (
            put_tokens(d, dh, start),
            totals,
            squares,
            d_norm + d_scale,
            dwo + _outer(out_c, dh),
        )

    zeros = None  # which one chunk need not fill, nor add to
    if loop_chunks(T, ctx.chunk_size)[0] < T:
        zeros = [jnp.zeros(w.shape, jnp.float32) for w in weights]
    d_norm = jnp.zeros(p["mlp_norm"]["scale"].shape, jnp.float32)
    carry = (dy, zeros, None, d_norm, jnp.zeros(wo.shape, jnp.float32))
    dh, totals, squares, d_norm, dwo = for_chunks(T, ctx.chunk_size, body, carry)
    d_mlp = dict(zip(names, totals, strict=True))
    squares = dict(zip(names, squares, strict=True)) if squares else {}
    return d_mlp, squares, {"scale": d_norm}, dwo, dh


# --- shared ---


_rope = jax.named_scope("rope")(apply_rope)


@jax.named_scope("norm")
def _norm(p: Weights, x: jax.Array, ctx: Context) -> jax.Array:
    return rms_norm(x, p["scale"], eps=ctx.cfg.rms_norm_eps)


def _norm_vjp(
    p: Weights, name: str, x: jax.Array, start: Any, size: int, ctx: Context
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """Normalise a chunk; return it and dy -> (f32 gradient of the scale, dx)."""
    scale = p[name]["scale"].astype(jnp.float32)
    chunk = take_tokens(x, start, size)

    @jax.named_scope("norm")
    def norm(scale, x):
        return rms_norm(x, scale, eps=ctx.cfg.rms_norm_eps)

    return jax.vjp(norm, scale, chunk)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("BCI,BCO->IO", a, b, preferred_element_type=jnp.float32)
