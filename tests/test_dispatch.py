"""benchmarks/dispatch.py's count of launches, and the options that change it."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from scripts import load

from mst_jax.config import PRESETS, Config, TrainConfig
from mst_jax.train_step import COMMAND_BUFFERS, compiler_options

dispatch = load("dispatch")

HLO = """\
HloModule m, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%f
  %b = (f32[8]{0}, s8[0]{0}) custom-call(%a, %a), custom_call_target="__cublas$lt$matmul"
  ROOT %t = (s32[], f32[8]) tuple(%i, %a)
}

%copies (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%q)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]) while(%t.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[8]) while(%w), condition=%cond, body=%body
  %k = f32[8]{0} call(%x.1), to_apply=%copies
  %s = ((f32[8]), f32[8]) copy-start(%k)
  ROOT %d = f32[8]{0} copy-done(%s)
}
"""  # noqa: E501


def test_launches_of_a_module():
    found = dispatch.count_launches(HLO)
    assert found == {
        "fusion": 6, "custom-call": 6, "loops": 1, "copy": 1, "copy-start": 1,
    }  # fmt: skip


def test_launches_of_a_loop_count_as_often_as_it_runs():
    def run(times):
        def inner(i, x):
            return jnp.sin(x @ x)

        def outer(x, _):
            return jax.lax.fori_loop(0, times, inner, x), None

        step = jax.jit(lambda x: jax.lax.scan(outer, x, length=3)[0])
        text = step.lower(jnp.ones((64, 64))).compile().as_text()
        return dispatch.count_launches(text).total()

    ten, twenty, thirty = run(10), run(20), run(30)
    assert twenty - ten == thirty - twenty
    assert twenty - ten >= 3 * 10 * 2  # at least a product and a sine each time


@pytest.mark.parametrize("name", COMMAND_BUFFERS)
def test_xla_knows_the_options(name):
    # A misspelt option, or a command that this XLA has not, is an error on any device.
    options = COMMAND_BUFFERS[name]
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_every_choice_has_its_options():
    hint = get_type_hints(TrainConfig)["command_buffers"]
    assert set(get_args(hint)) == set(COMMAND_BUFFERS)


@pytest.mark.parametrize(
    "plan, command_buffers, on",
    [
        ("save_attention", "default", True), ("offload", "default", False),
        ("offload", "step", True), ("save_attention", "off", False),
    ],
)  # fmt: skip
def test_copies_to_the_host_are_in_no_cuda_graph(plan, command_buffers, on):
    # There they take their turn with the kernels.
    model = PRESETS["llama3_8b"]
    cfg = Config(model=model, train=TrainConfig(plan=plan))
    options = compiler_options(cfg, model, command_buffers)
    assert (options.get("xla_gpu_enable_command_buffer") != "") is on
    early = options.get("xla_gpu_enable_latency_hiding_scheduler") is False
    assert early is ("offload" in plan)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
