"""Plans chosen from predicted memory and speed."""

import dataclasses
import re
from pathlib import Path

import pytest

from mst_jax import planner
from mst_jax.chunk_loop import loop_chunks
from mst_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.gpus import GPUS, H200_TARGET, find_gpu
from mst_jax.gradients import make_plan
from mst_jax.ops import matmul
from mst_jax.plan import parse_bytes
from mst_jax.plan_report import memory_limit
from mst_jax.planner import (
    GRAIN,
    default_budget,
    fastest_plan,
    longest_sequence,
)
from mst_jax.prediction import GIB, predict
from mst_jax.step_memory import WORKSPACE, StepMemory

ROOT = Path(__file__).parent.parent
LLAMA, SMALL = PRESETS["llama3_8b"], PRESETS["llama32_1b"]
H200 = GPUS["h200"]
ADAMW_8 = {"name": "adamw", "moment_dtype": "int8"}
# A search makes 100,000 calls, and checking their annotations is most of its time.
search = pytest.mark.usefixtures("untyped")


def config(tokens=65536, *, model=LLAMA, optim=None, packing=False, **train):
    """SGD in the backward pass, bf16 weights."""
    sgd = {"name": "sgd", "param_dtype": "bfloat16", "clip_norm": None}
    return Config(
        model=model,
        data=DataConfig(seq_len=tokens, batch_size=1, tokenizer="x", packing=packing),
        optim=OptimConfig(**{**sgd, "in_backward": True, **(optim or {})}),
        train=TrainConfig(**train),
    )


# --- plans ---


@search
def test_long_packed_rows_take_head_groups_for_cudnn():
    # 2**31 elements of q for one group: offsets are 32 bits.
    for asked, groups in (("cudnn", 2), ("auto", 1)):
        cfg = config(2**19, packing=True, attention=asked, plan="offload")
        chosen, p = fastest_plan(cfg, LLAMA, H200, 120 * GIB, 400 * GIB)
        assert chosen.train.head_groups >= groups
        on_cudnn = asked == "cudnn" or matmul.obstacle() is not None
        assert (p.phases["attention"][WORKSPACE] > 0) == on_cudnn
    one_group = config(2**19, packing=True, plan="offload")
    assert predict(one_group, LLAMA, H200).phases["attention"][WORKSPACE] == 0
    with pytest.raises(NotImplementedError, match="take more head groups"):
        predict(config(2**19, packing=True, attention="cudnn"), LLAMA, H200)


@search
def test_prefetch_is_for_those_who_have_the_memory():
    plans = [
        fastest_plan(config(262144, plan="offload"), LLAMA, H200, gib * GIB, 64 * GIB)
        for gib in (28, 30)
    ]
    assert [cfg.train.prefetch for cfg, _ in plans] == [False, True]
    assert not fastest_plan(config(16384), LLAMA, H200)[0].train.prefetch


@search
@pytest.mark.parametrize("gib", [25, 40, 60, 100])
def test_the_fastest_plan_is_within_the_budget(gib):
    cfg, p = fastest_plan(config(), LLAMA, H200, gib * GIB, 40 * GIB)
    assert p.peak_device <= gib * GIB and p.peak_host <= 40 * GIB
    assert p == predict(cfg, LLAMA, H200)
    assert sum(group.layers for group in make_plan(cfg, LLAMA).groups) == 32


@search
def test_more_memory_is_never_slower():
    speeds = [
        fastest_plan(config(), LLAMA, H200, gib * GIB, host * GIB)[1].tokens_per_second
        for gib, host in ((24, 16), (24, 40), (40, 40), (60, 40), (130, 40))
    ]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


@pytest.fixture(params=[(0, 0, 0), (99, 0, 0)], ids=["kernels", "xla"])
def either_jax(request, monkeypatch):
    """As on a JAX that has the Hopper kernels, and as on one that has not."""
    monkeypatch.setattr(matmul.mosaic_gpu, "OLDEST_JAX", request.param)


@search
def test_chunks_are_equal_where_they_can_be(either_jax):
    for tokens, budget in ((65536, 24), (100000, 29), (782 * 1024, 135)):
        cfg, _ = fastest_plan(config(tokens), LLAMA, H200, budget * GIB, 400 * GIB)
        train = cfg.train
        assert tokens % train.mlp_chunk_size == tokens % train.loss_chunk_size == 0
        assert train.mlp_chunk_size in (tokens, *range(4096, 16384 + 1, 8))
    assert fastest_plan(config(65537), LLAMA, H200)[0].train.mlp_chunk_size == 16384


@search
def test_chunks_are_those_that_kernels_take(monkeypatch):
    monkeypatch.setattr(matmul.mosaic_gpu, "OLDEST_JAX", (0, 0, 0))
    for tokens in (80056, 65672, 131080):  # equal ones: odd, odd, 4520
        cfg = config(tokens, implementation="mosaic_gpu")
        train = fastest_plan(cfg, LLAMA, H200, 30 * GIB, 100 * GIB)[0].train
        assert train.mlp_chunk_size in (tokens, 16384)
        for size in loop_chunks(tokens, train.mlp_chunk_size):
            assert size % 8 == 0
    # Without the kernels equal ones are better.
    cfg = fastest_plan(config(80056), LLAMA, GPUS["a100-80gb"], 30 * GIB, 100 * GIB)[0]
    assert cfg.train.mlp_chunk_size == 10007


def test_kernels_that_the_gpu_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(matmul.mosaic_gpu, "OLDEST_JAX", (0, 0, 0))
    cfg = config(8192, implementation="mosaic_gpu")
    why = "the LM head's loss: compute capability 8.0 is not 9.0"
    for plan in (predict, fastest_plan, longest_sequence):
        with pytest.raises(NotImplementedError, match=why):
            plan(cfg, LLAMA, GPUS["a100-80gb"])


def test_layers_run_on_the_whole_sequence_where_it_fits(either_jax):
    for tokens, size in ((32768, 32768), (65536, 65536), (32769, 10923)):
        cfg = fastest_plan(config(tokens), LLAMA, H200)[0]
        assert cfg.train.mlp_chunk_size == size  # kernels take multiples of 8 rows


def test_the_heads_chunk_is_that_of_what_computes_it(monkeypatch):
    monkeypatch.setattr(matmul.mosaic_gpu, "OLDEST_JAX", (0, 0, 0))
    for gpu, how, size in (
        ("h200", "auto", 8192), ("h200", "xla", 4096), ("a100-80gb", "auto", 4096),
    ):  # fmt: skip
        cfg = config(8192, implementation=how, mlp_chunk_size=1024)
        train = fastest_plan(cfg, LLAMA, GPUS[gpu])[0].train
        assert train.loss_chunk_size == size
    # Their logits are one 16-bit array.
    ours, xla = (
        predict(config(8192, implementation=how, loss_chunk_size=4096), LLAMA, H200)
        for how in ("auto", "xla")
    )
    more = xla.phases["head"]["head and loss"] - ours.phases["head"]["head and loss"]
    assert more == 4096 * LLAMA.vocab_size * 4


def test_the_heads_gradient_by_columns_makes_room_for_what_layers_keep(monkeypatch):
    # 1.6 GiB of the head's phase, the peak of short sequences.
    cfg, p = fastest_plan(config(8192), LLAMA, H200, int(21.2 * GIB))
    assert (cfg.train.vocab_chunk_size, cfg.train.loss_chunk_size) == (8192, 1024)
    cuts = planner._cuts(config(8192), LLAMA, H200)
    monkeypatch.setattr(planner, "_both_cuts", lambda *_: (cuts, []))
    without, slower = fastest_plan(config(8192), LLAMA, H200, int(21.2 * GIB))
    assert without.train.vocab_chunk_size is None
    assert p.step_seconds < 0.98 * slower.step_seconds


@search
@pytest.mark.parametrize("tokens, gib", [(8192, 60), (2**18, 60)])
def test_the_heads_gradient_is_summed_where_memory_is_not_short(tokens, gib):
    train = fastest_plan(config(tokens), LLAMA, H200, gib * GIB)[0].train
    assert train.vocab_chunk_size is None and train.loss_chunk_size <= tokens


def test_a_shorter_last_chunk_costs_a_copy():
    equal, ragged = (
        predict(config(t, plan="offload", head_groups=8), LLAMA, H200)
        for t in (2**20, 2**20 + 1)
    )
    copy = sum(ragged.phases["MLP"].values()) - sum(equal.phases["MLP"].values())
    assert copy == pytest.approx(2 * 4096 * 2**20, rel=0.01)


def test_a_mixture_fills_the_memory_between_two_plans():
    cfg, p = fastest_plan(config(), LLAMA, H200, 50 * GIB)
    assert len(make_plan(cfg, LLAMA).groups) == 2
    assert p.peak_device > 49 * GIB


def test_blocks_on_the_device_make_long_sequences_without_host_memory():
    for tokens, every in ((150 * 1024, 2), (320 * 1024, 4)):
        cfg, _ = fastest_plan(config(tokens, optim=ADAMW_8), LLAMA, GPUS["a100-80gb"])
        groups = make_plan(cfg, LLAMA).groups
        assert groups[0].every == every and not any(g.offload for g in groups)


def test_blocks_keep_attention_where_it_fits():
    cfg, p = fastest_plan(config(2**18), LLAMA, H200, 90 * GIB)
    groups = make_plan(cfg, LLAMA).groups
    assert groups[0].every > 1 and groups[0].save == {"input", "attention"}
    plain = dataclasses.replace(cfg.train, plan="* save=input every=2")
    plain = predict(dataclasses.replace(cfg, train=plain), LLAMA, H200)
    assert p.step_seconds < 0.9 * plain.step_seconds


@search
def test_inputs_on_the_host_and_attention_on_the_device():
    cfg, p = fastest_plan(
        config(384 * 1024, optim=ADAMW_8), LLAMA, H200, None, 100 * GIB
    )
    groups = make_plan(cfg, LLAMA).groups
    assert groups[-1].offload == {"input"} and groups[-1].save == {"attention"}
    others = dataclasses.replace(cfg.train, plan="offload")
    others = predict(dataclasses.replace(cfg, train=others), LLAMA, H200)
    assert p.step_seconds < 0.9 * others.step_seconds


@pytest.mark.parametrize("device, host", [(40, 24), (50, 24), (80, 48), (120, 0)])
def test_a_mixture_has_as_many_of_the_faster_layers_as_both_memories_hold(device, host):
    budget = device * GIB, host * GIB
    cut = config(2**18, head_groups=8, mlp_chunk_size=4096, plan="full")
    step = StepMemory(cut, LLAMA, H200)
    for faster, smaller in planner.NEIGHBOURS:
        counts = [n for n in range(4, 32, 4)]
        all_of_them = [
            planner._candidate(
                step,
                dataclasses.replace(smaller, layers=32 - n),
                dataclasses.replace(faster, layers=n),
            )[1]
            for n in counts
        ]
        best = max(
            (n for n, p in zip(counts, all_of_them, strict=True) if p.within(budget)),
            default=0,
        )
        found = planner._mixture(step, faster, smaller, budget)
        assert found is not None
        assert found[1].within(budget) or not best
        if found[1].within(budget):
            assert found[0].plan.groups[-1].layers >= best


def test_without_host_memory_nothing_is_offloaded():
    cfg, p = fastest_plan(config(), LLAMA, H200, 45 * GIB)
    assert p.peak_host == 0 and not make_plan(cfg, LLAMA).offloads


@search
@pytest.mark.parametrize("gpu, host", [("h200", 0), ("a100-80gb", 120)])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(gpu, host):
    gpu = GPUS[gpu]
    cfg, p = longest_sequence(config(), LLAMA, gpu, None, host * GIB)
    assert cfg.data.seq_len % GRAIN == 0
    assert p.peak_device <= default_budget(gpu) and p.peak_host <= host * GIB
    tokens = cfg.data.seq_len + GRAIN
    with pytest.raises(ValueError, match=f"{tokens} tokens do not fit"):
        fastest_plan(config(tokens), LLAMA, gpu, None, host * GIB)


@search
def test_what_limits_the_length():
    budget = 40 * GIB, 20 * GIB
    cfg, _ = longest_sequence(config(), LLAMA, H200, *budget)
    assert memory_limit(cfg, LLAMA, H200, *budget) == "host memory (20.0 GiB)"
    budget = 24 * GIB, 400 * GIB
    cfg, _ = longest_sequence(config(), LLAMA, H200, *budget)
    assert memory_limit(cfg, LLAMA, H200, *budget) == "device memory (24.0 GiB)"
    budget = 24 * GIB, 0
    cfg, _ = longest_sequence(config(), LLAMA, H200, *budget)
    limit = memory_limit(cfg, LLAMA, H200, *budget)
    assert limit == "device memory (24.0 GiB); host memory would make it longer"


def test_nothing_fits():
    adamw = {"name": "adamw", "param_dtype": "float32", "in_backward": False}
    with pytest.raises(ValueError) as caught:
        longest_sequence(config(optim=adamw), LLAMA, GPUS["a100-80gb"])
    text = str(caught.value)
    assert "1024 tokens do not fit NVIDIA A100-SXM4-80GB" in text
    assert "optimizer state 59.8 GiB" in text and "there are 73.7 GiB" in text
    for change in (
        "optim.param_dtype='bfloat16' saves", "optim.in_backward=True saves",
        "optim.name='adafactor' saves 59.8 GiB", "optim.moment_dtype='int8' saves",
    ):  # fmt: skip
        assert change in text, text


def test_host_memory_would_make_room():
    with pytest.raises(ValueError, match="of host memory saves .* then it fits"):
        fastest_plan(config(), LLAMA, H200, 22 * GIB)


def test_the_optimizer_state_can_go_to_the_host():
    cfg = config(optim={"name": "adamw"})
    saves = r"optim.state_on_host=True saves [0-9.]+ GiB; then it fits"
    for host, said in ((0, False), (20, False), (80, True)):
        with pytest.raises(ValueError) as caught:
            fastest_plan(cfg, LLAMA, GPUS["a100-80gb"], None, host * GIB)
        assert bool(re.search(saves, str(caught.value))) is said
        assert ("state_on_host=True" in str(caught.value)) is said


@search
def test_too_little_host_memory_for_the_optimizer_state():
    adamw = {"name": "adamw", "clip_norm": 1.0, "clip": "layer", "state_on_host": True}
    cfg, p = longest_sequence(config(optim=adamw), LLAMA, H200, None, 120 * GIB)
    assert p.host["optimizer state"] == pytest.approx(52 * GIB, rel=0.01)
    assert p.peak_host <= 120 * GIB and cfg.data.seq_len > 10**6
    with pytest.raises(ValueError) as caught:
        fastest_plan(config(optim=adamw), LLAMA, H200, None, 40 * GIB)
    text = str(caught.value)
    assert "optim.moment_dtype='int8' saves" in text
    assert "With optim.state_on_host=False it fits." in text
    assert "GiB of host memory it fits." in text


# --- names and sizes ---


def test_gpus_by_name():
    assert find_gpu("A100-80GB") is find_gpu("a100_80") is GPUS["a100-80gb"]
    assert find_gpu("RTX 4090") is find_gpu("4090") is GPUS["rtx-4090"]
    assert find_gpu("rtx4090") is GPUS["rtx-4090"]
    assert find_gpu("nvidia h100") is GPUS["h100"]
    for gpu in GPUS.values():  # as the driver says it
        assert find_gpu(gpu.name) is gpu
    with pytest.raises(ValueError, match="gpu='V100' is not one of .*a10g"):
        find_gpu("V100")
    with pytest.raises(ValueError, match="mean 'a100-40gb' or 'a100-80gb'"):
        find_gpu("a100")


def test_the_compiler_knows_each_gpu():
    assert H200.target.replace(" minor: 0", "") == H200_TARGET
    targets = [gpu.target for gpu in GPUS.values()]
    assert len(set(targets)) == len(GPUS)
    assert "{ major: 8 minor: 6 }" in GPUS["a10g"].target
    assert f"device_memory_size: {15 * GIB}" in GPUS["t4"].target


def test_small_sizes_are_in_mib():
    tiny = config(512, model=PRESETS["tiny"], optim={"in_backward": False})
    message = r"needs \d+ MiB .* there are 1 MiB .*At its peak: [a-z ]+ \d+ MiB, "
    with pytest.raises(ValueError, match=message):
        fastest_plan(tiny, PRESETS["tiny"], H200, 2**20)


def test_sizes():
    assert parse_bytes("120GiB") == 120 * GIB and parse_bytes("80 GB") == 80 * 10**9
    assert parse_bytes("1.5MiB") == 3 * 2**19
    for wrong in ("80", "1.2.3GiB", ".GiB", "-1GiB"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no size.*120GiB"):
            parse_bytes(wrong)
