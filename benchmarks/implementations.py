"""Time a whole step with XLA's products and with this package's kernels, in turn.

    python benchmarks/implementations.py --tokens 32768
    python benchmarks/implementations.py --preset llama31_70b --layers 4

One process, one state: the two compiled steps alternate, so that the GPU's temperature
and power limit are the same for both. Their first steps start from the same weights
and must have the same loss and gradient norm. SGD in the backward pass, batch 1, the
step alone; `--layers` of a model whose whole is too large.
"""

import argparse
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from arguments import positive

from mst_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.model import init_params
from mst_jax.sharding import make_mesh
from mst_jax.train_step import abstract_state, init_train_state, make_train_step


def step_config(
    model: ModelConfig,
    tokens: int,
    plan: str,
    implementation: str = "auto",
    *,
    optim: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """Return the configuration of the step: SGD, in the backward pass, batch 1."""
    sgd = {"name": "sgd", "learning_rate": 1e-2, "clip_norm": None, "in_backward": True}
    return Config(
        model=model,
        data=DataConfig(seq_len=tokens, batch_size=1, tokenizer="none", packing=False),
        optim=OptimConfig(
            param_dtype="bfloat16", warmup_steps=0, **sgd | (optim or {})
        ),
        train=TrainConfig(plan=plan, implementation=implementation, **train),
    )  # fmt: skip


def random_batch(model: ModelConfig, tokens: int) -> dict[str, jax.Array]:
    """Return one row of random tokens."""
    most = min(1000, model.vocab_size)
    ids = jax.random.randint(jax.random.key(0), (1, 1, tokens), 0, most)
    return {"tokens": ids, "labels": jnp.roll(ids, -1, -1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama3_8b", choices=PRESETS)
    parser.add_argument(
        "--layers", type=positive, help="of the model; all if not given"
    )
    parser.add_argument("--tokens", type=positive, default=32768)
    parser.add_argument("--plan", default="save_attention")
    parser.add_argument("--repeats", type=positive, default=3)
    args = parser.parse_args()
    model = PRESETS[args.preset]
    if args.layers is not None:
        model = dataclasses.replace(model, num_layers=args.layers)

    def config(implementation: str) -> Config:
        return step_config(model, args.tokens, args.plan, implementation)

    mesh = make_mesh(config("xla").mesh)

    def start():
        return init_train_state(config("xla"), init_params(model, 0), mesh)

    ids = jax.ShapeDtypeStruct((1, 1, args.tokens), jnp.int32)
    print(
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {args.preset}, "
        f"{model.num_layers} layers, {args.tokens} tokens",
        flush=True,
    )
    steps = {}
    for name, chosen in (("xla", "xla"), ("kernels", "auto")):
        cfg = config(chosen)
        step = make_train_step(cfg, model, mesh)
        began = time.perf_counter()
        batch = {"tokens": ids, "labels": ids}
        steps[name] = step.lower(abstract_state(cfg, model), batch).compile()
        calls = steps[name].as_text().count("mosaic_gpu_v2")
        gib = steps[name].memory_analysis().temp_size_in_bytes / 2**30
        print(
            f"{name}: compiled in {time.perf_counter() - began:.0f} s, temporaries "
            f"{gib:.2f} GiB, kernels called {calls} times",
            flush=True,
        )

    batch = random_batch(model, args.tokens)
    first, state = {}, None
    for name, step in steps.items():
        del state
        state, metrics = step(jax.jit(start)(), batch)
        first[name] = float(metrics["loss"]), float(metrics["grad_norm"])
        print(f"{name}: first loss %.4f, gradient norm %.4f" % first[name], flush=True)
    for a, b in zip(*first.values(), strict=True):
        if not math.isclose(a, b, rel_tol=3e-3):
            raise SystemExit("the two steps do not compute the same")

    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - began)
    for name, found in times.items():
        seconds = sorted(found)[len(found) // 2]
        print(
            f"{name}: {seconds:.3f} s a step ({min(found):.3f} to {max(found):.3f}), "
            f"{args.tokens / seconds:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
