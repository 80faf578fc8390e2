"""What a train step will need and how long it will take, from shapes alone.

Memory is `step_memory.py`'s. Time is the sum of matrix products, attention, kernels
bound by memory, and the host link; nothing overlaps but the stores to the host, and
the loads with `prefetch`. The shares of the GPU's peak are those of Llama3-8B's steps
on an H200: with them the 30 measured ones of 8,192 to 131,072 tokens (docs/benchmarks)
come out within 3.3%. Other GPUs are assumed to reach the same shares. XLA's flash
attention (`train.attention`, T4, packed documents below Hopper) is taken to be bound by
the memory traffic of its scores. A packed row counts as one document.
"""

from dataclasses import dataclass

from mst_jax.config import Config, ModelConfig
from mst_jax.gpus import Gpu
from mst_jax.plan import LayerGroup
from mst_jax.step_memory import WORKSPACE, StepMemory

GIB = 2**30
MATMUL, MATMUL_KERNELS = 0.70, 0.725
"""Share of the peak in matrix products: 690 TFLOP/s of 989, 717 with the kernels."""
ATTENTION_FORWARD = {"cudnn": (0.58, 1000), "mosaic_gpu": (0.595, 750)}
ATTENTION_BACKWARD = {"cudnn": (0.53, 2200), "mosaic_gpu": (0.54, 900)}
"""(share, short) of attention: share * T / (T + short). In a step at 65,536 tokens
cuDNN 565 TFLOP/s forward and 507 back, the kernels 587 and 533; at 8,192 cuDNN 511 and
413, the kernels 539 and 488."""
SMALL_HEADS = 0.8
"""Of that share with heads of 64: alone, on an H200, 0.79 in cuDNN, 0.84 back in the
kernels."""
BOTH_WAYS = 0.8
"""Of the host link's rate, each way at once and beside the backward pass."""
BANDWIDTH = 0.9
"""Share of the memory's bandwidth: 4.3 TB/s of 4.8."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One train step. Bytes and seconds."""

    state: dict[str, int]
    """Device memory between steps: parameters, optimizer state."""
    phases: dict[str, dict[str, int]]
    """Device memory beside the state, by phase and component."""
    host: dict[str, int]
    """Pinned host memory, by component."""
    seconds: dict[str, float]
    """Of a step: matrix products, attention, memory bandwidth, host link."""
    tokens: int
    """Tokens of a step."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def components(self) -> dict[str, int]:
        """What the device holds at the peak."""
        return self.state | self.phases[self.peak_phase]

    @property
    def peak_device(self) -> int:
        """Most device memory at a time."""
        return sum(self.components.values())

    @property
    def peak_compiled(self) -> int:
        """What a compilation without a device reports: no attention workspace."""
        phases = (p | {WORKSPACE: 0} for p in self.phases.values())
        return sum(self.state.values()) + max(sum(p.values()) for p in phases)

    @property
    def peak_host(self) -> int:
        """Pinned host memory."""
        return sum(self.host.values())

    @property
    def peaks(self) -> tuple[int, int]:
        """Most device memory, and host memory."""
        return self.peak_device, self.peak_host

    def within(self, budget: tuple[int, int]) -> bool:
        """Return whether (device, host) bytes hold it."""
        return self.peak_device <= budget[0] and self.peak_host <= budget[1]

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.step_seconds

    @property
    def limited_by(self) -> str:
        """What most of the time goes to."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def predict(cfg: Config, model: ModelConfig, gpu: Gpu) -> Prediction:
    """Predict memory and time of `cfg`'s train step on a GPU.

    Raises:
        ValueError: the plan does not fit the model.
        NotImplementedError: more than one device, or cuDNN or the Hopper kernels asked
            for by name where they cannot run.
    """
    return predict_step(StepMemory(cfg, model, gpu))


def predict_step(step: StepMemory) -> Prediction:
    """Predict memory and time of a step."""
    params, device, host = step.state
    return Prediction(
        state={"parameters": params, "optimizer state": device},
        phases=step.phases(),
        host={"residuals": step.host_residuals, "optimizer state": host},
        seconds=_Time(step).seconds(),
        tokens=step.n * step.cfg.train.accumulate,
    )


def parts(prediction: Prediction) -> str:
    """Name what the device holds at the peak, largest first."""
    parts = sorted(prediction.components.items(), key=lambda item: -item[1])
    least = prediction.peak_device / 100
    return ", ".join(f"{name} {show(size)}" for name, size in parts if size > least)


def show(size: int) -> str:
    """Write a size in GiB, a small one in MiB."""
    if 0 < size < GIB // 2:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"


class _Time:
    """Seconds of a step."""

    def __init__(self, step: StepMemory):
        self.step, self.gpu, self.cfg = step, step.gpu, step.cfg
        # In the backward pass, clipping the global norm takes a second one.
        twice = self.cfg.optim.in_backward and step.clips_globally
        self.passes = 2 if twice else 1

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step by what they go to."""
        s = self.step
        groups = s.plan.groups
        matmul = self._matmul()
        attention = self._attention()
        tokens = 14 * s.V + sum(g.layers * self._moved(g) for g in groups)
        # The chunks' weight gradients are added up in f32.
        sums = s.L * s.W * s.n / s.C
        sums += 0 if s.vocab_chunk else s.V * s.D * s.n / s.C_loss
        parts = {
            "matrix products": matmul,
            "attention": attention,
            "memory bandwidth": self._memory(s.n * tokens + 8 * sums),
            "host link": self._host_link(matmul + attention),
        }
        parts = {name: x * self.cfg.train.accumulate for name, x in parts.items()}
        params, state, on_host = s.state
        # Weights and state are read and written, f32 gradients too.
        updated = 2 * params + 2 * (state + on_host) + 8 * params / s.w
        parts["memory bandwidth"] += self._memory(updated)
        parts["host link"] += self._state_link(3 / 4 * (matmul + attention))
        return parts

    def _host_link(self, compute: float) -> float:
        """Seconds that the residuals' way to the host and back is waited for."""
        s, link = self.step, self.gpu.link
        moved = s.host_residuals / link
        # The forward pass is about a quarter, and covers the stores.
        stores = max(0.0, moved - compute / 4)
        loads = self.passes * moved
        if s.plan.prefetch:  # of each group the first layer's are waited for
            first = sum(s.kept_bytes(g.offload) for g in s.plan.groups) / link
            loads = max(self.passes * first, loads - 3 / 4 * compute)
        return stores + loads

    def _state_link(self, backward: float) -> float:
        """Seconds that the optimizer state's way here and back is waited for."""
        s, link = self.step, self.gpu.link
        waited = moved = s.state[2] / link
        if self.cfg.optim.in_backward:
            loads = s.host_residuals / link if s.plan.prefetch else 0.0
            hidden = max(0.0, backward / self.passes - loads)
            waited = max(0.0, moved / BOTH_WAYS - hidden)
        # One layer's comes before all others and one goes behind them.
        return waited + 2 * moved / s.L

    def _memory(self, size: float) -> float:
        return size / (BANDWIDTH * self.gpu.bandwidth)

    def _reruns(self, group: LayerGroup) -> int:
        """How often a backward pass runs a layer's attention forward again."""
        return (group.every > 1) + ("attention" not in group.kept)

    def _moved(self, group: LayerGroup) -> int:
        """Bytes a token that one layer's memory-bound kernels move."""
        s, passes = self.step, self.passes
        forward = 15 * s.D + 3 * s.F
        backward = 35 * s.D + 6 * s.F + (forward if group.every > 1 else 0)
        # Each group of heads after the first reads and normalises x again.
        again = (s.plan.head_groups - 1) * (1 + passes * (1 + self._reruns(group)))
        return s.a * (forward + passes * backward + 7 * s.D * again)

    def _matmul(self) -> float:
        s = self.step
        flops = (8 if s.vocab_chunk else 6) * s.V * s.D + sum(
            g.layers * (2 * s.W + self.passes * (4 * s.W + self._again(g)))
            for g in s.plan.groups
        )
        share = MATMUL_KERNELS if s.kernels else MATMUL
        return s.n * flops / (share * self.gpu.peak)

    def _again(self, group: LayerGroup) -> int:
        """FLOPs a token of the matrix products that a layer's backward runs again."""
        s, kept, again = self.step, group.kept, 0
        if "qkv" not in kept:
            twice = s.plan.head_groups > 1 and "attention" not in kept
            again += 2 * s.qkv * (2 if twice else 1)
        if "mlp_input" not in kept:
            again += 2 * s.NH * s.D
        if "gate_up" not in kept:
            again += 4 * s.D * s.F
        return again + (2 * s.W if group.every > 1 else 0)

    def _attention(self) -> float:
        s, gpu = self.step, self.gpu
        forward = sum(
            g.layers * (1 + self.passes * self._reruns(g)) for g in s.plan.groups
        )
        backward = s.L * self.passes
        pairs = s.n * min(s.T / 2, s.model.sliding_window or s.T)
        if s.attention == "xla":
            # Its f32 scores go through memory, an estimated 6 times forward and 15
            # back.
            scores = self._memory(pairs * s.N * 4 * (6 * forward + 15 * backward))
            flops = pairs * s.NH * (4 * forward + 10 * backward)
            return scores + flops / (MATMUL * gpu.peak)
        rates = ATTENTION_FORWARD[s.attention], ATTENTION_BACKWARD[s.attention]
        passes = zip((4 * forward, 10 * backward), rates, strict=True)
        flops = sum(n * (1 + short / s.T) / share for n, (share, short) in passes)
        heads = SMALL_HEADS if s.H < 128 else 1
        return pairs * s.NH * flops / (heads * gpu.peak)
