"""Documents of files, Hugging Face datasets or Python's own source code.

A document is a text, or an array of token ids where the source holds those. They come
one after another, in the same order every time: of a Parquet file 256 rows are in
memory, of a JSONL file one line, and .npy files stay on disk.
"""

import itertools
import json
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mst_jax.config import DataConfig

logger = logging.getLogger("mst_jax")
_EXTENSIONS = (".txt", ".jsonl", ".parquet", ".npy")
_STDLIB_BYTES = 10_000_000


def read_documents(cfg: DataConfig, start: int = 0) -> Iterator[str | np.ndarray]:
    """Yield every document of `cfg.source`: a text, or token ids [n].

    Args:
        cfg: the source, and the field of its texts.
        start: first row of an 'hf:' source; the others are read from their start.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: a file of another type or content, or a row without its text.
        ImportError: an 'hf:' source without the `datasets` package.
    """
    if cfg.source.startswith("hf:"):
        return _read_hf(cfg, start)
    if cfg.source == "stdlib":
        return _read_stdlib()
    return _read_files(cfg)


def _read_stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    total = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        parts = path.relative_to(root).parts
        # _sysconfigdata differs from one installation to the next.
        if left_out.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            content = path.read_bytes()
            total += len(content)
            if total > _STDLIB_BYTES:
                return
            yield content.decode("utf-8", errors="replace")


def _read_hf(cfg: DataConfig, start: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"DataConfig.source={cfg.source!r} needs the datasets package: "
            'pip install "mst-jax[datasets]"'
        ) from error
    name, _, config = cfg.source.removeprefix("hf:").partition(":")
    try:
        rows: Any = datasets.load_dataset(
            name, config or None, split="train", streaming=cfg.streaming
        )
    except (OSError, ValueError) as error:  # no such data, no network, no such split
        raise ValueError(
            f"DataConfig.source={cfg.source!r} is no Hugging Face dataset that can be "
            f"read: {type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows.skip(start) if start else rows, start):
        yield _text(row, cfg.text_field, f"{cfg.source} row {number}")


def _read_files(cfg: DataConfig) -> Iterator[str | np.ndarray]:
    path = Path(cfg.source).expanduser()
    known = ", ".join(_EXTENSIONS)
    if path.is_dir():
        paths = _data_files(path)
        if not paths:
            raise ValueError(f"DataConfig.source={cfg.source!r} has no file of {known}")
    elif path.exists():
        paths = [path]
    else:
        raise FileNotFoundError(
            f"DataConfig.source={cfg.source!r} is no file or directory; it may also be "
            "'stdlib' or 'hf:NAME'"
        )
    for path in paths:
        extension = path.suffix.lower()
        if extension == ".txt":
            yield _decode(path.read_bytes(), str(path))
        elif extension == ".jsonl":
            yield from _read_jsonl(path, cfg.text_field)
        elif extension == ".parquet":
            yield from _read_parquet(path, cfg.text_field)
        elif extension == ".npy":
            yield from _read_npy(path)
        else:
            raise ValueError(
                f"DataConfig.source={cfg.source!r} has the extension {path.suffix!r}, "
                f"not one of {known}"
            )


def _data_files(directory: Path) -> list[Path]:
    """Return the files to read, in order; log the others, which no error names."""
    found, skipped = [], []
    for path in sorted(p for p in directory.rglob("*") if not p.is_dir()):
        (found if path.suffix.lower() in _EXTENSIONS else skipped).append(path)
    if found and skipped:
        names = ", ".join(str(p.relative_to(directory)) for p in skipped[:3])
        more = ", ..." if len(skipped) > 3 else ""
        # Files are read once a run, however many epochs it has.
        logger.warning(
            "DataConfig.source=%r: %d files are skipped (%s%s), only %s are read",
            str(directory), len(skipped), names, more, ", ".join(_EXTENSIONS),
        )  # fmt: skip
    return found


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors write a mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}; convert it") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(line, where)
            if not text or text.isspace():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            yield _text(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error
    with file:
        names = file.schema_arrow.names
        columns = [text_field] if text_field in names else names
        parts = file.iter_batches(batch_size=256, columns=columns)
        rows = itertools.chain.from_iterable(part.to_pylist() for part in parts)
        for number, row in enumerate(rows):
            yield _text(row, text_field, f"{path} row {number}")


def _text(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        has = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where} has no field {text_field!r}, only {has}; set "
            "DataConfig.text_field"
        )
    if not isinstance(row[text_field], str):
        raise ValueError(
            f"{where}: field {text_field!r} is {row[text_field]!r:.40}, not a string"
        )
    # Half a surrogate pair, as scraped JSON has, is no text to a tokenizer.
    return row[text_field].encode(errors="replace").decode()


def _read_npy(path: Path) -> Iterator[np.ndarray]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is no .npy array of integers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays (.npz): save each as .npy")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ValueError(
            f"{path} has dtype={array.dtype.name} and shape={array.shape}; it must "
            "hold integer token ids, 1-D for one document or 2-D for one a row"
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{path} has the negative token id {array.min()}")
    yield from array if array.ndim == 2 else [array]
