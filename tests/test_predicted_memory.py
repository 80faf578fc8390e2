"""Predicted memory and time; memory also against that of the real step, compiled.

The compiler for a GPU that is not there is in the CUDA plugin: `pip install
".[cuda13]"`.
"""

import dataclasses

import jax
import pytest
from mosaic import needs_pallas
from test_planner import ADAMW_8, H200, LLAMA, SMALL, config

from mst_jax.compile_only import compile_step
from mst_jax.config import PRESETS, DataConfig, MeshConfig
from mst_jax.gpus import GPUS
from mst_jax.planner import PURE
from mst_jax.prediction import GIB, predict
from mst_jax.step_memory import WORKSPACE
from mst_jax.train_step import abstract_state

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
    state = abstract_state(cfg, cfg.model)
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    predicted = sum(predict(cfg, cfg.model, H200).state.values())
    assert predicted == pytest.approx(real, abs=4096)  # counters


@pytest.mark.parametrize("plan", PURE)
def test_memory_and_time_grow_with_the_sequence(plan):
    steps = [predict(config(t, plan=str(plan)), LLAMA, H200) for t in LENGTHS]
    for short, long in zip(steps, steps[1:], strict=False):
        assert short.peak_device < long.peak_device
        assert short.peak_host <= long.peak_host
        assert short.step_seconds < long.step_seconds
        assert short.tokens_per_second > long.tokens_per_second


LENGTHS = [2**k for k in range(13, 21)]


def test_components_add_up():
    p = predict(config(plan="save_attention", attention="cudnn"), LLAMA, H200)
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
        for how in (
            {"attention": "cudnn"},
            {"attention": "xla"},
            {"attention": "cudnn", "packing": True},
        )
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


@needs_pallas
def test_the_kernel_has_sums_in_f32_in_place_of_a_workspace():
    cudnn, kernel = (
        predict(config(8192, plan="save_attention", attention=how), LLAMA, H200)
        for how in ("cudnn", "mosaic_gpu")
    )
    sizes = [dict(p.phases["attention"]) for p in (cudnn, kernel)]
    assert [p.pop(WORKSPACE) for p in sizes] == [8 * 8192 * 4096, 0]
    assert sizes[0] == sizes[1]  # 4 bytes of dq, not 2; the output is not needed
    assert kernel.seconds["attention"] < 0.97 * cudnn.seconds["attention"]


def test_attention_is_that_of_the_gpu():
    for gpu, how, on_cudnn in (
        ("h200", {"attention": "cudnn"}, True), ("b200", {"packing": True}, True),
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
        text = f"TrainConfig.attention='cudnn': .*{why}.*; set it to 'auto' or 'xla'"
        with pytest.raises(NotImplementedError, match=text):
            predict(cfg, LLAMA, GPUS[gpu])


def test_what_is_offloaded_is_on_the_host():
    saved, offloaded = (
        predict(config(plan=plan), LLAMA, H200) for plan in ("full", "offload")
    )
    assert offloaded.peak_host == 16 * GIB and saved.peak_host == 0
    assert saved.peak_device - offloaded.peak_device == 16 * GIB
    assert offloaded.seconds["host link"] > 0


def test_small_chunks_of_the_head_leave_the_rounding_of_its_gradient():
    head = [
        predict(config(8192, plan="full", loss_chunk_size=C), LLAMA, H200).phases[
            "head"
        ]["head and loss"]
        for C in (128, 256, 512)
    ]
    assert len(set(head)) == 1
    # the f32 sum, the same in 16 bits, y, its gradient, RoPE's tables
    assert head[0] == 6 * LLAMA.vocab_size * 4096 + 8192 * (4 * 4096 + 4 * 128)


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


def test_groups_of_heads_take_less_memory_and_more_time():
    one, eight = (
        predict(
            config(plan="save_attention", head_groups=g, attention="cudnn"), LLAMA, H200
        )
        for g in (1, 8)
    )
    attention = [sum(p.phases["attention"].values()) for p in (one, eight)]
    assert attention[1] < attention[0] - 3 * GIB
    assert eight.peak_device < one.peak_device
    assert eight.step_seconds > one.step_seconds


def test_update_in_the_backward_pass_holds_no_whole_gradient():
    one, whole = (
        predict(config(optim={"in_backward": at_once}, attention="cudnn"), LLAMA, H200)
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


@pytest.mark.parametrize(
    "tokens, moments, measured",
    [
        (8192, "float32", 0.470 - 0.227),
        (32768, "float32", 1.230 - 1.172),
        (8192, "int8", 0.271 - 0.249),
    ],
)
def test_the_wait_for_state_on_the_host_is_the_measured_one(tokens, moments, measured):
    model = dataclasses.replace(LLAMA, num_layers=8)
    optim = {
        "name": "adamw", "moment_dtype": moments, "state_on_host": True, "clip": "layer"
    }  # fmt: skip
    whole = {"plan": "none", "mlp_chunk_size": 0, "loss_chunk_size": tokens}
    p = predict(config(tokens, model=model, optim=optim, **whole), model, H200)
    # One run each, an H200; cards differ by 2% of a step (docs/LOG.md).
    assert p.seconds["host link"] == pytest.approx(measured, abs=0.015)


# What computes attention: (tokens, plan, chunk of the layers, head groups, products,
# update in the backward pass) -> tokens a second, of steps and runs on an H200 in
# docs/benchmarks.
BUT_GATE_UP = "save=input+qkv+attention+mlp_input"


def gate_up_in(layers):
    return f"{32 - layers} {BUT_GATE_UP}; {layers} {BUT_GATE_UP}+gate_up"


MEASURED = {
    "cudnn": {
        (8192, "none", 8192, 1, "auto", True): 10994,
        (16384, "none", 16384, 1, "auto", True): 9834,
        (32768, "none", 32768, 1, "auto", True): 7802,
        (65536, gate_up_in(8), 65536, 1, "auto", True): 5288,
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
    },
    "mosaic_gpu": {
        (8192, "none", 8192, 1, "auto", True): 11049,
        (16384, "none", 16384, 1, "auto", True): 9873,
        (32768, "none", 32768, 1, "auto", True): 7862,
        (32768, "none", 16384, 1, "auto", True): 7699,
        (32768, "save_attention", 32768, 1, "auto", True): 7101,
        (65536, gate_up_in(9), 65536, 1, "auto", True): 5348,
        (65536, f"* {BUT_GATE_UP}", 16384, 1, "auto", True): 5268,
        (65536, "save_attention", 65536, 1, "auto", True): 5225,
        (131072, f"20 save=input+attention; 12 {BUT_GATE_UP}", 131072, 1, "auto", True):
            3351,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "attention, case",
    [
        pytest.param(how, case, marks=needs_pallas if how == "mosaic_gpu" else ())
        for how, cases in MEASURED.items()
        for case in cases
    ],
)
def test_speed_is_that_of_measured_steps(attention, case):
    tokens, plan, chunk, groups, how, at_once = case
    cfg = config(
        tokens, plan=plan, head_groups=groups, mlp_chunk_size=chunk, implementation=how,
        optim={"in_backward": at_once}, attention=attention,
    )  # fmt: skip
    predicted = predict(cfg, LLAMA, H200).tokens_per_second
    assert predicted == pytest.approx(MEASURED[attention][case], rel=0.05)


# (tokens, plan) of whole sequences that offload, a layer ahead -> tokens a second, GiB.
# Measured on an H200: docs/benchmarks/peers-2026-11-27-*-host.md.
AHEAD = "offload=input+qkv+attention+mlp_input"
OFFLOADED = {
    (8192, f"30 {AHEAD}; 2 {BUT_GATE_UP}+gate_up"): (9902, 20.50),
    (65536, f"3 offload=input+attention; 29 {AHEAD} save=gate_up"): (5452, 128.51),
}


@needs_pallas
@pytest.mark.parametrize("case", OFFLOADED)
def test_speed_and_peaks_of_measured_steps_that_offload(case):
    tokens, plan = case
    cfg = config(tokens, plan=plan, prefetch=True, mlp_chunk_size=tokens)
    speed, peak = OFFLOADED[case]
    p = predict(cfg, LLAMA, H200)
    assert p.tokens_per_second == pytest.approx(speed, rel=0.05)
    assert p.peak_device / GIB == pytest.approx(peak, rel=0.01)


# (tokens, plan, chunks of the layers and of the head), of steps in docs/benchmarks, ->
# GiB, compiled for an H200 on JAX 0.11.2.
COMPILED = {
    (8192, "none", 8192, 8192): 42.03,
    (8192, "13 save=input; 19 save=input+attention", 4096, 2048): 21.29,
    (16384, "none", 16384, 8192): 65.38,
    (32768, "none", 32768, 8192): 111.83,
    (32768, "save_attention", 32768, 8192): 35.83,
    (65536, "save_attention", 65536, 8192): 54.49,
    (65536, gate_up_in(9), 65536, 8192): 126.24,
    (131072, f"20 save=input+attention; 12 {BUT_GATE_UP}", 131072, 8192): 123.31,
}


def step_of(case):
    tokens, plan, chunk, loss_chunk = case
    return config(
        tokens, plan=plan, mlp_chunk_size=chunk, loss_chunk_size=loss_chunk,
        attention="mosaic_gpu",
    )  # fmt: skip


@needs_pallas
@pytest.mark.parametrize("case", COMPILED)
def test_peaks_of_the_benchmarked_steps(case):
    predicted = predict(step_of(case), LLAMA, H200).peak_device / GIB
    assert predicted == pytest.approx(COMPILED[case], rel=0.01)


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


# --- compiled ---

AWAY = f"* {AHEAD} save=gate_up"
# The head's phase is the peak.
COLUMNS = {
    "model": dataclasses.replace(LLAMA, num_layers=2, vocab_size=4 * 128256),
    "plan": "full", "optim": {"freeze": ("embed",)}, "vocab_chunk_size": 8192,
}  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize(
    "gpu, cfg",
    [
        ("h200", config(8192, plan="full")),
        ("h200", config(65536, plan="save_attention")),
        ("h200", config(65536, plan="save_attention", mlp_chunk_size=65536)),
        ("h200", config(32768, plan="none", mlp_chunk_size=32768)),
        ("h200", config(262144, plan="offload", head_groups=8)),
        ("h200", config(16384, loss_chunk_size=1024, **COLUMNS)),
        ("a100-40gb", config(8192, loss_chunk_size=512, **COLUMNS)),
        ("h200", config(131072, plan="offload_attention", prefetch=True)),
        ("h200", config(65536, plan=AWAY, prefetch=True, mlp_chunk_size=65536)),
        ("h200", config(65536, plan=AWAY, prefetch=True)),
        (
            "h200",
            config(16384, plan="full", optim={"name": "adamw", "state_on_host": True}),
        ),
        (
            "h200",
            config(
                16384, plan="full", mlp_chunk_size=16384,
                optim={"name": "adamw", "state_on_host": True, "in_backward": False},
            ),
        ),
        ("h200", config(131072, plan="offload", attention="xla")),
        ("h200", config(16384, plan="save_attention", attention="mosaic_gpu")),
        (
            "h200",
            config(16384, plan="save_attention", attention="mosaic_gpu", head_groups=8),
        ),
        ("h200", config(32768, plan="offload", packing=True, attention="mosaic_gpu")),
        (
            "h200",
            config(
                131072, head_groups=8,
                plan="24 save=input+attention every=4; 8 offload=input save=attention",
            ),
        ),
        ("h200", config(131072, plan="offload", packing=True, attention="cudnn")),
        (
            "h200",
            config(
                65536, plan="offload", packing=True, attention="cudnn", head_groups=2
            ),
        ),
        (
            "a100-40gb",
            config(
                32768, model=SMALL, head_groups=2, mlp_chunk_size=4096,
                plan="8 offload=input; 8 save=input+attention",
                optim={"name": "adamw", "clip_norm": 1.0, "in_backward": False},
            ),
        ),
        (
            "t4",
            config(
                8192, model=SMALL, plan="full", mlp_chunk_size=2048,
                loss_chunk_size=1024, optim={"name": "adafactor"},
            ),
        ),
    ],
    ids=[
        "head", "save_attention", "whole", "none, whole", "offload", "columns",
        "columns, xla", "prefetch", "away", "away in chunks",
        "state away", "state away, after", "xla",
        "kernel", "kernel in groups", "kernel, packed", "blocks", "packed",
        "packed in groups", "mixture", "T4",
    ],
)  # fmt: skip
def test_predicted_memory_is_within_5_percent_of_the_compiled(gpu, cfg):
    compiled = compile_step(cfg, cfg.model, GPUS[gpu])
    predicted = predict(cfg, cfg.model, GPUS[gpu])
    assert predicted.peak_compiled == pytest.approx(compiled.device, rel=0.05)
    assert predicted.peak_host == pytest.approx(compiled.host, rel=0.01)


@pytest.mark.compiled
@needs_pallas
@pytest.mark.parametrize("case", COMPILED)
def test_predicted_memory_holds_the_benchmarked_steps(case):
    cfg = step_of(case)
    compiled = compile_step(cfg, LLAMA, H200)
    # JAX 0.12 takes up to 1.5% less: where h is recomputed.
    ratio = predict(cfg, LLAMA, H200).peak_compiled / compiled.device
    assert 0.995 < ratio < 1.03


@pytest.mark.compiled
@pytest.mark.parametrize(
    "plan, tokens", [("full", 8192), ("save_attention", 8192), ("full", 16384)]
)
def test_the_update_of_the_head_in_8_bits_is_compiled(plan, tokens):
    # 16,384 tokens are two chunks of the head's, whose sum begins with zeros.
    cfg = config(
        tokens, plan=plan, optim=ADAMW_8, mlp_chunk_size=tokens, loss_chunk_size=8192
    )
    compiled = compile_step(cfg, LLAMA, H200).device
    assert predict(cfg, LLAMA, H200).peak_compiled == pytest.approx(compiled, rel=0.01)


@pytest.mark.compiled
def test_the_rounding_of_the_heads_gradient_is_compiled():
    cfg = config(
        8192, plan="full", head_groups=8, mlp_chunk_size=4096, loss_chunk_size=1024
    )
    compiled = compile_step(cfg, LLAMA, H200).device
    assert predict(cfg, LLAMA, H200).peak_compiled == pytest.approx(compiled, rel=0.01)
