"""Named GPUs: what the planner needs to know of one, and its target for XLA's compiler.

Measured, on an H200 and an H100: the share of the peak that matrix products and cuDNN's
attention reach in the train step (`prediction.py` has them), and the host link. Memory
is what the driver reports, peaks and bandwidths are NVIDIA's datasheets'. For every
other GPU the shares are assumed to be the same and its link is scaled by its PCIe
generation.

`target` describes the GPU to the compiler, which then needs none. Only the H200's is a
device's own; the others are that one with the fields changed that datasheets give. Each
compute capability here compiles with JAX 0.12 and CUDA 13. Memory depends on it alone:
below 8.0 there are no bf16 tensor cores, and XLA widens every matrix product to f32.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from mst_jax.metrics import PEAK_FLOPS

H200_TARGET = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As NVIDIA's driver spells it, nearly."""
    memory: int
    """Bytes of device memory, as the driver reports them."""
    peak: float
    """Dense FLOP/s of bf16 matrix products; of f32 where there are none in bf16."""
    bandwidth: float
    """Bytes a second of device memory."""
    link: float
    """Bytes a second between host and device, each way."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    cores: int
    """Streaming multiprocessors."""
    l2: int
    """Bytes of the L2 cache."""
    clock: float
    """Highest clock, GHz."""

    @property
    def usable(self) -> int:
        """Bytes that a JAX process can hold: the rest is CUDA's own."""
        return int(0.95 * self.memory)

    @property
    def has_bf16(self) -> bool:
        """Whether its tensor cores take bf16, and cuDNN has flash attention for it."""
        return self.capability >= (8, 0)

    @property
    def target(self) -> str:
        """XLA's GpuTargetConfigProto in text form."""
        # Shared memory of a core, of a block, threads and f32 units of a core.
        shared, block, threads, units = {
            (7, 5): (65536, 65536, 1024, 64),
            (8, 0): (167936, 166912, 2048, 64),
            (8, 6): (102400, 101376, 1536, 128),
            (8, 9): (102400, 101376, 1536, 128),
        }.get(self.capability, (233472, 232448, 2048, 128))
        fields = {
            "shared_memory_per_core": shared,
            "shared_memory_per_block_optin": block,
            "threads_per_core_limit": threads,
            "fpus_per_core": units,
            "core_count": self.cores,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
        }
        text = H200_TARGET.replace("NVIDIA H200", self.name)
        for key, value in fields.items():
            text = re.sub(rf"\b{key}: .*", f"{key}: {value}", text)
        major, minor = self.capability
        return text.replace("{ major: 9 }", f"{{ major: {major} minor: {minor} }}")


MIB = 2**20
_GEN3, _GEN4, _GEN5 = 13.2e9, 26.5e9, 53e9  # the last is measured
GPUS = {
    # No bf16: its matrix products run in f32 at 8.1 TFLOP/s, not at 65 in f16.
    "t4": Gpu(
        name="Tesla T4", memory=15360 * MIB, peak=8.1e12, bandwidth=320e9,
        link=_GEN3, capability=(7, 5), cores=40, l2=4 * MIB, clock=1.59,
    ),
    "l4": Gpu(
        name="NVIDIA L4", memory=23034 * MIB, peak=PEAK_FLOPS["L4"], bandwidth=300e9,
        link=_GEN4, capability=(8, 9), cores=58, l2=48 * MIB, clock=2.04,
    ),
    "a10g": Gpu(
        name="NVIDIA A10G", memory=23028 * MIB, peak=PEAK_FLOPS["A10G"],
        bandwidth=600e9, link=_GEN4, capability=(8, 6), cores=80, l2=6 * MIB,
        clock=1.71,
    ),
    "rtx-4090": Gpu(
        name="NVIDIA GeForce RTX 4090", memory=24564 * MIB, peak=PEAK_FLOPS["4090"],
        bandwidth=1008e9, link=_GEN4, capability=(8, 9), cores=128, l2=72 * MIB,
        clock=2.52,
    ),
    "a100-40gb": Gpu(
        name="NVIDIA A100-SXM4-40GB", memory=40960 * MIB, peak=PEAK_FLOPS["A100"],
        bandwidth=1555e9, link=_GEN4, capability=(8, 0), cores=108, l2=40 * MIB,
        clock=1.41,
    ),
    "a100-80gb": Gpu(
        name="NVIDIA A100-SXM4-80GB", memory=81920 * MIB, peak=PEAK_FLOPS["A100"],
        bandwidth=2039e9, link=_GEN4, capability=(8, 0), cores=108, l2=40 * MIB,
        clock=1.41,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3", memory=81559 * MIB, peak=PEAK_FLOPS["H100"],
        bandwidth=3352e9, link=_GEN5, capability=(9, 0), cores=132, l2=50 * MIB,
        clock=1.98,
    ),
    "h200": Gpu(
        name="NVIDIA H200", memory=143771 * MIB, peak=PEAK_FLOPS["H200"],
        bandwidth=4800e9, link=_GEN5, capability=(9, 0), cores=132, l2=60 * MIB,
        clock=1.98,
    ),
    "b200": Gpu(
        name="NVIDIA B200", memory=183359 * MIB, peak=PEAK_FLOPS["B200"],
        bandwidth=8000e9, link=_GEN5, capability=(10, 0), cores=148, l2=126 * MIB,
        clock=1.965,
    ),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Return a GPU by name, ours or the driver's, such as 'RTX 4090' or 'Tesla T4'.

    Raises:
        ValueError: there is none of that name; with those that come near.
    """
    key = _spelling(name)
    key = {"a10040": "a10040gb", "a10080": "a10080gb", "4090": "rtx4090"}.get(key, key)
    for known, gpu in GPUS.items():
        if key in (_spelling(known), _spelling(gpu.name)):
            return gpu
    near = [known for known in GPUS if key and _spelling(known).startswith(key)]
    near = near or get_close_matches(name.lower(), GPUS)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"gpu={name!r} is not one of {tuple(GPUS)}{hint}")


def _spelling(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower()).removeprefix("nvidia")
