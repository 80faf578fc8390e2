"""Llama weights to and from a Hugging Face directory, without torch.

One table holds every name, read in both directions. HF stores a projection as
[out, in], one tensor a layer; here it is [in, out], stacked on axis 0:

    layers/mlp/w_up [L, D, F]  =  stack(model.layers.{layer}.mlp.up_proj.weight.T)

HF's half-split RoPE is ours, so no row is permuted. Devices transpose. Loading holds a
few pieces of 32 MiB on the host, exporting one file.
"""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax  # registers bfloat16 with numpy
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from jax.sharding import SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mst_jax.config import ModelConfig
from mst_jax.hf_config import hf_config, read_object


class _Name(NamedTuple):
    path: str  # of the leaf in params
    hf: str  # "{layer}" marks a parameter stacked on axis 0
    shape: str  # in the letters of the legend; NH = N * H, KH = K * H
    transposed: bool


_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
_NORM = "model.layers.{layer}."
_TABLE = tuple(_Name(*row) for row in (
    ("embed/embedding", "model.embed_tokens.weight", "V D", False),
    ("layers/attention_norm/scale", _NORM + "input_layernorm.weight", "L D", False),
    ("layers/attention/wq", _ATTENTION + "q_proj.weight", "L D NH", True),
    ("layers/attention/wk", _ATTENTION + "k_proj.weight", "L D KH", True),
    ("layers/attention/wv", _ATTENTION + "v_proj.weight", "L D KH", True),
    ("layers/attention/wo", _ATTENTION + "o_proj.weight", "L NH D", True),
    ("layers/mlp_norm/scale", _NORM + "post_attention_layernorm.weight", "L D", False),
    ("layers/mlp/w_gate", _MLP + "gate_proj.weight", "L D F", True),
    ("layers/mlp/w_up", _MLP + "up_proj.weight", "L D F", True),
    ("layers/mlp/w_down", _MLP + "down_proj.weight", "L F D", True),
    ("final_norm/scale", "model.norm.weight", "D", False),
    ("lm_head/kernel", "lm_head.weight", "D V", True),
))  # fmt: skip
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PIECE = 2**25  # bytes of one read
_AHEAD = 8  # pieces that are read before they are needed
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
VOCABULARIES = "tokenizer.json", "tokenizer.model", "vocab.json"
"""One of which every tokenizer has."""


def _names(cfg: ModelConfig) -> Iterator[tuple[_Name, tuple[int, ...]]]:
    """Yield the table's rows that `cfg` has, with the shapes of our leaves."""
    H = cfg.head_size
    sizes = dict(
        L=cfg.num_layers, D=cfg.hidden_size, F=cfg.intermediate_size, V=cfg.vocab_size,
        NH=cfg.num_heads * H, KH=cfg.num_kv_heads * H,
    )  # fmt: skip
    for name in _TABLE:
        if not (cfg.tie_embeddings and name.path == "lm_head/kernel"):
            yield name, tuple(sizes[letter] for letter in name.shape.split())


def _tensors(cfg: ModelConfig) -> Iterator[tuple[str, _Name, int | None, tuple]]:
    """Yield (HF name, row, layer or None, HF shape) of every tensor of `cfg`."""
    for name, shape in _names(cfg):
        stacked = "{layer}" in name.hf
        hf_shape = shape[stacked:][:: -1 if name.transposed else 1]
        for layer in range(shape[0]) if stacked else (None,):
            yield name.hf.format(layer=layer), name, layer, hf_shape


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    leaves: Any = flatten_dict(tree, sep="/")
    return leaves


def param_shapes(cfg: ModelConfig) -> dict[str, Any]:
    """Return the shapes of the model's parameters, as params is nested."""
    return unflatten_dict({n.path: shape for n, shape in _names(cfg)}, sep="/")


def resolve(name_or_dir: str) -> Path:
    """Return the local directory of a checkpoint, downloading a hub id.

    Raises:
        FileNotFoundError: neither a directory nor a repository that can be read.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    # Subdirectories hold the same weights once more, in other formats.
    wanted = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(
            name_or_dir, allow_patterns=wanted, ignore_patterns=["*/*"],
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name_or_dir!r} is neither a local directory nor a Hugging Face "
            f"repository that can be read: {type(error).__name__}: {error}"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.exists():  # before the index, as transformers does
        return [single]
    if not index.exists():
        if files := sorted(directory.glob("*.safetensors")):
            return files
        there = sorted(p.name for p in directory.iterdir())
        weights = [n for n in there if n.endswith((".bin", ".pt", ".pth", ".gguf"))]
        hint = ": save the model with safe_serialization=True" if weights else ""
        raise FileNotFoundError(
            f"{directory} has no .safetensors file, only {weights or there}{hint}"
        )
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map of files: download it again")
    files = [directory / name for name in sorted(set(map(str, weight_map.values())))]
    if missing := [f.name for f in files if not f.exists()]:
        raise FileNotFoundError(f"{index} names files that are not there: {missing}")
    return files


def check_weights(directory: str | Path, cfg: ModelConfig) -> dict[str, "_Tensor"]:
    """Return where each of a model's tensors is; reads the files' headers only.

    Raises:
        ValueError, FileNotFoundError: see `load_params`.
    """
    found = _tensors_of(_weight_files(Path(directory)))
    _check(found, cfg, Path(directory))
    return found


class _Tensor(NamedTuple):
    file: Path
    offset: int  # of its first byte
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(_DTYPES[self.dtype]).itemsize


def _tensors_of(files: list[Path]) -> dict[str, _Tensor]:
    """Return where every tensor is, by HF name."""
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="np"):  # checks the header and the size
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({path.stat().st_size} bytes, "
                f"{error}): download it again"
            ) from error
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in sorted(header.items()):
            if name != "__metadata__":
                first = 8 + size + entry["data_offsets"][0]
                found[name] = _Tensor(
                    path, first, entry["dtype"], tuple(entry["shape"])
                )
    return found


def _check(found: dict[str, _Tensor], cfg: ModelConfig, directory: Path) -> None:
    expected = {hf: shape for hf, _, _, shape in _tensors(cfg)}
    problems = [f"missing: {hf}" for hf in expected if hf not in found]
    for hf, tensor in found.items():
        if hf not in expected:
            tied = cfg.tie_embeddings and hf == "lm_head.weight"
            if not (tied or hf.endswith("rotary_emb.inv_freq")):
                problems.append(f"unexpected: {hf}")
        elif tensor.shape != expected[hf]:
            problems.append(f"misshaped: {hf} is {tensor.shape}, not {expected[hf]}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"quantized: {hf} is {tensor.dtype}, not a float")
    if problems:
        raise ValueError(
            f"{directory} does not hold the model of the config, "
            f"{len(problems)} problems:\n  " + "\n  ".join(problems)
        )


class _Piece(NamedTuple):
    """Rows of one HF tensor, for those of this host's devices that hold them."""

    name: _Name
    tensor: _Tensor
    rows: tuple[int, int]
    columns: dict[Any, slice]  # of a vector none
    start: tuple[int, ...]  # in each device's shard of our leaf


def _pieces(
    name: _Name, shape: tuple, found: dict[str, _Tensor], indices: Any
) -> Iterator[_Piece]:
    """Cut what devices hold of one of our leaves, by `indices`, into pieces."""
    stacked = "{layer}" in name.hf
    groups: dict[tuple, dict[Any, slice]] = {}  # the same rows are read once
    for device, index in indices.items():
        ends = [slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]
        layers = range(ends[0].start, ends[0].stop) if stacked else (None,)
        rows, *columns = ends[stacked:][:: -1 if name.transposed else 1]
        group = groups.setdefault((tuple(layers), rows.start, rows.stop), {})
        group[device] = columns[0] if columns else slice(None)
    for (layers, low, high), columns in groups.items():
        for i, layer in enumerate(layers):
            tensor = found[name.hf.format(layer=layer)]
            count = math.ceil((high - low) * tensor.row_bytes / _PIECE)
            step = math.ceil((high - low) / count)
            for first in range(low, high, step):
                at = [first - low, *[0] * (len(tensor.shape) - 1)]
                at = [i] * stacked + at[:: -1 if name.transposed else 1]
                rows = first, min(first + step, high)
                yield _Piece(name, tensor, rows, columns, tuple(at))


def _read(tensor: _Tensor, rows: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    stored = np.dtype(_DTYPES[tensor.dtype])
    bits = np.dtype(f"u{stored.itemsize}")  # numpy reads no bfloat16
    count = (rows[1] - rows[0]) * tensor.row_bytes // stored.itemsize
    offset = tensor.offset + rows[0] * tensor.row_bytes
    read = np.fromfile(tensor.file, bits, count, offset=offset).view(stored)
    read = read.astype(dtype) if stored == np.float64 else read  # devices have none
    return read.reshape(-1, *tensor.shape[1:])


@partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _place(shard: jax.Array, piece: jax.Array, start: Any, *, transposed: bool):
    """Write a piece, in HF's layout, into a device's shard of our leaf."""
    piece = piece.astype(shard.dtype)
    piece = piece.T if transposed else piece
    piece = piece.reshape((1,) * (shard.ndim - piece.ndim) + piece.shape)
    return jax.lax.dynamic_update_slice(shard, piece, start)


def load_params(
    directory: str | Path,
    cfg: ModelConfig,
    *,
    dtype: Any,
    shardings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Read params from safetensors, each device's shards only.

    Files are read ahead of the devices, which cast and transpose.

    Args:
        directory: holds model.safetensors, or its index and files.
        cfg: shape of the model, see `model_config_from_hf`.
        dtype: of every parameter.
        shardings: a `jax.sharding.Sharding` for every parameter, nested as params;
            None places all on the first device.

    Returns:
        Params, nested as `param_shapes(cfg)`.

    Raises:
        ValueError: tensors missing, unexpected, misshaped or quantized, all in one
            message by HF name; a damaged file; shardings that are not params' tree.
        FileNotFoundError: no safetensors, or not all that the index names.
    """
    directory, dtype = Path(directory), np.dtype(dtype)
    if shardings is None:
        here = SingleDeviceSharding(jax.devices()[0])
        placed = {name.path: here for name, _ in _names(cfg)}
    else:
        placed = _flatten(shardings)
    if wrong := placed.keys() ^ {name.path for name, _ in _names(cfg)}:
        raise ValueError(f"shardings and params differ in {sorted(wrong)}")

    found = check_weights(directory, cfg)
    shards: dict[str, dict[Any, jax.Array]] = {}
    reads: deque[tuple[_Piece, Future]] = deque()
    sent: deque[jax.Array] = deque()

    def send(piece: _Piece, rows: np.ndarray) -> None:
        mine = shards[piece.name.path]
        for device, columns in piece.columns.items():
            part = rows if rows.ndim == 1 else rows[:, columns]
            sent.append(jax.device_put(part, device))
            mine[device] = _place(
                mine[device], sent[-1], piece.start, transposed=piece.name.transposed
            )
        while len(sent) > _AHEAD * len(piece.columns):  # or the host would fill
            sent.popleft().block_until_ready()

    with ThreadPoolExecutor(_AHEAD) as pool:
        for name, shape in _names(cfg):
            sharding = placed[name.path]
            indices = sharding.addressable_devices_indices_map(shape)
            local = sharding.shard_shape(shape)
            shards[name.path] = {d: jnp.zeros(local, dtype, device=d) for d in indices}
            for piece in _pieces(name, shape, found, indices):
                read = pool.submit(_read, piece.tensor, piece.rows, dtype)
                reads.append((piece, read))
                if len(reads) > _AHEAD:
                    first, read = reads.popleft()
                    send(first, read.result())
        for first, read in reads:
            send(first, read.result())
    leaves = {
        name.path: jax.make_array_from_single_device_arrays(
            shape, placed[name.path], list(shards[name.path].values())
        )
        for name, shape in _names(cfg)
    }
    return unflatten_dict(leaves, sep="/")


def _tensor(param: Any, layer: int | None, transposed: bool, dtype: Any) -> np.ndarray:
    """Return one HF tensor, contiguous, of one of our leaves."""
    if layer is not None and isinstance(param, jax.Array):
        # One compilation for all layers, one layer's copy on the device.
        param = jax.lax.dynamic_index_in_dim(param, layer, keepdims=False)
    elif layer is not None:
        param = param[layer]
    if transposed and isinstance(param, jax.Array):
        param = param.astype(dtype).T  # on the device
    elif transposed:
        param = param.T
    return np.ascontiguousarray(param, dtype)


def export_hf(
    params: dict[str, Any],
    cfg: ModelConfig,
    out_dir: str | Path,
    *,
    source_dir: str | Path | None = None,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int | float = 5e9,
    dtype: Any = None,
) -> None:
    """Write a directory that transformers loads; it appears whole or not at all.

    Args:
        params: jax or numpy arrays, nested as `param_shapes(cfg)`.
        cfg: shape of the model.
        out_dir: does not exist yet, or is empty.
        source_dir: other fields of its config.json, and its generation_config.json,
            are kept.
        tokenizer_dir: its tokenizer's files are copied.
        max_shard_bytes: most bytes of one file, unless a tensor alone has more.
        dtype: of the written weights; None keeps each parameter's.

    Raises:
        ValueError: params that are not the model's, all leaves in one message; a
            sliding window.
        FileExistsError: out_dir is not empty.
        FileNotFoundError: source_dir or tokenizer_dir is not a directory.
        NotImplementedError: params spread over several hosts.
    """
    out, leaves = Path(out_dir).resolve(), _flatten(params)
    expected = {name.path: shape for name, shape in _names(cfg)}
    got = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if wrong := dict(sorted(got.items() ^ expected.items())):
        lines = (f"{p}: {got.get(p)}, not {expected.get(p)}" for p in wrong)
        raise ValueError("params are not the model of cfg:\n  " + "\n  ".join(lines))
    if not all(getattr(x, "is_fully_addressable", True) for x in leaves.values()):
        raise NotImplementedError("params are spread over hosts: gather them first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: choose another or remove it")
    for name, given in (("source_dir", source_dir), ("tokenizer_dir", tokenizer_dir)):
        if given is not None and not Path(given).is_dir():
            raise FileNotFoundError(f"{name}={str(given)!r} is not a directory")
    copied = [Path(source_dir) / "generation_config.json"] if source_dir else []
    if tokenizer_dir:
        copied += [Path(tokenizer_dir) / name for name in TOKENIZER_FILES]
    base = None
    if source_dir and (Path(source_dir) / "config.json").exists():
        base = read_object(Path(source_dir) / "config.json")
    written = np.dtype(dtype or leaves["embed/embedding"].dtype).name
    config = hf_config(cfg, base=base, dtype=written)

    partial = out.with_name(f".{out.name}.partial{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(leaves, cfg, partial, max_shard_bytes, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in filter(Path.exists, copied):
            shutil.copyfile(path, partial / path.name)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(
    leaves: dict[str, Any],
    cfg: ModelConfig,
    out: Path,
    max_bytes: int | float,
    dtype: Any,
) -> None:
    files: list[list[tuple]] = []
    total = room = 0
    for hf, name, layer, shape in _tensors(cfg):
        to = np.dtype(dtype or leaves[name.path].dtype)
        size = math.prod(shape) * to.itemsize
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].append((hf, name, layer, to))
        room, total = room - size, total + size
    weight_map = {}
    for i, tensors in enumerate(files, start=1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        file = file if len(files) > 1 else "model.safetensors"
        arrays = {
            hf: _tensor(leaves[name.path], layer, name.transposed, to)
            for hf, name, layer, to in tensors
        }
        save_file(arrays, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        del arrays
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = out / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
