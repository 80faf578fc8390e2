"""The lines of a run's start."""

import dataclasses
import re

import pytest

from mst_jax import description
from mst_jax.compile_cache import CompileCache
from mst_jax.config import PRESETS, Config, DataConfig, TrainConfig
from mst_jax.data import load_data
from mst_jax.description import describe, implementations
from mst_jax.ops import linear_cross_entropy

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
