"""Predicted memory against that of the real step, compiled for a GPU that is not there.

The compiler is in the CUDA plugin: `pip install ".[cuda13]"`.
"""

import importlib.util

import pytest
from test_planner import H200, LLAMA, SMALL, config

from mst_jax.compile_only import compile_step
from mst_jax.gpus import GPUS
from mst_jax.prediction import predict

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
needs_plugin = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in PLUGINS),
    reason="compiling for a GPU needs the CUDA plugin: pip install '.[cuda13]'",
)


@needs_plugin
@pytest.mark.parametrize(
    "gpu, cfg",
    [
        ("h200", config(8192, plan="full")),
        ("h200", config(65536, plan="save_attention")),
        ("h200", config(65536, plan="save_attention", mlp_chunk_size=65536)),
        ("h200", config(32768, plan="none", mlp_chunk_size=32768)),
        ("h200", config(262144, plan="offload", head_groups=8)),
        ("h200", config(131072, plan="offload_attention", prefetch=True)),
        ("h200", config(131072, plan="offload", attention="xla")),
        ("h200", config(131072, plan="offload", packing=True)),
        ("h200", config(65536, plan="offload", packing=True, head_groups=2)),
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
        "head", "save_attention", "whole", "none, whole", "offload", "prefetch", "xla",
        "packed", "packed in groups", "mixture", "T4",
    ],
)  # fmt: skip
def test_predicted_memory_is_within_5_percent_of_the_compiled(gpu, cfg):
    compiled = compile_step(cfg, cfg.model, GPUS[gpu])
    predicted = predict(cfg, cfg.model, GPUS[gpu])
    assert predicted.peak_compiled == pytest.approx(compiled.device, rel=0.05)
    assert predicted.peak_host == pytest.approx(compiled.host, rel=0.01)


def test_state_on_the_host_is_not_compiled():
    cfg = config(optim={"name": "adamw", "state_on_host": True})
    with pytest.raises(NotImplementedError, match="state_on_host=True cannot be"):
        compile_step(cfg, LLAMA, H200)
