"""Device and host memory of a train step, from shapes alone.

The peak is the state plus the largest of a step's phases. With the package's letters, a
and w the bytes of an activation and of a weight, n = B T tokens and a layer of
W = D (N + 2 K) H + N H D + 3 D F weights, the phases hold in bytes

    head       residuals + n (3 a D + 4 H) + 4 D V + C V (4 + a)
      its sum  residuals + n (2 a D + 4 H) + 4 D V + w D V
      columns  residuals + n (2 a D + 4 H) + w D V + V_c (n (4 + a) + w D)
      update   residuals + n a D + (w + 7/2 for each moment in 8 bits) D V
    MLP        residuals + sequences + 2 n a K H + C a (6 F + 2 D) + 12 D F + layer
      whole    residuals + sequences + n a (3 F + D) + layer
    attention  residuals + sequences + n A / head_groups + workspace + 12 D F + layer
    update     4 V D + n a D
    sequences  n (a (2 D + N H) + 4 (N + H))
    layer      a W + 8 N H D

with V_c columns of the head's gradient at a time, A a token's arrays and workspace in

    cuDNN                   A = a (3 N H + 4 K H)    workspace 8 n N H / head_groups
    the same, packed        A = a (4 N H + 6 K H)    twice as much (packed.RATIO)
    the kernel, packed      A = a (3 N H + 4 K H) + 4 N H    0
      the other branch      A = a (4 N H + 6 K H) + 4 N H    0
    Hopper's kernel, XLA    A = a (N H + 4 K H) + 4 N H      0

and whatever is recomputed, kept or waits for its use besides: see the functions. With
Hopper's kernels (4 + a) is a, 6 F is 4 F, and a whole sequence has the row of its own;
with XLA's products it has no 12 D F. The terms are those of `layer.py` and
`gradients.py`, held against the buffers that XLA assigns. Where versions differ, the
larger is predicted: of a whole sequence that computes h = x + out W_o again, 0.12
holds up to 1.5% less. Llama3-8B's steps of 8,192 to 131,072 tokens in docs/benchmarks,
compiled on 0.11.2, are within 1%, eleven of 65,536 tokens that offload within 1.4%.

Of 43 compiled steps before those (Llama3-8B at 16,384 to 1,048,576 tokens, Llama 3.2 1B
at 8,192 to 321,536; every preset, mixtures, all optimizers, T4 to B200; JAX 0.12, three
on 0.11.2) all peaks are within 3.1%, 33 within 0.5%. Since then chunks that do not
divide the length are predicted too high, in one step of 460,800 tokens by 6.7%, and
Llama 3.2 1B on the kernels by up to 5.2% (docs/LOG.md).

cuDNN's workspace is measured on an H200, packed on an H100, and assumed elsewhere; a
compilation without a device leaves it out.
"""

from copy import copy
from functools import cache
from math import prod

from mst_jax.chunk_loop import loop_chunks
from mst_jax.config import Config, ModelConfig
from mst_jax.gpus import Gpu
from mst_jax.gradients import (
    attention_implementation,
    head_implementation,
    layer_chunk_size,
    make_plan,
    mlp_implementation,
)
from mst_jax.mini_sequence import ROW_MULTIPLE, split_length
from mst_jax.ops import linear_cross_entropy
from mst_jax.ops.attention.packed import RATIO
from mst_jax.optim import is_below
from mst_jax.plan import LayerGroup, Plan

MOMENTS = {"sgd": 0, "adafactor": 0, "lion": 1, "adamw": 2}
"""Optimizer state of a parameter's own shape."""
WORKSPACE = "attention workspace"


class StepMemory:
    """A step's letters, and its bytes.

    Raises:
        NotImplementedError: more than one device.
    """

    def __init__(self, cfg: Config, model: ModelConfig, gpu: Gpu):
        if cfg.mesh.data * cfg.mesh.fsdp > 1:
            raise NotImplementedError(
                f"the planner knows one device, the mesh has {cfg.mesh}: set it to "
                "one, or choose train.plan yourself, without train.memory_budget"
            )
        self.cfg, self.model, self.gpu = cfg, model, gpu
        self.plan: Plan = make_plan(cfg, model)
        B, T = cfg.data.batch_size, cfg.data.seq_len
        self.T, self.n = T, B * T
        self.D, self.F, self.V = (
            model.hidden_size, model.intermediate_size, model.vocab_size
        )  # fmt: skip
        self.NH = model.num_heads * model.head_size
        self.KH = model.num_kv_heads * model.head_size
        self.N, self.H, self.L = model.num_heads, model.head_size, model.num_layers
        self.a = 2 if cfg.train.compute_dtype == "bfloat16" else 4
        self.w = 2 if cfg.optim.param_dtype == "bfloat16" else 4
        # Without bf16 units XLA widens the operands of matrix products.
        self.wide = 4 if not gpu.has_bf16 else self.a
        self.attention, _ = attention_implementation(cfg, model, B, gpu.capability)
        size, rest = loop_chunks(T, layer_chunk_size(cfg, model, B, T))
        self.C, rest = B * size, B * rest
        self.ragged = rest > 0
        self.head_kernels = (
            head_implementation(cfg, model, gpu.capability)[0] == "mosaic_gpu"
        )
        self.vocab_chunk = min(cfg.train.vocab_chunk_size or 0, self.V)
        size = cfg.train.loss_chunk_size or default_loss_chunk(cfg, model, gpu)
        self.C_loss = B * split_length(T, size)[1]
        self.qkv = self.D * (self.NH + 2 * self.KH)
        self.W = self.qkv + self.NH * self.D + 3 * self.D * self.F
        self.kernels = has_layer_kernels(cfg, model, gpu, self.C)
        if rest:  # asked for by name, they must take the last chunk too
            has_layer_kernels(cfg, model, gpu, rest)
        optim = cfg.optim
        self.clips_globally = optim.clip == "global" and optim.clip_norm is not None
        # The same for every plan.
        self.trained = self._count_trained()
        self.state = self._state()
        self.layer_gradients = self._layer_gradients()
        self.gradients = self._gradients()
        self.layer = self._layer()

    def with_plan(self, plan: Plan) -> "StepMemory":
        """Return the same step under another plan, of as many head groups."""
        other = copy(self)
        other.plan = plan
        return other

    def _state(self) -> tuple[int, int, int]:
        """Bytes of parameters, of optimizer state on the device and on the host."""
        params = device = host = 0
        for name, (count, shape) in parameters(self.model).items():
            params += count * self.w * prod(shape)
            moments = 0 if self._frozen(name) else count * _moments(shape, self.cfg)
            if name.startswith("layers/") and self._moves(shape):
                host += moments
            else:
                device += moments
        return params, device, host

    def _moves(self, shape: tuple[int, ...]) -> bool:
        """Whether a layer's parameter of this shape has its moments on the host."""
        return self.cfg.optim.state_on_host and len(shape) > 1

    def _frozen(self, name: str) -> bool:
        return any(is_below(name, path) for path in self.cfg.optim.freeze)

    def _count_trained(self) -> dict[str, int]:
        """Trained parameters by the first part of their names."""
        found = {"layers": 0, "embed": 0, "lm_head": 0, "final_norm": 0}
        for name, (count, shape) in parameters(self.model).items():
            if not self._frozen(name):
                found[name.split("/")[0]] += count * prod(shape)
        return found

    def kept_bytes(self, names: frozenset[str]) -> int:
        """Bytes of one layer's residuals."""
        a, n = self.a, self.n
        widths = {
            "input": a * self.D,
            "qkv": a * (self.NH + 2 * self.KH),
            "attention": a * self.NH + 4 * self.N,
            "mlp_input": a * self.D,
            "gate_up": 2 * a * self.F,
        }
        return n * sum(widths[name] for name in names)

    def _saved(self, group: LayerGroup) -> int:
        names = group.save if group.every == 1 else group.save & {"input"}
        return group.layers // group.every * self.kept_bytes(names)

    def block(self, group: LayerGroup) -> int:
        """Bytes of the residuals of a block, whose layers are all run again."""
        return group.every * self.kept_bytes(group.kept) if group.every > 1 else 0

    @property
    def host_residuals(self) -> int:
        """Bytes of residuals in host memory."""
        # What is fetched ahead has an empty entry in front of the first layer's.
        front, groups = self.plan.prefetch, self.plan.groups
        return sum(
            (g.layers // g.every + front) * self.kept_bytes(g.offload) for g in groups
        )

    def phases(self) -> dict[str, dict[str, int]]:
        """Return the largest instance of each phase."""
        # Backward, the groups' residuals go one by one, the last group's first.
        found, saved, gradients = [], 0, self.gradients
        for group in self.plan.groups:
            saved += self._saved(group)
            held = saved + self.block(group)
            # The next layer's; and the loop's carry holds a layer's own to its end.
            ahead = group.offload if self.plan.prefetch else frozenset()
            held += self.kept_bytes(ahead)
            resident = {"residuals": held} | gradients
            found.append(("MLP", resident | self._mlp_backward(group)))
            held += self.kept_bytes(ahead & {"mlp_input", "gate_up"})
            resident = {"residuals": held} | gradients
            for name, parts in self._attention_backward(group).items():
                found.append((name, resident | parts))
        found.append(("head", {"residuals": saved} | self._head()))
        found.append(("head's update", {"residuals": saved} | self._head_update()))
        found.append(("update", self._update()))
        found.sort(key=lambda phase: sum(phase[1].values()))
        return dict(found)

    def _head(self) -> dict[str, int]:
        # f32 logits, and their gradient in x's dtype, or f32 where XLA widens it; the
        # kernels have both in one array. A head of another dtype than its products has
        # a copy in theirs.
        logits = self.a if self.head_kernels else 4 + self.wide
        trained = self.trained["embed" if self.model.tie_embeddings else "lm_head"]
        tokens = self.n * (self.a * self.D + 4 * self.H)
        held = (
            4 * (self.trained["embed"] + self.trained["lm_head"]) + self.layer_gradients
        )
        held = held if self._accumulates else 0  # of earlier micro-batches
        copies = self.wide * self.V * self.D if self.wide != self.w else 0
        if self.head_kernels and self.model.tie_embeddings and self.C_loss < self.n:
            copies += self.a * self.V * self.D  # [D, V], as the kernels take it
        chunk = self.n * 2 * self.a * self.D + self.C_loss * self.V * logits
        # After the chunks their sum is rounded to the head's dtype: both exist, and the
        # gradient of y.
        rounded = self.w * trained + self.n * self.a * self.D if self.w < 4 else 0
        if columns := self.vocab_chunk:
            # Its gradient comes after the chunks: beside x and dx the columns' logits,
            # and their slice of the head or of the gradient.
            by_columns = self.n * self.a * self.D + self.w * trained
            by_columns += columns * (self.n * logits + max(self.w, self.wide) * self.D)
            size = max(copies + chunk, by_columns)
        else:
            size = 4 * trained + max(copies + chunk, rounded)
        return {"head and loss": tokens + size, "gradients": held}

    def _head_update(self) -> dict[str, int]:
        """Of an untied head in the backward pass, before all layers."""
        optim, trained = self.cfg.optim, self.trained["lm_head"]
        if not optim.in_backward or not trained:
            return {}
        # Blocks of 8-bit moments are measured in f32, which is written for that, but
        # never of both moments whole.
        wide = 7 * MOMENTS[optim.name] if optim.moment_dtype == "int8" else 0
        size = self.w * trained + wide * trained // 2
        return {"gradients": size + self.n * self.a * self.D}

    @property
    def _accumulates(self) -> bool:
        return self.cfg.train.accumulate > 1

    def _layer_gradients(self) -> int:
        if self.cfg.optim.in_backward:
            return 0
        return self.trained["layers"] * (4 if self._accumulates else self.w)

    def _gradients(self) -> dict[str, int]:
        """Whole gradients that exist while the layers are differentiated."""
        if self._accumulates:
            rest = 4 * (self.trained["embed"] + self.trained["lm_head"])
        elif self.model.tie_embeddings:
            rest = 4 * self.trained["embed"]  # waits for the tokens' part
        else:  # updated at once, unless the global norm is waited for
            wide = self.w if self.cfg.optim.in_backward else 4
            rest = wide * self.trained["lm_head"] if self.clips_globally else 0
            if self.cfg.optim.moment_dtype == "int8":
                rest += MOMENTS[self.cfg.optim.name] * self.trained["lm_head"]
        return {"gradients": rest + self.layer_gradients}

    def _layer(self) -> int:
        """Weights of a layer, f32 gradients of wo, and narrow moments."""
        optim = self.cfg.optim
        moments = 0
        narrow = optim.moment_dtype != "float32"
        if optim.in_backward and narrow and not optim.state_on_host:
            moments = sum(
                _moments(shape, self.cfg)
                for name, (_, shape) in parameters(self.model).items()
                if name.startswith("layers/") and not self._frozen(name)
            )
        return self.wide * self.W + 8 * self.NH * self.D + moments

    def _moving(self, halves: int) -> int:
        """Halves of a layer's moments that are on their way: see `layer_state`."""
        return halves * self.state[2] // (2 * self.L)

    @property
    def _sequences(self) -> int:
        """x, out, lse, dh and RoPE's tables, which both layer phases hold."""
        token = self.a * (2 * self.D + self.NH) + 4 * (self.N + self.H)
        return self.n * token

    def _mlp_backward(self, group: LayerGroup) -> dict[str, int]:
        a, kept, groups = self.a, group.kept, self.plan.head_groups
        single = self.C == self.n
        whole = single and self.kernels
        # dk and dv, or k and v, made early, in front of a loop; not if they come back.
        early = groups > 1 or not whole
        token = 2 * a * self.KH if early and "qkv" not in group.offload else 0
        if "attention" not in kept:  # x or, from recomputing it, q is there twice
            token += a * (self.D if whole else self.NH * (groups == 1))
        # In a stack on the device a whole sequence is read where it lies.
        if "mlp_input" in (group.offload if whole else kept):
            token += a * self.D
        if "gate_up" in (group.offload if single else kept):
            token += 2 * a * self.F
        if "qkv" in group.offload:
            token += a * (self.NH + 2 * self.KH)
        if self.ragged:
            token += a * self.D  # the last, shorter chunk rewrites a copy of dh
        # gate, up, the gradient of hidden, and what one kernel makes of them: hidden,
        # dgate, dup. Hopper's kernels never write gate and up.
        wide = 4 if "gate_up" in kept or self.kernels else 6
        narrow = 2
        if whole:
            # dup is in the gradient of hidden's place. Beside dy and its successor: the
            # normed MLP input if gate and up are read, and h if that is not kept.
            wide, narrow = 3, ("gate_up" in kept) + ("mlp_input" not in kept)
        chunk = self.C * (wide * self.wide * self.F + narrow * a * self.D)
        # A single chunk has no sums to add to.
        sums = 0 if single else 12 * self.D * self.F
        size = self._sequences + self.n * token + chunk + sums + self.layer
        size += self._moving(3) if self.cfg.optim.in_backward else 0
        return {"layer working set": size}

    def _attention_backward(self, group: LayerGroup) -> dict[str, dict[str, int]]:
        a, groups, packing = self.a, self.plan.head_groups, self.cfg.data.packing
        given = a * (2 * self.NH + 2 * self.KH)  # q, k, v, the gradient of out
        gradients = a * (self.NH + 2 * self.KH)
        sums = 4 * self.NH + 2 * a * self.KH  # dq in f32
        # Of a token and all heads: arrays, and cuDNN's workspace.
        if packing and self.attention != "xla":  # a branch, or one with heads first
            levels = given + 2 * gradients, RATIO * 8 * self.NH
            kernel = given + a * self.NH + sums, 0
            forms = {
                "attention": levels if self.attention == "cudnn" else kernel,
                "attention in blocks": (2 * given + sums, 0),
            }
        elif self.attention == "cudnn":
            forms = {"attention": (given + gradients, 8 * self.NH)}
        else:
            out = a * self.NH if groups == 1 else 0  # not needed beside its gradient
            forms = {"attention": (given + sums - out, 0)}
        layer = 12 * self.D * self.F + self.layer + self._sequences
        layer += self._moving(4) if self.cfg.optim.in_backward else 0
        found = {}
        for name, (token, workspace) in forms.items():
            if groups > 1:
                token = (token + a * self.NH) // groups + 2 * a * self.KH
            if self.wide > a:  # dh, for its product with wo
                token = max(token, self.wide * (self.D + self.NH // groups))
            found[name] = {
                "layer working set": layer + self.n * token,
                WORKSPACE: self.n * workspace // groups,
            }
        return found

    def _update(self) -> dict[str, int]:
        """After all layers: the embedding's update, or theirs."""
        whole = 0 if self.cfg.optim.in_backward else self.layer_gradients
        copies = 3 if self.cfg.optim.moment_dtype == "int8" else 1
        embed = 4 * self.trained["embed"] * copies + self.n * self.a * self.D
        moving = 0 if self.cfg.optim.in_backward else self._moving(4)
        return {"gradients": whole + max(embed, moving)}


def has_layer_kernels(
    cfg: Config, model: ModelConfig, gpu: Gpu, rows: int = ROW_MULTIPLE
) -> bool:
    """Return whether Hopper's kernels run the layers' chunks of so many rows.

    Raises:
        NotImplementedError: they were asked for by name, and cannot.
    """
    name, why = mlp_implementation(cfg, model, rows, gpu.capability)
    asked = cfg.train.asked_implementation
    if asked == "mosaic_gpu" != name:
        raise NotImplementedError(
            f"TrainConfig.implementation='mosaic_gpu': {why}; set it to 'auto' or 'xla'"
        )
    return (asked or name) == "mosaic_gpu"


def default_loss_chunk(cfg: Config, model: ModelConfig, gpu: Gpu) -> int:
    """Return the tokens of the head's chunk that `loss_chunk_size=None` stands for."""
    how, _ = head_implementation(cfg, model, gpu.capability)
    return linear_cross_entropy.loss_chunk_size(
        cfg.data.batch_size, model.vocab_size, how
    )


@cache
def parameters(model: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return {path: (how many, shape)} of all parameters."""
    D, F, V, L = (
        model.hidden_size, model.intermediate_size, model.vocab_size, model.num_layers
    )  # fmt: skip
    NH, KH = (k * model.head_size for k in (model.num_heads, model.num_kv_heads))
    layer = {
        "attention_norm/scale": (D,), "mlp_norm/scale": (D,),
        "attention/wq": (D, NH), "attention/wk": (D, KH), "attention/wv": (D, KH),
        "attention/wo": (NH, D),
        "mlp/w_gate": (D, F), "mlp/w_up": (D, F), "mlp/w_down": (F, D),
    }  # fmt: skip
    rest = {"embed/embedding": (V, D), "final_norm/scale": (D,)}
    if not model.tie_embeddings:
        rest["lm_head/kernel"] = (D, V)
    return {f"layers/{name}": (L, shape) for name, shape in layer.items()} | {
        name: (1, shape) for name, shape in rest.items()
    }


def _is_factored(shape: tuple[int, ...]) -> bool:
    """Whether Adafactor holds rows' and columns' moments of such a parameter."""
    return len(shape) > 1 and sorted(shape)[-2] >= 128


def _moments(shape: tuple[int, ...], cfg: Config) -> int:
    """Bytes of optimizer state of one parameter."""
    size, optim = prod(shape), cfg.optim
    if optim.name == "adafactor":
        return 4 * (sum(shape) + 1 if _is_factored(shape) else size + 2)
    count = MOMENTS[optim.name]
    if optim.moment_dtype == "float32" or len(shape) < 2 or size < 4096:
        return 4 * size * count
    if optim.moment_dtype == "bfloat16":
        return 2 * size * count
    return count * (size + 4 * prod(shape[:-1]) * -(-shape[-1] // 256))
