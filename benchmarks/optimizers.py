"""Time AdamW's update with its moments in f32, bf16 and 8 bits.

    python benchmarks/optimizers.py                    # 8 layers: 20 GiB of a GPU
    python benchmarks/optimizers.py --layers 32        # 84 GB

The layers of Llama3-8B, bf16 parameters and gradients, through `optim.update`: layer by
layer, in place, parameters rounded stochastically. First each kind of state takes three
steps; how far they move the parameters must agree with f32's to 2%. Prints a table:
milliseconds of a step (the median), the same for 8e9 parameters, in proportion, state
and temporaries. Ends after --limit seconds, whatever has run by then.
"""

import argparse
import json
import signal
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from arguments import positive

from mst_jax.config import PRESETS, ModelConfig, OptimConfig
from mst_jax.optim import init_state, make_optimizer, squared_norm, update
from mst_jax.step_memory import parameters

MOMENTS = ("float32", "bfloat16", "int8")


def make_layers(model: ModelConfig, layers: int, scale: float, seed: int) -> dict:
    """Return random bf16 arrays of the layers' shapes, as the model names them."""
    shapes = {
        name.removeprefix("layers/"): (layers, *shape)
        for name, (_, shape) in parameters(model).items()
        if name.startswith("layers/")
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: scale * jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def measure(
    moments: str, model: ModelConfig, layers: int, steps: int
) -> dict[str, float | str]:
    """Run one kind of state: three steps, then `steps` timed ones."""
    cfg = OptimConfig(
        name="adamw", moment_dtype=moments, param_dtype="bfloat16", warmup_steps=0,
        schedule="constant", learning_rate=1e-3, weight_decay=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(cfg, 1000)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients, key):
        one = jnp.float32(1)
        return update(optimizer, params, gradients, state, scale=one, key=key)

    params = {"layers": jax.jit(lambda: make_layers(model, layers, 0.02, 0))()}
    gradients = {"layers": jax.jit(lambda: make_layers(model, layers, 1e-3, 1))()}
    state = jax.jit(partial(init_state, optimizer))(params)
    key = jax.random.key(0)
    compiled = step.lower(params, state, gradients, key).compile()
    memory = compiled.memory_analysis()

    largest = max(params["layers"], key=lambda name: params["layers"][name].size)
    before = params["layers"][largest][0].astype(jnp.float32)
    for i in range(3):
        params, state = compiled(params, state, gradients, jax.random.key(i))
    moved = jnp.sqrt(squared_norm(params["layers"][largest][0] - before))
    times = []
    for _ in range(steps):
        jax.block_until_ready(params)
        began = time.perf_counter()
        params, state = compiled(params, state, gradients, key)
        jax.block_until_ready(params)
        times.append(1e3 * (time.perf_counter() - began))
    size = sum(p.size for p in jax.tree.leaves(params))
    ms = statistics.median(times)
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    return {
        "moments": moments,
        "parameters": size,
        "ms": round(ms, 2),
        "ms_for_8e9": round(ms * 8e9 / size, 1),
        "state_bytes_a_parameter": round(held / size, 3),
        "temporaries_MiB": round(memory.temp_size_in_bytes / 2**20, 1),
        "moved": float(moved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moments", nargs="*", default=list(MOMENTS))
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--limit", type=positive, default=240, help="seconds")
    args = parser.parse_args()
    if unknown := set(args.moments) - set(MOMENTS):
        raise SystemExit(f"no moments {sorted(unknown)}; there are {MOMENTS}")
    signal.alarm(args.limit)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    found = []
    for moments in args.moments:
        found.append(measure(moments, PRESETS[args.preset], args.layers, args.steps))
        print(json.dumps(found[-1]), flush=True)
    for row in found:
        ratio = row["moved"] / found[0]["moved"]
        if abs(ratio - 1) > 0.02:
            raise SystemExit(f"{row['moments']} moves the parameters {ratio:.3f} times")


if __name__ == "__main__":
    main()
