"""Shapes of known models, by name."""

from typing import Any

from mst_jax.model_config import ModelConfig, RopeConfig

_LLAMA3_ROPE: dict[str, Any] = dict(theta=500000.0, original_max_position=8192)
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "llama2_7b": ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
        num_heads=32, num_kv_heads=32, max_position=4096,
        rope=RopeConfig(original_max_position=4096),
    ),
    "llama3_8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, max_position=8192,
        rope=RopeConfig(**_LLAMA3_ROPE),
    ),
    "llama32_1b": ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
        num_heads=32, num_kv_heads=8, head_dim=64, tie_embeddings=True,
        rope=RopeConfig(type="llama3", factor=32.0, **_LLAMA3_ROPE),
    ),
    "llama31_70b": ModelConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80,
        num_heads=64, num_kv_heads=8,
        rope=RopeConfig(type="llama3", factor=8.0, **_LLAMA3_ROPE),
    ),
}  # fmt: skip
