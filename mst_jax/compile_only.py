"""Compile the real train step for GPUs that are not there: its memory, its HLO.

XLA's CUDA compiler needs a description of the GPU, not the GPU: `gpus.Gpu.target`. The
CUDA plugin must be installed. The compilation runs in a process of its own, since the
plugin would claim this one's backend. Two things differ from a run:

- cuDNN is not asked for the workspace of its attention, which counts as nothing;
  `Prediction` knows it.
- kernels are not autotuned, and Triton's matrix products, which need that, are off. So
  they are on Hopper (`train_step.py`); elsewhere a GPU holds up to 1.2% more with them
  (docs/LOG.md).

Optimizer state in host memory (`optim.state_on_host`) cannot be an argument here: its
memory kind belongs to a device. The program allocates it instead, and keeps it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mst_jax.config import Config, ModelConfig, from_dict, to_dict
from mst_jax.gpus import GPUS, Gpu

FLAGS = "--xla_gpu_enable_triton_gemm=false"
SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """XLA's account of a compiled step, in bytes of one device."""

    arguments: int
    """State and batch."""
    temporaries: int
    """What the step allocates on the device."""
    outputs: int
    """Results that do not overwrite an argument."""
    host: int
    """What the step has in pinned host memory, optimizer state too."""
    hlo: str = field(repr=False)
    """The optimised program, as text."""

    @property
    def device(self) -> int:
        """Peak of the device's memory."""
        return self.arguments + self.temporaries + self.outputs


def compile_step(cfg: Config, model: ModelConfig, gpu: Gpu) -> Compiled:
    """Compile `cfg`'s train step for a GPU, or a mesh: 10 to 60 seconds on two cores.

    Raises:
        ImportError: the CUDA plugin is not installed.
        RuntimeError: the compilation failed; with the end of what it said.
    """
    if not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise ImportError(
            "compiling for a GPU needs the CUDA plugin: pip install 'mst-jax[cuda13]'"
        )
    name = next(key for key, known in GPUS.items() if known == gpu)
    job = {"config": to_dict(cfg), "model": to_dict(model), "gpu": name}
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = [*filter(None, [os.environ.get("XLA_FLAGS")]), FLAGS]
    done = subprocess.run(
        [sys.executable, "-m", "mst_jax.compile_only"],
        input=json.dumps(job), capture_output=True, text=True, timeout=SECONDS,
        env={
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags),
            "PYTHONPATH": os.pathsep.join(paths),
        },
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"the step does not compile for {gpu.name} (compute capability "
            f"{gpu.capability}) without one:\n{done.stderr[-2000:]}"
        )
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    job = json.load(sys.stdin)
    compiled = _compile(
        from_dict(job["config"]), from_dict(job["model"], ModelConfig), GPUS[job["gpu"]]
    )
    print(json.dumps(compiled))


def _compile(cfg: Config, model: ModelConfig, gpu: Gpu) -> dict[str, int | str]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    import mst_jax.ops.attention.api as attention
    import mst_jax.ops.matmul.mosaic_gpu as kernels
    from mst_jax.sharding import make_mesh
    from mst_jax.train_step import (
        BATCH_SPEC,
        abstract_state,
        jit_step,
        pure_train_step,
        state_shardings,
    )

    # They ask this process's device, which is a CPU.
    attention.compute_capability = lambda: gpu.capability
    kernels.compute_capability = attention.compute_capability

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=gpu.target,
        topology=f"1x{cfg.mesh.data * cfg.mesh.fsdp}x1",
    )  # fmt: skip
    mesh = make_mesh(cfg.mesh, topology.devices)
    state = abstract_state(cfg, model)
    state = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        state, state_shardings(state, mesh),
    )  # fmt: skip
    names = ["tokens", "labels"]
    names += ["segment_ids", "positions"] if cfg.data.packing else []
    ids = jax.ShapeDtypeStruct(
        (cfg.train.accumulate, cfg.data.batch_size, cfg.data.seq_len), jnp.int32,
        sharding=NamedSharding(mesh, BATCH_SPEC),
    )  # fmt: skip
    step = pure_train_step(cfg, model, mesh)
    if cfg.optim.state_on_host and "layers" in state["opt"]:
        step, state = _allocating(step, state)
    run = jit_step(cfg, model, step)
    compiled = run.lower(state, dict.fromkeys(names, ids)).compile()
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
        "hlo": compiled.as_text(),
    }


def _allocating(step: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a step that allocates its state in host memory, and the other state."""
    import jax

    from mst_jax.host_memory import to_device, to_host
    from mst_jax.layer_state import join, split
    from mst_jax.train_step import goes_to_host

    def with_layers(state, layers):
        return {**state, "opt": {**state["opt"], "layers": layers}}

    layers = state["opt"]["layers"]
    is_away = jax.tree.map(goes_to_host, layers)
    here, away = split(layers, is_away)

    def room(a):
        if len(a.sharding.device_set) == 1:
            return to_host(jax.lax.empty(a.shape, a.dtype))
        zeros = jax.lax.full(a.shape, 0, a.dtype)  # XLA splits nothing that is empty
        return to_host(jax.lax.with_sharding_constraint(zeros, a.sharding))

    def run(state, batch):
        layers = join(state["opt"]["layers"], jax.tree.map(room, away))
        state, metrics = step(with_layers(state, layers), batch)
        here, written = split(state["opt"]["layers"], is_away)
        # A row of each comes back: XLA drops what is written for nothing.
        rows = jax.tree.map(lambda a: to_device(a[(slice(1),) * (a.ndim - 1)]), written)
        return with_layers(state, here), metrics, rows

    return run, with_layers(state, here)


if __name__ == "__main__":
    _main()
