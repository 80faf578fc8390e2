"""A run's place in this machine's memory: its plan, its host pool, running out of it.

The planner knows named GPUs; here it meets the one that is present.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax

from mst_jax.config import Config, MeshConfig, ModelConfig
from mst_jax.gpus import GPUS, Gpu
from mst_jax.plan import parse_bytes
from mst_jax.planner import default_budget, fastest_plan, options
from mst_jax.prediction import GIB, predict

_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


class OutOfMemoryError(RuntimeError):
    """The device's memory does not hold the step."""


def fit(cfg: Config, model: ModelConfig) -> Config:
    """Return the run with its plan filled in if it has a memory budget.

    Also sizes XLA's pool of pinned host memory, so call it before anything touches a
    device. The pool is no larger than the plan, or its budget, needs: it may take all
    that it is allowed.

    Raises:
        ValueError: no plan fits the budget; or the host has not what the plan needs.
    """
    budget, host_budget = cfg.train.memory_budget, cfg.train.host_memory
    if budget is None:
        need = _host_bytes(cfg, model)
        if need and need > (free := available_host_bytes()):
            raise ValueError(
                f"the plan keeps {need / GIB:.1f} GiB in host memory and "
                f"{free / GIB:.1f} GiB are free: offload fewer layers or residuals "
                "(--train.plan), or use shorter sequences"
            )
        _reserve_host(need)
        return cfg
    host = 0
    if host_budget == "auto":
        host = int(0.8 * available_host_bytes())
    elif host_budget is not None:
        host, free = parse_bytes(host_budget), available_host_bytes()
        if host > free:
            raise ValueError(
                f"TrainConfig.host_memory={host_budget!r}: {free / GIB:.1f} GiB are "
                "free; give less, or 'auto'"
            )
    _reserve_host(host)
    gpu = present_gpu()
    device = default_budget(gpu) if budget == "auto" else parse_bytes(budget)
    return fastest_plan(cfg, model, gpu, device, host)[0]


def present_gpu() -> Gpu:
    """Return the first device as the planner sees it.

    A GPU that is not in `GPUS` gets its own memory and capability, and the speeds of an
    A100; a CPU as well, so that plans can be tried without a GPU.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    known = [g for g in GPUS.values() if g.name == device.device_kind]
    gpu = known[0] if known else replace(GPUS["a100-80gb"], name=device.device_kind)
    if "bytes_limit" in stats:  # what this process may use, not what the card has
        gpu = replace(gpu, memory=int(stats["bytes_limit"] / 0.95))
    if not known and hasattr(device, "compute_capability"):
        major, minor = device.compute_capability.split(".")
        gpu = replace(gpu, capability=(int(major), int(minor)))
    return gpu


def available_host_bytes() -> int:
    """Return the host memory that is free, or can be made so, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    available = int(found[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        cached = int(stat[stat.index("inactive_file") + 1])  # files, that can go
        available = min(available, int(text) - used + cached)
    return available


@contextmanager
def explained(cfg: Config, model: ModelConfig) -> Iterator[None]:
    """Turn XLA's out-of-memory error into one that says what would fit.

    Raises:
        OutOfMemoryError: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(_explanation(cfg, model, str(error))) from error


def _explanation(cfg: Config, model: ModelConfig, error: str) -> str:
    gpu = present_gpu()
    lines = [f"out of memory on {gpu.name}: {error.splitlines()[0][:300]}"]
    try:
        expected = predict(cfg, model, gpu)
        lines.append(
            f"predicted were {expected.peak_device / GIB:.1f} GiB with plan="
            f"{cfg.train.plan!r}, this process may use {gpu.usable / GIB:.1f} GiB"
        )
        host = int(0.8 * available_host_bytes())
        better, found = fastest_plan(cfg, model, gpu, default_budget(gpu), host)
        lines.append(
            f"this fits, in {found.peak_device / GIB:.1f} GiB and "
            f"{found.peak_host / GIB:.1f} GiB of host memory: "
            f"{' '.join(options(better.train))}; or let "
            "--train.memory-budget auto --train.host-memory auto choose"
        )
    except (ValueError, NotImplementedError) as reason:
        lines.append(str(reason))
    return "\n".join(lines)


def _host_bytes(cfg: Config, model: ModelConfig) -> int:
    """Pinned host memory of an explicit plan, of all devices of this host.

    Each replica has optimizer state of its own; residuals are of the whole batch.
    """
    host = predict(replace(cfg, mesh=MeshConfig()), model, GPUS["h200"]).host
    return host["residuals"] + cfg.mesh.data * host["optimizer state"]


def _reserve_host(need: int) -> None:
    # XLA's own default is 64 GiB, read when the GPU's client is made.
    if need:
        os.environ.setdefault(_POOL, str(max(64, math.ceil(1.02 * need / GIB) + 1)))
