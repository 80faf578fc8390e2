"""The matrix products' core that it may replace (old_* here) against the new one.

    python benchmarks/core_ab/ab.py --seconds 330 --out ab.json

Checks first: every kernel against f32 on ragged lengths and at the sizes that are
timed, runs against each other bit for bit, old and new likewise. Then times XLA, old
and new in turns. Says what it is about to run before it runs it. A run that does not
return ends the process, and so does --seconds; the JSON has what was done by then.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import old_lce  # noqa: E402
import old_mlp  # noqa: E402
import tune_matmul as tune  # noqa: E402
from old_matmul import matmul as old_matmul  # noqa: E402

from mst_jax.mini_sequence import to_chunks  # noqa: E402
from mst_jax.ops.linear_cross_entropy import chunks, mosaic_gpu, xla  # noqa: E402
from mst_jax.ops.linear_cross_entropy.xla import Options  # noqa: E402
from mst_jax.ops.matmul import Tiles, matmul  # noqa: E402
from mst_jax.ops.swiglu import api as mlp  # noqa: E402

F32 = jnp.float32
# Tokens, D, F. A block has none or one tile, one or two, two or three; the depths of
# one step show whether the loads of the next tile wait for this one to be read.
RAGGED = [(8, 64, 64), (1000, 1344, 2112), (2056, 64, 4160)]
RAGGED_HEAD = 1000, 192, 5000, 384  # tokens, D, V, chunk
RAGGED_LOOP = 1000, 192, 1984, 200  # tokens, D, F, chunk
TOKENS, CHUNK = 65536, 16384
D, F, V = 4096, 14336, 128256  # Llama3-8B
HEAD = 16384, (4096, 8192)
OTHERS = {"Llama3.2-1B": (2048, 8192), "Llama3-70B": (8192, 28672)}
ROOMY = replace(tune.WIDE, stages=3, slots=5)
VARIANTS = [replace(tune.WIDE, snake=16), replace(tune.WIDE, stages=3, slots=4), ROOMY]
HANG_SECONDS = 40
QUICK = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""How references are compiled; what is timed is compiled as everywhere."""

mlp._HOW["old"] = old_mlp
HEADS = {"xla": xla, "old": old_lce, "new": mosaic_gpu}
chunks._implementation = lambda options: HEADS[options.implementation]


@dataclass
class Case:
    """One computation, in several ways that are checked and timed together."""

    name: str
    ways: dict[str, Callable[..., Any]]
    args: Callable[[], tuple[jax.Array, ...]]
    flops: int
    sums: bool = False
    """Whether the result takes the place of the first argument."""
    compiled: dict[str, Future] = field(default_factory=dict)
    reference: Future | None = None


class Run:
    """The clock, what is under way, and what was found."""

    def __init__(self, seconds: float, out: Path | None):
        self.began, self.seconds, self.out = time.monotonic(), seconds, out
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.doing: tuple[str, float] | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.began)

    def say(self, *words: Any) -> None:
        """Print a line with the time."""
        print(f"[{self.seconds - self.left:6.1f}]", *words, flush=True)

    def call(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """Run something on the GPU, watched."""
        self.doing = name, time.monotonic()
        try:
            return jax.block_until_ready(fn(*args))
        finally:
            self.doing = None

    def add(self, **row: Any) -> None:
        """Keep a result, on disk at once."""
        self.rows.append(row)
        if self.out:
            rows = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            rows |= {"wrong": self.wrong, "rows": self.rows}
            self.out.write_text(json.dumps(rows, indent=1))

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            doing = self.doing
            if doing and time.monotonic() - doing[1] > HANG_SECONDS:
                self.say(f"HANGS: {doing[0]}")
                os._exit(3)
            if self.left < 0:
                self.say(f"--seconds are over, at: {doing and doing[0]}")
                os._exit(4)


def head(way: str, chunk_size: int, x, w, labels):
    """Return the loss of the LM head and its gradients to x [T, D] and w [D, V]."""
    options = Options(0.0, None, 0.0, way)
    return _head(options, chunk_size, x, w, labels)


def _head(options, chunk_size, x, w, labels):
    def loss(x, w):
        size = -(-x.shape[0] // chunk_size)
        weights = jnp.ones((1, x.shape[0]), F32).at[:, ::7].set(0)
        weights = jnp.pad(weights, ((0, 0), (0, size * chunk_size - x.shape[0])))
        x, y = to_chunks((x[None], labels[None]), size, chunk_size, 1)
        weights = to_chunks(weights, size, chunk_size, 1)
        return chunks.weighted_sum(options, x, w, y, weights)

    return jax.value_and_grad(loss, (0, 1))(x, w)


def loop(way: str, chunk_size: int, x, g, u, d, dy):
    """Return the chunked MLP of x [1, T, D] and its gradients."""

    def run(x, *w):
        how = {"new": "mosaic_gpu"}.get(way, way)
        return mlp.swiglu(x, *w, chunk_size=chunk_size, implementation=how)

    y, vjp = jax.vjp(run, x, g, u, d)
    return y, *vjp(dy)


def loop_case(name: str, tokens: int, D: int, F: int, chunk: int, ways) -> Case:
    """The MLP over all tokens, forward and backward."""

    def args():
        w = [tune.normal(i, D, F, scale=D**-0.5) for i in (4, 5)]
        w.append(tune.normal(6, F, D, scale=F**-0.5))
        return tune.normal(0, 1, tokens, D), *w, tune.normal(1, 1, tokens, D)

    functions = {way: partial(loop, way, chunk) for way in ways}
    return Case(name, functions, args, 11 * 2 * tokens * D * F)


def head_case(name: str, tokens: int, D: int, V: int, chunk: int) -> Case:
    """The LM head over all tokens, forward and backward."""

    def args():
        labels = jax.random.randint(jax.random.key(3), (tokens,), 0, V)
        w = tune.normal(1, D, V, scale=2 * D**-0.5)
        return tune.normal(0, tokens, D), w, labels

    ways = {way: partial(head, way, chunk) for way in HEADS}
    return Case(name, ways, args, 3 * 2 * tokens * D * V)


def product_cases(tokens, D, F, tiles, before: bool) -> list[Case]:
    """Every product of the MLP's chunk: XLA, old, new with default tiles, `tiles`."""

    def nt(a, b, **options):
        return old_matmul(a, b, transpose_b=True, **options)

    def tn(total, a, b):
        return old_matmul(a, b, transpose_a=True, total=total)

    old = {
        "dh, gate_up_backward": lambda x, g, u, dy, w: old_mlp.gate_up_backward(
            x, g, u, nt(dy, w)
        ),
        "dx, two products": lambda a, b, g, u: nt(b, u, total=nt(a, g)),
        "dh": nt,
        "gate_up": lambda *a: old_mlp.gate_up(*a, keep=False)[0],
        "dW += f32": tn,
        "dW_down += f32": tn,
        "down": old_matmul,
        "down + residual": lambda r, h, w: old_matmul(h, w, total=r),
    }
    cases = []
    for name, product in tune.products(tokens, D, F).items():
        ways = {"xla": product.plain}
        if before:
            ways["old"] = old[name]
        ways["new"] = partial(product.ours, None)
        if before and name == "dx, two products":
            ways["new, one after the other"] = lambda a, b, g, u: matmul(
                b, u, transpose_b=True, total=matmul(a, g, transpose_b=True)
            )
        ways |= {
            f"new, {tune.short(t)}": partial(product.ours, t)
            for t in tiles
            if can(t, product)
        }
        title = f"{name} {tokens} {D} {F}"
        args = product.args
        cases.append(
            Case(title, ways, lambda args=args: args, product.flops, product.sums)
        )
    return cases


def can(tiles: Tiles, product: tune.Product) -> bool:
    """Whether the product has enough slots under these tiles."""
    try:
        jax.eval_shape(partial(product.ours, tiles), *product.args)
    except ValueError:
        return False
    return True


def submit(pool: ThreadPoolExecutor, case: Case, reference: bool, options=None) -> None:
    """Compile all ways of a case, in the background."""
    shapes = jax.eval_shape(case.args)

    def build(fn, shapes, options, donate):
        donated = 0 if donate else ()
        lowered = jax.jit(fn, donate_argnums=donated).lower(*shapes)
        return lowered.compile(options)

    if reference:
        wide = [
            jax.ShapeDtypeStruct(s.shape, F32 if s.dtype == jnp.bfloat16 else s.dtype)
            for s in shapes
        ]

        def exact(*args):
            with jax.default_matmul_precision("highest"):
                return case.ways["xla"](*args)

        case.reference = pool.submit(build, exact, wide, QUICK, False)
    for way, fn in case.ways.items():
        case.compiled[way] = pool.submit(build, fn, shapes, options, case.sums)


@jax.jit
def errors(got, want):
    """Return the relative error of each leaf, of the norms."""

    def error(a, b):
        a, b = a.astype(F32), b.astype(F32)
        return jnp.sqrt(jnp.square(a - b).sum() / jnp.square(b).sum())

    return jax.tree.leaves(jax.tree.map(error, got, want))


@jax.jit
def same(a, b):
    """Return whether two results are equal, and free of NaN."""
    equal = jax.tree.map(lambda a, b: (a == b).all(), a, b)
    return jnp.stack(jax.tree.leaves(equal)).all()


def check(run: Run, case: Case, repeats: int) -> None:
    """Compare every way with f32 and with itself; old with new."""
    args = case.args()
    run.say(f"check {case.name}")

    def result(way, compiled):
        given = (jnp.copy(args[0]), *args[1:]) if case.sums else args
        return run.call(f"{case.name}: {way}", compiled, *given)

    wide = [a.astype(F32) if a.dtype == jnp.bfloat16 else a for a in args]
    assert case.reference is not None
    want = run.call(f"{case.name}: f32", case.reference.result(), *wide)
    case.reference = None
    del wide
    theirs, old = None, None
    for way, future in case.compiled.items():
        try:
            compiled = future.result()
        except Exception as reason:  # of one way: the others still count
            run.say(f"  NOT COMPILED {way}: {str(reason)[-300:]}")
            run.wrong.append(f"{case.name}: {way}: does not compile")
            continue
        run.say(f"  run {way}")
        got = result(way, compiled)
        found = [float(e) for e in errors(got, want)]
        words = [f"errors {' '.join(f'{e:.2e}' for e in found)}"]
        good = True
        if way == "xla":
            theirs = found
        else:
            stable = all(bool(same(got, result(way, compiled))) for _ in range(repeats))
            words.append(f"{repeats} more runs {'equal' if stable else 'DIFFER'}")
            limits = [1.05 * e + 1e-5 for e in theirs] if theirs else found
            good = stable and all(e <= m for e, m in zip(found, limits, strict=True))
        if way == "old":
            old = got
        elif old is not None:
            words.append(f"bits of old: {bool(same(got, old))}")
        if not good:
            run.wrong.append(f"{case.name}: {way}: {found}, XLA {theirs}, {words}")
        run.say("   ", way, "ok:" if good else "WRONG:", *words)
        run.add(check=case.name, way=way, errors=found, good=good, words=words)


def take_turns(run: Run, case: Case, rounds: int) -> None:
    """Time the ways of a case in rounds, forth and back; print medians."""
    args = case.args()
    ready = {way: f.result() for way, f in case.compiled.items() if not f.exception()}
    runs = {way: tune.runner(fn, args, case.sums) for way, fn in ready.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    calls = {}
    for way, fn in runs.items():
        run.call(f"{case.name}: {way}", fn)
        began = time.perf_counter()
        run.call(f"{case.name}: {way}", fn)
        seconds = time.perf_counter() - began
        calls[way] = max(1, round(tune.CALL_SECONDS / seconds))
    done = 0
    for turn in range(rounds):
        for way in list(runs)[:: -1 if turn % 2 else 1]:

            def several(fn=runs[way], n=calls[way]):
                for _ in range(n - 1):
                    fn()
                return fn()

            began = time.perf_counter()
            run.call(f"{case.name}: {way}", several)
            times[way].append(1e3 * (time.perf_counter() - began) / calls[way])
        done += 1
        if run.left < 5:
            break
    run.say(f"{case.name}, {done} rounds")
    for way, found in times.items():
        ms = sorted(found)[len(found) // 2]
        temporaries = ready[way].memory_analysis().temp_size_in_bytes
        rate = case.flops / ms / 1e9
        print(
            f"    {ms:8.3f} ms ({min(found):.3f} to {max(found):.3f}) {rate:4.0f} "
            f"TFLOP/s, temporaries {temporaries / 2**30:.2f} GiB  {way}",
            flush=True,
        )
        run.add(
            time=case.name, way=way, ms=ms, all=found, tflops=rate,
            temporaries=temporaries,
        )  # fmt: skip


def guarded(run: Run, step: Callable[..., None], case: Case, count: int) -> None:
    """Do a step; if it fails, say so and let the next ones run."""
    try:
        step(run, case, count)
    except Exception as reason:  # no memory, say
        run.say(f"FAILED {step.__name__} {case.name}: {str(reason)[:300]}")
        run.wrong.append(f"{step.__name__} {case.name}: {str(reason)[:100]}")


def ragged_cases() -> list[Case]:
    """Every kernel on lengths that no tile divides."""
    cases = []
    for sizes in RAGGED:
        tiles = tune.CHECKED[1:] if sizes == RAGGED[1] else []
        cases += product_cases(*sizes, tiles, before=False)
    tokens, depth, wide, chunk = RAGGED_LOOP
    cases.append(loop_case("ragged loop", tokens, depth, wide, chunk, ("xla", "new")))
    tokens, depth, vocab, chunk = RAGGED_HEAD
    for name, options in {
        "ragged head": (0.0, None, 0.0),
        "ragged head, z and smoothing": (1e-3, None, 0.1),
        "ragged head, softcap": (0.0, 5.0, 0.0),
    }.items():
        case = head_case(name, tokens, depth, vocab, chunk)
        case.ways = {
            way: partial(_head, Options(*options, way), chunk) for way in ("xla", "new")
        }
        cases.append(case)
    return cases


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=16, help="that compile")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    run = Run(args.seconds, args.out)
    run.say(jax.devices()[0].device_kind, jax.__version__)
    pool = ThreadPoolExecutor(args.threads)
    ragged = [] if args.no_checks else ragged_cases()
    for case in ragged:
        submit(pool, case, reference=True, options=QUICK)
    run.say("submitted", sum(len(c.ways) + 1 for c in ragged), "programs, ragged")
    tokens, sizes = HEAD
    loops = [loop_case("loop, 8B", TOKENS, D, F, CHUNK, ("xla", "old", "new"))]
    loops += [head_case(f"head, 8B, chunks of {n}", tokens, D, V, n) for n in sizes]
    products = product_cases(CHUNK, D, F, VARIANTS, before=True)
    others = [
        loop_case(f"loop of a chunk, {name}", CHUNK, *size, CHUNK, ("xla", "new"))
        for name, size in OTHERS.items()
    ]
    for case in [*loops, *products]:
        submit(pool, case, reference=not args.no_checks)
    for case in others:
        submit(pool, case, reference=False)
    run.say("submitted", sum(len(c.ways) for c in [*loops, *products, *others]))
    for case in ragged:
        guarded(run, check, case, 5)
    run.say("ragged: wrong", run.wrong)
    # At full size: the ones with most at stake first, the products at the end.
    for case in [] if args.no_checks else [*loops, *products]:
        guarded(run, check, case, 3)
    run.say("checked: wrong", run.wrong)
    for case in [*loops, *products, *others]:
        for way, future in case.compiled.items():
            if reason := future.exception():
                run.say(f"{case.name}: {way}: {str(reason)[-300:]}")
    run.say("compiled")
    for case in [*loops, *products, *others]:
        guarded(run, take_turns, case, args.rounds)
    run.say("done; wrong:", run.wrong)
    sys.exit(bool(run.wrong))


if __name__ == "__main__":
    main()
