"""The f64 reference of `ops.py`: errors of the gradients of a few rows, in NumPy.

All rows but R are masked (head) or get no gradient (MLP), so that every weight gradient
is a sum over R rows and can be had in f64 without a GPU.
"""

import numpy as np

BLOCK = 16384
"""Columns of a head that are in f64 at once."""
CHECKED = 4
"""Blocks of the head's gradient that are compared, the first and last among them."""


class Error:
    """||got - want|| / ||want||, in blocks."""

    def __init__(self):
        self.difference = self.norm = 0.0

    def add(self, got, want):
        got = np.asarray(got, np.float64)
        self.difference += ((got - want) ** 2).sum()
        self.norm += (want**2).sum()

    def value(self) -> float:
        return float(np.sqrt(self.difference / self.norm))


def head_errors(x, w, y, total, dx, dw) -> dict:
    """Compare a loss and its gradients.

    Args:
        x: f32 [R, D], the rows that count.
        w: f32 [D, V].
        y: [R] labels.
        total: the loss's sum.
        dx: [R, D].
        dw: [D, V].
    """
    x, V, rows = x.astype(np.float64), w.shape[1], np.arange(len(y))
    blocks = [(i, min(i + BLOCK, V)) for i in range(0, V, BLOCK)]
    logits = np.concatenate([x @ w[:, i:j].astype(np.float64) for i, j in blocks], 1)
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    want = (lse - logits[rows, y]).sum()
    dlogits = np.exp(logits - lse[:, None])
    dlogits[rows, y] -= 1
    dx_error, dw_error, want_dx = Error(), Error(), np.zeros(x.shape)
    checked = {int(k) for k in np.linspace(0, len(blocks) - 1, CHECKED)}
    for k, (i, j) in enumerate(blocks):
        want_dx += dlogits[:, i:j] @ w[:, i:j].astype(np.float64).T
        if k in checked:
            dw_error.add(dw[:, i:j], x.T @ dlogits[:, i:j])
    dx_error.add(dx, want_dx)
    return {
        "loss_error": abs(float(total) / want - 1),
        "dx_error": dx_error.value(),
        "dw_error": dw_error.value(),
    }


def mlp_errors(x, weights, dy, y, dx, dws) -> dict:
    """Compare an MLP's rows and gradients: f32 [R, D], [D, F] x 2, [F, D]; as above."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    gate, up, down = (w.astype(np.float64) for w in weights)
    a, b = x @ gate, x @ up
    s = 1 / (1 + np.exp(-a))
    h = a * s * b
    dh = dy @ down.T
    da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s
    errors = [Error() for _ in range(3)]
    errors[0].add(y, h @ down)
    errors[1].add(dx, da @ gate.T + db @ up.T)
    for got, want in zip(dws, (x.T @ da, x.T @ db, h.T @ dy), strict=True):
        errors[2].add(got, want)
    names = "loss_error", "dx_error", "dw_error"
    return {name: e.value() for name, e in zip(names, errors, strict=True)}
