"""The LM head's loss and the gated MLP, as this package and its peers compute them.

Each builder imports its package and returns a function of arrays; a package that is
not there is an ImportError. Weights are [in, out] in JAX and [out, in] in torch, as the
packages have them.
"""

import importlib.util
import inspect
import sys
import types


def ours_head(implementation, columns=None):
    from mst_jax import linear_cross_entropy

    options: dict = {"implementation": implementation}
    if columns:
        options |= {"vocab_chunk_size": columns, "chunk_size": 1024}

    def loss(x, w, y):
        return linear_cross_entropy(x, w, y, **options)[0]

    return loss


def plain_head():
    import jax
    import jax.numpy as jnp

    def loss(x, w, y):
        logits = (x @ w).astype(jnp.float32)
        log_probs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_probs, jnp.maximum(y, 0)[:, None], 1)[:, 0]
        return -jnp.where(y == -100, 0, own).sum()

    return loss


def import_tokamax():
    """Import tokamax, which needs xprof (a 31 MB wheel) for its own benchmarks."""
    if importlib.util.find_spec("xprof") is None:
        tools = types.ModuleType("xprof.cli.tools")
        tools.get_kernel_stats_tool = None
        for name in ("xprof", "xprof.cli"):
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["xprof.cli.tools"] = tools
    import tokamax

    return tokamax


def tokamax_head(implementation):
    import jax.numpy as jnp

    tokamax = import_tokamax()

    def loss(x, w, y):
        losses = tokamax.linear_softmax_cross_entropy_loss(
            x, jnp.maximum(y, 0), w, reduction="none", implementation=implementation
        )
        return jnp.where(y == -100, 0, losses.astype(jnp.float32)).sum()

    return loss


def liger_head(accumulate_f32):
    import torch
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    fused = LigerFusedLinearCrossEntropyLoss(
        reduction="sum", accum_dtype=torch.float32 if accumulate_f32 else None
    )
    return lambda x, w, y: fused(w, x, y)


def cce_head(filter_eps):
    from cut_cross_entropy import linear_cross_entropy

    def loss(x, w, y):
        return linear_cross_entropy(x, w, y, reduction="sum", filter_eps=filter_eps)

    return loss


def torch_head(compiled):
    import torch

    def loss(x, w, y):
        logits = torch.nn.functional.linear(x, w).float()
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum")

    return torch.compile(loss) if compiled else loss


def ours_mlp(implementation, chunk_size):
    from mst_jax.ops.swiglu import swiglu

    options: dict = {"chunk_size": chunk_size}
    if "implementation" in inspect.signature(swiglu).parameters:
        options["implementation"] = implementation
    elif implementation != "xla":
        raise NotImplementedError(f"swiglu has no implementation={implementation!r}")
    return lambda x, *w: swiglu(x[None], *w, **options)[0]


def plain_mlp():
    import jax

    return lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down


def tokamax_mlp(implementation):
    import jax

    tokamax = import_tokamax()

    def mlp(x, gate, up, down):
        hidden = tokamax.gated_linear_unit(
            x, (gate, up), activation=jax.nn.swish, implementation=implementation
        )
        return hidden @ down

    return mlp


def liger_mlp():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from torch.nn.functional import linear

    def mlp(x, gate, up, down):
        hidden = LigerSiLUMulFunction.apply(linear(x, gate), linear(x, up))
        return linear(hidden, down)

    return mlp


def torch_mlp(compiled):
    import torch
    from torch.nn.functional import linear, silu

    def mlp(x, gate, up, down):
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    return torch.compile(mlp) if compiled else mlp


# name: (framework, builder, its arguments)
HEAD = {
    "ours, xla": ("jax", ours_head, ("xla",)),
    "ours, mosaic_gpu": ("jax", ours_head, ("mosaic_gpu",)),
    "ours, xla, columns": ("jax", ours_head, ("xla", 2048)),
    "ours, mosaic_gpu, columns": ("jax", ours_head, ("mosaic_gpu", 2048)),
    "plain JAX, whole logits": ("jax", plain_head, ()),
    "tokamax": ("jax", tokamax_head, (None,)),
    "Liger FLCE": ("torch", liger_head, (False,)),
    "Liger FLCE, f32 sums": ("torch", liger_head, (True,)),
    "Apple CCE": ("torch", cce_head, ("auto",)),
    "Apple CCE, no filter": ("torch", cce_head, (None,)),
    "torch": ("torch", torch_head, (False,)),
    "torch.compile": ("torch", torch_head, (True,)),
}
MLP = {
    "ours, xla": ("jax", ours_mlp, ("xla", None)),
    "ours, xla, whole": ("jax", ours_mlp, ("xla", 0)),
    "ours, mosaic_gpu": ("jax", ours_mlp, ("mosaic_gpu", None)),
    "plain JAX": ("jax", plain_mlp, ()),
    "tokamax": ("jax", tokamax_mlp, (None,)),
    "Liger": ("torch", liger_mlp, ()),
    "torch": ("torch", torch_mlp, (False,)),
    "torch.compile": ("torch", torch_mlp, (True,)),
}
VARIANTS = {"head": HEAD, "mlp": MLP}
