"""Time the Hopper matmul core and the MLP's kernels under many tiles, beside XLA.

    python benchmarks/tune_matmul.py --preset llama3_8b --tokens 16384 --seconds 240

Checks every kernel first, values against f32, on lengths that no tile divides. Then
sweeps the tiles for each product of the MLP's chunk, and times the whole chunk loop,
forward and backward. Random data, medians; prints a table and writes JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mst_jax.config import PRESETS
from mst_jax.ops.matmul import Tiles, matmul
from mst_jax.ops.swiglu import mosaic_gpu, swiglu

WIDE = Tiles()
TALL = Tiles(wg_tile_m=128, tile_n=128, slots=1)
SWEEP = [
    WIDE,
    replace(WIDE, snake=16),
    replace(WIDE, snake=4),
    replace(WIDE, snake_m=False),
    replace(WIDE, snake=4, snake_m=False),
    replace(WIDE, cluster=1),
    TALL,
    replace(TALL, cluster=1),
    replace(WIDE, stages=3, slots=4),
    replace(WIDE, stages=3, slots=4, snake=16),
    replace(WIDE, stages=3, slots=4, snake_m=False),
    replace(TALL, stages=3, slots=2),
]


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Return random bf16 numbers."""
    draw = jax.jit(
        lambda: (jax.random.normal(jax.random.key(seed), shape) * scale).astype(
            jnp.bfloat16
        )
    )
    return draw()


def products(tokens: int, D: int, F: int) -> dict[str, tuple[Callable[..., Any], ...]]:
    """Return name -> (ours(tiles, *args), XLA's(*args), args, FLOPs)."""
    x, dy = normal(0, tokens, D), normal(1, tokens, D)
    wide, other = normal(2, tokens, F), normal(3, tokens, F)
    w_gate, w_up = normal(4, D, F, scale=D**-0.5), normal(5, D, F, scale=D**-0.5)
    w_down = normal(6, F, D, scale=F**-0.5)
    flops = 2 * tokens * D * F

    def f32(total, a, b):
        return total + jnp.einsum("TI,TO->IO", a, b, preferred_element_type="float32")

    def silu_up(x, g, u):
        gate, up = x @ g, x @ u
        return (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(x.dtype)

    def gradients(x, g, u, dh):
        hidden, vjp = jax.vjp(
            lambda a, b: (jax.nn.silu(a.astype(jnp.float32)) * b).astype(a.dtype),
            x @ g, x @ u,
        )  # fmt: skip
        return hidden, *vjp(dh)

    return {
        "gate_up": (
            lambda t, *a: mosaic_gpu.gate_up(*a, keep=False, tiles=t)[0],
            silu_up, (x, w_gate, w_up), 2 * flops,
        ),
        "gate_up_backward": (
            lambda t, *a: mosaic_gpu.gate_up_backward(*a, tiles=t),
            gradients, (x, w_gate, w_up, wide), 2 * flops,
        ),
        "down nn +residual": (
            lambda t, h, w, r: matmul(h, w, total=r, tiles=t),
            lambda h, w, r: r + h @ w, (wide, w_down, x), flops,
        ),
        "dh nt": (
            lambda t, a, w: matmul(a, w, transpose_b=True, tiles=t),
            lambda a, w: jnp.einsum("TD,FD->TF", a, w), (dy, w_down), flops,
        ),
        "dx nt": (
            lambda t, a, w: matmul(a, w, transpose_b=True, tiles=t),
            lambda a, w: jnp.einsum("TF,DF->TD", a, w), (other, w_gate), flops,
        ),
        "dx nt +total": (
            lambda t, a, w, r: matmul(a, w, transpose_b=True, total=r, tiles=t),
            lambda a, w, r: r + jnp.einsum("TF,DF->TD", a, w),
            (other, w_gate, x), flops,
        ),
        "dW tn f32": (
            lambda t, total, a, b: matmul(a, b, transpose_a=True, total=total, tiles=t),
            f32, (jnp.zeros((D, F), jnp.float32), x, other), flops,
        ),
        "dW_down tn f32": (
            lambda t, total, a, b: matmul(a, b, transpose_a=True, total=total, tiles=t),
            f32, (jnp.zeros((F, D), jnp.float32), wide, dy), flops,
        ),
    }  # fmt: skip


def error(got: Any, want: Any) -> float:
    """Return the largest relative error of the norms."""

    @jax.jit
    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(relative(a, b)) for a, b in pairs)


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median time of a call, of several in flight at once."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(2, int(0.03 / (time.perf_counter() - began)))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / calls)
    return 1e3 * sorted(times)[repeats // 2]


def check(tiles: list[Tiles]) -> None:
    """Compare every product with f32 at a ragged size; raise if one is wrong."""
    for name, (ours, plain, args, _) in products(1000, 1344, 2112).items():
        with jax.default_matmul_precision("highest"):
            want = jax.jit(plain)(*[a.astype(jnp.float32) for a in args])
        theirs, found = error(jax.jit(plain)(*args), want), None
        for tile in tiles:
            try:
                run = jax.jit(lambda *a, f=ours, t=tile: f(t, *a))
                got = run(*args)
                again = run(*args)
            except Exception as reason:  # a tile that cannot: said, and left out
                print(f"check {name} {tile}: {str(reason)[:150]}", flush=True)
                continue
            found = error(got, want)
            same = all(
                bool((a == b).all())
                for a, b in zip(*map(jax.tree.leaves, (got, again)), strict=True)
            )
            if not found < 1.2 * theirs + 1e-4 or not same:
                raise SystemExit(f"WRONG: {name} {tile}: {found=} {theirs=} {same=}")
        if found is None:
            raise SystemExit(f"no tiles can do {name}")
        print(f"check {name}: error {found:.2e}, XLA's {theirs:.2e}", flush=True)


def sweep(preset: str, tokens: int, names: list[str], deadline: float) -> list[dict]:
    """Time every product under every tile."""
    model = PRESETS[preset]
    rows = []
    todo = products(tokens, model.hidden_size, model.intermediate_size)
    for name, (ours, plain, args, flops) in todo.items():
        if names and name not in names:
            continue
        plain = jax.jit(plain)
        base = milliseconds(lambda f=plain, a=args: f(*a))
        rows.append({"product": name, "tiles": "XLA", "ms": base, "flops": flops})
        for tile in SWEEP:
            if time.monotonic() > deadline:
                break
            try:
                run = jax.jit(lambda *a, f=ours, t=tile: f(t, *a))
                ms = milliseconds(lambda f=run, a=args: f(*a))
            except Exception as reason:
                print(f"{name} {tile}: {str(reason)[:100]}", flush=True)
                continue
            rows.append({"product": name, "tiles": str(tile), "ms": ms, "flops": flops})
        for row in rows:
            if row["product"] == name:
                rate = row["flops"] / row["ms"] / 1e9
                print(f"{name:18} {row['ms']:8.3f} ms {rate:6.0f} {row['tiles']}")
    return rows


def loop(preset: str, tokens: int, chunk_size: int) -> list[dict]:
    """Time swiglu's chunk loop, forward and backward, both ways."""
    model = PRESETS[preset]
    D, F = model.hidden_size, model.intermediate_size
    x, dy = normal(0, 1, tokens, D), normal(1, 1, tokens, D)
    w = [normal(4, D, F, scale=D**-0.5), normal(5, D, F, scale=D**-0.5)]
    w.append(normal(6, F, D, scale=F**-0.5))
    rows = []
    for implementation in ("xla", "mosaic_gpu", "xla", "mosaic_gpu"):

        @jax.jit
        def run(x, w, dy, how=implementation):
            y, vjp = jax.vjp(
                lambda x, *w: swiglu(
                    x, *w, chunk_size=chunk_size, implementation=how
                ),
                x, *w,
            )  # fmt: skip
            return y, *vjp(dy)

        compiled = run.lower(x, w, dy).compile()
        ms = milliseconds(lambda f=compiled: f(x, w, dy), repeats=3)
        temp = compiled.memory_analysis().temp_size_in_bytes / 2**30
        rate = 11 * 2 * tokens * D * F / ms / 1e9
        rows.append({"product": "loop", "tiles": implementation, "ms": ms})
        print(
            f"loop {tokens} tokens, chunks of {chunk_size}, {implementation}: "
            f"{ms:.1f} ms, {rate:.0f} TFLOP/s, temporaries {temp:.2f} GiB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama3_8b")
    parser.add_argument("--tokens", type=int, default=16384, help="of a chunk")
    parser.add_argument("--loop-tokens", type=int, default=65536)
    parser.add_argument("--products", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, help="JSON of all times")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    print(jax.devices()[0].device_kind, jax.__version__)
    check([SWEEP[0], *SWEEP[5:7], SWEEP[8]])
    rows = loop(args.preset, args.loop_tokens, args.tokens)
    rows += sweep(args.preset, args.tokens, args.products, deadline)
    if args.out:
        args.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
