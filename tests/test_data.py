"""Every target once, nothing across documents, exact resume, errors that help."""

import itertools
import json
import sys
from collections import Counter
from dataclasses import replace

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mst_jax import data as data_module
from mst_jax.config import DataConfig
from mst_jax.data import load_data

datasets = pytest.importorskip("datasets")
T, B = 16, 4
TEXTS = [f"document {i}: " + "abcdefg " * (i % 9) for i in range(60)]


def config(source, **kwargs):
    return DataConfig(**(dict(source=str(source), seq_len=T, batch_size=B) | kwargs))


def unique_documents(lengths):
    """Documents in which every id of the corpus is another one."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)]


def write_documents(folder, documents):
    for i, document in enumerate(documents):
        np.save(folder / f"{i:04d}.npy", document.astype(np.int32))
    return folder


def segments(batch):
    """Yield inputs and labels of every segment, having checked the layout."""
    assert set(batch) == {"tokens", "labels", "segment_ids", "positions"}
    for value in batch.values():
        assert value.shape == (B, T) and value.dtype == np.int32
    for row in range(B):
        tokens, labels, ids, positions = (
            batch[k][row] for k in ("tokens", "labels", "segment_ids", "positions")
        )
        used = np.count_nonzero(ids)
        assert (ids[used:] == 0).all() and (labels[used:] == -100).all()
        assert (tokens[used:] == 0).all() and (positions[used:] == 0).all()
        assert (np.diff(ids[:used]) >= 0).all()
        assert sorted(set(ids[:used])) == list(range(1, ids.max() + 1))
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert (positions[here] == np.arange(here.sum())).all()
            assert (tokens[here][1:] == labels[here][:-1]).all()
            yield tokens[here], labels[here]


def targets(batches):
    """Count the (token, next token) pairs of batches."""
    pairs = Counter()
    for batch in batches:
        for tokens, labels in segments(batch):
            pairs.update(zip(tokens.tolist(), labels.tolist(), strict=True))
    return pairs


def expected_targets(documents):
    return Counter(p for d in documents for p in itertools.pairwise(d.tolist()))


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def decode(batches):
    """All windows of batches as sets of texts."""
    found = Counter()
    for batch in batches:
        for tokens, labels in segments(batch):
            found[bytes([tokens[0], *labels.tolist()]).decode()] += 1
    return found


LENGTHS = [2, 3, T, T + 1, T + 2, 2 * T + 1, 5 * T + 7, 40, 1, 9, 17, 90, 33]


@pytest.mark.parametrize("packing", [True, False])
def test_one_pass_has_every_target_once(packing):
    documents = [d for d in unique_documents(LENGTHS) if len(d) > 1]
    cfg = config("unused", packing=packing)
    windows = grain.MapDataset.source(data_module._Windows(documents, T))
    windows = windows.shuffle(seed=3).to_iter_dataset()
    for num_targets in (None, 64, 10_000):
        batches = list(data_module._batches(windows, cfg, num_targets, shuffle=True))
        assert targets(batches) == expected_targets(documents)
        per_row = max(b["segment_ids"].max() for b in batches)
        assert per_row > 1 if packing else per_row == 1


def test_training_repeats_every_target_and_reshuffles(tmp_path):
    documents = unique_documents([T + 1, 3 * T + 1, 2 * T + 1, 2 * T + 1])
    cfg = config(write_documents(tmp_path, documents), holdout=0.0)
    data = load_data(cfg, None)
    epochs = [take(it := data.train_iterator(), 2), take(it, 2), take(it, 2)]
    for epoch in epochs:  # 8 full windows, 2 batches of 4 rows
        assert targets(epoch) == expected_targets(documents)
    orders = [np.concatenate([b["tokens"] for b in e])[:, 0].tolist() for e in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("packing", [True, False])
def test_training_of_ragged_documents_is_even(tmp_path, packing):
    documents = unique_documents(LENGTHS)
    cfg = config(write_documents(tmp_path, documents), holdout=0.0, packing=packing)
    counts = targets(take(load_data(cfg, None).train_iterator(), 200))
    assert set(counts) == set(expected_targets(documents))
    # A buffer of rows is drawn from at most two epochs and may be half used up.
    assert max(counts.values()) - min(counts.values()) <= 2
    assert min(counts.values()) > 10


@pytest.mark.parametrize("packing", [True, False])
def test_split_is_disjoint_and_complete(tmp_path, packing):
    documents = unique_documents([20 + i for i in range(30)])
    cfg = config(write_documents(tmp_path, documents), holdout=0.2, packing=packing)
    data = load_data(cfg, None)
    held = targets(data.eval_batches(10**6))
    train = targets(take(data.train_iterator(), 200))
    assert max(held.values()) == 1 and not set(held) & set(train)
    assert set(held) | set(train) == set(expected_targets(documents))
    held_documents = [d for d in documents if (d[0], d[1]) in held]
    assert held == expected_targets(held_documents) and len(held_documents) == 6
    assert data.num_documents == 24
    assert data.num_tokens == sum(map(len, documents)) - sum(map(len, held_documents))
    again = targets(load_data(cfg, None).eval_batches(10**6))
    other = config(cfg.source, holdout=0.2, seed=1, packing=packing)
    assert again == held != targets(load_data(other, None).eval_batches(10**6))


def test_small_holdout_takes_one_document_and_none_takes_none(tmp_path):
    documents = unique_documents([100, 100])
    write_documents(tmp_path, documents)
    assert load_data(config(tmp_path, holdout=0.001), None).num_documents == 1
    data = load_data(config(tmp_path, holdout=0.0), None)
    assert data.num_documents == 2 and data.unigram_entropy is None
    assert list(data.eval_batches(3)) == []


def test_single_document_holds_out_its_tail(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(1000, dtype=np.uint16))
    data = load_data(config(tmp_path / "one.npy", holdout=0.1), 1000)
    assert (data.num_documents, data.num_tokens) == (1, 900)
    assert targets(data.eval_batches(100)) == expected_targets([np.arange(900, 1000)])
    train = targets(take(data.train_iterator(), 60))
    assert set(train) == set(expected_targets([np.arange(900)]))


def test_eval_batches_are_padded_to_the_full_shape(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(20 * 17).reshape(20, 17))
    cfg = config(tmp_path / "rows.npy", holdout=0.25)
    data = load_data(cfg, None)
    first, second = data.eval_batches(10)  # 5 windows of T in rows of 4
    assert (first["segment_ids"] == 1).all()
    assert (second["segment_ids"][1:] == 0).all()
    assert (second["labels"][1:] == -100).all()
    assert first["tokens"][:, 0].tolist() == sorted(first["tokens"][:, 0])
    assert_equal(list(data.eval_batches(1)), [first])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batches", [0, 1, 7, 23])
def test_state_restores_the_exact_stream(tmp_path, packing, batches):
    write_documents(tmp_path, unique_documents(LENGTHS * 4))
    cfg = config(tmp_path, packing=packing)
    iterator = load_data(cfg, None).train_iterator()
    take(iterator, batches)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    fresh = load_data(cfg, None).train_iterator()
    take(fresh, 2)  # whatever it did before
    fresh.set_state(state)
    assert_equal(take(fresh, 30), expected)
    assert fresh.get_state() == iterator.get_state()


def test_same_seed_same_stream_other_seed_another(tmp_path):
    write_documents(tmp_path, unique_documents([200] * 5))
    cfg, other = (config(tmp_path, seed=seed) for seed in (0, 7))
    first = take(load_data(cfg, None).train_iterator(), 10)
    assert_equal(first, take(load_data(cfg, None).train_iterator(), 10))
    changed = take(load_data(other, None).train_iterator(), 10)
    assert targets(first) != targets(changed)


def test_the_shuffle_is_over_all_windows_and_seeded(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(1000 * T))

    def first_windows(seed):  # 64 rows are packed at once
        cfg = config(tmp_path, seed=seed)
        batches = take(load_data(cfg, None).train_iterator(), 16)
        return set(np.concatenate([b["tokens"][:, 0] for b in batches]) // T)

    windows = first_windows(0)
    assert min(windows) < 100 and max(windows) > 800 and len(windows) == 64
    assert windows != first_windows(1)


def test_packing_leaves_little_padding(tmp_path):
    lengths = np.random.default_rng(0).integers(2, T, 2000)
    rows = [{"text": "x" * n} for n in lengths.tolist()]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = config(tmp_path / "x.jsonl", batch_size=1)
    batches = take(load_data(cfg, 256).train_iterator(), 300)
    assert np.mean([b["segment_ids"] > 0 for b in batches]) > 0.9


def write_text(path, rows):
    if path.suffix == ".jsonl":
        lines = [json.dumps({"body": row, "n": 1}) for row in rows]
        path.write_text("\n\n".join(lines) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"body": rows, "n": [1] * len(rows)}), path)
    else:
        for i, row in enumerate(rows):
            (path / f"{i:03d}.txt").write_bytes(row.encode())
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "."])
def test_text_files(tmp_path, name):
    texts = TEXTS + ["Zürich\r\n", ""]
    path = write_text(tmp_path / name, texts)
    cfg = config(path, text_field="body", seq_len=128, holdout=0.1)
    data = load_data(cfg, 256)
    assert data.num_documents == 61 - 6
    held = [bytes(t) for t in eval_texts(data)]
    assert len(held) == 6 and {h.decode() for h in held} <= set(texts)
    whole = load_data(config(path, text_field="body", holdout=0.0), 256)
    assert whole.num_tokens == sum(len(t.encode()) for t in texts)


def eval_texts(data):
    for batch in data.eval_batches(100):
        for row in range(B):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = batch["segment_ids"][row] == segment
                yield [*batch["tokens"][row][here], batch["labels"][row][here][-1]]


def test_single_text_file_and_mixed_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a" * 300)
    (tmp_path / "README.md").write_text("not data")
    np.save(tmp_path / "b.npy", np.full(100, 98))
    one = load_data(config(tmp_path / "sub" / "a.txt"), 256)
    assert (one.num_documents, one.num_tokens) == (1, 285)
    assert load_data(config(tmp_path, holdout=0.0), 256).num_tokens == 400


def test_a_directory_says_once_which_files_it_skips(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "A.TXT").write_text("a" * 300)
    (tmp_path / "B.JsonL").write_text(json.dumps({"text": "b" * 100}))
    assert load_data(config(tmp_path, holdout=0.0), 256).num_tokens == 400
    assert not caplog.records
    assert load_data(config(tmp_path / "sub" / "A.TXT", holdout=0.0), 256)
    for name in ("sub/notes.md", "c.json", "d.jsonl.gz", "e.csv"):
        (tmp_path / name).write_text("not data")
    data = load_data(config(tmp_path, holdout=0.0), 256)
    take(data.train_iterator(), 20)  # several epochs
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mst_jax", "WARNING")
    assert "4 files are skipped (c.json, d.jsonl.gz, e.csv, ...)" in record.message
    assert "only .txt, .jsonl, .parquet, .npy are read" in record.message


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    text = "z" * 100
    content = text if name == "x.txt" else json.dumps({"text": text}) + "\n\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    data = load_data(config(tmp_path / name, holdout=0.0), 256)
    assert data.num_tokens == 100


def test_stdlib():
    data = load_data(config("stdlib", seq_len=512), 256)
    assert data.num_documents > 300 and 5e6 < data.num_tokens < 10e6
    assert 2.5 < data.unigram_entropy < np.log(256)
    assert any(b"import " in bytes(text) for text in eval_texts(data))
    filled = [(b["segment_ids"] > 0).mean() for b in take(data.train_iterator(), 100)]
    assert np.mean(filled) > 0.95


def test_unigram_entropy(tmp_path):
    np.save(tmp_path / "x.npy", np.array([0, 1, 2, 1] * 90 + [0, 1, 1, 3] * 10))
    data = load_data(config(tmp_path / "x.npy", holdout=0.1), 5)
    p = (np.array([90, 180, 90, 0, 0]) + 1) / (360 + 5)
    expected = -np.mean(np.log(p[[0, 1, 1, 3]]))
    np.testing.assert_allclose(data.unigram_entropy, expected, rtol=1e-12)


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for text in TEXTS for w in text.split()})
    vocab = {w: i for i, w in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return vocab


def test_hf_tokenizer_ends_documents_with_eos(tmp_path):
    vocab = save_tokenizer(tmp_path / "tokenizer")
    path = write_text(tmp_path / "x.jsonl", TEXTS)
    cfg = config(path, tokenizer=str(tmp_path / "tokenizer"), text_field="body")
    documents = [np.array([*(vocab[w] for w in t.split()), 1]) for t in TEXTS]
    data = load_data(cfg, len(vocab))
    assert data.num_tokens == sum(map(len, documents)) - sum(
        len(list(text)) for text in eval_texts(data)
    )
    assert {tuple(t) for t in eval_texts(data)} <= {tuple(d) for d in documents}
    with pytest.raises(ValueError, match=r"token id \d+ .*at least \d+, but vocab_siz"):
        load_data(cfg, len(vocab) - 30)
    (tmp_path / "half.jsonl").write_text('{"body": "a \\ud800 b"}\n' * 30)
    for tokenizer in (cfg.tokenizer, "bytes"):
        half = replace(cfg, source=str(tmp_path / "half.jsonl"), tokenizer=tokenizer)
        assert load_data(half, None).num_tokens > 0  # half a surrogate pair
    with pytest.raises(ValueError, match="tokenizer='.*nowhere' is neither 'bytes'"):
        load_data(config(path, tokenizer=str(tmp_path / "nowhere")), None)


@pytest.mark.parametrize("streaming", [False, True])
def test_hf_dataset_from_a_local_directory(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    write_text(tmp_path / "d" / "train.jsonl", TEXTS)
    cfg = config(f"hf:{tmp_path / 'd'}", text_field="body", streaming=streaming)
    data = load_data(cfg, 256)
    assert data.num_documents == 57  # the stream's end was within its first documents
    assert {bytes(t).decode() for t in eval_texts(data)} <= cut(TEXTS)


def cut(texts):
    return {t[i : i + T + 1] for t in texts for i in range(0, len(t) - 1, T)}


def patch_stream(monkeypatch, head=10):
    calls = []
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return rows.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data_module, "_STREAM_HEAD", head)
    return calls


def test_stream_has_every_target_and_its_own_held_out_documents(monkeypatch):
    calls = patch_stream(monkeypatch)
    monkeypatch.setattr(data_module, "_BUFFER_TOKENS", 8 * T)
    data = load_data(config("hf:some/name:part", streaming=True, holdout=0.2), 256)
    assert calls[0] == (("some/name", "part"), {"split": "train", "streaming": True})
    assert (data.num_documents, data.num_tokens) == (None, None)
    assert data.unigram_entropy > 0
    held = {bytes(t).decode() for t in eval_texts(data)}
    held_texts = [t for t in TEXTS[:10] if t[: T + 1] in held]
    assert len(held_texts) == 2 and held == cut(held_texts)
    train = decode(take(data.train_iterator(), 200))
    assert set(train) == cut(t for t in TEXTS if t not in held_texts)
    assert len(calls) > 3  # several passes


def test_stream_is_shuffled(monkeypatch):
    patch_stream(monkeypatch)
    iterator = load_data(config("hf:name", streaming=True), 256).train_iterator()
    early, late = cut(TEXTS[:30]), cut(TEXTS[40:])
    found = set(decode(take(iterator, 8)))  # in order these would be early ones
    assert found & (early - late) and found & (late - early)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batches", [0, 5, 60])
def test_stream_state_restores_the_exact_stream(monkeypatch, packing, batches):
    patch_stream(monkeypatch)
    monkeypatch.setattr(data_module, "_BUFFER_TOKENS", 8 * T)
    cfg = config("hf:name", streaming=True, packing=packing)
    iterator = load_data(cfg, 256).train_iterator()
    take(iterator, batches)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 70)
    fresh = load_data(cfg, 256).train_iterator()
    fresh.set_state(state)
    assert_equal(take(fresh, 70), expected)


def test_missing_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "mst-jax\[datasets\]"'):
        load_data(config("hf:name"), None)


def test_hf_dataset_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"source='hf:.*none' is no Hugging Face data"):
        load_data(config(f"hf:{tmp_path / 'none'}"), None)
    (tmp_path / "d").mkdir()
    write_text(tmp_path / "d" / "test.jsonl", TEXTS)  # no training split
    with pytest.raises(ValueError, match=r'is no Hugging Face data.*split "train"'):
        load_data(config(f"hf:{tmp_path / 'd'}", text_field="body"), None)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt' is no file .*stdlib"):
        load_data(config(tmp_path / "nothing.txt"), None)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"", "x.txt' is empty"),
        ("x.jsonl", b"", "x.jsonl' is empty"),
        ("x.txt", b"\xff\xfe", "x.txt is not UTF-8"),
        ("x.csv", b"a,b", r"extension '\.csv', not one of \.txt, \.jsonl, \.parquet"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"b": "a", "a": 1}', r"x.jsonl:1 has no field 'text', only \['a"),
        ("x.jsonl", b"[1]", "x.jsonl:1 has no field 'text', only list"),
        ("x.jsonl", b'\n{"text": 5}', "x.jsonl:2: field 'text' is 5, not a string"),
        ("x.parquet", b"no parquet", "x.parquet is not Parquet"),
        ("x.npy", b"", "x.npy is no .npy array"),
        ("x.npy", "archive", "x.npy is an archive of arrays"),
        ("x.npy", np.zeros(9), r"x.npy has dtype=float64 and shape=\(9,\)"),
        ("x.npy", np.zeros((2, 2, 2), int), r"dtype=int64 and shape=\(2, 2, 2\)"),
        ("x.npy", np.array([1, -3]), "x.npy has the negative token id -3"),
        ("x.npy", np.arange(999), "token id 998 in document 0 .*999, but vocab_size=9"),
        ("x.npy", np.arange(64), r"60 training targets.*4 \* 16 = 64; lower"),
        ("x.npy", np.arange(3), "holdout=0.05 leaves no training document"),
    ],
)
def test_errors_name_the_value_and_the_way_out(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, str):
        np.savez(tmp_path / "x.npz", np.arange(3))
        (tmp_path / "x.npz").rename(tmp_path / name)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load_data(config(tmp_path / name), 9 if len(content) == 999 else None)


def test_error_of_a_directory_without_data(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"has no file of \.txt, \.jsonl"):
        load_data(config(tmp_path), None)


def test_error_of_a_parquet_column(tmp_path):
    path = write_text(tmp_path / "x.parquet", TEXTS)
    with pytest.raises(ValueError, match=r"no field 'text', only \['body', 'n'\]"):
        load_data(config(path), None)


def test_error_of_a_holdout_that_takes_all(tmp_path):
    write_documents(tmp_path, unique_documents([100, 100]))
    with pytest.raises(ValueError, match="holdout=0.9 leaves no training document of"):
        load_data(config(tmp_path, holdout=0.9), None)


def test_vocabulary_is_as_large_as_the_highest_id_needs(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(300))
    assert load_data(config(tmp_path / "x.npy"), 300).num_tokens == 285
    with pytest.raises(ValueError, match="'bytes'.* at least 300, but vocab_size=299"):
        load_data(config(tmp_path / "x.npy"), 299)


def test_too_few_tokens_are_fine_without_packing(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10))
    data = load_data(config(tmp_path / "x.npy", packing=False), None)
    assert set(targets(take(data.train_iterator(), 3))) == {
        (i, i + 1) for i in range(7)
    }
