"""One chunk of the gated MLP in Mosaic GPU kernels, for Hopper and bf16.

    forward     h = silu(x W_gate) * (x W_up)     one kernel, gate and up in registers
                y = residual + h W_down           one kernel, W_down read in its stack
    backward    dh = dy W_down^T                  XLA's
                h, dgate, dup                     one kernel: gate and up again, and dh
                dx = dgate W_gate^T + dup W_up^T  one kernel, rounded once
                dW += x^T dgate, x^T dup, h^T dy  f32, in place; of the first chunk with
                                                  its sum of squares

XLA writes gate and up, reads them again and, in the backward pass, makes two or three
passes over [C, F] arrays for h, dgate and dup. Here gate and up are f32 from the
products to the end. dh is cuBLAS's, which is faster at a product alone; for y it would
copy W_down and add the residual in a pass of its own (docs/LOG.md).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.ops import matmul as mm
from mst_jax.ops.matmul import Tiles, matmul
from mst_jax.ops.swiglu import xla


def obstacle(activation: str, x: Any, w_gate: Any) -> str | None:
    """Return why the kernels cannot compute this MLP, whatever the GPU, or None."""
    if activation != "silu":
        return f"has silu, not {activation!r}"
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    if reason := mm.obstacle(rows, w_gate):
        return reason
    return None


def forward(activation: str, x, weights, residual, keep: bool):
    """As `api.mlp_forward`."""
    del activation
    shape, x = x.shape, _rows(x)
    h, *kept = gate_up(x, *weights[:2], keep=keep)
    y = matmul(h, weights[2], total=None if residual is None else _rows(residual))
    gate_up_kept = [a.reshape(*shape[:-1], -1) for a in kept]
    return y.reshape(shape), tuple(gate_up_kept) if keep else None


def backward(activation: str, x, gate_up, dy, weights, totals: Any):
    """As `api.mlp_backward`."""
    w_gate, w_up, w_down = weights
    shape = x.shape
    x, dy = _rows(x), _rows(dy)
    dh = jnp.einsum("TD,FD->TF", dy, w_down)
    if gate_up is None:
        h, dgate, dup = gate_up_backward(x, w_gate, w_up, dh)
    else:
        gate_up = map(_rows, gate_up)
        h, vjp = jax.vjp(partial(xla.gated, activation), *gate_up)
        dgate, dup = vjp(dh)
    dx = matmul(dgate, w_gate, transpose_b=True, also=((dup, w_up),))
    pairs = ((x, dgate), (x, dup), (h, dy))
    squares = None
    if totals:
        totals = [
            matmul(*pair, transpose_a=True, total=t)
            for pair, t in zip(pairs, totals, strict=True)
        ]
    else:
        products = [
            matmul(*pair, transpose_a=True, dtype=jnp.float32, squares=True)
            for pair in pairs
        ]
        totals, squares = map(list, zip(*products, strict=True))
    return dx.reshape(shape), totals, squares


def gate_up(x, w_gate, w_up, *, keep: bool, tiles: Tiles | None = None):
    """[C, D] -> h [C, F], and gate and up [C, F] if they are to be kept."""
    out = jax.ShapeDtypeStruct((x.shape[0], w_gate.shape[1]), x.dtype)
    return mm.tiled_matmul(
        x, (w_gate, w_up), _write_hidden, name="gate_up",
        out_type=(out,) * (3 if keep else 1), tiles=tiles or Tiles(),
    )  # fmt: skip


def gate_up_backward(x, w_gate, w_up, dh, *, tiles: Tiles | None = None):
    """Return h, dgate, dup [C, F]; dup is written over dh where XLA can spare it."""
    out = jax.ShapeDtypeStruct(dh.shape, x.dtype)
    dup, (h, dgate) = mm.in_place(
        lambda ref, x, w_gate, w_up: mm.tiled_matmul(
            x, (w_gate, w_up), _write_gradients, name="gate_up_backward",
            extra=(ref,), out_type=(out, out), reads=True, tiles=tiles or Tiles(),
        ),
        dh, x, w_gate, w_up,
    )  # fmt: skip
    return h, dgate, dup


def _write_hidden(tile, accs, extra, outs):
    for i in range(tile.num_parts):
        gate, up = (acc[:, tile.columns(i)] for acc in accs)
        values = (gate * _sigmoid(gate) * up, gate, up)
        for j, (out, value) in enumerate(zip(outs, values, strict=False)):
            tile.write(out, i, value, i * len(outs) + j)


def _write_gradients(tile, accs, extra, outs):
    # The slots are written from the first part on: all is read before.
    for i, dh in enumerate([tile.read(i) for i in range(tile.num_parts)]):
        gate, up = (acc[:, tile.columns(i)] for acc in accs)
        dh = dh.astype(jnp.float32)
        s = _sigmoid(gate)
        act = gate * s
        dgate = dh * up * (s + act * (1 - s))
        tile.write(outs[0], i, act * up, 3 * i)
        tile.write(outs[1], i, dgate, 3 * i + 1)
        tile.write(extra[0], i, dh * act, 3 * i + 2)


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _rows(a):
    return a.reshape(-1, a.shape[-1])
