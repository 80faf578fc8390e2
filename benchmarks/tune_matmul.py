"""Time the Hopper matmul core and the layers' kernels under many tiles, beside XLA.

    python benchmarks/tune_matmul.py --preset llama3_8b --tokens 16384 --seconds 240

Checks every kernel first, values against f32, on lengths that no tile divides. Then
times the whole chunk loop, forward and backward, and the products of the MLP's chunk
under each of the tiles. What is compared takes turns, round after round, since a GPU
that is limited by power gets slower while it is warm: medians of the rounds. What is
added in place is, as in the loop, so that no copy is timed. Random data; prints a
table and writes JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from arguments import positive

from mst_jax.config import PRESETS
from mst_jax.ops.matmul import Tiles, device_obstacle, matmul, sum_of_products
from mst_jax.ops.swiglu import mosaic_gpu, swiglu, xla

WIDE = Tiles()
TALL = Tiles(wg_tile_m=128, tile_n=128, slots=1)
SWEEP = [
    WIDE,
    replace(WIDE, snake=16),
    replace(WIDE, snake=4),
    replace(WIDE, snake_m=False),
    replace(WIDE, stages=3, slots=2),
    replace(WIDE, stages=3, slots=4),
    replace(WIDE, stages=3, slots=5),
    TALL,
    replace(TALL, stages=3, slots=2),
]
CHECKED = [WIDE, replace(WIDE, cluster=1), replace(WIDE, stages=3, slots=4), TALL]
CALL_SECONDS = 0.02
"""Of one product, in one round."""


@dataclass(frozen=True)
class Product:
    """Something to time."""

    ours: Callable[..., Any]
    """(tiles, *args)."""
    plain: Callable[..., Any]
    """(*args), in XLA."""
    args: tuple[jax.Array, ...]
    flops: int
    sums: bool = False
    """Whether the result takes the place of the first argument."""


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Return random bf16 numbers."""
    draw = jax.jit(
        lambda: (jax.random.normal(jax.random.key(seed), shape) * scale).astype(
            jnp.bfloat16
        )
    )
    return draw()


def products(tokens: int, D: int, F: int, K: int) -> dict[str, Product]:
    """Return a chunk's products, with K columns of keys and of values."""
    x, dy = normal(0, tokens, D), normal(1, tokens, D)
    wide, other = normal(2, tokens, F), normal(3, tokens, F)
    w_gate, w_up = normal(4, D, F, scale=D**-0.5), normal(5, D, F, scale=D**-0.5)
    w_down = normal(6, F, D, scale=F**-0.5)
    dw, dw_down = (jnp.zeros(s, jnp.float32) for s in ((D, F), (F, D)))
    dk, dv = normal(7, tokens, K), normal(8, tokens, K)
    wq, wk, wv = (normal(9 + i, D, n, scale=D**-0.5) for i, n in enumerate((D, K, K)))
    flops = 2 * tokens * D * F

    def nt(a, b):
        return jnp.einsum("TI,OI->TO", a, b)

    def outer(a, b):
        return jnp.einsum("TI,TO->IO", a, b, preferred_element_type="float32")

    def f32(total, a, b):
        return total + outer(a, b)

    def in_f32(tiles, total, a, b):
        return matmul(a, b, transpose_a=True, total=total, tiles=tiles)

    def hidden(x, g, u):
        return xla.gated("silu", x @ g, x @ u)

    def hidden_kept(x, g, u):
        gate, up = x @ g, x @ u
        return xla.gated("silu", gate, up), gate, up

    def of_qkv(tiles, dq, dk, dv, wq, wk, wv):
        also = (dk, wk), (dv, wv)
        return matmul(dq, wq, also=also, transpose_b=True, tiles=tiles)

    def of_qkv_plain(dq, dk, dv, wq, wk, wv):
        pairs = (dq, wq), (dk, wk), (dv, wv)
        return sum_of_products(*pairs, implementation="xla")

    def gradients(x, g, u, dy, w):
        value, vjp = jax.vjp(lambda a, b: xla.gated("silu", a, b), x @ g, x @ u)
        return value, *vjp(nt(dy, w))

    def dh_gradients(tiles, x, g, u, dy, w):
        dh = nt(dy, w)
        return mosaic_gpu.gate_up_backward(x, g, u, dh, tiles=tiles)

    return {
        "dh, gate_up_backward": Product(
            dh_gradients, gradients, (x, w_gate, w_up, dy, w_down), 3 * flops
        ),
        "dx, two products": Product(
            lambda t, a, b, g, u: matmul(
                a, g, transpose_b=True, also=((b, u),), tiles=t
            ),
            lambda a, b, g, u: nt(a, g) + nt(b, u),
            (wide, other, w_gate, w_up), 2 * flops,
        ),
        "dh": Product(
            lambda t, a, w: matmul(a, w, transpose_b=True, tiles=t),
            nt, (dy, w_down), flops,
        ),
        "gate_up": Product(
            lambda t, *a: mosaic_gpu.gate_up(*a, keep=False, tiles=t)[0],
            hidden, (x, w_gate, w_up), 2 * flops,
        ),
        "gate_up, kept": Product(
            lambda t, *a: mosaic_gpu.gate_up(*a, keep=True, tiles=t),
            hidden_kept, (x, w_gate, w_up), 2 * flops,
        ),
        "dx of q, k, v": Product(
            of_qkv, of_qkv_plain, (dy, dk, dv, wq, wk, wv), 2 * tokens * D * (D + 2 * K)
        ),
        "dW, f32": Product(
            lambda t, *a: matmul(*a, transpose_a=True, dtype=jnp.float32, tiles=t),
            outer, (x, other), flops,
        ),
        "dW += f32": Product(in_f32, f32, (dw, x, other), flops, sums=True),
        "dW_down += f32": Product(in_f32, f32, (dw_down, wide, dy), flops, sums=True),
        "down": Product(
            lambda t, h, w: matmul(h, w, tiles=t), jnp.matmul, (wide, w_down), flops
        ),
        "down + residual": Product(
            lambda t, r, h, w: matmul(h, w, total=r, tiles=t),
            lambda r, h, w: r + h @ w, (x, wide, w_down), flops, sums=True,
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


def check(tiles: list[Tiles]) -> None:
    """Compare every product with f32 at a ragged size; raise if one is wrong."""
    for name, product in products(1000, 1344, 2112, 320).items():
        args = product.args
        with jax.default_matmul_precision("highest"):
            want = jax.jit(product.plain)(*[a.astype(jnp.float32) for a in args])
        theirs, found = error(jax.jit(product.plain)(*args), want), None
        for tile in tiles:
            try:
                run = jax.jit(lambda *a, f=product.ours, t=tile: f(t, *a))
                got = run(*args)
                again = run(*args)
            except ValueError as reason:  # tiles that cannot: said, and left out
                print(f"check {name} {short(tile)}: {str(reason)[-40:]}", flush=True)
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


def take_turns(
    runs: dict[str, Callable[[], Any]], rounds: int, deadline: float
) -> dict[str, float]:
    """Return the median milliseconds of a call of each, in rounds of some calls."""
    calls = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        began = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, round(CALL_SECONDS / (time.perf_counter() - began)))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                out = run()
            jax.block_until_ready(out)
            times[name].append(1e3 * (time.perf_counter() - began) / calls[name])
        if time.monotonic() > deadline:
            break
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def runner(compiled: Any, args: tuple[jax.Array, ...], sums: bool) -> Callable[[], Any]:
    """Return a call; if it sums, each goes on with the last one's result."""
    if not sums:
        return lambda: compiled(*args)
    state = [jnp.copy(args[0])]

    def run():
        state[0] = compiled(state[0], *args[1:])
        return state[0]

    return run


def compile_all(jobs: dict[str, tuple[Callable[..., Any], Product]]) -> dict[str, Any]:
    """Compile several programs at once; say which failed and leave them out."""

    def one(fn, product):
        donated = 0 if product.sums else ()
        return jax.jit(fn, donate_argnums=donated).lower(*product.args).compile()

    done = {}
    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(one, *job) for name, job in jobs.items()}
        for name, future in futures.items():
            try:
                done[name] = future.result()
            except Exception as reason:  # what cannot run must not end the rest
                print(f"{name}: {str(reason)[-90:]}", flush=True)
    return done


def short(tiles: Tiles) -> str:
    """Name tiles in a few letters."""
    return (
        f"{2 * tiles.wg_tile_m}x{tiles.tile_n}x{tiles.tile_k} stages{tiles.stages} "
        f"slots{tiles.slots} cluster{tiles.cluster} "
        f"snake{tiles.snake}{'nm'[tiles.snake_m]}"
    )


def sweep(
    preset: str, tokens: int, names: list[str], rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """Time every product under every tile."""
    model = PRESETS[preset]
    D, F = model.hidden_size, model.intermediate_size
    K = model.num_kv_heads * model.head_size
    rows = []
    for name, product in products(tokens, D, F, K).items():
        if names and name not in names:
            continue
        if time.monotonic() > deadline:
            print(f"{name}: no time left")
            break
        kinds: dict[str, Tiles | None] = {"XLA": None, **{short(t): t for t in SWEEP}}
        jobs = {
            kind: (
                (lambda *a, f=product.ours, t=t: f(t, *a)) if t else product.plain,
                product,
            )
            for kind, t in kinds.items()
        }
        runs = {
            kind: runner(fn, product.args, product.sums)
            for kind, fn in compile_all(jobs).items()
        }
        times = take_turns(runs, rounds, deadline)
        for kind, ms in sorted(times.items(), key=lambda item: item[1]):
            rate = product.flops / ms / 1e9
            print(f"{name:22} {ms:8.3f} ms {rate:6.0f} TFLOP/s  {kind}", flush=True)
            tiles = kinds[kind]
            rows.append({
                "product": name, "tokens": tokens, "D": D, "F": F, "ms": ms,
                "tflops": rate, "tiles": asdict(tiles) if tiles else "XLA",
            })  # fmt: skip
    return rows


def loop(
    preset: str, tokens: int, chunk_size: int, rounds: int, deadline: float,
    kinds: tuple[str, ...] = ("xla", "mosaic_gpu"),
) -> list[dict[str, Any]]:  # fmt: skip
    """Time swiglu's chunk loop, forward and backward."""
    model = PRESETS[preset]
    D, F = model.hidden_size, model.intermediate_size
    w = [normal(4, D, F, scale=D**-0.5), normal(5, D, F, scale=D**-0.5)]
    w.append(normal(6, F, D, scale=F**-0.5))
    args = (normal(0, 1, tokens, D), *w, normal(1, 1, tokens, D))

    def run(kind, x, *rest):
        *w, dy = rest

        def mlp(x, *w):
            return swiglu(x, *w, chunk_size=chunk_size, implementation=kind)

        y, vjp = jax.vjp(mlp, x, *w)
        return y, *vjp(dy)

    flops = 11 * 2 * tokens * D * F
    what = Product(run, run, args, flops)
    compiled = compile_all(
        {kind: (lambda *a, kind=kind: run(kind, *a), what) for kind in kinds}
    )
    runs = {kind: runner(fn, args, False) for kind, fn in compiled.items()}
    rows = []
    for kind, ms in take_turns(runs, rounds, deadline).items():
        temp = compiled[kind].memory_analysis().temp_size_in_bytes
        rate = flops / ms / 1e9
        print(
            f"loop of {tokens} tokens, chunks of {chunk_size}: {ms:8.1f} ms "
            f"{rate:4.0f} TFLOP/s, temporaries {temp / 2**30:.2f} GiB  {kind}",
            flush=True,
        )
        rows.append({
            "product": "loop", "tokens": tokens, "D": D, "F": F, "ms": ms,
            "tflops": rate, "tiles": kind, "temporaries": temp,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument("--tokens", type=positive, default=16384, help="of a chunk")
    parser.add_argument("--loop-tokens", type=positive, default=65536)
    parser.add_argument("--products", nargs="*", default=[])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, help="JSON of all times")
    args = parser.parse_args()
    if reason := device_obstacle():
        raise SystemExit(f"the kernels cannot run here: {reason}")
    known = products(8, 8, 8, 8)
    if unknown := set(args.products) - known.keys():
        parser.error(f"no products {sorted(unknown)}; there are {list(known)}")
    deadline = time.monotonic() + args.seconds
    print(jax.devices()[0].device_kind, jax.__version__)
    check(CHECKED)
    rows = loop(args.preset, args.loop_tokens, args.tokens, args.rounds, deadline)
    rows += sweep(args.preset, args.tokens, args.products, args.rounds, deadline)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
