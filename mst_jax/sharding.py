"""Which axis of which parameter lies on which axis of the device mesh.

The batch is split over `data` and `fsdp`; every parameter is also split over `fsdp`,
along its model width. A step runs inside `jax.shard_map`, so that each device's chunk
loops see its own tokens only; a layer's weights are gathered just before use, and the
gather's transpose scatters their gradients back (ZeRO-3).
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mst_jax.config import MeshConfig, ModelConfig

BATCH_AXES = ("data", "fsdp")

# The axes of each parameter by name; D is the one that `fsdp` splits.
AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("V", "D"),
    "kernel": ("D", "V"),
    "scale": ("D",),
    "wq": ("D", "NH"),
    "wk": ("D", "KH"),
    "wv": ("D", "KH"),
    "wo": ("NH", "D"),
    "w_gate": ("D", "F"),
    "w_up": ("D", "F"),
    "w_down": ("F", "D"),
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the device mesh, axes `data` and `fsdp`.

    Args:
        cfg: its sizes.
        devices: None is `jax.devices()`.

    Raises:
        ValueError: fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else devices
    need = cfg.data * cfg.fsdp
    if need > len(devices):
        raise ValueError(
            f"mesh.data={cfg.data} * mesh.fsdp={cfg.fsdp} needs {need} devices, there "
            f"are {len(devices)}"
        )
    return jax.make_mesh(
        (cfg.data, cfg.fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:need],
    )


def check_divisible(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raise ValueError if `fsdp` does not divide the model's width."""
    if model.hidden_size % mesh.fsdp:
        raise ValueError(
            f"mesh.fsdp={mesh.fsdp} must divide hidden_size={model.hidden_size}"
        )


def param_specs(params: Any) -> Any:
    """Return the PartitionSpec of every parameter; stacked ones lead with None."""

    def spec(path, leaf):
        axes = ["fsdp" if a == "D" else None for a in AXES[path[-1].key]]
        return P(*[None] * (leaf.ndim - len(axes)), *axes)

    return jax.tree_util.tree_map_with_path(spec, params)


def named(mesh: Mesh, specs: Any) -> Any:
    """Return NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )


def gather(params: Any, specs: Any) -> Any:
    """Inside shard_map, return whole parameters from this device's shards."""

    def one(leaf, axis):
        return jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)

    return _along_fsdp(one, params, specs)


def scatter(gradients: Any, specs: Any) -> Any:
    """Inside shard_map, add up over fsdp and return this device's shards."""

    def one(leaf, axis):
        return jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=axis, tiled=True)

    return _along_fsdp(one, gradients, specs)


def _along_fsdp(one: Any, tree: Any, specs: Any) -> Any:
    def along(leaf, spec):
        skip = len(spec) - leaf.ndim  # a layer's slice has lost its leading axis
        return one(leaf, tuple(spec).index("fsdp") - skip)

    leaves, treedef = jax.tree.flatten(tree)
    specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    return jax.tree.unflatten(
        treedef, [along(*pair) for pair in zip(leaves, specs, strict=True)]
    )
