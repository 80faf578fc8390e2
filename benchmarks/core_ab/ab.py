"""Old core (old_* beside this file) against the new one, in one process, taking turns.

    timeout 400 python benchmarks/core_ab/ab.py --seconds 240 --out ab.json
"""
import argparse, json, sys, time
from pathlib import Path
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT)]
import jax, jax.numpy as jnp
import old_mlp, old_matmul
from old_matmul import matmul as old
import tune_matmul as t
from mst_jax.config import PRESETS
from mst_jax.ops.swiglu import api
from mst_jax.ops.matmul import matmul, Tiles

parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, default=240)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--preset", default="llama3_8b")
parser.add_argument("--tokens", type=int, default=16384)
parser.add_argument("--loop-tokens", type=int, default=65536)
parser.add_argument("--out", type=Path)
a = parser.parse_args()
deadline = time.monotonic() + a.seconds
began = time.monotonic()
def say(*x): print(f"[{time.monotonic() - began:5.1f}]", *x, flush=True)
say(jax.devices()[0].device_kind, jax.__version__)
t.check(t.CHECKED)
say("checked")
api._HOW["old"] = old_mlp

# dx as two products in the new core: what the fusion alone gives
class Split:
    forward = staticmethod(api.mosaic_gpu.forward)
    @staticmethod
    def backward(activation, x, gate_up, dy, weights, totals):
        m = api.mosaic_gpu
        w_gate, w_up, w_down = weights
        shape = x.shape
        x, dy = m._rows(x), m._rows(dy)
        dh = matmul(dy, w_down, transpose_b=True)
        h, dgate, dup = m.gate_up_backward(x, w_gate, w_up, dh)
        dx = matmul(dgate, w_gate, transpose_b=True)
        dx = matmul(dup, w_up, transpose_b=True, total=dx)
        pairs = ((x, dgate), (x, dup), (h, dy))
        return dx.reshape(shape), [matmul(*p, transpose_a=True, total=s) for p, s in zip(pairs, totals)]
api._HOW["split"] = Split
# tiles that leave room for all of the epilogue
ROOMY = Tiles(stages=3, slots=5)
class Roomy:
    forward = staticmethod(api.mosaic_gpu.forward)
    @staticmethod
    def backward(activation, x, gate_up, dy, weights, totals):
        m = api.mosaic_gpu
        w_gate, w_up, w_down = weights
        shape = x.shape
        x, dy = m._rows(x), m._rows(dy)
        dh = matmul(dy, w_down, transpose_b=True, tiles=Tiles(stages=3, slots=4))
        h, dgate, dup = m.gate_up_backward(x, w_gate, w_up, dh, tiles=ROOMY)
        dx = matmul(dgate, w_gate, transpose_b=True, also=((dup, w_up),))
        pairs = ((x, dgate), (x, dup), (h, dy))
        return dx.reshape(shape), [matmul(*p, transpose_a=True, total=s) for p, s in zip(pairs, totals)]
api._HOW["roomy"] = Roomy

kinds = ("xla", "old", "mosaic_gpu", "split", "roomy")
rows = []
for chunk in (a.tokens, a.tokens // 2):
    rows += t.loop(a.preset, a.loop_tokens, chunk, a.rounds, deadline, kinds)
    say("loop")
jax.clear_caches()

model = PRESETS[a.preset]
def olds(name):
    def dh_gub(x, g, u, dy, w): return old_mlp.gate_up_backward(x, g, u, old(dy, w, transpose_b=True))
    def dx(p, q, g, u): return old(q, u, transpose_b=True, total=old(p, g, transpose_b=True))
    return {
        "dh, gate_up_backward": dh_gub,
        "dx, two products": dx,
        "dh": lambda x, w: old(x, w, transpose_b=True),
        "gate_up": lambda *x: old_mlp.gate_up(*x, keep=False)[0],
        "dW += f32": lambda s, x, y: old(x, y, transpose_a=True, total=s),
        "dW_down += f32": lambda s, x, y: old(x, y, transpose_a=True, total=s),
        "down": lambda h, w: old(h, w),
        "down + residual": lambda r, h, w: old(h, w, total=r),
    }[name]
for name, p in t.products(a.tokens, model.hidden_size, model.intermediate_size).items():
    if time.monotonic() > deadline:
        say(name, "no time left"); break
    jobs = {"XLA": (p.plain, p), "OLD": (olds(name), p)}
    jobs |= {t.short(k): (lambda *x, f=p.ours, k=k: f(k, *x), p) for k in t.SWEEP}
    compiled = t.compile_all(jobs)
    say("compiled", len(compiled))
    times = t.take_turns({k: t.runner(f, p.args, p.sums) for k, f in compiled.items()}, a.rounds, deadline)
    for kind, ms in sorted(times.items(), key=lambda i: i[1]):
        print(f"{name:22} {ms:8.3f} ms {p.flops / ms / 1e9:6.0f} TFLOP/s  {kind}", flush=True)
        rows.append({"product": name, "kind": kind, "ms": ms, "tokens": a.tokens, "preset": a.preset})
    if a.out: a.out.write_text(json.dumps(rows))

# the LM head: its products and its logits kernel, V = 128256, chunks of 8192
import old_lce
from mst_jax.ops.linear_cross_entropy import mosaic_gpu as lce
from mst_jax.ops.linear_cross_entropy.xla import Options
jax.clear_caches()
C, D, V = (8192, 4096, 128256) if a.preset == "llama3_8b" else (64, 64, 512)
if time.monotonic() < deadline:
    x, w, p = t.normal(0, C, D), t.normal(1, D, V, scale=D**-0.5), t.normal(2, C, V)
    labels = jax.random.randint(jax.random.key(3), (C,), 0, V)
    dw = jnp.zeros((D, V), jnp.float32)
    some = [t.SWEEP[0], t.SWEEP[1], t.SWEEP[5]]
    def stats(m): return lambda k, x, w, l: m.logits_kernel(x, w, l, V, Options(0.0, None, 0.0, 'mosaic_gpu'), write=True, tiles=k)
    heads = {
        "head logits": (stats(lce), stats(old_lce), lambda x, w, l: x @ w, (x, w, labels), False),
        "head dx": (lambda k, p, w: matmul(p, w, transpose_b=True, tiles=k), lambda k, p, w: old(p, w, transpose_b=True), lambda p, w: jnp.einsum("TV,DV->TD", p, w), (p, w), False),
        "head dW": (lambda k, s, x, p: matmul(x, p, transpose_a=True, total=s, tiles=k), lambda k, s, x, p: old(x, p, transpose_a=True, total=s), lambda s, x, p: s + jnp.einsum("TI,TO->IO", x, p, preferred_element_type="float32"), (dw, x, p), True),
    }
    for name, (new, before, plain, args, sums) in heads.items():
        q = t.Product(new, plain, args, 2 * C * D * V, sums)
        jobs = {"XLA (bare product)": (plain, q), "OLD": (lambda *x, f=before: f(Tiles(), *x), q)}
        jobs |= {t.short(k): (lambda *x, f=new, k=k: f(k, *x), q) for k in some}
        compiled = t.compile_all(jobs)
        times = t.take_turns({k: t.runner(f, args, sums) for k, f in compiled.items()}, a.rounds, deadline)
        for kind, ms in sorted(times.items(), key=lambda i: i[1]):
            print(f"{name:22} {ms:8.3f} ms {q.flops / ms / 1e9:6.0f} TFLOP/s  {kind}", flush=True)
            rows.append({"product": name, "kind": kind, "ms": ms, "tokens": C, "preset": a.preset})
    if a.out: a.out.write_text(json.dumps(rows))
say("done")
