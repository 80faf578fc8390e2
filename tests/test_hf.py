"""Weights survive the way from transformers to params and back, bit by bit."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mst_jax import hf
from mst_jax.config import PRESETS, ModelConfig, RopeConfig
from mst_jax.hf_config import hf_config, model_config_from_hf

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128,
)  # fmt: skip
CFG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=128,
    rope=RopeConfig(original_max_position=128),
)  # fmt: skip
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save(path, tied=False, dtype="float32", max_shard_size="5GB"):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).to(TORCH[dtype])
    with torch.no_grad():  # fresh norms are all ones
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand(p.shape) + 0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    save(path, max_shard_size="50KB")
    return path


def random_params(cfg, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(dtype),
        hf.param_shapes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def bits(x):
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.itemsize}")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))


def torch_bits(tensor):
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return tensor.detach().contiguous().view(kind).numpy().view(f"u{kind.itemsize}")


def edit(source, out, **changes):
    """Copy a single-file checkpoint with tensors changed, or None to drop them."""
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    tensors |= changes
    out.mkdir(exist_ok=True)
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, out / "model.safetensors")
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_load_is_bit_equal(tmp_path, tied, dtype, size):
    model = save(tmp_path, tied, dtype, size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "50KB")
    cfg = model_config_from_hf(tmp_path)
    assert cfg == dataclasses.replace(CFG, tie_embeddings=tied, rms_norm_eps=1e-6)
    params = hf.load_params(tmp_path, cfg, dtype=dtype)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == hf.param_shapes(cfg) and ("lm_head" in params) == (not tied)

    def same(ours, name, transposed=True):
        want = torch_bits(model.state_dict()[name])
        np.testing.assert_array_equal(bits(ours.T if transposed else ours), want)

    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    same(params["embed"]["embedding"], "model.embed_tokens.weight", False)
    same(params["final_norm"]["scale"], "model.norm.weight")
    if not tied:
        same(params["lm_head"]["kernel"], "lm_head.weight")
    for i in range(cfg.num_layers):
        layer, at = jax.tree.map(lambda x, i=i: x[i], params["layers"]), "model.layers."
        same(layer["attention_norm"]["scale"], f"{at}{i}.input_layernorm.weight")
        same(layer["mlp_norm"]["scale"], f"{at}{i}.post_attention_layernorm.weight")
        for x in "qkvo":
            same(layer["attention"]["w" + x], f"{at}{i}.self_attn.{x}_proj.weight")
        for x in ("gate", "up", "down"):
            same(layer["mlp"]["w_" + x], f"{at}{i}.mlp.{x}_proj.weight")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_bytes", [5e9, 20e3])
def test_export_is_bit_equal(tmp_path, tied, dtype, max_bytes):
    model = save(tmp_path / "in", tied, dtype)
    cfg = model_config_from_hf(tmp_path / "in")
    params = hf.load_params(tmp_path / "in", cfg, dtype=dtype)
    hf.export_hf(params, cfg, tmp_path / "out", max_shard_bytes=max_bytes)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    if max_bytes == 5e9:
        assert files == ["model.safetensors"]
    else:
        n = len(files)
        want = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        index = json.loads(
            (tmp_path / "out" / "model.safetensors.index.json").read_text()
        )
        assert n > 2 and files == want
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        assert index["metadata"]["total_size"] == size
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    state, want = again.state_dict(), model.state_dict()
    assert again.dtype == TORCH[dtype] and state.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(torch_bits(state[name]), torch_bits(want[name]))
    if dtype == "float32":  # .to(bfloat16) also rounds the model's rotary table
        ids = torch.arange(40).reshape(2, 20)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)


def test_jax_numpy_and_sharded_params_export_the_same(tmp_path):
    params = random_params(CFG, jnp.bfloat16)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    spread = NamedSharding(mesh, P(None, "fsdp"))
    placed["layers"]["mlp"] = jax.device_put(params["layers"]["mlp"], spread)
    trees = {"numpy": params, "jax": jax.tree.map(jnp.asarray, params), "mesh": placed}
    for name, tree in trees.items():
        hf.export_hf(tree, CFG, tmp_path / name)
        assert_equal(hf.load_params(tmp_path / name, CFG, dtype="bfloat16"), params)
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in trees]
    assert files[0] == files[1] == files[2]


def test_dtypes_are_cast_on_the_way(tmp_path):
    params = random_params(CFG)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hf.export_hf(params, CFG, tmp_path / "f32")
    hf.export_hf(params, CFG, tmp_path / "bf16", dtype=jnp.bfloat16)
    assert_equal(hf.load_params(tmp_path / "f32", CFG, dtype="bfloat16"), narrow)
    assert_equal(hf.load_params(tmp_path / "bf16", CFG, dtype="bfloat16"), narrow)
    hf.export_hf(params, CFG, tmp_path / "f64", dtype=np.float64)
    assert_equal(hf.load_params(tmp_path / "f64", CFG, dtype="bfloat16"), narrow)
    names = [json.loads((tmp_path / n / "config.json").read_text())["dtype"]
             for n in ("f32", "bf16")]  # fmt: skip
    assert names == ["float32", "bfloat16"]


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_sharded_load_equals_unsharded(source, shape, monkeypatch):
    cfg = model_config_from_hf(source)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp")[-len(shape) :])

    def spec(shape):
        axes = [None] * len(shape)
        axes[-1 if len(shape) != 2 else 0] = "fsdp"
        return NamedSharding(mesh, P() if shape[0] == 3 == len(shape) else P(*axes))

    def is_shape(x):
        return isinstance(x, tuple)

    shardings = jax.tree.map(spec, hf.param_shapes(cfg), is_leaf=is_shape)
    shardings["layers"]["attention_norm"]["scale"] = NamedSharding(mesh, P())
    shardings["layers"]["mlp_norm"]["scale"] = NamedSharding(mesh, P(None, "fsdp"))
    for name in ("wq", "wk", "wv"):  # the file's rows, the file's columns
        shardings["layers"]["attention"][name] = NamedSharding(
            mesh, P(None, None, "fsdp")
        )
    shardings["layers"]["mlp"]["w_up"] = NamedSharding(mesh, P(None, "fsdp", None))
    reads, read = [], hf._read
    monkeypatch.setattr(hf, "_read", lambda *a: reads.append(a[:2]) or read(*a))
    params = hf.load_params(source, cfg, dtype="float32", shardings=shardings)
    # Every byte once: for replicas, and for shards that split the file's columns.
    size = sum(t.row_bytes * (stop - start) for t, (start, stop) in reads)
    assert size == sum(p.nbytes for p in jax.tree.leaves(params))
    assert len(set(reads)) == len(reads)
    assert params["layers"]["mlp"]["w_up"].sharding.shard_shape((3, 32, 80))[1] < 32
    plain = hf.load_params(source, cfg, dtype="float32")
    assert {d for x in jax.tree.leaves(plain) for d in x.devices()} == {
        jax.devices()[0]
    }
    assert_equal(params, plain)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(), params, shardings)


def test_stack_split_over_layers_and_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_PIECE", 3000)  # bytes; a row of w_down's file has 544
    cfg = dataclasses.replace(CFG, num_layers=8, vocab_size=2500, intermediate_size=136)
    params = random_params(cfg)
    hf.export_hf(params, cfg, tmp_path / "out", max_shard_bytes=100_000)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
    shardings = jax.tree.map(
        lambda s: sharding if s[0] == 8 else NamedSharding(sharding.mesh, P()),
        hf.param_shapes(cfg), is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    got = hf.load_params(tmp_path / "out", cfg, dtype="float32", shardings=shardings)
    assert_equal(got, params)


ROPES = {
    "default": RopeConfig(theta=5e5, original_max_position=1024),
    "linear": RopeConfig(type="linear", factor=4.0, original_max_position=1024),
    "dynamic": RopeConfig(type="dynamic", factor=2.0, original_max_position=1024),
    "yarn": RopeConfig(type="yarn", factor=4.0, original_max_position=256,
                       beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    "yarn_exact": RopeConfig(type="yarn", factor=4.0, original_max_position=256,
                             truncate=False),
    "yarn_plain": RopeConfig(type="yarn", factor=4.0, original_max_position=256),
    "llama3": RopeConfig(type="llama3", factor=8.0, original_max_position=256,
                         theta=5e5, low_freq_factor=2.0, high_freq_factor=8.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_round_trip(tmp_path, kind, caplog):
    cfg = dataclasses.replace(CFG, max_position=1024, rope=ROPES[kind])
    written = hf_config(cfg)
    assert model_config_from_hf(written) == cfg
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlamaConfig and not caplog.records
    assert loaded.rope_parameters == written["rope_parameters"]
    loaded.save_pretrained(tmp_path)
    assert model_config_from_hf(tmp_path) == cfg
    older = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert model_config_from_hf(older) == cfg  # what transformers 4 reads


@pytest.mark.parametrize(
    "name", ["llama2_7b", "llama3_8b", "llama32_1b", "llama31_70b"]
)
def test_presets_round_trip(name):
    assert model_config_from_hf(hf_config(PRESETS[name])) == PRESETS[name]


def test_source_files_and_unknown_fields_survive(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    base = dict(
        model_type="llama", eos_token_id=[7, 8], my_field=1, torch_dtype="float16",
        quantization_config={"bits": 4},
        rope_scaling={"type": "yarn", "factor": 9.0, "truncate": False,
                      "attention_factor": 3.0},
    )  # fmt: skip
    (source / "config.json").write_text(json.dumps(base))
    for name in (*hf.TOKENIZER_FILES, "generation_config.json", "other.json"):
        (source / name).write_text(name)
    cfg = dataclasses.replace(CFG, max_position=1024, rope=ROPES["yarn_plain"])
    (tmp_path / "out").mkdir()  # empty is fine
    params = random_params(cfg)
    hf.export_hf(params, cfg, tmp_path / "out", source_dir=source, tokenizer_dir=source)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    copied = (*hf.TOKENIZER_FILES, "generation_config.json")
    # Without them a tokenizer of words, or one with words added, loads and knows none.
    assert {"vocab.json", "merges.txt", "added_tokens.json"} <= {*copied}
    assert names == {*copied, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / n).read_text() == n for n in copied)
    hf.export_hf(params, cfg, tmp_path / "bytes", source_dir=source)
    names = {p.name for p in (tmp_path / "bytes").iterdir()}
    assert names == {"generation_config.json", "config.json", "model.safetensors"}
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    assert got["eos_token_id"] == [7, 8] and got["my_field"] == 1
    assert "quantization_config" not in got and "torch_dtype" not in got
    # RoPE is the model's, not the source's: nothing of a changed scaling stays.
    assert got["rope_parameters"]["truncate"] is True
    assert model_config_from_hf(got) == cfg
    for name in ("source_dir", "tokenizer_dir"):
        with pytest.raises(FileNotFoundError, match=f"{name}='nowhere' is not a dir"):
            hf.export_hf(params, cfg, tmp_path / "new", **{name: "nowhere"})


def test_all_problems_are_reported_together(tmp_path, source):
    bad = edit(source, tmp_path / "bad", **{
        "model.norm.weight": None,
        "model.layers.1.mlp.up_proj.weight": np.zeros((32, 80), np.float32),
        "model.layers.2.self_attn.q_proj.bias": np.zeros(64, np.float32),
        "model.layers.0.mlp.down_proj.weight": np.zeros((32, 80), np.uint8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    })  # fmt: skip
    with pytest.raises(ValueError) as error:
        hf.load_params(bad, CFG, dtype="float32")
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.norm.weight",
        "  quantized: model.layers.0.mlp.down_proj.weight is U8, not a float",
        "  misshaped: model.layers.1.mlp.up_proj.weight is (32, 80), not (80, 32)",
        "  unexpected: model.layers.2.self_attn.q_proj.bias",
    ]


def test_names_that_are_ignored(tmp_path, source):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    good = edit(source, tmp_path / "good", **{extra: np.zeros(8, np.float32)})
    hf.load_params(good, CFG, dtype="float32")
    tied = dataclasses.replace(CFG, tie_embeddings=True)
    assert "lm_head" not in hf.load_params(good, tied, dtype="float32")
    edit(source, tmp_path / "tied", **{"lm_head.weight": None})
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        hf.load_params(tmp_path / "tied", CFG, dtype="float32")


def test_files_that_are_not_there(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        hf.load_params(tmp_path / "nowhere", CFG, dtype="float32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"only \['config.json'\]"):
        hf.load_params(tmp_path, CFG, dtype="float32")
    (tmp_path / "pytorch_model.bin").write_text("")
    want = r"only \['pytorch_model.bin'\]: save the model with safe_serialization=True"
    with pytest.raises(FileNotFoundError, match=want):
        hf.load_params(tmp_path, CFG, dtype="float32")
    index = "model.safetensors.index.json"
    (tmp_path / index).write_text((source / index).read_text())
    with pytest.raises(FileNotFoundError, match="model-00001-of-.*safetensors"):
        hf.load_params(tmp_path, CFG, dtype="float32")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match="not a whole safetensors file .23 bytes"):
        hf.load_params(tmp_path, CFG, dtype="float32")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not JSON: Expecting value"),
        ('{"weight_map": {', "is not JSON"),
        ("[]", "is a JSON list, not an object"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{index} {message}")):
        hf.load_params(tmp_path, CFG, dtype="float32")


def test_an_index_of_things_that_are_no_names(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": ["a"], "lm_head": null}}')
    with pytest.raises(FileNotFoundError, match="names files that are not there"):
        hf.load_params(tmp_path, CFG, dtype="float32")


@pytest.mark.parametrize("content, message", [("[]", "a JSON list"), ("{", "not JSON")])
def test_export_names_a_damaged_source(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json is {message}"):
        hf.export_hf(random_params(CFG), CFG, tmp_path / "out", source_dir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_shardings_must_be_the_tree_of_params(source):
    shardings = {"embed": {"embedding": NamedSharding(Mesh(jax.devices(), "x"), P())}}
    with pytest.raises(ValueError, match="shardings and params differ in .*lm_head"):
        hf.load_params(source, CFG, dtype="float32", shardings=shardings)


def test_resolve(tmp_path, source, monkeypatch):
    assert hf.resolve(str(source)) == source
    for name in ("no/such-model-here", "not a name at all!", "../nowhere/at/all"):
        with pytest.raises(FileNotFoundError) as error:
            hf.resolve(name)
        assert repr(name) in str(error.value) and "local directory" in str(error.value)
    asked = {}
    monkeypatch.setattr(
        hf, "snapshot_download", lambda name, **k: asked.update(k, name=name) or source
    )
    assert hf.resolve("owner/model") == source and asked["name"] == "owner/model"
    assert "*.safetensors" in asked["allow_patterns"]


def test_export_refuses(tmp_path, monkeypatch):
    params = random_params(CFG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("")
    with pytest.raises(FileExistsError, match="full is not empty"):
        hf.export_hf(params, CFG, tmp_path / "full")
    window = dataclasses.replace(CFG, sliding_window=8)
    with pytest.raises(ValueError, match="sliding_window=8"):
        hf.export_hf(params, window, tmp_path / "out")
    wrong = random_params(CFG) | {"final_norm": {"scale": np.zeros(7)}}
    del wrong["lm_head"]
    with pytest.raises(ValueError) as error:
        hf.export_hf(wrong, CFG, tmp_path / "out")
    assert str(error.value).splitlines()[1:] == [
        "  final_norm/scale: (7,), not (32,)",
        "  lm_head/kernel: None, not (32, 96)",
    ]

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hf.export_hf(params, CFG, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]  # nothing is left behind
