"""What a run reports of its speed."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mst_jax import metrics
from mst_jax.config import PRESETS
from mst_jax.metrics import PEAK_FLOPS, Meter, MetricsWriter, peak_flops, read_metrics

MODEL = PRESETS["tiny"]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_gpu_that_is_named(kind, name, monkeypatch):
    devices = [SimpleNamespace(device_kind=kind)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert peak_flops() == (None if name is None else (name, PEAK_FLOPS[name]))


def test_speed_counts_labels_and_what_they_see(monkeypatch):
    # Two documents of 3 and 4 tokens; the last of each has no label, nor has padding.
    batch = {
        "labels": np.array([[5, 5, -100, 5, 5, 5, -100, -100]]),
        "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),
    }
    monkeypatch.setattr(metrics, "peak_flops", lambda: ("it", 1e9))
    for window, context in ((None, 9 / 5), (2, 8 / 5)):  # 1 + 2 and 1 + 2 + 3
        clock = iter([0.0, 2.0, 2.0])
        time = SimpleNamespace(perf_counter=clock.__next__)
        monkeypatch.setattr(metrics, "time", time)
        model = dataclasses.replace(MODEL, sliding_window=window)
        meter = Meter(model, devices=2)
        meter.add(batch)
        meter.add(batch)
        found = meter.read(2)
        assert found["tokens_per_second"] == 10 / 2 and found["step_seconds"] == 1
        flops = model.flops_per_token(context)
        assert found["mfu"] == pytest.approx(5 * flops / 2e9)


def test_a_resumed_file_keeps_what_came_before(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    MetricsWriter(tmp_path, start_step=2).close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
