"""bench/training.py on a model small enough to run here."""

import importlib.util
import sys
from pathlib import Path

import pytest

from flexdit_ext import DensitySchedule, FlexDiTConfig

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_training", BENCH / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"input_size": 32, "patch_size": 8, "hidden_size": 16, "num_heads": 2}
    schedule = DensitySchedule([(4, 3), (3, 3), (2, 3), (2, 2)])

    def config_of(mode):
        layout = {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 2}
        if mode != "dense":
            layout = {"num_pooling_blocks": 1, "num_sdtm": 1, "num_dense_blocks": 1, "schedule": schedule}
        return FlexDiTConfig(**sizes, **layout)

    monkeypatch.setattr(module, "config_of", config_of)
    monkeypatch.setattr(module, "FIXED", (2, 2))
    monkeypatch.setattr(module, "CONTENDERS", ("flexdit_ext", "reference, eager"))
    monkeypatch.setattr(module, "peak_of", lambda mode, contender: 1.0)
    yield module
    sys.modules.pop("harness", None)


def test_speed_and_report(training):
    rows = training.speed(rounds=1)  # asserts that both contenders have the same loss
    assert [row["name"] for row in rows] == ["dense", "fixed", "piecewise", "padded", "ragged"]
    macs = {row["name"]: row["macs"] for row in rows}
    # Two samples in each segment: the work of piecewise training, less than that of the largest grid for all.
    assert macs["ragged"] == macs["piecewise"] < macs["padded"]
    for row, factor in zip(rows, (1, 1, 4, 1, 1), strict=True):
        ours = row["contenders"]["flexdit_ext"]
        assert ours["images_per_second"] == pytest.approx(8 * factor / ours["median_ms"] * 1e3)
    quality = [
        {
            "seed": 0,
            "fork": 4,
            "steps": 8,
            "ragged": {"distance": 0.5, "accuracy": 0.9},
            "piecewise": {"distance": 0.4, "accuracy": 0.8},
        }
    ]
    text = training.report({"machine": training.machine(), "speed": rows, "quality": quality})
    assert "1.25, asked at most 1.0: MISSED" in text and "0.500 / 90.0%" in text
    assert f"time per multiply-accumulate: {training.ragged_cost(rows, 'padded'):.2f}, asked at most 1.1" in text
