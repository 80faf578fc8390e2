"""benchmarks/trace.py: from a trace and a program to a table, without a GPU."""

import csv
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from scripts import BENCHMARKS, load

pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

program, events, trace = map(load, ("trace_program", "trace_events", "trace"))

T, D, F, N, K, H, L = 64, 512, 1024, 4, 2, 128, 3
LAYER = "jit(step)/while/body"
GEMM = (
    'custom_call_target="__cublas$lt$matmul", metadata={{op_name="{}"}}, '
    'backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":'
    '{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}}}}'
)
HLO = f"""\
HloModule jit_step, is_scheduled=true, entry_computation_layout={{(f32[8]{{0}})->f32[]}}

%add (a.9: f32[], b.9: f32[]) -> f32[] {{
  %a.9 = f32[] parameter(0)
  %b.9 = f32[] parameter(1)
  ROOT %sum.9 = f32[] add(%a.9, %b.9)
}}

%norm (p.0: bf16[{T},{D}], p.1: bf16[{L},{D}], p.2: s32[]) -> bf16[{T},{D}] {{
  %p.0 = bf16[{T},{D}]{{1,0}} parameter(0)
  %p.1 = bf16[{L},{D}]{{1,0}} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %scale = bf16[1,{D}]{{1,0}} dynamic-slice(%p.1, %p.2, %zero.1), dynamic_slice_sizes={{1,{D}}}
  %scale.1 = bf16[{T},{D}]{{1,0}} broadcast(%scale), dimensions={{0,1}}
  ROOT %scaled = bf16[{T},{D}]{{1,0}} multiply(%p.0, %scale.1), metadata={{op_name="{LAYER}/forward/qkv/norm/mul"}}
}}

%slice_and_multiply (q.0: bf16[{2 * T},{D}], q.1: s32[], q.2: bf16[{D},{D}]) -> (bf16[{T},{D}], s8[4096]) {{
  %q.0 = bf16[{2 * T},{D}]{{1,0}} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = bf16[{D},{D}]{{1,0}} parameter(2)
  %slice.0 = bf16[{T},{D}]{{1,0}} dynamic-slice(%q.0, %q.1, %q.1), dynamic_slice_sizes={{{T},{D}}}, metadata={{op_name="{LAYER}/backward/output/dynamic_slice"}}
  ROOT %gemm.9 = (bf16[{T},{D}]{{1,0}}, s8[4096]{{0}}) custom-call(%slice.0, %q.2), {GEMM.format(f"{LAYER}/backward/output/mlp/dot_general")}
}}

%put (r.0: bf16[{L},{T},{D}], r.1: bf16[{T},{D}], r.2: s32[]) -> bf16[{L},{T},{D}] {{
  %r.0 = bf16[{L},{T},{D}]{{2,1,0}} parameter(0)
  %r.1 = bf16[{T},{D}]{{1,0}} parameter(1)
  %r.2 = s32[] parameter(2)
  %r.3 = bf16[1,{T},{D}]{{2,1,0}} bitcast(%r.1)
  %zero.2 = s32[] constant(0)
  %r.4 = s32[] add(%r.2, %zero.2), metadata={{op_name="{LAYER}/weights/jit(dynamic_index_in_dim)/select_n"}}
  ROOT %put.1 = bf16[{L},{T},{D}]{{2,1,0}} dynamic-update-slice(%r.0, %r.3, %r.4, %zero.2, %zero.2), metadata={{op_name="{LAYER}/jit(dynamic_update_index_in_dim)/dynamic_update_slice"}}
}}

%fetch (h.0: bf16[{L},{T},{D}], h.1: s32[]) -> bf16[1,{T},{D}] {{
  %h.0 = bf16[{L},{T},{D}]{{2,1,0:S(5)}} parameter(0)
  %h.1 = s32[] parameter(1)
  ROOT %h.2 = bf16[1,{T},{D}]{{2,1,0}} dynamic-slice(%h.0, %h.1, %h.1, %h.1), dynamic_slice_sizes={{1,{T},{D}}}
}}

%filled () -> f32[{D},{F}] {{
  %zero.3 = f32[] constant(0)
  ROOT %fill = f32[{D},{F}]{{1,0}} broadcast(%zero.3), dimensions={{}}
}}

%same_loop (s: (s32[], bf16[{T},{D}])) -> (s32[], bf16[{T},{D}]) {{
  %s = (s32[], bf16[{T},{D}]{{1,0}}) parameter(0)
  %s.0 = s32[] get-tuple-element(%s), index=0
  %s.1 = bf16[{T},{D}]{{1,0}} get-tuple-element(%s), index=1
  %again = (bf16[{T},{D}]{{1,0}}, s8[4096]{{0}}) custom-call(%s.1, /*index=1*/%s.1), {GEMM.format(f"{LAYER}/forward/qkv/while/body/dot_general")}
  ROOT %s.2 = (s32[], bf16[{T},{D}]{{1,0}}) tuple(%s.0, %s.1)
}}

%layer (c: (s32[], bf16[{T},{D}])) -> (s32[], bf16[{T},{D}]) {{
  %c = (s32[], bf16[{T},{D}]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[{T},{D}]{{1,0}} get-tuple-element(%c), index=1
  %scales = bf16[{L},{D}]{{1,0}} constant({{...}})
  %both = bf16[{2 * T},{D}]{{1,0}} constant({{...}})
  %kept = bf16[{L},{T},{D}]{{2,1,0}} constant({{...}})
  %on_host = bf16[{L},{T},{D}]{{2,1,0:S(5)}} custom-call(), custom_call_target="AllocateBuffer"
  %w = bf16[{D},{D}]{{1,0}} constant({{...}})
  %w_up = bf16[{D},{F}]{{1,0}} constant({{...}})
  %next = s32[] add(%i, %i)
  %loop_multiply_fusion.1 = bf16[{T},{D}]{{1,0}} fusion(%x, %scales, %i), kind=kLoop, calls=%norm, metadata={{op_name="{LAYER}/forward/qkv/norm/mul"}}
  %inner = (s32[], bf16[{T},{D}]{{1,0}}) while(%c), condition=%cond, body=%same_loop, metadata={{op_name="{LAYER}/backward/recompute/qkv/while"}}, backend_config={{"known_trip_count":{{"n":"2"}}}}
  %q = bf16[1,{T},{N},{H}]{{3,2,1,0}} bitcast(%x)
  %k = bf16[1,{T},{K},{H}]{{3,2,1,0}} constant({{...}})
  %attend.0 = (bf16[1,{N},{T},{H}]{{3,1,2,0}}, f32[1,{N},{T}]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", metadata={{op_name="{LAYER}/forward/dot_product_attention_fwd"}}, backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "CAUSAL", "sliding_window_length": 0}}}}
  %mpmd_map.1 = bf16[{T},{F}]{{1,0}} custom-call(%x, %w_up, %w_up), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{LAYER}/forward/output/mlp/gate_up/mpmd_map"}}, backend_config={{module = "a, (b"}}
  %mpmd_map.2 = f32[{D},{F}]{{1,0}} custom-call(%x, %mpmd_map.1, %wide), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{LAYER}/backward/output/mlp/matmul_tn_add_f32/mpmd_map"}}
  %mpmd_map.3 = bf16[{T},{D}]{{1,0}} custom-call(%mpmd_map.1, %w_up, %x, %w), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{LAYER}/backward/output/mlp/matmul_nt/mpmd_map"}}
  %statistic = f32[1,{N},{T}]{{2,1,0}} constant({{...}})
  %dq = f32[1,{T},{N},{H}]{{3,2,1,0}} constant({{...}})
  %mpmd_map.4 = (bf16[1,{T},{K},{H}]{{3,2,1,0}}, bf16[1,{T},{K},{H}]{{3,2,1,0}}, f32[1,{T},{N},{H}]{{3,2,1,0}}) custom-call(%q, %k, %k, %q, %statistic, /*index=5*/%statistic, %dq), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{{{2}}: (6, {{}})}}, metadata={{op_name="{LAYER}/backward/attention_backward/mpmd_map"}}
  %mpmd_map.5 = (bf16[1,{T},{N},{H}]{{3,2,1,0}}, f32[1,{N},{T}]{{2,1,0}}) custom-call(%q, %k, %k), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{LAYER}/backward/recompute/attention_forward/mpmd_map"}}
  %dynamic_slice_fusion = (bf16[{T},{D}]{{1,0}}, s8[4096]{{0}}) fusion(%both, %i, %w), kind=kCustom, calls=%slice_and_multiply
  %put-start = ((bf16[{L},{T},{D}]{{2,1,0}}, bf16[{T},{D}]{{1,0}}, s32[]), bf16[{L},{T},{D}]{{2,1,0}}, u32[]) fusion-start(%kept, %x, %i), kind=kLoop, calls=%put, metadata={{op_name="{LAYER}/jit(dynamic_update_index_in_dim)/dynamic_update_slice"}}
  %put-done = bf16[{L},{T},{D}]{{2,1,0}} fusion-done(%put-start)
  %fetch-start = ((bf16[{L},{T},{D}]{{2,1,0:S(5)}}, s32[]), bf16[1,{T},{D}]{{2,1,0}}, u32[]) fusion-start(%on_host, %i), kind=kLoop, calls=%fetch
  %fetch-done = bf16[1,{T},{D}]{{2,1,0}} fusion-done(%fetch-start)
  ROOT %out = (s32[], bf16[{T},{D}]{{1,0}}) tuple(%next, %x)
}}

ENTRY %main (x.0: bf16[{T},{D}]) -> (s32[], bf16[{T},{D}]) {{
  %x.0 = bf16[{T},{D}]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %wide = f32[{D},{F}]{{1,0}} fusion(), kind=kLoop, calls=%filled
  %init = (s32[], bf16[{T},{D}]{{1,0}}) tuple(%zero, %x.0)
  ROOT %loop = (s32[], bf16[{T},{D}]{{1,0}}) while(%init), condition=%cond, body=%layer, metadata={{op_name="jit(step)/while"}}, backend_config={{"known_trip_count":{{"n":"{L}"}}}}
}}
"""  # noqa: E501
LIMITS = events.Limits(flops=1e12, bytes=1e12, host_bytes=1e10)
BF16 = 2
PAIRS = T * (T + 1) // 2
CASES = {
    # instruction: (row, launches, FLOPs, bytes of a launch)
    "wide": ("zero fills", 1, 0, 4 * D * F),
    "next": ("scalars, loop counters", L, 0, 12),
    "loop_multiply_fusion.1": (
        # of the stack of scales, one is read
        "RMS norm, forward", L, 0, BF16 * (2 * T * D + D) + 4,
    ),
    "again": (
        # its own name says forward: XLA merged two equal loops
        "q, k, v products, recompute", 2 * L, 2 * T * D * D, BF16 * 3 * T * D,
    ),
    "attend.0": (
        "attention, forward", L, 4 * N * H * PAIRS,
        BF16 * H * T * (2 * N + 2 * K) + 4 * N * T,
    ),
    "mpmd_map.1": (
        "MLP products, forward", L, 2 * 2 * T * D * F,
        BF16 * (T * D + 2 * D * F + T * F),
    ),
    "mpmd_map.2": (
        "MLP products, backward", L, 2 * T * D * F,
        BF16 * (T * D + T * F) + 2 * 4 * D * F,
    ),
    "mpmd_map.3": (
        # two products into one sum, each as deep as its own operands
        "MLP products, backward", L, 2 * T * D * (F + D),
        BF16 * (T * F + D * F + T * D + D * D + T * D),
    ),
    "mpmd_map.4": (
        # five products of the pairs; dq is read and written in f32
        "attention, backward", L, 5 * 2 * N * H * PAIRS,
        BF16 * H * T * (2 * N + 4 * K) + 2 * 4 * N * T * (1 + H),
    ),
    "mpmd_map.5": (
        "attention, recompute", L, 2 * 2 * N * H * PAIRS,
        BF16 * H * T * (2 * N + 2 * K) + 4 * N * T,
    ),
    "dynamic_slice_fusion": (
        # of the first operand, the slice; of the scope, the product's
        "MLP products, backward", L, 2 * T * D * D, BF16 * (2 * T * D + D * D) + 4,
    ),
    "put-start": (
        # in place: one entry read, one written
        "copies: residuals kept and fetched", L, 0, BF16 * 2 * T * D + 4,
    ),
    "fetch-start": ("host copies", L, 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def parsed():
    return program.Program(HLO)


def test_launches(parsed):
    assert parsed.name == "jit_step"
    assert parsed.launches == {name: case[1] for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_rows_and_costs(parsed, name):
    cost = parsed.costs[name]
    assert (cost.row, parsed.launches[name], cost.flops, cost.bytes) == CASES[name]
    host = BF16 * T * D + 2 if name == "fetch-start" else 0  # and half the index
    assert cost.host_bytes == host


def test_attention_backward_and_windows(parsed):
    one = parsed.by_name["attend.0"]
    window = one.rest.replace('length": 0', 'length": 8')
    assert program._attention_flops(
        program.Instruction("w", one.opcode, one.shapes, one.operands, window),
        (1, T, N, H),
    ) == 4 * N * H * sum(min(t + 1, 8) for t in range(T))
    back = one.rest.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    back = back.replace("CAUSAL", "NO_MASK")
    assert (
        program._attention_flops(
            program.Instruction("b", one.opcode, one.shapes, one.operands, back),
            (1, T, N, H),
        )
        == 10 * N * H * T * T
    )


def profile(named, kernels=(), plane="/device:GPU:0", line="Stream #7(Kernel)"):
    """A trace in which each of `named`, (hlo_op, start us, us), ran on one stream and
    each of `kernels`, (kernel, start us, us), on another, without hlo_op."""
    names = sorted({n for n, _, _ in named} | {k for k, _, _ in kernels})

    def event(name, start, length, stats):
        i = names.index(name) + 10
        times = f"offset_ps: {int(start * 1e6)} duration_ps: {int(length * 1e6)}"
        return f"events {{ metadata_id: {i} {times} {stats.format(i)} }}\n"

    stats = (
        "stats {{ metadata_id: 1 ref_value: {} }} "
        "stats {{ metadata_id: 2 ref_value: 3 }}"
    )
    lines = (
        f'lines {{ id: 7 name: "{line}" {"".join(event(*e, stats) for e in named)} }}'
        f'lines {{ id: 8 name: "{line}" {"".join(event(*e, "") for e in kernels)} }}'
        f'lines {{ id: 9 name: "XLA Ops" {"".join(event(*e, stats) for e in named)} }}'
    )
    words = dict(enumerate(names, 10)) | {1: "hlo_op", 2: "hlo_module", 3: "jit_step"}
    words = "".join(
        f'{kind} {{ key: {i} value {{ id: {i} name: "{word}" }} }}\n'
        for i, word in words.items()
        for kind in ("event_metadata", "stat_metadata")
    )
    host = 'planes { name: "/host:CPU" lines { id: 1 name: "python" } }'
    text = f'planes {{ id: 2 name: "{plane}" {lines}\n{words} }}\n{host}'
    return ProfileData.text_proto_to_serialized_xspace(text)


def step_events():
    """All launches of the program, 2 us each and 1 us apart, as (op, start, us)."""
    ops = [op for op, case in CASES.items() for _ in range(case[1])]
    return [(op, 100 + 3 * i, 2) for i, op in enumerate(ops)]


def accounted(parsed, named, kernels=()):
    read = ProfileData.from_serialized_xspace(profile(named, kernels))
    return events.account(events.read_events(read), parsed, LIMITS)


def test_every_ms_is_in_a_row(parsed):
    named = step_events()
    found = accounted(parsed, named)
    n = len(named)
    assert found.problems == []
    assert found.span == pytest.approx((3 * n - 1) / 1e3)
    assert found.busy == pytest.approx(2 * n / 1e3)
    assert sum(ms for ms, _, _ in found.gaps) == pytest.approx((n - 1) / 1e3)
    assert len(found.gaps) == n - 1 and found.overlap == pytest.approx(0)
    by_row = found.by_row
    assert set(by_row) == {case[0] for case in CASES.values()}
    backward = by_row["MLP products, backward"]
    assert backward.launches == 3 * L and backward.ms == pytest.approx(6 * L / 1e3)
    assert backward.flops == L * (4 * T * D * F + 4 * T * D * D)
    # Some are limited by their bytes, some by their FLOPs: 1e12 of both a second.
    most = [max(case[2:]) for case in CASES.values() if "MLP products, b" in case[0]]
    assert backward.limit_ms == pytest.approx(L * sum(most) / 1e9)


def test_overlap_is_counted_once(parsed):
    named = step_events()
    under = [("loop_multiply_fusion_1", named[0][1] + 0.5, 2.0)]  # by kernel's name
    found = accounted(parsed, named, under)
    assert found.overlap == pytest.approx(1.5e-3)
    assert found.busy == pytest.approx((2 * len(named) + 0.5) / 1e3)
    assert found.by_row["RMS norm, forward"].launches == L + 1
    assert found.problems == [
        "loop_multiply_fusion.1 (RMS norm, forward): 4 events for 3 launches"
    ]


def test_what_the_program_does_not_know_is_said(parsed):
    named = [e for e in step_events() if e[0] != "mpmd_map.1"]
    kernels = [("some_kernel", 500, 30), ("MemcpyD2H", 600, 1)]
    found = accounted(parsed, named, kernels)
    assert found.by_row["other"].ms == pytest.approx(0.03)
    assert found.by_row["host copies"].launches == L + 1
    assert found.problems == ["0.03 ms in some_kernel, of no known row"]
    big = program.Program(HLO.replace(f"{D}", "65536").replace(f"{T},", "16384,"))
    missing = accounted(big, named).problems
    assert any("mpmd_map.1" in p and "no event, 3 launches" in p for p in missing)


def test_kernels_inside_a_fusion_belong_to_it(parsed):
    found = accounted(parsed, [("gemm.9", 10, 5)])
    assert list(found.by_op) == ["dynamic_slice_fusion"]


def test_another_module_is_outside(parsed):
    one = events.Event(0, 1e3, "k", "next", "jit_other")
    found = events.account([one], parsed, LIMITS)
    assert set(found.by_row) == {"outside of the step"}


def test_a_trace_without_a_gpu_is_an_error():
    read = ProfileData.from_serialized_xspace(profile([("next", 0, 1)], plane="/cpu"))
    with pytest.raises(ValueError, match="streams of one GPU"):
        events.read_events(read)
    with pytest.raises(ValueError, match="no ENTRY"):
        program.Program("HloModule x")


def test_files_to_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "step-64.xplane.pb"
    path.write_bytes(profile(step_events()))
    (tmp_path / "program.txt").write_text(HLO)
    about = {"tokens": T, "step_ms": 0.1, "bandwidth": 1e12, "bandwidth_is": "given"}
    trace.beside(path, "json").write_text(json.dumps(about))
    command = ["trace.py", "--read", str(path), "--hlo", str(tmp_path / "program.txt")]
    monkeypatch.setattr(
        sys, "argv", [*command, "--out", str(tmp_path), "--tflops", "1"]
    )
    trace.main()
    printed = capsys.readouterr().out
    (csv_path,) = tmp_path.glob("trace-*.csv")
    with csv_path.open() as file:
        written = {line["instruction"]: line for line in csv.DictReader(file)}
    assert set(written) == set(CASES)
    assert float(written["again"]["ms"]) == pytest.approx(4 * L / 1e3)
    assert (csv_path.with_suffix(".md")).read_text().strip() == printed.strip()
    ms = dict(re.findall(r"^\| \**([^|*]+)\** \| (-?[\d.]+) \|", printed, re.M))
    assert ms["q, k, v products, recompute"] == "0.01"
    parts = [float(ms[name]) for name in ("all kernels", "less: two at a time", "gaps")]
    assert sum(parts) == pytest.approx(float(ms["traced step"]), abs=0.011)


def test_a_program_that_xla_compiled():
    """The parser reads this XLA's text, and the scopes reach the instructions."""

    @jax.named_scope("mlp")
    def body(_, x):
        return jnp.tanh(x @ x)

    def step(x):
        with jax.named_scope("forward"):
            return jax.lax.fori_loop(0, 5, body, x)

    compiled = jax.jit(step).lower(jnp.ones((256, 256))).compile()
    found = program.Program(compiled.as_text())
    dots = [i for i in found.by_name.values() if i.opcode == "dot"]
    if not dots:
        pytest.skip("this XLA makes a library call of the product on a CPU")
    (name,) = {found.owners[i.name] for i in dots}
    assert found.launches[name] == 5
    assert found.costs[name].flops == 2 * 256**3
    assert found.costs[name].row == "MLP products, forward"


def test_every_mosaic_kernel_of_a_product_has_its_flops():
    """A kernel's name that `trace_program` does not know would count as `other`."""
    package = BENCHMARKS.parent / "mst_jax" / "ops"
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    names = set(re.findall(r'name="(\w+)", *\n? *(?:tiles|extra|out_type)', text))
    functions = set(re.findall(r"plgpu\.kernel\(\s*(\w+),", text))
    names |= functions - {"kernel"}  # which takes one of the names above
    assert {"gate_up", "gate_up_backward", "logits", *program.ATTENTION} <= names
    known = tuple(program.PRODUCTS | program.ATTENTION)
    unknown = {n for n in names if not n.startswith(known)}
    assert unknown == set()
