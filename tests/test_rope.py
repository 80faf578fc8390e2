"""RoPE: tables against transformers, packed positions, rotation, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.config import RopeConfig
from mst_jax.hf_config import model_config_from_hf
from mst_jax.ops.rope import apply_rope, rope_tables

H = 32
LENGTH = 256  # max_position_embeddings
SCALINGS = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0,
             "original_max_position_embeddings": 64},
    "yarn_all": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5,
                 "original_max_position_embeddings": 64, "beta_fast": 16.0,
                 "beta_slow": 2.0},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7,
                    "mscale_all_dim": 1.3, "original_max_position_embeddings": 64},
    "yarn_no_factor": {"rope_type": "yarn", "factor": None,
                       "original_max_position_embeddings": 64},
    "yarn_exact": {"rope_type": "yarn", "factor": 4.0, "truncate": False,
                   "original_max_position_embeddings": 64},
    "yarn_all_interpolated": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10.0,
                              "original_max_position_embeddings": 2**15},
    "yarn_null": {"rope_type": "yarn", "factor": 4.0, "truncate": None,
                  "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "rope_theta": 5e5,
               "original_max_position_embeddings": 64},
    "llama32": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "rope_theta": 5e5,
                "original_max_position_embeddings": 128},
}  # fmt: skip


def hf_dict(scaling, **changes):
    return dict(
        model_type="llama", vocab_size=32, hidden_size=64, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=H,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    ) | changes  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("T", [40, LENGTH, 400])  # dynamic stretches the last
def test_tables_are_those_of_transformers(name, T):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = hf_dict(SCALINGS[name])
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    backwards = np.arange(T)[::-1] if name != "dynamic" else np.arange(T)
    positions = np.stack([np.arange(T), backwards])
    want = theirs(torch.zeros(()), torch.from_numpy(positions.copy()))
    rope = model_config_from_hf(hf_dict(SCALINGS[name])).rope
    got = rope_tables(rope, H, jnp.asarray(positions))
    for ours, table in zip(got, want, strict=True):
        assert ours.dtype == jnp.float32
        # One f32 rounding of a frequency turns by T * 6e-8.
        np.testing.assert_allclose(ours, table[..., : H // 2], atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(SCALINGS) - {"dynamic"}))
def test_packed_documents_start_at_zero(name):
    rope = model_config_from_hf(hf_dict(SCALINGS[name])).rope
    packed = jnp.array([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    cos, sin = rope_tables(rope, H, packed)
    one_cos, one_sin = rope_tables(rope, H, jnp.arange(4)[None])
    for start, length in ((0, 4), (4, 2), (6, 3)):
        span = slice(start, start + length)
        np.testing.assert_array_equal(cos[:, span], one_cos[:, :length])
        np.testing.assert_array_equal(sin[:, span], one_sin[:, :length])


def test_dynamic_stretches_each_document_by_its_own_length():
    rope = RopeConfig(type="dynamic", factor=2.0, original_max_position=16)
    lengths = (16, 64, 7, 40)
    packed = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    tables = rope_tables(rope, H, packed)
    start = 0
    for n in lengths:
        alone = jnp.arange(n)[None]
        for got, want in zip(tables, rope_tables(rope, H, alone), strict=True):
            np.testing.assert_allclose(got[:, start : start + n], want, atol=1e-5)
        plain = rope_tables(RopeConfig(original_max_position=16), H, alone)[0]
        moved = abs(tables[0][:, start : start + n] - plain).max()
        assert (moved > 0.5) == (n > 16), (n, moved)
        start += n


def test_rotation_keeps_norms_and_depends_on_the_distance():
    x = jax.random.normal(jax.random.key(0), (2, 50, 3, H))
    positions = jnp.broadcast_to(jnp.arange(50), (2, 50))
    tables = rope_tables(RopeConfig(), H, positions)
    rotated = apply_rope(x, *tables)
    assert rotated.dtype == x.dtype and rotated.shape == x.shape
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])  # position 0: no angle
    norm, want = (jnp.linalg.norm(a, axis=-1) for a in (rotated, x))
    np.testing.assert_allclose(norm, want, rtol=1e-5)
    # The same two vectors, 7 apart, score the same anywhere.
    q, k = (
        apply_rope(jnp.tile(x[:, i : i + 1], (1, 50, 1, 1)), *tables) for i in (3, 4)
    )
    scores = jnp.einsum("BTNH,BTNH->BTN", q[:, 7:], k[:, :-7])
    np.testing.assert_allclose(scores, scores[:, :1].repeat(43, 1), atol=1e-4)


def test_yarn_scales_the_norm():
    rope = RopeConfig(type="yarn", factor=4.0, attention_factor=1.5)
    x = jax.random.normal(jax.random.key(0), (1, 9, 1, H))
    rotated = apply_rope(x, *rope_tables(rope, H, jnp.arange(9)[None]))
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated, axis=-1), 1.5 * jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_bf16_is_rounded_once():
    x = jax.random.normal(jax.random.key(0), (1, 200, 2, H)).astype(jnp.bfloat16)
    tables = rope_tables(RopeConfig(), H, jnp.arange(200)[None])
    got = apply_rope(x, *tables)
    want = apply_rope(x.astype(jnp.float32), *tables).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"theta": 0.0}, "theta=0.0 must be positive"),
        ({"factor": -1.0}, "factor=-1.0 must be positive"),
        ({"original_max_position": 0}, "original_max_position=0 must be positive"),
        (
            {"type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor=4.0 must be larger",
        ),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**values)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "longrope"}, "rope_type='longrope'"),
        ({"rope_type": "linear", "partial_rotary_factor": 0.5}, "partial_rotary"),
        ({"rope_type": "linear"}, "has no factor"),
    ],
)
def test_scalings_of_hf_that_are_not_there(scaling, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(hf_dict(scaling))


def test_hf_reading():
    def read(**changes):
        return model_config_from_hf(hf_dict({}, **changes)).rope

    assert read() == RopeConfig(original_max_position=LENGTH)
    # transformers 4: theta outside, 'type' instead of 'rope_type'
    older = {"type": "linear", "factor": 2.0}
    want = RopeConfig(type="linear", factor=2.0, theta=7.0, original_max_position=256)
    assert read(rope_parameters=None, rope_scaling=older, rope_theta=7.0) == want
    assert read(rope_parameters=None, rope_theta=7.0) == dataclasses.replace(
        want, type="default", factor=1.0
    )
