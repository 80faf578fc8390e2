"""A Llama decoder in Flax NNX: tokens -> hidden states.

    h = x + attention(norm(x));   y = h + mlp(norm(h))

Layers are stacked on axis 0 and run by one scan. The MLP runs on chunks of the
sequence: O(T F) -> O(C F). The LM head is not applied here: `loss.py` turns hidden
states into a loss without ever holding the logits.

This is the model to read, to evaluate, and to differentiate with `jax.grad`, which
keeps each layer's input and computes the rest again. Training runs the same layers
through `stack.py`, which keeps what a plan says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mst_jax.model_config import ModelConfig
from mst_jax.ops.attention import attention, find_documents
from mst_jax.ops.rms_norm import rms_norm
from mst_jax.ops.rope import apply_rope, rope_tables
from mst_jax.ops.swiglu import swiglu


def _normal(key: jax.Array, shape: tuple[int, ...], cfg: ModelConfig) -> nnx.Param:
    return nnx.Param(cfg.initializer_range * jax.random.normal(key, shape))


class RMSNorm(nnx.Module):
    """scale [D]."""

    def __init__(self, cfg: ModelConfig):
        self.scale = nnx.Param(jnp.ones(cfg.hidden_size))
        self.eps = cfg.rms_norm_eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
    """wq [D, N H], wk and wv [D, K H], wo [N H, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, H = cfg.hidden_size, cfg.head_size
        self.wq = _normal(rngs.params(), (D, cfg.num_heads * H), cfg)
        self.wk = _normal(rngs.params(), (D, cfg.num_kv_heads * H), cfg)
        self.wv = _normal(rngs.params(), (D, cfg.num_kv_heads * H), cfg)
        self.wo = _normal(rngs.params(), (cfg.num_heads * H, D), cfg)
        self.head_size = H
        self.sliding_window = cfg.sliding_window

    def __call__(
        self, x: Float[Array, "B T D"], rope: Any, segment_ids: Any, **options: Any
    ) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        q, k, v = (
            (x @ w[...]).reshape(B, T, -1, self.head_size)
            for w in (self.wq, self.wk, self.wv)
        )
        out = attention(
            apply_rope(q, *rope), apply_rope(k, *rope), v,
            segment_ids=segment_ids, sliding_window=self.sliding_window, **options,
        )  # fmt: skip
        return out.reshape(B, T, -1) @ self.wo[...]


class MLP(nnx.Module):
    """w_gate and w_up [D, F], w_down [F, D]; runs on mini-sequences."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, F = cfg.hidden_size, cfg.intermediate_size
        self.w_gate = _normal(rngs.params(), (D, F), cfg)
        self.w_up = _normal(rngs.params(), (D, F), cfg)
        self.w_down = _normal(rngs.params(), (F, D), cfg)

    def __call__(
        self, x: Float[Array, "B T D"], **options: Any
    ) -> Float[Array, "B T D"]:
        """options: chunk_size and implementation of `ops.swiglu`."""
        weights = (self.w_gate[...], self.w_up[...], self.w_down[...])
        return swiglu(x, *weights, **options)


class DecoderLayer(nnx.Module):
    """attention_norm, attention, mlp_norm, mlp."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg)
        self.attention = Attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg)
        self.mlp = MLP(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Any,
        segment_ids: Any,
        *,
        mlp_chunk_size: int | None = None,
        mlp_implementation: str | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B T D"]:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, rope, segment_ids, implementation=implementation)
        return x + self.mlp(
            self.mlp_norm(x), chunk_size=mlp_chunk_size,
            implementation=mlp_implementation,
        )  # fmt: skip


class Embedding(nnx.Module):
    """embedding [V, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.embedding = _normal(rngs.params(), shape, cfg)


class LMHead(nnx.Module):
    """kernel [D, V]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.kernel = _normal(rngs.params(), (cfg.hidden_size, cfg.vocab_size), cfg)


class Llama(nnx.Module):
    """embed, layers (stacked [L, ...]), final_norm, lm_head (unless tied)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(cfg, rngs)

        self.cfg = cfg
        self.embed = Embedding(cfg, rngs)
        self.layers = layers(rngs)
        self.final_norm = RMSNorm(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = LMHead(cfg, rngs)

    def head_weight(self) -> Float[Array, "D V"]:
        """Return the LM head; the transposed embedding when tied."""
        if self.cfg.tie_embeddings:
            return self.embed.embedding[...].T
        return self.lm_head.kernel[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mlp_chunk_size: int | None = None,
        mlp_implementation: str | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm.

        Args:
            tokens: [B, T] ids.
            positions: [B, T], restarting in each document; None is 0..T-1.
            segment_ids: [B, T] documents of a packed row; None is one document.
            mlp_chunk_size: tokens of an MLP chunk; None by byte budget, 0 whole.
            mlp_implementation: see `ops.swiglu`.
            implementation: of attention, see `ops.attention`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        rope = rope_tables(self.cfg.rope, self.cfg.head_size, positions)
        documents = None if segment_ids is None else find_documents(segment_ids)
        graph, state = nnx.split(self.layers)

        def body(x, layer_state):
            layer = nnx.merge(graph, layer_state)
            x = layer(
                x, rope, documents,
                mlp_chunk_size=mlp_chunk_size, mlp_implementation=mlp_implementation,
                implementation=implementation,
            )  # fmt: skip
            return x, None

        x = self.embed.embedding[...][tokens]
        x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, state)
        return self.final_norm(x)


def abstract_model(cfg: ModelConfig) -> tuple[Any, Any]:
    """Return (graph definition, state of f32 shapes) without allocating."""
    return nnx.split(nnx.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0))))


def init_params(cfg: ModelConfig, seed: int) -> dict[str, Any]:
    """Return fresh f32 parameters as a nested dict. Jit it to create them sharded."""
    return to_params(nnx.split(Llama(cfg, rngs=nnx.Rngs(seed)))[1])


def to_params(state: Any) -> dict[str, Any]:
    """Return an NNX state as a nested dict of arrays."""
    return nnx.to_pure_dict(state)


def from_params(cfg: ModelConfig, params: dict[str, Any]) -> Llama:
    """Return the model with these parameters, of any dtype, traced ones too."""
    graph, state = abstract_model(cfg)
    leaves = jax.tree.leaves(params)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
