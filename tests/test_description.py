"""The lines of a run's start."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mst_jax import description, trainer
from mst_jax.compile_cache import CompileCache
from mst_jax.config import PRESETS, Config, DataConfig, TrainConfig
from mst_jax.data import load_data
from mst_jax.description import describe, implementations
from mst_jax.ops import linear_cross_entropy, matmul, swiglu
from mst_jax.ops.swiglu import xla
from mst_jax.sharding import make_mesh
from mst_jax.train_step import abstract_state, make_eval_step, make_train_step

MODEL = PRESETS["tiny"]
CACHE = CompileCache(None, "a test")


def run(**train):
    return Config(model=MODEL, data=DataConfig(seq_len=512), train=TrainConfig(**train))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("ab" * 3000)
    return load_data(DataConfig(source=str(path), seq_len=512), 256)


def lines(cfg, data):
    found = {}
    for line in describe(cfg, MODEL, data, CACHE):
        name, text = line[:12].strip(), line[12:]
        assert name not in found
        found[name] = text
    return found


def test_every_op_says_what_computes_it_and_why(data):
    said = lines(run(), data)
    ops = implementations(run(), MODEL)
    assert set(ops) == {"attention", "head, loss", "mlp", "norm, rope"}
    for op, (name, why) in ops.items():
        assert said[op] == f"{name}: {why}" and name == "xla" and why
    assert ops["attention"][1].startswith("not cudnn: ")


def test_padding_is_told_where_it_is_much(tmp_path):
    # 5 targets and 2: rows of 4 hold 4, 1 and 2.
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.txt").write_text("abc")
    rows = {"source": str(tmp_path), "seq_len": 4, "batch_size": 1, "holdout": 0.0}
    for packing, fill in ((False, 7 / 12), (True, None)):
        cfg = dataclasses.replace(run(), data=DataConfig(**rows, packing=packing))
        found = load_data(cfg.data, 256)
        assert found.fill == fill
        told = "; rows are 58% full, --data.packing fills them"
        assert (told in lines(cfg, found)["data"]) != packing


def test_the_reason_is_the_configuration_s():
    wide = implementations(run(compute_dtype="float32"), MODEL)["attention"]
    assert wide == ("xla", "not cudnn: takes bfloat16 and float16, not float32")
    packed = implementations(run(), MODEL)["attention"]
    assert packed == ("xla", "not cudnn: there is no GPU (cpu)")
    asked = implementations(run(attention="xla"), MODEL)["attention"]
    assert asked == ("xla", "as asked for")
    cfg = dataclasses.replace(run(), data=DataConfig(seq_len=512, packing=False))
    alone = implementations(cfg, MODEL)["attention"]
    assert alone == ("xla", "not cudnn: there is no GPU (cpu)")


def test_chunks_and_plan_are_what_runs(data):
    said = lines(run(mlp_chunk_size=128, loss_chunk_size=64, plan="full"), data)
    assert said["layers"].startswith("chunks of 128 of 512 tokens")
    assert said["loss"].startswith("chunks of 64 of 512 tokens")
    assert f"{MODEL.num_layers} save=input (" in said["plan"]
    assert lines(run(mlp_chunk_size=0), data)["layers"].startswith(
        "chunks of 512 of 512"
    )
    assert re.match(r"chunks of 512 of 512", lines(run(), data)["loss"])
    by_columns = lines(run(vocab_chunk_size=100), data)["loss"]
    assert f", the head's gradient 100 of {MODEL.vocab_size} columns" in by_columns
    uneven = lines(run(mlp_chunk_size=100, loss_chunk_size=100), data)
    assert uneven["layers"].startswith("chunks of 88 of 512 tokens, the last of 72; ")
    assert uneven["loss"].startswith("chunks of 88 of 512 tokens, ")
    assert said["cache"] == "compiled programs are not kept: a test"
    assert f"{data.num_tokens:,} tokens" in said["data"]
    assert f"{data.unigram_entropy:.4f} nats" in said["to beat"]


def test_the_loss_s_chunk_is_that_of_its_implementation(data, monkeypatch):
    cfg = run()
    bytes_of_64 = 64 * 4 * cfg.data.batch_size * MODEL.vocab_size
    monkeypatch.setattr(linear_cross_entropy.api, "LOGITS_BYTES", bytes_of_64)
    ops = implementations(cfg, MODEL)
    for name, tokens in (("xla", 64), ("mosaic_gpu", 128)):  # f32, and 16 bits
        found = ops | {"head, loss": (name, "a test")}
        monkeypatch.setattr(description, "implementations", lambda *_, f=found: f)
        assert lines(cfg, data)["loss"].startswith(f"chunks of {tokens} of 512 tokens")


# --- chunks of which kernels take some ---


@pytest.fixture
def hopper(monkeypatch):
    """A GPU with the kernels, as far as the choice goes."""
    monkeypatch.setattr(matmul.mosaic_gpu, "OLDEST_JAX", (0, 0, 0))
    for op in (swiglu, linear_cross_entropy):
        monkeypatch.setattr(op.api, "device_obstacle", lambda *_: None)


def one_sequence(chunk, length=512, **train):
    return dataclasses.replace(
        run(mlp_chunk_size=chunk, **train),
        data=DataConfig(seq_len=length, batch_size=1),
    )


ROWS = r"a matrix of \({}, 256\) is not of multiples of 8 and 64"
UNEVEN = [
    (128, 512, "mosaic_gpu", "this GPU has it"),
    (100, 512, "mosaic_gpu", "this GPU has it"),  # 5 of 88 and one of 72
    (87, 512, "xla", ROWS.format(86)),  # 5 of 86, as 88 would be more, and one of 82
    (0, 512, "mosaic_gpu", "this GPU has it"),
    (0, 509, "xla", ROWS.format(509)),
    # 4 of 104 and one of 102
    (104, 518, "mosaic_gpu, xla", f"has it; the last 102 tokens: {ROWS.format(102)}"),
    # 3 of 11 and one of 8
    (11, 41, "xla, mosaic_gpu", f"{ROWS.format(11)}; the last 8 tokens: this GPU"),
]


@pytest.mark.parametrize("chunk, length, name, why", UNEVEN)
def test_the_mlp_is_asked_with_the_chunks_that_run(hopper, chunk, length, name, why):
    found = implementations(one_sequence(chunk, length), MODEL)["mlp"]
    assert found[0] == name and re.search(why, found[1])


@pytest.mark.parametrize("chunk, length, name, why", UNEVEN)
def test_what_is_said_of_the_mlp_is_what_runs(
    hopper, monkeypatch, chunk, length, name, why
):
    cfg = one_sequence(chunk, length)
    ran = {}

    def recorded(which, direction):
        def run(activation, x, *args):
            ran[x.shape[1]] = which
            return getattr(xla, direction)(activation, x, *args)

        return run

    for which in ("xla", "mosaic_gpu"):
        forms = {d: recorded(which, d) for d in ("forward", "backward")}
        monkeypatch.setitem(swiglu.api._HOW, which, SimpleNamespace(**forms))
    # The head's kernels would be lowered here, and this machine has none.
    monkeypatch.setattr(linear_cross_entropy.api, "device_obstacle", lambda *_: "none")
    state = abstract_state(cfg, MODEL)
    batch = dict.fromkeys(
        ("tokens", "labels"), jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    )
    mesh = make_mesh(cfg.mesh)
    jax.eval_shape(make_train_step(cfg, MODEL, mesh), state, batch)
    sizes = sorted(ran, reverse=True)
    assert ", ".join(dict.fromkeys(ran[size] for size in sizes)) == name
    said = implementations(cfg, MODEL)["mlp"]
    assert said[0] == name
    trained = dict(ran)
    ran.clear()
    jax.eval_shape(make_eval_step(cfg, MODEL, mesh), state["params"], batch)
    assert ran == trained


def test_kernels_asked_for_by_name_are_refused_with_the_way_out(hopper):
    def said(chunk, length=512):
        cfg = one_sequence(chunk, length, implementation="mosaic_gpu")
        return implementations(cfg, MODEL)["mlp"]

    assert said(128) == ("mosaic_gpu", "as asked for")
    for chunk, length, text in (
        (87, 512, f"86 of 512 tokens, the last of 82, 1 .*{ROWS.format(86)}; set .*="),
        (104, 518, f"the last of 102, 1 .*{ROWS.format(102)}; set DataConfig.seq_len"),
        (0, 509, f"509 of 509 tokens, 1 .*{ROWS.format(509)}; set DataConfig.seq_len"),
    ):
        with pytest.raises(NotImplementedError, match=text) as caught:
            said(chunk, length)
        assert "or set it to 'auto' or 'xla'" in str(caught.value)
        if option := re.search(r"mlp_chunk_size=(\d+)", str(caught.value)):
            assert said(int(option[1])) == ("mosaic_gpu", "as asked for")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize(
    "asked", [{"implementation": "mosaic_gpu"}, {"attention": "cudnn"}]
)
def test_a_run_is_refused_before_its_data_is_read(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "load_data", lambda *_: pytest.fail("reads data"))
    cfg = dataclasses.replace(run(**asked), out_dir=str(tmp_path))
    text = f"TrainConfig.*='{[*asked.values()][0]}'.*(no GPU|older).*set it to 'auto'"
    with pytest.raises(NotImplementedError, match=text):
        trainer.train(cfg)
