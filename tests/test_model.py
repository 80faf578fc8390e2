"""The decoder against transformers' Llama in torch: values, loss, every gradient.

Torch's gradients come back as params: they are saved as the weights of a model and
loaded through the table of names. The reference runs in f64, since eager f32 would
itself be the larger error.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from mst_jax import hf  # noqa: E402
from mst_jax.config import Config, DataConfig, TrainConfig  # noqa: E402
from mst_jax.hf_config import model_config_from_hf  # noqa: E402
from mst_jax.loss import next_token_loss  # noqa: E402
from mst_jax.model import from_params, init_params  # noqa: E402
from mst_jax.ops.rope import rope_tables  # noqa: E402
from mst_jax.sharding import make_mesh  # noqa: E402
from mst_jax.train_step import make_gradients  # noqa: E402

B, T = 2, 45  # divided by none of the chunk sizes
LAYERS = 2
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
          "rope_theta": 5e5}  # fmt: skip
MODELS = {
    "llama2": {"num_key_value_heads": 4},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama31": {"rope_parameters": LLAMA3},
    "llama32": {"rope_parameters": LLAMA3 | {"factor": 32.0},
                "tie_word_embeddings": True, "head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                   "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                    "rope_theta": 1e4},
                "max_position_embeddings": 20},  # T is beyond it
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                 "original_max_position_embeddings": 16}},
}  # fmt: skip
CHUNKS = {"mlp_chunk_size": 7, "loss_chunk_size": 13}


def config(name):
    values = dict(
        vocab_size=70, hidden_size=32, intermediate_size=56,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, rms_norm_eps=1e-5, attn_implementation="eager",
        initializer_range=0.2,
    ) | copy.deepcopy(MODELS[name])  # fmt: skip
    return LlamaConfig(**values)


@dataclasses.dataclass
class Pair:
    """transformers' model, ours with the same weights, and one batch."""

    torch: LlamaForCausalLM
    cfg: object
    params: dict
    tokens: np.ndarray
    labels: np.ndarray
    path: object

    @property
    def batch(self):
        return {"tokens": jnp.asarray(self.tokens), "labels": jnp.asarray(self.labels)}

    def as_params(self, state_dict, name):
        """Return torch tensors, by HF name, as params."""
        holder = LlamaForCausalLM(self.torch.config)
        holder.load_state_dict(state_dict)
        holder.save_pretrained(self.path / name)
        return hf.load_params(self.path / name, self.cfg, dtype=jnp.float32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def build(name, path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:  # fresh ones are all 1, which tests nothing
                p.copy_(torch.rand(p.shape) + 0.5)
    model.save_pretrained(path)
    cfg = model_config_from_hf(path)
    params = hf.load_params(path, cfg, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (B, T + 1)).astype(np.int32)
    labels = np.where(rng.random((B, T)) < 0.3, -100, tokens[:, 1:]).astype(np.int32)
    return Pair(model, cfg, params, tokens[:, :-1], labels, path)


def reference(pair, dtype=torch.float64):
    """Return torch's hidden states, logits, mean loss and gradients as params."""
    model = copy.deepcopy(pair.torch).to(dtype)
    model.model.rotary_emb = copy.deepcopy(pair.torch.model.rotary_emb)  # stays f32
    seen = {}
    model.model.norm.register_forward_hook(lambda m, x, y: seen.update(hidden=y))
    logits = model(torch.from_numpy(pair.tokens).long(), use_cache=False).logits
    labels = torch.from_numpy(pair.labels).long()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(dtype, torch.float32)),
        labels.flatten(),
        ignore_index=-100,
    )
    loss.backward()
    grads = {key: p.grad.float() for key, p in model.named_parameters()}
    if pair.cfg.tie_embeddings:
        grads["lm_head.weight"] = grads["model.embed_tokens.weight"]
    grads = pair.as_params(grads, f"grads_{dtype}".replace(".", "_"))
    return {
        "hidden": seen["hidden"].detach().double().numpy(),
        "logits": logits.detach().double().numpy(),
        "loss": loss.detach().double().numpy(),
        "grads": grads,
    }


def ours(pair, dtype="float32", **chunks):
    train = TrainConfig(**(chunks or CHUNKS))

    @jax.jit
    def run(params, batch):
        params = jax.tree.map(lambda p: p.astype(dtype), params)

        def loss(params):
            total, count = next_token_loss(from_params(pair.cfg, params), batch, train)
            return total / count

        model = from_params(pair.cfg, params)
        hidden = model(batch["tokens"], mlp_chunk_size=7)
        value, grads = jax.value_and_grad(loss)(params)
        logits = hidden @ model.head_weight()
        return {"hidden": hidden, "logits": logits, "loss": value, "grads": grads}

    return run(pair.params, pair.batch)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def errors(got, want):
    """Return the relative error of every leaf, by path."""
    paths = jax.tree_util.tree_leaves_with_path(got)
    return {
        jax.tree_util.keystr(path): relative(a, b)
        for (path, a), b in zip(paths, jax.tree.leaves(want), strict=True)
    }


def assert_close(got, want, tolerance=1e-5):
    found = errors(got, want)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize("name", MODELS)
def test_everything_f32(pairs, name):
    pair = pairs(name)
    got = ours(pair)
    assert_close(got, reference(pair))
    assert len(jax.tree.leaves(got["grads"])) == 12 - pair.cfg.tie_embeddings


@pytest.mark.parametrize("mlp, loss", [(0, 1000), (44, 1)])
def test_chunks_change_nothing(pairs, mlp, loss):
    pair = pairs("llama31")
    got = ours(pair, mlp_chunk_size=mlp, loss_chunk_size=loss)
    assert_close(got, reference(pair))


@pytest.mark.parametrize("plan", ["full", "save_attention", "none"])
def test_training_gradients(pairs, plan):
    # What training differentiates, which is not jax.grad of the model.
    pair = pairs("llama31")
    train = TrainConfig(plan=plan, compute_dtype="float32", **CHUNKS)
    data = DataConfig(tokenizer="x")  # V is below that of bytes
    cfg = Config(model=pair.cfg, data=data, train=train)
    fn = jax.jit(make_gradients(cfg, pair.cfg, make_mesh(cfg.mesh)))
    batch = {key: a[None] for key, a in pair.batch.items()}
    total, count, grads = fn(pair.params, batch)
    got = {"loss": total / count, "grads": jax.tree.map(lambda g: g / count, grads)}
    want = reference(pair)
    assert_close(got, {key: want[key] for key in got})


@pytest.mark.parametrize("name", MODELS)
def test_sublayers(pairs, name):
    pair = pairs(name)
    model = copy.deepcopy(pair.torch).double().model
    seen = {}

    def keep(key):
        def hook(module, args, kwargs, out):
            x = args[0] if args else kwargs["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            seen[key] = x.detach().numpy(), out.detach().numpy()

        return hook

    for i, layer in enumerate(model.layers):
        for key, module in (
            ("attention_norm", layer.input_layernorm),
            ("attention", layer.self_attn),
            ("mlp_norm", layer.post_attention_layernorm),
            ("mlp", layer.mlp),
            ("layer", layer),
        ):
            module.register_forward_hook(keep((i, key)), with_kwargs=True)
    model(torch.from_numpy(pair.tokens).long(), use_cache=False)

    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    rope = rope_tables(pair.cfg.rope, pair.cfg.head_size, positions)
    one = dataclasses.replace(pair.cfg, num_layers=1)

    @jax.jit
    def run(params, x):
        layer = jax.tree.map(lambda a: a[0], from_params(one, params).layers)
        return {
            "attention_norm": layer.attention_norm(x["attention_norm"]),
            "attention": layer.attention(x["attention"], rope, None),
            "mlp_norm": layer.mlp_norm(x["mlp_norm"]),
            "mlp": layer.mlp(x["mlp"], chunk_size=7),
            "layer": layer(x["layer"], rope, None, mlp_chunk_size=7),
        }

    for i in range(LAYERS):
        layers = jax.tree.map(lambda a, i=i: a[i : i + 1], pair.params["layers"])
        inputs = {k: jnp.float32(x) for (n, k), (x, _) in seen.items() if n == i}
        want = {k: y for (n, k), (_, y) in seen.items() if n == i}
        assert_close(run(pair.params | {"layers": layers}, inputs), want)


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama32", "yarn"])
def test_bf16_error_is_that_of_torch(pairs, name):
    pair = pairs(name)
    rounded = copy.deepcopy(pair.torch).to(torch.bfloat16).float()
    rounded.model.rotary_emb = pair.torch.model.rotary_emb
    pair = dataclasses.replace(pair, torch=rounded)  # bf16 weights, f32 arithmetic
    want = reference(pair, torch.float32)
    our = errors(ours(pair, "bfloat16"), want)
    their = errors(reference(pair, torch.bfloat16), want)
    for path, error in our.items():
        assert error < 1.1 * their[path] + 1e-3, (path, error, their[path])


def test_documents_of_a_packed_row_do_not_see_each_other(pairs):
    pair = pairs("llama3")
    lengths = [20, 1, 24]
    segments = jnp.asarray(np.repeat([1, 2, 3], lengths))[None]
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None]
    tokens = jnp.asarray(pair.tokens[:1])
    model = from_params(pair.cfg, pair.params)
    packed = model(tokens, positions=positions, segment_ids=segments)
    start = 0
    for n in lengths:
        alone = model(tokens[:, start : start + n])
        assert relative(packed[:, start : start + n], alone) < 1e-5
        start += n


def test_sliding_window_reaches_the_attention(pairs):
    pair = pairs("llama3")
    cfg = dataclasses.replace(pair.cfg, sliding_window=3)
    model = from_params(cfg, pair.params)
    tokens = jnp.asarray(pair.tokens[:1])
    other = tokens.at[0, 0].set((tokens[0, 0] + 1) % cfg.vocab_size)
    same = np.asarray(model(tokens) == model(other)).all(-1)[0]
    reach = LAYERS * 2 + 1  # two tokens to the left in each layer
    assert not same[:reach].any() and same[reach:].all()


def test_fresh_parameters():
    cfg = model_config_from_hf(config("llama3").to_dict())
    params = jax.jit(lambda: init_params(cfg, 3))()
    assert jax.tree.map(lambda p: p.shape, params) == hf.param_shapes(cfg)
    assert sum(p.size for p in jax.tree.leaves(params)) == cfg.num_params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            assert (leaf == 1).all()
        else:
            assert abs(leaf.std() / cfg.initializer_range - 1) < 0.1
    w = params["layers"]["mlp"]["w_gate"]
    assert (w[0] != w[1]).all()  # every layer has a key of its own
