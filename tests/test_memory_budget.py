"""A run in a memory budget: the plan that is chosen, refusals, out-of-memory errors."""

import dataclasses
import os

import jax
import pytest

from mst_jax import memory
from mst_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from mst_jax.gpus import GPUS

LLAMA = PRESETS["llama3_8b"]


def config(tokens=65536, **train):
    return Config(
        model=LLAMA,
        data=DataConfig(seq_len=tokens, batch_size=1, tokenizer="x"),
        optim=OptimConfig(
            name="sgd", param_dtype="bfloat16", in_backward=True, clip="layer"
        ),
        train=TrainConfig(**train),
    )


@pytest.fixture(autouse=True)
def a_machine(monkeypatch):
    """An H200 with 200 GiB of free host memory."""
    monkeypatch.setattr(memory, "present_gpu", lambda: GPUS["h200"])
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 200 * memory.GIB)
    monkeypatch.delenv(memory._POOL, raising=False)


def test_without_a_budget_the_plan_stays():
    cfg = config(plan="full", head_groups=2)
    assert memory.fit(cfg, LLAMA) == cfg
    assert memory._POOL not in os.environ


def test_a_small_budget_takes_a_leaner_plan():
    plans = []
    for budget in ("auto", "50GiB", "30GiB"):
        cfg = config(memory_budget=budget, host_memory="20GiB")
        plans.append(memory.fit(cfg, LLAMA).train)
    assert len({p.plan for p in plans}) == 3
    assert "offload" not in plans[0].plan and "offload" in plans[2].plan


def test_the_chosen_plan_is_in_the_budget():
    cfg = memory.fit(config(memory_budget="40GiB", host_memory="64GiB"), LLAMA)
    predicted = memory.predict(cfg, LLAMA, GPUS["h200"])
    assert predicted.peak_device <= 40 * memory.GIB
    assert predicted.peak_host <= 64 * memory.GIB


def test_nothing_fits():
    with pytest.raises(ValueError, match="GiB"):
        memory.fit(config(memory_budget="12GiB", host_memory="64GiB"), LLAMA)


def test_a_budget_is_of_one_device():
    cfg = config(memory_budget="auto")
    data = dataclasses.replace(cfg.data, batch_size=2)
    optim = dataclasses.replace(cfg.optim, in_backward=False)
    mesh = MeshConfig(fsdp=2)
    two = dataclasses.replace(cfg, mesh=mesh, data=data, optim=optim)
    with pytest.raises(NotImplementedError, match="one device, the mesh has .*fsdp=2"):
        memory.fit(two, LLAMA)


@pytest.mark.parametrize("mesh, replicas", [((1, 2), 1), ((2, 1), 2), ((4, 2), 4)])
def test_each_replica_has_its_state_on_the_host(mesh, replicas):
    cfg = config(tokens=4096, plan="offload")
    lean = {"name": "adamw", "state_on_host": True, "in_backward": False}
    optim = dataclasses.replace(cfg.optim, **lean)
    data = dataclasses.replace(cfg.data, batch_size=8)
    one = dataclasses.replace(cfg, optim=optim, data=data)
    cfg = dataclasses.replace(one, mesh=MeshConfig(data=mesh[0], fsdp=mesh[1]))
    host = memory.predict(one, LLAMA, GPUS["h200"]).host
    assert host["optimizer state"] > host["residuals"] > 0
    need = host["residuals"] + replicas * host["optimizer state"]
    assert memory._host_bytes(cfg, LLAMA) == need


def test_the_host_pool_is_what_the_plan_needs():
    memory.fit(config(tokens=393216, plan="offload"), LLAMA)
    assert 97 <= int(os.environ[memory._POOL]) <= 100  # 96 GiB


def test_more_host_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 20 * memory.GIB)
    with pytest.raises(ValueError, match=r"96\.0 GiB in host memory and 20\.0 GiB"):
        memory.fit(config(tokens=393216, plan="offload"), LLAMA)
    limits = {"memory_budget": "auto", "host_memory": "4000GiB"}
    with pytest.raises(ValueError, match=r"host_memory='4000GiB': 20\.0 GiB are free"):
        memory.fit(config(**limits), LLAMA)


def test_out_of_memory_says_what_would_fit(monkeypatch):
    small = dataclasses.replace(GPUS["h200"], memory=60 * memory.GIB)
    monkeypatch.setattr(memory, "present_gpu", lambda: small)
    cfg = config(plan="none")
    with pytest.raises(memory.OutOfMemoryError) as caught:
        with memory.explained(cfg, LLAMA):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    text = str(caught.value)
    assert "predicted were" in text and "57.0 GiB" in text
    assert "--train.plan" in text and "--train.head-groups" in text


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory.explained(config(), LLAMA):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_container_s_limit_counts_but_not_its_cached_files(monkeypatch, tmp_path):
    monkeypatch.undo()
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   209715200 kB\n",
        "/sys/fs/cgroup/memory.max": f"{64 * memory.GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{60 * memory.GIB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {50 * memory.GIB}\n",
    }
    for name, text in files.items():
        (tmp_path / name.replace("/", "_")).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda p: tmp_path / p.replace("/", "_"))
    assert memory.available_host_bytes() == 54 * memory.GIB
    (tmp_path / "_sys_fs_cgroup_memory.max").write_text("max\n")
    assert memory.available_host_bytes() == 200 * memory.GIB


def test_available_host_bytes_is_plausible(monkeypatch):
    monkeypatch.undo()
    assert 2**28 < memory.available_host_bytes() < 2**50
    assert memory.present_gpu().usable > 0
