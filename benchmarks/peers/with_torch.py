"""Time one peer, a PyTorch model of Hugging Face's, at several lengths.

    python benchmarks/peers/with_torch.py JOB    # JSON, from benchmarks/peers.py

Prints a line `ROW {...}` a length. Every peer has what its users can switch on:

- attention by cuDNN, no other kernel allowed; no cache of keys and values
- each parameter updated as soon as its gradient is there, so that no whole gradient is
  held. Liger's tiled MLP adds to its gradients once a tile: there the update waits for
  the MLP's backward pass
- expandable segments; non-reentrant checkpoints that keep no state of random numbers
- Liger's loss on chunks of up to 4096 tokens instead of T H / V (256 at 8192 tokens)
- torch.compile layer by layer, with static shapes
"""

import functools
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.utils.checkpoint
import weights

GIB = 2**30
LOSS_CHUNK = 4096


@dataclass(frozen=True)
class Peer:
    """What is switched on."""

    liger: tuple[str, ...] = ()
    """Options of `apply_liger_kernel_to_llama` that are on."""
    tiled: bool = False
    """Liger's tiled MLP."""
    checkpoint: str | None = None
    """'layer', or 'attention' for all of a layer but attention's output."""
    compiled: bool = False
    mini_s: bool = False


LIGER = ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
LOSS = ("fused_linear_cross_entropy",)
PEERS = {
    "hf": Peer(),
    "hf-ckpt": Peer(checkpoint="layer"),
    "mini-s": Peer(mini_s=True, checkpoint="layer"),
    "liger": Peer(liger=LIGER),
    "liger-ckpt": Peer(liger=LIGER, checkpoint="layer"),
    "liger-ckpt-attn": Peer(liger=LIGER, checkpoint="attention"),
    "liger-tiled": Peer(liger=LIGER, tiled=True),
    "liger-tiled-ckpt": Peer(liger=LIGER, tiled=True, checkpoint="layer"),
    "compile": Peer(compiled=True),
    "compile-ckpt": Peer(compiled=True, checkpoint="layer"),
    "compile-liger-loss": Peer(compiled=True, liger=LOSS),
    "compile-liger-loss-ckpt": Peer(compiled=True, liger=LOSS, checkpoint="layer"),
}


def force_cudnn() -> None:
    """Allow no attention kernel but cuDNN's: where it cannot run, torch raises."""
    from torch.backends import cuda

    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_math_sdp(False)
    cuda.enable_cudnn_sdp(True)


def make_model(peer: Peer, job: dict[str, Any], device: str) -> Any:
    """Return the patched model on the device; its weights are not written yet."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    if peer.liger:
        from liger_kernel.transformers import (  # pyright: ignore
            LigerTiledSwiGLUMLP,
            apply_liger_kernel_to_llama,
        )

        apply_liger_kernel_to_llama(
            **{name: name in peer.liger for name in LIGER}, cross_entropy=False
        )
        if peer.tiled:
            modeling_llama.LlamaMLP = LigerTiledSwiGLUMLP
    cfg = LlamaConfig(**job["hf_config"], use_cache=False)
    cfg._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(cfg)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device=device)
    # Its frequencies are f32 buffers, and now empty.
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(cfg).to(device)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.tie_weights()
    return model.train()


def wrap(peer: Peer, model: Any, job: dict[str, Any]) -> Any:
    """Return what is called in a step: checkpoints, compiler, mini-s's wrapper."""
    if peer.checkpoint:
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if peer.checkpoint == "attention":
            aten = torch.ops.aten
            kept = [
                aten._scaled_dot_product_cudnn_attention.default,
                aten._scaled_dot_product_flash_attention_for_cpu.default,
            ]
            options["context_fn"] = functools.partial(
                torch.utils.checkpoint.create_selective_checkpoint_contexts, kept
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if peer.compiled:
        dynamo = importlib.import_module("torch._dynamo")  # seconds: only here
        dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        model.model.norm.compile(dynamic=False)
    if peer.mini_s:
        if job["mini_s"]:
            sys.path.insert(0, job["mini_s"])
        from minis.mini_sequence import minisequence  # pyright: ignore

        # It switches checkpoints on by itself.
        return minisequence(model)
    return model


def update_in_backward(peer: Peer, model: Any, job: dict[str, Any]) -> None:
    """Update every parameter in the backward pass and drop its gradient."""
    rate = job["learning_rate"]
    if job["optimizer"] == "adamw":
        adamw = functools.partial(
            torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        optimizers = {p: adamw([p]) for p in model.parameters()}

    @torch.no_grad()
    def update(p: Any) -> None:
        if job["optimizer"] == "adamw":
            optimizers[p].step()
        else:
            p.add_(p.grad, alpha=-rate)
        p.grad = None

    def update_all(parameters: Iterable[torch.nn.Parameter]) -> None:
        for p in parameters:
            update(p)

    tiled = [layer.mlp for layer in model.model.layers] if peer.tiled else []
    for mlp in tiled:
        mlp.register_full_backward_hook(lambda m, _, __: update_all(m.parameters()))
    late = {p for mlp in tiled for p in mlp.parameters()}
    for p in model.parameters():
        if p not in late:
            p.register_post_accumulate_grad_hook(update)


def make_loss(peer: Peer, called: Any, model: Any) -> Callable[[torch.Tensor], Any]:
    """Return ids [1, T] -> mean loss of the next tokens."""
    cfg = model.config
    if peer.compiled and not peer.liger:
        # Compiled with the head, so that the logits' f32 copy is not written.
        head_loss = torch.compile(
            functools.partial(model.loss_function, vocab_size=cfg.vocab_size),
            dynamic=False,
        )

        def compiled(ids: torch.Tensor) -> Any:
            hidden = model.model(input_ids=ids).last_hidden_state
            return head_loss(model.lm_head(hidden), ids)

        return compiled

    def loss(ids: torch.Tensor) -> Any:
        options = {}
        if peer.liger:
            chunks = -(-ids.shape[1] // LOSS_CHUNK)
            options["chunk_mem_const"] = -(
                -cfg.vocab_size // (cfg.hidden_size * chunks)
            )
        return called(input_ids=ids, labels=ids, **options).loss

    return loss


def measure(
    loss_of: Callable[[torch.Tensor], Any], ids: torch.Tensor, job: dict[str, Any]
) -> dict[str, Any]:
    """Time steps after the warm-up: at least two, more while they are short."""
    cuda = ids.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    while len(times) < job["warmup"] + 2 or (
        len(times) < job["warmup"] + job["steps"]
        and sum(times[job["warmup"] :]) < job["timed_seconds"]
    ):
        began = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    memory = torch.cuda.memory_stats() if cuda else {}
    timed = times[job["warmup"] :]
    return {
        "step_s": median(timed),
        "fastest_s": min(timed),
        "first_step_s": times[0],
        "steps": len(timed),
        "peak_GiB": memory.get("allocated_bytes.all.peak", 0) / GIB,
        "reserved_GiB": memory.get("reserved_bytes.all.peak", 0) / GIB,
        "losses": losses,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    peer = PEERS[job["entry"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"torch": str(torch.__version__)}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, job["budget_GiB"] * GIB / total)
        )
        force_cudnn()
        versions["torch's cuDNN"] = str(torch.backends.cudnn.version())
    model = make_model(peer, job, device)
    names = dict(model.named_parameters())  # before mini-s and the compiler wrap it
    called = wrap(peer, model, job)
    update_in_backward(peer, model, job)
    loss_of = make_loss(peer, called, model)
    for tokens in job["lengths"]:
        with torch.no_grad():
            for name, parameter in names.items():
                weights.fill_torch(parameter, name, job["initializer_range"])
        ids = torch.from_numpy(
            weights.token_ids(tokens, job["hf_config"]["vocab_size"])
        )
        ids = ids.long()[None].to(device)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        row: dict[str, Any] = {"tokens": tokens, "versions": versions}
        try:
            row |= measure(loss_of, ids, job)
        except torch.OutOfMemoryError as error:
            row["error"] = f"out of memory: {error}"
        print("ROW " + json.dumps(row), flush=True)
        if "error" in row:
            break


if __name__ == "__main__":
    main()
