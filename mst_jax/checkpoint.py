"""Checkpoints of a training run: asynchronous, atomic, and checked before use.

A checkpoint is a directory named by its step:

    <directory>/<step>/arrays/        the state, written by Orbax
    <directory>/<step>/manifest.json  each leaf's dtype and shape, each file's size
                                      and CRC-32, and the caller's `extra`

It is written as `<step>.tmp` and renamed when its last byte is on disk, so a directory
with a bare number for a name was once whole. Whether it still is, the manifest tells:
Orbax and TensorStore checksum their indices but not the array data, and restore a
flipped byte as other numbers without a word (orbax-checkpoint 0.12.8).

One process writes a directory; any number may read it. The disk must hold `keep` + 1
checkpoints, the host's memory one copy of the state.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import orbax.checkpoint.v1 as ocp  # pyright: ignore[reportMissingImports]
except ImportError:  # orbax-checkpoint 0.12 still calls it experimental
    import orbax.checkpoint.experimental.v1 as ocp

log = logging.getLogger("mst_jax")

_FORMAT = "mst_jax checkpoint 1"
_NAME = re.compile(r"(0|[1-9]\d*)(\.tmp|\.damaged)?")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


class Checkpoints:
    """Save and restore a training state; use as a context manager.

    Args:
      directory: where the checkpoints live; made by the first save.
      keep: how many of the newest checkpoints stay on disk, at least 1.

    Raises:
      ValueError: `keep` < 1, or `directory` holds other files and no checkpoint.
      NotImplementedError: more than one JAX process.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int):
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        if jax.process_count() > 1:
            raise NotImplementedError(f"{jax.process_count()=}: one process only")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._damaged: set[int] = set()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        names = self._names()
        if names and not any(_NAME.fullmatch(name) for name in names):
            raise ValueError(
                f"{self._directory} holds {names[:5]} and no checkpoint: "
                "give the checkpoints a directory of their own"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except SaveError as failed_save:
            if error is None:
                raise
            error.add_note(str(failed_save))

    def steps(self) -> list[int]:
        """List the steps on disk, oldest first, less those found damaged so far."""
        matches = [_NAME.fullmatch(name) for name in self._names()]
        return sorted({int(m[1]) for m in matches if m and not m[2]} - self._damaged)

    def latest(self) -> int | None:
        """Return the newest of `steps()`, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Start to save; return once the arrays in `state` may be donated or deleted.

        Waits for the save before it. Checkpoints that `restore` found damaged are
        renamed to `<step>.damaged` here, which frees their steps.

        Args:
          step: above every step on disk.
          state: a pytree of `jax.Array`s of any dtype, PRNG keys included.
          extra: what JSON can hold; tuples come back as lists, keys as strings.

        Raises:
          SaveError: this save could not start, or the one before it failed, and then
            this one is not tried. Names step and path; earlier checkpoints are intact.
          TypeError: `extra` is not JSON.
          ValueError: `step` is not above the newest; leaves that are not arrays.
        """
        self.wait()
        leaves = _named(state)
        other = {n: type(x) for n, x in leaves.items() if not isinstance(x, jax.Array)}
        if other:
            raise ValueError(f"not a jax.Array, wrap in jnp.asarray: {other}")
        if step <= (newest := max(self.steps(), default=-1)):
            raise ValueError(
                f"{step=} must be above {newest}, the newest in {self._directory}: "
                "move the newer away, or use another directory"
            )
        manifest = {"format": _FORMAT, "step": step, "leaves": _described(leaves)}
        manifest["extra"] = json.loads(json.dumps(extra))
        path = self._directory / str(step)
        try:
            self._clear_up()
            path.with_suffix(".tmp").mkdir(parents=True)
            with _pageable():
                writing = ocp.save_async(
                    f"{path}.tmp/arrays", jax.tree.map(_own, leaves)
                )
        except Exception as error:
            raise _not_saved(path, error) from error
        self._pending = self._thread.submit(self._finish, path, manifest, writing)

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
          SaveError: it failed; names step and path. Raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and take no more saves.

        Raises:
          SaveError: as `wait`.
        """
        self._thread.shutdown()
        self.wait()

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Read back (step, state, extra), the state bit for bit.

        Reads every file for its checksum, and then the leaves of `abstract_state`.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct`; a leaf without a sharding
            goes to the first device. The layout it was saved from does not matter.
          step: None for the newest that is whole; damaged ones are logged as warnings.
          partial: whether leaves that were saved may be absent from `abstract_state`;
            they are not restored and take no memory.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          ValueError: the checkpoint of `step`, or every one, is damaged or foreign; or
            its leaves are not those of `abstract_state`, or with `partial` do not
            include them: lists all differences.
        """
        found = self._find(step, _verified)
        if found is None:
            return None
        step, manifest = found
        path = self._directory / str(step)
        wanted = _named(abstract_state)
        saved = manifest["leaves"]
        compared = {n: saved[n] for n in wanted if n in saved} if partial else saved
        _check_same(path, compared, _described(wanted))
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for name, leaf in wanted.items():
            wanted[name] = leaf.update(sharding=leaf.sharding or first)
        # Orbax wants every name that it saved, and does not read a placeholder's.
        arrays = ocp.load(
            f"{path}/arrays", dict.fromkeys(saved, ocp.PLACEHOLDER) | wanted
        )
        leaves = [arrays[name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return step, state, manifest["extra"]

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """Read what was saved beside the state, without reading the arrays.

        Args:
          step: None for the newest whose manifest is whole.

        Raises:
          ValueError: there is no checkpoint, or as `restore`.
        """
        found = self._find(step, _manifest)
        if found is None:
            raise ValueError(f"no checkpoint in {self._directory}")
        return found[1]["extra"]

    def _names(self) -> list[str]:
        return sorted(os.listdir(self._directory)) if self._directory.exists() else []

    def _find(
        self, step: int | None, read: Callable[[Path], dict[str, Any]]
    ) -> tuple[int, dict[str, Any]] | None:
        """Return `step`, or the newest that `read` accepts, and its manifest."""
        reasons = []
        for candidate in self.steps()[::-1] if step is None else [step]:
            path = self._directory / str(candidate)
            try:
                return candidate, read(path)
            except (OSError, ValueError) as error:
                reasons.append(f"{path} is not a whole checkpoint: {error}")
            if step is None:
                log.warning("%s; trying the one before it", reasons[-1])
                self._damaged.add(candidate)
        if reasons:
            raise ValueError("\n".join(reasons))
        return None

    def _clear_up(self) -> None:
        """Remove what a killed process left, put damaged checkpoints out of the way."""
        for name in self._names():
            if _NAME.fullmatch(name) and name.endswith(".tmp"):
                shutil.rmtree(self._directory / name)
        for path in [self._directory / str(step) for step in self._damaged]:
            if path.exists():
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                path.rename(path.with_suffix(".damaged"))
        self._damaged.clear()

    def _finish(self, path: Path, manifest: dict[str, Any], writing: Any) -> None:
        """Wait for Orbax, write the manifest, commit by renaming, drop the oldest."""
        partial = path.with_suffix(".tmp")
        try:
            writing.result()
            files = [file for file in partial.rglob("*") if file.is_file()]
            names = [file.relative_to(partial).as_posix() for file in files]
            sums = _checksums(files, sync=True)
            manifest["files"] = dict(zip(names, sums, strict=True))
            signed = {"crc32": _crc(manifest), "manifest": manifest}
            (partial / "manifest.json").write_text(json.dumps(signed))
            _checksums([partial / "manifest.json"], sync=True)
            partial.rename(path)
            _sync(self._directory)  # before the old ones go
        except Exception as error:
            raise _not_saved(path, error) from error
        try:
            self._remove_oldest()
        except OSError as error:  # the next save tries again
            log.warning("%s is saved, an older one is still there: %s", path, error)

    def _remove_oldest(self) -> None:
        whole = [self._directory / str(step) for step in self.steps()]
        whole = [old for old in whole if (old / "manifest.json").exists()]
        for old in whole[: -self._keep]:
            # First out of sight: half removed, it must not look damaged.
            old.rename(old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))


def _pageable() -> ocp.Context:
    """Orbax's copy in pageable memory: XLA's pool of pinned memory is the run's own."""
    context = ocp.Context()
    context.array.saving.enable_pinned_host_transfer = False
    return context


def _own(leaf: jax.Array) -> Any:
    """Copy an array in host memory: the next step changes what is being written."""
    on_host = leaf.sharding.memory_kind == "pinned_host"
    return np.array(leaf) if on_host else leaf


def _sync(directory: Path) -> None:
    """Force the names in a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_saved(path: Path, error: Exception) -> SaveError:
    """Free the disk of what was written; return the error to raise."""
    shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
    return SaveError(f"checkpoint of step {path.name} not saved to {path}: {error}")


def _named(tree: Any) -> dict[str, Any]:
    """Flatten to {"layers/0/w": leaf}, in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"some leaves have the same name: {sorted(named)}")
    return named


def _described(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _check_same(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise a ValueError that lists every leaf in which the two differ."""
    lines = [
        f"  {name}: saved {saved.get(name, '-')}, wanted {wanted.get(name, '-')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        raise ValueError("\n".join([f"{path} holds another state:", *lines]))


def _crc(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _checksums(files: list[Path], *, sync: bool) -> list[list[int]]:
    """Return [bytes, CRC-32] of each file; with `sync`, after forcing it to disk."""

    def one(path: Path) -> list[int]:
        size = crc = 0
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            while block := file.read(1 << 24):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, files))


def _manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, or raise OSError or ValueError."""
    signed = json.loads((path / "manifest.json").read_text())
    manifest = signed.get("manifest", {}) if isinstance(signed, dict) else {}
    if not manifest or _crc(manifest) != signed.get("crc32"):
        raise ValueError("manifest.json is not as it was written")
    if manifest["format"] != _FORMAT or manifest["step"] != int(path.name):
        raise ValueError(f"it is {manifest['format']!r} of step {manifest['step']}")
    return manifest


def _verified(path: Path) -> dict[str, Any]:
    """Read the manifest and every file it names, or raise as `_manifest`."""
    manifest = _manifest(path)
    written = manifest["files"]
    for name, (size, _) in written.items():  # cheap, before reading gigabytes
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, {size} were written")
    sums = _checksums([path / name for name in written], sync=False)
    changed = [n for n, found in zip(written, sums, strict=True) if found != written[n]]
    if changed:
        raise ValueError(f"the bytes of {changed} changed since they were written")
    return manifest
