"""Compiled programs, kept between runs: JAX's persistent compilation cache, in use.

The step of an 8B model takes most of a minute to compile; the same command again, after
an interruption say, reads it in a second. Programs for a CPU lie in a directory of that
CPU's own, since they use its instructions and a home directory may be shared.
"""

import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

_OPTIONS = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class CompileCache:
    """What the cache is, and what it did so far."""

    def __init__(self, directory: Path | str | None, why: str):
        self.directory = directory
        """None if programs are not kept; text is JAX's own, and may be a URL."""
        self.why = why
        self.hits = self.misses = 0

    def __str__(self) -> str:
        if self.directory is None:
            return f"compiled programs are not kept: {self.why}"
        there = ""
        if isinstance(self.directory, Path):
            there = f"{len([*self.directory.glob('*-cache')])} there; "
        return f"compiled programs are kept in {self.directory} ({there}{self.why})"

    def count(self, event: str, **_: object) -> None:
        """Listen to JAX's monitoring."""
        self.hits += event == _HIT
        self.misses += event == _MISS


@contextmanager
def compile_cache(choice: str) -> Iterator[CompileCache]:
    """Keep what is compiled inside, and use what was kept.

    Call it after `memory.fit`: it asks which device there is.

    Args:
        choice: `Config.compile_cache`.

    Raises:
        ValueError: a directory was named that cannot be made or written.
    """
    before = [getattr(jax.config, name) for name in _OPTIONS]
    cache = _choose(choice, *before)
    jax.monitoring.register_event_listener(cache.count)
    try:
        _switch(cache.directory, cache.directory is not None)
        yield cache
    finally:
        jax.monitoring.unregister_event_listener(cache.count)
        _switch(*before)


def _switch(directory: Path | str | None, enabled: bool) -> None:
    values = (None if directory is None else str(directory), enabled)
    for name, value in zip(_OPTIONS, values, strict=True):
        jax.config.update(name, value)
    reset_cache()  # JAX looks at its options once, at the first compilation


def _choose(choice: str, before: str | None, enabled: bool) -> CompileCache:
    if choice == "off":
        return CompileCache(None, "compile_cache='off'")
    if choice != "auto":
        directory = Path(choice).expanduser().absolute()
        if problem := _obstacle(directory):
            raise ValueError(f"Config.compile_cache={choice!r}: {problem}")
        return CompileCache(directory, "compile_cache")
    if not enabled:
        return CompileCache(None, "JAX_ENABLE_COMPILATION_CACHE is off")
    if before:
        return CompileCache(before, "JAX_COMPILATION_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(home) / "mst_jax" / "compiled" / _device_name()
    if problem := _obstacle(directory):
        return CompileCache(None, problem)
    return CompileCache(directory, "--compile-cache off keeps none")


def _device_name() -> str:
    name = jax.default_backend()
    if name != "cpu":
        return name
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    kind = " ".join([platform.machine(), platform.processor(), *flags])
    return f"cpu-{zlib.crc32(kind.encode()):08x}"


def _obstacle(directory: Path) -> str | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None if os.access(directory, os.W_OK) else f"{directory} is not writable"
