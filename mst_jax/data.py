"""Batches of tokens: documents tokenised, split, shuffled and packed into rows.

A document of n tokens is cut into windows of T + 1 tokens that overlap by one; a window
w gives the inputs w[:-1] and the labels w[1:], so that each of the document's n - 1
next-token targets appears exactly once an epoch. Windows are shuffled, packed into
rows of T tokens by Grain's best-fit packer, and told apart by segment ids. Grain also
keeps the position in the stream, which `get_state` and `set_state` save and restore.

Documents are read and tokenised once, O(tokens) bytes with the byte tokenizer and four
times that with another; .npy files stay on disk. With `DataConfig.streaming` only the
first 1000 documents are kept, and only they are split: the held-out documents are some
of these, and all that follows is for training.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from mst_jax.config import DataConfig
from mst_jax.documents import read_documents

IGNORE = -100
_STREAM_HEAD = 1000  # documents
_BUFFER_TOKENS = 2**22  # of a pack or shuffle buffer
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

Batch = dict[str, Int32[np.ndarray, "B T"]]
Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Batches of training and held-out documents.

    A batch is a dictionary of int32 arrays [B, T]: `tokens`; `labels`, the next token
    of the same document or -100; `segment_ids`, 1, 2, ... for the windows in a row and
    0 for padding; `positions`, from 0 in each window.
    """

    train: grain.IterDataset
    """Shuffled training batches without end."""
    heldout: grain.IterDataset | None
    """One ordered pass over the held-out batches; None without held-out documents."""
    unigram_entropy: float | None
    """Cross-entropy, in nats a token, of the held-out tokens under the add-one smoothed
    frequencies of the training tokens; of the first documents when they are streamed,
    and None without held-out documents. A model that learns context falls below it."""
    num_documents: int | None
    """Training documents; None when streamed, their end is not known."""
    num_tokens: int | None
    """Training tokens; None when streamed."""
    fill: float | None
    """Share of the training rows' places that hold a token, of unpacked rows; None when
    packed or streamed."""

    def train_iterator(self) -> grain.DatasetIterator:
        """Return a fresh iterator over the training batches.

        `get_state()` is a JSON-able dictionary; `set_state(state)` continues exactly
        after the last batch that was taken. A stream skips forward to get there.
        """
        return iter(self.train)

    def eval_batches(self, n: int) -> Iterator[Batch]:
        """Yield the first `n` held-out batches, or as many as there are.

        Rows that the last batch lacks have segment id 0 and label -100 throughout.
        """
        return itertools.islice(iter(self.heldout or ()), n)


def load_data(cfg: DataConfig, vocab_size: int | None) -> Data:
    """Read, tokenise and split `cfg.source`.

    Documents of one token have no target and are left out. A fraction `cfg.holdout` of
    the documents is held out, one at least; of a single document, its tail.

    Args:
        cfg: source, tokenizer (None as for a fresh model), shape of a batch, and seed.
        vocab_size: V of the model, to check the token ids; None checks nothing.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: a file of another type or content, a token id outside the
            vocabulary, too few documents or tokens, or a tokenizer that does not load.
        ImportError: an 'hf:' source without the `datasets` package.
    """
    encode, num_entries = _load_tokenizer(cfg.tokenizer_name())
    stream = enumerate(_documents(cfg, encode, vocab_size))
    head = itertools.islice(stream, _STREAM_HEAD if cfg.streaming else None)
    documents = {row: document for row, document in head if len(document) > 1}
    streamed = cfg.streaming and next(stream, None) is not None
    if not documents:
        raise ValueError(
            f"DataConfig.source={cfg.source!r} is empty: it has no document of two or "
            "more tokens"
        )
    documents, held = _split(documents, cfg, streamed)
    train = [document for row, document in documents.items() if row not in held]
    heldout = [document for row, document in documents.items() if row in held]
    num_tokens = sum(map(len, train))
    num_targets = num_tokens - len(train)
    if cfg.packing and not streamed and num_targets < cfg.batch_size * cfg.seq_len:
        raise ValueError(
            f"DataConfig.source={cfg.source!r} has {num_targets} training targets, but "
            f"a packed batch needs batch_size * seq_len = {cfg.batch_size} * "
            f"{cfg.seq_len} = {cfg.batch_size * cfg.seq_len}; lower one of the two, or "
            "set packing=False"
        )
    fill = None
    if streamed:
        open_at = functools.partial(_documents, cfg, encode, vocab_size)
        windows = grain.experimental.WindowShuffleIterDataset(
            grain.experimental.FlatMapIterDataset(
                _Stream(open_at, held), _CutDocument(cfg.seq_len)
            ),
            window_size=max(1, min(1024, _BUFFER_TOKENS // cfg.seq_len)),
            seed=cfg.seed % 2**31,
        )
    else:
        cut = _Windows(train, cfg.seq_len)
        if not cfg.packing:
            fill = num_targets / (len(cut) * cfg.seq_len)
        windows = grain.MapDataset.source(cut)
        windows = windows.seed(cfg.seed % 2**32).shuffle().repeat()
        windows = windows.to_iter_dataset(_IN_MEMORY)
    held_batches = None
    if heldout:
        held_windows = grain.MapDataset.source(_Windows(heldout, cfg.seq_len))
        held_windows = held_windows.to_iter_dataset(_IN_MEMORY)
        held_targets = sum(map(len, heldout)) - len(heldout)
        held_batches = _batches(held_windows, cfg, held_targets, shuffle=False)
    return Data(
        train=_batches(windows, cfg, None if streamed else num_targets, shuffle=True),
        heldout=held_batches,
        unigram_entropy=_cross_entropy(train, heldout, vocab_size or num_entries),
        num_documents=None if streamed else len(train),
        num_tokens=None if streamed else num_tokens,
        fill=fill,
    )


# --- windows, rows and batches ---


class _Windows(Sequence):
    """All windows of all documents by index, in order, as inputs and labels."""

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int):
        self._documents = documents
        self._seq_len = seq_len
        self._ends = np.cumsum([-(-(len(d) - 1) // seq_len) for d in documents])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        start = (index - first) * self._seq_len
        window = self._documents[which][start : start + self._seq_len + 1]
        window = np.asarray(window, np.int32)
        return {"tokens": window[:-1], "labels": window[1:]}


def _batches(
    windows: grain.IterDataset, cfg: DataConfig, num_targets: int | None, shuffle: bool
) -> grain.IterDataset:
    """Pack windows into rows, and rows into batches of the full shape."""
    B, T = cfg.batch_size, cfg.seq_len
    # More rows at once fill better, but no more than the data has: else windows of
    # several epochs would share a row.
    rows = min(64, _BUFFER_TOKENS // T, (num_targets or _BUFFER_TOKENS) // T)
    return grain.experimental.BestFitPackIterDataset(
        windows,
        length_struct={"tokens": T, "labels": T},
        padding_struct={"tokens": 0, "labels": IGNORE},
        num_packing_bins=max(1, rows // B) * B,
        max_sequences_per_bin=None if cfg.packing else 1,
        seed=cfg.seed % 2**32,
        shuffle_bins=shuffle,
    ).batch(B, batch_fn=functools.partial(_stack, batch_size=B))


def _stack(rows: Sequence[dict[str, np.ndarray]], batch_size: int) -> Batch:
    names = {
        "tokens": "tokens",
        "labels": "labels",
        "tokens_segment_ids": "segment_ids",
        "tokens_positions": "positions",
    }
    missing = ((0, batch_size - len(rows)), (0, 0))
    return {
        name: np.pad(
            np.stack([row[key] for row in rows]),
            missing,
            constant_values=IGNORE if name == "labels" else 0,
        )
        for key, name in names.items()
    }


class _CutDocument(grain.experimental.FlatMapTransform):
    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element):
        return list(_Windows([element], self._seq_len))


class _Stream(grain.IterDataset):
    """Training documents of a stream, again from its start when it ends."""

    def __init__(self, open_at: Callable[[int], Iterator], held: set[int]):
        super().__init__()
        self._args = open_at, held

    def __iter__(self):
        return _StreamIterator(*self._args)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, open_at: Callable[[int], Iterator], held: set[int]):
        super().__init__()
        self._open_at = open_at
        self._held = held
        self.set_state({"row": 0})

    def __next__(self):
        while True:
            if self._documents is None:
                self._documents = self._open_at(self._row)
            for document in self._documents:
                self._row += 1
                if self._row - 1 not in self._held and len(document) > 1:
                    return document
            self.set_state({"row": 0})

    def get_state(self):
        return {"row": self._row}

    def set_state(self, state):
        self._row = state["row"]
        self._documents = None


# --- split and statistics ---


def _split(
    documents: dict[int, np.ndarray], cfg: DataConfig, streamed: bool
) -> tuple[dict[int, np.ndarray], set[int]]:
    """Return the documents by row, and the rows that are held out."""
    if not cfg.holdout:
        return documents, set()
    if len(documents) == 1 and not streamed:
        (document,) = documents.values()
        cut = len(document) - max(2, round(cfg.holdout * len(document)))
        if cut >= 2:
            return {0: document[:cut], 1: document[cut:]}, {1}
    count = max(1, round(cfg.holdout * len(documents)))
    if count >= len(documents):
        raise ValueError(
            f"DataConfig.holdout={cfg.holdout} leaves no training document of the "
            f"{len(documents)} in {cfg.source!r}, with "
            f"{sum(map(len, documents.values()))} tokens; lower it"
        )
    rng = np.random.default_rng(cfg.seed % 2**32)
    return documents, {int(i) for i in rng.permutation(list(documents))[:count]}


def _count(documents: list[np.ndarray], num_entries: int) -> np.ndarray:
    counts = np.zeros(num_entries, np.int64)
    for document in documents:
        for start in range(0, len(document), _BUFFER_TOKENS):
            part = np.bincount(document[start : start + _BUFFER_TOKENS].astype(np.intp))
            counts = np.pad(counts, (0, max(0, len(part) - len(counts))))
            counts[: len(part)] += part
    return counts


def _cross_entropy(
    train: list[np.ndarray], heldout: list[np.ndarray], num_entries: int
) -> float | None:
    if not heldout:
        return None
    counts = _count(train, len(_count(heldout, num_entries)))
    held_counts = _count(heldout, len(counts))
    log_probability = np.log((counts + 1) / (counts.sum() + len(counts)))
    return float(-(held_counts @ log_probability) / held_counts.sum())


# --- tokens ---


def _documents(
    cfg: DataConfig, encode: Encode, vocab_size: int | None, start: int = 0
) -> Iterator[np.ndarray]:
    """Yield token ids [n] of every document, checked against the vocabulary."""
    records = read_documents(cfg, start)
    number = start
    # One at a time when streaming: no document is tokenised before it is needed.
    while group := list(itertools.islice(records, 1 if cfg.streaming else 256)):
        texts = [record for record in group if isinstance(record, str)]
        encoded = iter(encode(texts)) if texts else iter(())
        for record in group:
            ids = next(encoded) if isinstance(record, str) else record
            highest = int(ids.max(initial=0))
            if vocab_size is not None and highest >= vocab_size:
                raise ValueError(
                    f"token id {highest} in document {number} of {cfg.source!r} "
                    f"(tokenizer={cfg.tokenizer_name()!r}) needs a vocabulary of at "
                    f"least {highest + 1}, but {vocab_size=}; take the model's own "
                    "tokenizer or a larger vocab_size"
                )
            yield ids
            number += 1


def _load_tokenizer(name: str) -> tuple[Encode, int]:
    """Return the function from texts to ids, and the number of ids it knows."""
    if name == "bytes":
        return _encode_bytes, 256
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"DataConfig.tokenizer={name!r} is neither 'bytes' nor an HF tokenizer "
            f"directory or hub id that loads: {error}"
        ) from error
    eos = tokenizer.eos_token_id

    def encode(texts: list[str]) -> list[np.ndarray]:
        ids = tokenizer(texts, verbose=False)["input_ids"]
        ends = [[eos] if eos is not None and row[-1:] != [eos] else [] for row in ids]
        return [
            np.array(row + end, np.int32) for row, end in zip(ids, ends, strict=True)
        ]

    return encode, len(tokenizer)


def _encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]
