"""examples/digits/run.py: the quick run writes readable files, and Ctrl-C leaves only whole ones."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexdit_ext import FlexDiT

imread = pytest.importorskip("matplotlib.image").imread
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "digits" / "run.py"
PICTURES = {"samples.png", "samples_dense.png", "losses.png"}
CHECKPOINTS = {"dense", "flexdit"}
TIMEOUT = 120  # seconds; a quick run takes about 8 on two idle cores


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--threads", "2", "--out", str(out), *arguments]


def assert_whole(path: Path) -> None:
    """Opens one of the demo's outputs."""
    if path.is_dir():
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "config.json"}
        assert FlexDiT.from_pretrained(path).config.depth == 8
    elif path.suffix == ".png":
        assert imread(path).ndim == 3
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        assert path.name == "report.md" and path.read_text(encoding="utf-8").endswith("\n")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(command(out, "--seed", "3"), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Targets: not judged" in done.stdout
    return out


def test_every_file_is_written_and_readable(quick_run):
    assert {path.name for path in quick_run.iterdir()} == PICTURES | CHECKPOINTS | {"report.md", "report.json"}
    for path in quick_run.iterdir():
        assert_whole(path)


def test_sample_grid_has_one_row_per_digit(quick_run):
    height, width = imread(quick_run / "samples.png").shape[:2]
    assert height / width == 10 / 4  # the quick run draws 4 of each digit


def test_checkpoints_hold_their_layouts(quick_run):
    dense, flexdit = (FlexDiT.from_pretrained(quick_run / name).config for name in ("dense", "flexdit"))
    assert (dense.num_pooling_blocks, dense.num_sdtm) == (0, 0)
    assert flexdit.num_pooling_blocks > 0 and flexdit.num_sdtm > 0 and len(set(flexdit.schedule.grids)) > 1


def test_report_has_every_measurement(quick_run):
    report = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 3 and report["targets"] == {}
    assert report["macs"]["flexdit"] < report["macs"]["dense"]
    assert set(report["macs"]["flexdit_by_grid"]) == {"5x5", "4x4", "3x3"}
    assert set(report["accuracy"]) == {"dense", "flexdit", "held_out"}
    distance = report["frechet_distance"]
    assert {"dense", "flexdit", "by_set", "held_out", "train_halves", "ratio_standard_error"} < set(distance)
    assert distance["ratio"] == pytest.approx(distance["flexdit"] / distance["dense"])
    assert all(rate > 0 for rate in report["images_per_second"].values())
    assert report["counts"] == {"samples": 40, "sets": 2, "held_out": 500, "train": 1297}
    assert report["hardware"]["threads"] == 2 and report["seconds"]["total"] > 0
    text = (quick_run / "report.md").read_text(encoding="utf-8")
    assert "images/s" in text and "Fréchet" in text


@pytest.mark.parametrize(
    ("phase", "arguments", "expected"),
    [
        ("dense, to the fork", ("--steps", "100000"), set()),
        ("dense, after it", ("--steps", "100000", "--fork-step", "2"), {"dense"}),
    ],
)
def test_interrupt_leaves_whole_files(tmp_path, phase, arguments, expected):
    # A session of its own, as from a shell in the foreground: SIGINT is not ignored there.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(tmp_path, *arguments), stderr=subprocess.PIPE, start_new_session=True, env=environment
    ) as process:
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        seen = b""
        while phase.encode() not in seen and (chunk := process.stderr.read1()):
            seen += chunk
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
        watchdog.cancel()
    assert process.returncode == 130, seen.decode() + rest
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == f"interrupted; the files in {tmp_path} are whole"
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in tmp_path.iterdir():
        assert_whole(path)


def test_missed_target_is_an_exit_status_of_1(monkeypatch, quick_run):
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))
    report = importlib.import_module("digits.report")
    results = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    results["accuracy"] |= {"dense": 0.95, "flexdit": 0.95}
    results["frechet_distance"]["ratio"] = 1.2
    results["targets"] = report.judge(results)
    assert list(results["targets"].values()) == [True, True, False]
    assert "MISSED: Fréchet distance" in report.to_markdown(results)
