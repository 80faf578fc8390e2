"""What is restored is what was saved, or the caller hears why not."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from mst_jax import checkpoint
from mst_jax.checkpoint import Checkpoints

EXTRA = {"data": {"next": 7, "shard": ["a", 3]}, "lr": 1e-3, "note": "ü"}


def make_state(seed=0):
    key = jax.random.key(seed)
    w = jax.random.normal(key, (64, 48))
    return {
        "layers": [{"w": w, "b": w[0].astype(jnp.bfloat16)}, {"w": -w}],
        "step": jnp.int32(seed),
        "key": key,
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "mask": w > 0,
        "bytes": jnp.arange(200, dtype=jnp.uint8),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "none": None,
        "empty": (),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)


def save_steps(directory, *steps, keep=5):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {**EXTRA, "step": step})


def largest_file(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def bytes_read():
    """Bytes of arrays that this process has read from files so far."""
    name = "/tensorstore/kvstore/file/bytes_read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    return sum(cell["value"] for metric in metrics for cell in metric["values"])


def test_round_trip_is_bit_equal(tmp_path):
    save_steps(tmp_path / "new" / "run", 0, 3)
    checkpoints = Checkpoints(tmp_path / "new" / "run", keep=5)
    step, state, extra = checkpoints.restore(abstract(make_state()))
    assert (step, extra) == (3, {**EXTRA, "step": 3})
    assert_same(state, make_state(3))
    step, state, extra = checkpoints.restore(abstract(make_state()), step=0)
    assert (step, extra) == (0, {**EXTRA, "step": 0})
    assert_same(state, make_state(0))
    assert checkpoints.steps() == [0, 3] and checkpoints.latest() == 3


def test_the_tree_may_have_other_containers_of_the_same_names(tmp_path):
    x = jnp.arange(3.0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, [{"a": x}, {"a.b": -x, "a": {"b": 2 * x}}], {})
        wanted = (abstract({"a": x}), abstract({"a.b": x, "a": {"b": x}}))
        checkpoints.wait()
        _, state, _ = checkpoints.restore(wanted)
    assert_same(state, ({"a": x}, {"a.b": -x, "a": {"b": 2 * x}}))


def test_no_checkpoint_is_none(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        checkpoints = Checkpoints(directory, keep=1)
        assert checkpoints.restore(abstract(make_state())) is None
        assert checkpoints.latest() is None and checkpoints.steps() == []
        with pytest.raises(ValueError, match="no checkpoint"):
            checkpoints.extra()
    assert not (tmp_path / "absent").exists()


def test_arrays_may_be_deleted_or_donated_after_save(tmp_path):
    def make():
        return {"w": jnp.arange(1 << 20, dtype=jnp.float32), "key": jax.random.key(5)}

    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state = make()
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state["w"]))
        state["key"].delete()
        state = make()
        checkpoints.save(2, state, {})
        state["w"].delete()
        del state
        checkpoints.wait()
        for step in (1, 2):
            assert_same(checkpoints.restore(abstract(make()), step)[1], make())


def test_extra_is_taken_at_the_call_and_read_without_arrays(tmp_path):
    extra = {"next": [1]}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(), extra)
        extra["next"].append(2)
        checkpoints.save(2, make_state(), extra)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "2" / "arrays")
        assert checkpoints.extra() == {"next": [1, 2]}
        assert checkpoints.extra(1) == {"next": [1]}
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(3, make_state(), {"x": object()})


def test_keeps_the_newest(tmp_path):
    (tmp_path / "2").mkdir()  # a number, but no checkpoint: not ours to remove
    save_steps(tmp_path, 5, 6, 7, 100, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["100", "2", "7"]
    assert Checkpoints(tmp_path, keep=2).steps() == [2, 7, 100]


def test_steps_only_grow(tmp_path):
    save_steps(tmp_path, 5)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 4, -1):
            with pytest.raises(ValueError, match=r"must be above 5.*another directory"):
                checkpoints.save(step, make_state(), {})


def test_leaves_that_are_not_arrays_are_refused(tmp_path):
    state = {"a": 1, "b": jnp.ones(2), "c": np.ones(2)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=r"'a'.*int.*'c'.*ndarray"):
            checkpoints.save(1, state, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def truncate_largest(path):
    file = largest_file(path)
    os.truncate(file, file.stat().st_size // 2)


def empty_largest(path):
    os.truncate(largest_file(path), 0)


def delete_largest(path):
    largest_file(path).unlink()


def flip_a_byte(path):
    file = largest_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def delete_manifest(path):
    (path / "manifest.json").unlink()


def truncate_manifest(path):
    os.truncate(path / "manifest.json", 100)


def edit_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace("float32[64, 48]", "float32[64, 49]"))


def foreign_manifest(path):
    (path / "manifest.json").write_text("[1, 2]")


def rename_from_another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.parent / "1", path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate_largest,
        empty_largest,
        delete_largest,
        flip_a_byte,
        delete_manifest,
        truncate_manifest,
        edit_manifest,
        foreign_manifest,
        rename_from_another_step,
    ],
)
def test_the_one_before_a_damaged_one_is_used(tmp_path, caplog, damage):
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=f"{tmp_path}/2 is not a whole checkpoint"):
            checkpoints.restore(abstract(make_state()), step=2)
        with caplog.at_level(logging.WARNING, "mst_jax"):
            step, state, _ = checkpoints.restore(abstract(make_state()))
        assert step == 1
        assert_same(state, make_state(1))
        (record,) = [r for r in caplog.records if r.name == "mst_jax"]
        assert f"{tmp_path}/2 is not a whole checkpoint: " in record.getMessage()
        # The run goes on from step 1 and comes by step 2 again.
        checkpoints.save(2, make_state(7), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(abstract(make_state()))[1], make_state(7))
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.damaged"]


def test_all_damaged_raises(tmp_path):
    save_steps(tmp_path, 1, 2)
    truncate_largest(tmp_path / "1")
    delete_largest(tmp_path / "2")
    with pytest.raises(ValueError, match=r"(?s)/2 is not .*/1 is not .* bytes"):
        Checkpoints(tmp_path, keep=2).restore(abstract(make_state()))


def test_an_absent_step_raises(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(ValueError, match="/9 is not a whole checkpoint"):
        Checkpoints(tmp_path, keep=2).restore(abstract(make_state()), step=9)


def test_a_mismatch_lists_all_differences(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    wanted = make_state()
    wanted["layers"][0]["w"] = jnp.ones((64, 50))
    wanted["layers"][0]["b"] = jnp.ones(48)
    wanted["key"] = jax.random.key(0, impl="rbg")
    wanted["more"] = wanted.pop("mask")
    for step in (None, 2):
        with pytest.raises(ValueError) as error:
            Checkpoints(tmp_path, keep=2).restore(abstract(wanted), step)
        assert str(error.value).splitlines() == [
            f"{tmp_path}/2 holds another state:",
            "  key: saved key<fry>[], wanted key<rbg>[]",
            "  layers/0/b: saved bfloat16[48], wanted float32[48]",
            "  layers/0/w: saved float32[64, 48], wanted float32[64, 50]",
            "  mask: saved bool[64, 48], wanted -",
            "  more: saved -, wanted bool[64, 48]",
        ]
    assert not caplog.records


def test_a_part_is_read_without_the_rest(tmp_path):
    w = jax.random.normal(jax.random.key(0), (512, 512))
    state = {"params": {"w": w}, "opt": [2 * w, 3 * w], "key": jax.random.key(1)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, EXTRA)
        checkpoints.wait()
        before = bytes_read()
        checkpoints.restore(abstract(state))
        whole = bytes_read() - before
        part = {"params": state["params"]}
        step, found, extra = checkpoints.restore(abstract(part), partial=True)
        of_part = bytes_read() - before - whole
        assert (step, extra) == (1, EXTRA)
        assert_same(found, part)
        assert 0.3 * whole < of_part < 0.4 * whole
        assert_same(checkpoints.restore(abstract(state), partial=True)[1], state)
        with pytest.raises(ValueError, match=r"opt/0: saved .*, wanted -"):
            checkpoints.restore(abstract(part))


def test_a_part_is_checked_as_the_whole(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        wanted = {"mask": jnp.ones((64, 48)), "more": jnp.ones(2)}
        with pytest.raises(ValueError) as error:
            checkpoints.restore(abstract(wanted), partial=True)
        assert str(error.value).splitlines() == [
            f"{tmp_path}/1 holds another state:",
            "  mask: saved bool[64, 48], wanted float32[64, 48]",
            "  more: saved -, wanted float32[2]",
        ]
        flip_a_byte(tmp_path / "1")
        part = abstract({"step": make_state()["step"]})
        with pytest.raises(ValueError, match="1 is not a whole checkpoint"):
            checkpoints.restore(part, 1, partial=True)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt.*directory of their own"):
        Checkpoints(tmp_path, keep=1)
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "model.bin").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match=r"12 is not a whole .*manifest.json"):
        Checkpoints(tmp_path, keep=1).restore(abstract(make_state()))


def test_restores_onto_another_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    one = jax.random.normal(jax.random.key(0), (16, 24))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {"w": one}, {})
        checkpoints.save(2, {"w": jax.device_put(one, rows)}, {})
        checkpoints.wait()
        for step in (1, 2):
            for sharding in (rows, columns, None):
                leaf = jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)
                w = checkpoints.restore({"w": leaf}, step)[1]["w"]
                assert bits(w) == bits(one)
                assert w.sharding == (sharding or one.sharding)


LOOP = """
import sys, jax, jax.numpy as jnp
from mst_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in range(1, 10_000):
        checkpoints.save(step, {"w": jnp.full((1 << 20,), step, jnp.float32)}, {})
        print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    wanted = {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
    command = [sys.executable, "-c", LOOP, str(tmp_path)]
    newest = 0
    for delay in (0.0, 0.013, 0.037):
        pipe = subprocess.PIPE
        if newest:  # go on where the killed one was
            command[2] = LOOP.replace("range(1,", f"range({newest + 1},")
        with subprocess.Popen(command, stdout=pipe, text=True) as process:
            for _ in range(4):
                started = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            newest, state, _ = checkpoints.restore(wanted)
            assert newest >= started - 1
            assert jnp.all(state["w"] == newest)
            newest += 1000
            checkpoints.save(newest, state, {})
        assert not [name for name in os.listdir(tmp_path) if "." in name]


FULL = """
import os, resource, signal, sys, jax, jax.numpy as jnp
from mst_jax.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small = {"w": jnp.arange(1000.0)}
big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, small, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for call in (checkpoints.wait, lambda: checkpoints.save(3, small, {})):
    checkpoints.save(2, big, {})
    try:
        call()
    except RuntimeError as error:
        print(error)
    else:
        raise SystemExit("no error")
    assert os.listdir(sys.argv[1]) == ["1"], os.listdir(sys.argv[1])
try:
    with checkpoints:
        checkpoints.save(2, big, {})
        raise KeyError("from the loop")
except KeyError as error:
    print(*error.__notes__)
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    wanted = {"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    step, state, _ = checkpoints.restore(wanted)
    assert step == 1 and bool(jnp.all(state["w"] == small["w"]))
    checkpoints.save(2, small, {})
assert os.listdir(sys.argv[1]) == ["2"]
"""


def test_a_full_disk_is_reported_and_older_checkpoints_stay(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message = f"checkpoint of step 2 not saved to {tmp_path}/2: "
    assert result.stdout.count(message) == 3


def test_an_old_one_that_stays_does_not_unsave_the_new(tmp_path, caplog, monkeypatch):
    def busy(path, **_):
        raise OSError(f"{path}: Directory not empty")

    save_steps(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="mst_jax"):
        patch.setattr("mst_jax.checkpoint.shutil.rmtree", busy)
        save_steps(tmp_path, 2, keep=1)
    assert f"{tmp_path}/2 is saved, an older one is still there" in caplog.text
    assert Checkpoints(tmp_path, keep=1).steps() == [2]
    save_steps(tmp_path, 3, keep=1)
    assert os.listdir(tmp_path) == ["3"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "run", keep=1) as checkpoints:
        with pytest.raises(RuntimeError, match=f"step 1 not saved to {tmp_path}/file"):
            checkpoints.save(1, make_state(), {})


def test_host_arrays_are_copied_before_they_are_written():
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    assert isinstance(
        checkpoint._own(jax.device_put(jnp.ones(3), sharding)), np.ndarray
    )
