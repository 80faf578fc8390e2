"""Predicted memory and speed, the plans chosen from them, `mst-jax plan`."""

import dataclasses
import shlex
import sys
from pathlib import Path

import jax
import pytest
import tyro

from mst_jax import cli
from mst_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.gpus import GPUS, H200_TARGET, find_gpu
from mst_jax.gradients import make_plan
from mst_jax.model import init_params
from mst_jax.ops import matmul
from mst_jax.planner import (
    GIB,
    GRAIN,
    PURE,
    default_budget,
    fastest_plan,
    longest_sequence,
    memory_limit,
    parse_bytes,
)
from mst_jax.prediction import predict
from mst_jax.step_memory import WORKSPACE
from mst_jax.train_step import init_train_state

ROOT = Path(__file__).parent.parent
LLAMA, SMALL = PRESETS["llama3_8b"], PRESETS["llama32_1b"]
H200 = GPUS["h200"]


def config(tokens=65536, *, model=LLAMA, optim=None, packing=False, **train):
    """SGD in the backward pass, bf16 weights."""
    sgd = {"name": "sgd", "param_dtype": "bfloat16", "clip_norm": None}
    return Config(
        model=model,
        data=DataConfig(seq_len=tokens, batch_size=1, tokenizer="x", packing=packing),
        optim=OptimConfig(**{**sgd, "in_backward": True, **(optim or {})}),
        train=TrainConfig(**train),
    )


# --- predictions ---


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "sgd"},
        {"name": "adamw"},
        {"name": "adamw", "param_dtype": "float32"},
        {"name": "adamw", "moment_dtype": "bfloat16"},
        {"name": "lion", "moment_dtype": "int8"},
        {"name": "adafactor"},
        {"name": "adamw", "freeze": ("embed", "layers/mlp")},
    ],
)
@pytest.mark.parametrize("name", ["tiny", "llama32_1b"])
def test_state_is_the_real_state(name, optim):
    cfg = config(model=PRESETS[name], optim=optim)
    state = jax.eval_shape(lambda: init_train_state(cfg, init_params(cfg.model, 0)))
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    predicted = sum(predict(cfg, cfg.model, H200).state.values())
    assert predicted == pytest.approx(real, abs=4096)  # counters


@pytest.mark.parametrize("plan", PURE)
def test_memory_and_time_grow_with_the_sequence(plan):
    steps = [predict(config(t, plan=f"* {plan}"), LLAMA, H200) for t in LENGTHS]
    for short, long in zip(steps, steps[1:], strict=False):
        assert short.peak_device < long.peak_device
        assert short.peak_host <= long.peak_host
        assert short.step_seconds < long.step_seconds
        assert short.tokens_per_second > long.tokens_per_second


LENGTHS = [2**k for k in range(13, 21)]


def test_components_add_up():
    p = predict(config(plan="save_attention"), LLAMA, H200)
    assert p.peak_device == sum(p.components.values())
    residuals = 32 * 65536 * (2 * 2 * 4096 + 4 * 32)
    assert p.components["residuals"] == residuals
    assert p.components["parameters"] == 2 * LLAMA.num_params
    # cuDNN's workspace, 32 KiB a token, is not in a compilation without a device.
    assert p.phases["attention"]["attention workspace"] == 2**31
    assert p.peak_compiled < p.peak_device


def test_each_attention_has_its_own_buffers():
    dense, blocks, packed = (
        predict(config(plan="save_attention", **how), LLAMA, H200)
        for how in ({}, {"attention": "xla"}, {"packing": True})
    )
    token = 65536 * 4096
    workspaces = [p.phases["attention"][WORKSPACE] for p in (dense, blocks, packed)]
    assert workspaces == [8 * token, 0, 16 * token]
    # gradients of q, k, v twice
    sizes = [p.phases["attention"]["layer working set"] for p in (dense, packed)]
    assert sizes[1] - sizes[0] == 2 * 65536 * (4096 + 2 * 1024)
    # The branch of packed documents that no level holds.
    assert packed.phases["attention in blocks"][WORKSPACE] == 0
    assert packed.peak_device > packed.peak_compiled > dense.peak_compiled
    assert blocks.peak_device == blocks.peak_compiled
    assert blocks.seconds["attention"] > 2 * dense.seconds["attention"]
    assert packed.seconds["attention"] == dense.seconds["attention"]


def test_attention_is_that_of_the_gpu():
    for gpu, how, on_cudnn in (
        ("h200", {}, True), ("h200", {"packing": True}, True),
        ("h200", {"attention": "xla"}, False), ("a100-80gb", {}, True),
        ("a100-80gb", {"packing": True}, False), ("t4", {}, False),
        ("h200", {"compute_dtype": "float32"}, False),
        ("h200", {"attention": "cudnn", "packing": True}, True),
    ):  # fmt: skip
        p = predict(config(**how), LLAMA, GPUS[gpu])
        assert (p.phases["attention"][WORKSPACE] > 0) is on_cudnn, (gpu, how)
    for gpu, packing, why in (
        ("t4", False, "below 8.0"),
        ("a100-80gb", True, "packed"),
    ):
        cfg = config(attention="cudnn", packing=packing)
        with pytest.raises(NotImplementedError, match=f"attention='cudnn'.*{why}"):
            predict(cfg, LLAMA, GPUS[gpu])


def test_long_packed_rows_take_head_groups_for_cudnn():
    # 2**31 elements of q for one group: offsets are 32 bits.
    for asked, groups in (("cudnn", 2), ("auto", 1)):
        cfg = config(2**19, packing=True, attention=asked, plan="offload")
        chosen, p = fastest_plan(cfg, LLAMA, H200, 120 * GIB, 400 * GIB)
        assert chosen.train.head_groups >= groups
        assert p.phases["attention"][WORKSPACE] > 0
    one_group = config(2**19, packing=True, plan="offload")
    assert predict(one_group, LLAMA, H200).phases["attention"][WORKSPACE] == 0
    with pytest.raises(NotImplementedError, match="take more head groups"):
        predict(config(2**19, packing=True, attention="cudnn"), LLAMA, H200)


def test_what_is_offloaded_is_on_the_host():
    saved, offloaded = (
        predict(config(plan=plan), LLAMA, H200) for plan in ("full", "offload")
    )
    assert offloaded.peak_host == 16 * GIB and saved.peak_host == 0
    assert saved.peak_device - offloaded.peak_device == 16 * GIB
    assert offloaded.seconds["host link"] > 0


def test_prefetch_takes_one_more_input_and_less_time():
    waited, ahead = (
        predict(config(plan="offload", prefetch=prefetch), LLAMA, H200)
        for prefetch in (False, True)
    )
    more = [sum(p.phases["MLP"].values()) for p in (ahead, waited)]
    one = 2 * 4096 * 65536
    assert more[0] - more[1] == one
    assert ahead.peak_host - waited.peak_host == one  # the stack's empty entry
    saved = waited.seconds["host link"] - ahead.seconds["host link"]
    assert saved == pytest.approx(31 / 32 * 16 * GIB / H200.link)


def test_prefetch_is_for_those_who_have_the_memory():
    plans = [
        fastest_plan(config(262144, plan="offload"), LLAMA, H200, gib * GIB, 64 * GIB)
        for gib in (28, 40)
    ]
    assert [cfg.train.prefetch for cfg, _ in plans] == [False, True]
    assert not fastest_plan(config(16384), LLAMA, H200)[0].train.prefetch


def test_groups_of_heads_take_less_memory_and_more_time():
    one, eight = (
        predict(config(plan="save_attention", head_groups=g), LLAMA, H200)
        for g in (1, 8)
    )
    attention = [sum(p.phases["attention"].values()) for p in (one, eight)]
    assert attention[1] < attention[0] - 3 * GIB
    assert eight.peak_device < one.peak_device
    assert eight.step_seconds > one.step_seconds


def test_update_in_the_backward_pass_holds_no_whole_gradient():
    one, whole = (
        predict(config(optim={"in_backward": at_once}), LLAMA, H200)
        for at_once in (True, False)
    )
    layers = 2 * (LLAMA.num_params - 2 * LLAMA.vocab_size * LLAMA.hidden_size)
    assert whole.peak_device - one.peak_device == pytest.approx(layers, rel=0.01)


def test_optimizer_state_on_the_host():
    device, host = (
        predict(config(optim={"name": "adamw", "state_on_host": there}), LLAMA, H200)
        for there in (False, True)
    )
    moved = host.peak_host
    assert moved == pytest.approx(8 * 32 * 218112000, rel=0.01)
    assert host.state["optimizer state"] + moved == device.state["optimizer state"]
    assert host.step_seconds > device.step_seconds


# (tokens, plan, chunk of the layers, head groups, products, update in the backward
# pass) -> tokens a second, of steps and runs on an H200 in docs/benchmarks.
BUT_GATE_UP = "save=input+qkv+attention+mlp_input"
MEASURED = {
    (8192, "none", 8192, 1, "auto", True): 10994,
    (16384, "none", 16384, 1, "auto", True): 9834,
    (32768, "none", 32768, 1, "auto", True): 7802,
    (65536, f"24 {BUT_GATE_UP}; 8 {BUT_GATE_UP}+gate_up", 65536, 1, "auto", True): 5288,
    (32768, "none", 16384, 1, "auto", True): 7567,
    (65536, f"* {BUT_GATE_UP}", 16384, 1, "auto", True): 5128,
    (32768, f"* {BUT_GATE_UP}", 16384, 1, "auto", True): 7053,
    (16384, "save_attention", 16384, 1, "auto", True): 8475,
    (65536, "save_attention", 16384, 1, "auto", True): 5047,
    (16384, "save_attention", 16384, 1, "xla", False): 8203,
    (32768, "save_attention", 16384, 1, "xla", False): 6787,
    (32768, f"* {BUT_GATE_UP}", 16384, 1, "xla", False): 6927,
    (65536, "save_attention", 16384, 1, "xla", False): 5009,
    (65536, "save_attention", 16384, 1, "xla", True): 4906,
    (65536, "save_attention", 16384, 8, "xla", True): 4778,
    (65536, "full", 16384, 1, "xla", True): 4291,
    (65536, "offload", 16384, 1, "xla", True): 4250,
    (65536, "offload", 16384, 8, "xla", True): 4002,
}


@pytest.mark.parametrize("case", MEASURED)
def test_speed_is_that_of_measured_steps(case):
    tokens, plan, chunk, groups, how, at_once = case
    cfg = config(
        tokens, plan=plan, head_groups=groups, mlp_chunk_size=chunk, implementation=how,
        optim={"in_backward": at_once},
    )  # fmt: skip
    predicted = predict(cfg, LLAMA, H200).tokens_per_second
    assert predicted == pytest.approx(MEASURED[case], rel=0.05)


def test_long_sequences_are_limited_by_attention_short_ones_by_matrix_products():
    assert predict(config(4096), LLAMA, H200).limited_by == "matrix products"
    assert predict(config(2**18), LLAMA, H200).limited_by == "attention"


def test_more_than_one_device_is_refused():
    cfg = dataclasses.replace(
        config(optim={"in_backward": False}),
        data=DataConfig(batch_size=2, tokenizer="x"),
        mesh=MeshConfig(fsdp=2),
    )
    with pytest.raises(NotImplementedError, match="one device.*fsdp=2"):
        predict(cfg, LLAMA, H200)


# --- plans ---


@pytest.mark.parametrize("gib", [25, 40, 60, 100])
def test_the_fastest_plan_is_within_the_budget(gib):
    cfg, p = fastest_plan(config(), LLAMA, H200, gib * GIB, 40 * GIB)
    assert p.peak_device <= gib * GIB and p.peak_host <= 40 * GIB
    assert p == predict(cfg, LLAMA, H200)
    assert sum(group.layers for group in make_plan(cfg, LLAMA).groups) == 32


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


def test_chunks_are_equal_where_they_can_be(either_jax):
    for tokens, budget in ((65536, 24), (100000, 29), (782 * 1024, 135)):
        cfg, _ = fastest_plan(config(tokens), LLAMA, H200, budget * GIB, 400 * GIB)
        train = cfg.train
        assert tokens % train.mlp_chunk_size == tokens % train.loss_chunk_size == 0
        assert train.mlp_chunk_size in range(4096, 16384 + 1, 8)
    assert fastest_plan(config(65537), LLAMA, H200)[0].train.mlp_chunk_size == 16384


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


def test_without_host_memory_nothing_is_offloaded():
    cfg, p = fastest_plan(config(), LLAMA, H200, 45 * GIB)
    assert p.peak_host == 0 and not make_plan(cfg, LLAMA).offloads


@pytest.mark.parametrize("gpu, host", [("h200", 0), ("a100-80gb", 120)])
def test_the_longest_sequence_fits_and_a_longer_one_does_not(gpu, host):
    gpu = GPUS[gpu]
    cfg, p = longest_sequence(config(), LLAMA, gpu, None, host * GIB)
    assert cfg.data.seq_len % GRAIN == 0
    assert p.peak_device <= default_budget(gpu) and p.peak_host <= host * GIB
    tokens = cfg.data.seq_len + GRAIN
    with pytest.raises(ValueError, match=f"{tokens} tokens do not fit"):
        fastest_plan(config(tokens), LLAMA, gpu, None, host * GIB)


def test_what_limits_the_length():
    budget = 40 * GIB, 20 * GIB
    cfg, _ = longest_sequence(config(), LLAMA, H200, *budget)
    assert memory_limit(cfg, LLAMA, H200, *budget) == "host memory (20.0 GiB)"
    budget = 24 * GIB, 400 * GIB
    cfg, _ = longest_sequence(config(), LLAMA, H200, *budget)
    assert memory_limit(cfg, LLAMA, H200, *budget) == "device memory (24.0 GiB)"


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
        fastest_plan(config(), LLAMA, H200, 30 * GIB)


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
    with pytest.raises(ValueError, match="gpu='V100' is not one of .*a10g"):
        find_gpu("V100")


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
    with pytest.raises(ValueError, match="'80'.*120GiB"):
        parse_bytes("80")


# --- the command ---


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mst-jax", "plan", *map(str, args)])
    return cli.main()


def test_command(monkeypatch, capsys, tmp_path):
    png = tmp_path / "plan.png"
    recipe = ROOT / "configs" / "llama3_8b.py"
    status = run(
        monkeypatch, "--config", recipe, "--gpu", "a100-80gb",
        "--host-memory", "120GiB", "--out", png,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert "The longest sequence is" in out and "host memory (120.0 GiB)" in out
    assert "| tokens | plan | head groups | device GiB | host GiB | tokens/s |" in out
    line = out[out.index("XLA_PYTHON_CLIENT_MEM_FRACTION") :].replace("\\\n", "")
    command = shlex.split(line.splitlines()[0])
    assert command[1:5] == ["python", "train.py", "--config", str(recipe)]
    cfg = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(Config),
        default=cli.load_recipe(recipe), args=command[5:],
    )  # fmt: skip
    p = predict(cfg, LLAMA, find_gpu("a100-80gb"))
    assert p.peak_device <= default_budget(find_gpu("a100-80gb"))
    assert f"| {cfg.data.seq_len} | {cfg.train.plan} |" in out
    assert cfg.train.memory_budget is None  # or the trainer would plan again
    assert png.read_bytes().startswith(b"\x89PNG")


def test_command_for_one_length(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "h200", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args, "--seq-len", 65536) == 0
    out = capsys.readouterr().out
    assert "The fastest plan for 65536 tokens" in out and "\n| 65536 |" in out


def test_command_refuses(monkeypatch, capsys, tmp_path):
    recipe = ROOT / "configs" / "llama3_8b.py"
    args = ["--config", recipe, "--gpu", "t4", "--out", tmp_path / "x.png"]
    assert run(monkeypatch, *args) == 1
    error = capsys.readouterr().err
    assert "error: 1024 tokens do not fit Tesla T4" in error
    assert "saves" in error and not (tmp_path / "x.png").exists()
