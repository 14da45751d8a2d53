"""`flexdit bench` and `flexdit info`: what they print, and what they refuse."""

import json
import re

import pytest
import torch
from helpers import tiny_model
from test_cli import exit_code, refused, words

import flexdit_ext
from flexdit_ext import cli_bench
from flexdit_ext.__main__ import main


def test_bench_times_every_combination(saved, capsys, monkeypatch):
    """On a clock that goes on by 1 ms whenever it is read."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(cli_bench.time, "perf_counter", lambda: next(ticks) / 1000)
    line = words({"checkpoint": saved[1], "sizes": "8,4x16", "dtype": "float32,bfloat16", "steps": 3,
                  "repeats": 2, "batch_size": 2, "device": "cpu"})  # fmt: skip
    line += ["--schedule", "3,2x1", "--schedule", "4", "--json"]
    assert main(["bench", *line]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [(row["size"], row["schedule"], row["dtype"]) for row in result["rows"]]
    schedules, sizes = [[[3, 3], [2, 1]], [[4, 4]]], [[8, 8], [4, 16]]
    assert rows == [(size, grids, dtype) for grids in schedules for dtype in ("float32", "bfloat16") for size in sizes]
    for row in result["rows"]:
        assert row["steps_ms"] == [pytest.approx([1, 1, 1])] * 2 and row["step_ms"] == pytest.approx(1)
        assert row["images_ms"] == pytest.approx([3.5, 3.5]) and row["image_ms"] == pytest.approx(3.5)  # of two images
    assert result["batch_size"] == 2 and result["threads"] == torch.get_num_threads() and result["load_average"] >= 0


def test_bench_prints_a_table(saved, capsys):
    line = words({"checkpoint": saved[1], "steps": 2, "repeats": 2, "cfg_scale": 1, "device": "cpu"})
    assert main(["bench", *line]) == 0
    title, machine, head, row = capsys.readouterr().out.splitlines()
    assert title == f"{saved[1]}; batch 1, 2 DDIM steps" and "threads" in machine
    assert re.split(r"\s{2,}", head.strip()) == list(cli_bench._COLUMNS)
    size, grids, dtype, step, image, rate, spread = re.split(r"\s{2,}", row.strip())
    assert (size, grids, dtype) == ("8x8", "3,2", "float32")
    least, most = map(float, spread.split(" to "))
    assert 0 < float(step) <= float(image) and least <= float(image) <= most
    assert float(rate) == pytest.approx(1000 / float(image), rel=0.1)


def test_bench_measures_presets(capsys, monkeypatch):
    tiny = dict(cli_bench._PRESETS, S=(8, 2, 1, 1, (1, 1, 1, 1), 1))
    monkeypatch.setattr(flexdit_ext.config, "_PRESETS", tiny)
    line = words({"image_size": 512, "steps": 1, "repeats": 1, "sizes": "8", "device": "cpu"})
    assert main(["bench", *line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "S/2, 512, random weights" and result["rows"][0]["dtype"] == "bfloat16"
    assert result["rows"][0]["schedule"] == [[20, 20], [16, 16], [14, 14], [12, 12]]


@pytest.mark.parametrize("options, message", [
    ({"preset": "XXL/2"}, "argument --preset: invalid choice: 'XXL/2'"),
    ({"preset": "S/2", "checkpoint": "x"}, "--checkpoint is given: --preset and --image-size are for a model without"),
    ({"checkpoint": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"schedule": "3,a"}, "argument --schedule: '3,a', must be sparse grids from data to noise: "),
    ({"schedule": "0"}, "argument --schedule: '0', must be sparse grids"),
    ({"schedule": "5", "here": True}, "--schedule has the sparse grid (5, 5), at most the dense grid (4, 4)"),
    ({"sizes": "8,9", "here": True}, "size is (9, 9), must be (height, width): multiples of the patch size 2"),
    ({"dtype": "float32,float8"}, "argument --dtype: 'float8', must be of float32, "),
    ({"dtype": "float32,float16", "here": True}, "dtype is torch.float16, must be one of float32, "),
    ({"steps": 0}, "argument --steps: '0', must be an integer from 1"),
    ({"steps": 1001, "here": True}, "steps = 1001: must be in 1..1000"),
    ({"repeats": -1}, "argument --repeats"),
    ({"cfg_scale": -2, "here": True}, "cfg_scale = -2.0: must be finite and at least 0"),
])  # fmt: skip
def test_bench_refuses_bad_input(options, message, saved, capsys):
    options = {"device": "cpu"} | options
    if options.pop("here", False):
        options["checkpoint"] = saved[1]
    assert message in refused(capsys, "bench", *words(options))


def test_bench_of_a_dense_model(tmp_path, capsys):
    tiny_model(num_sdtm=0, schedule=None).save_pretrained(tmp_path)
    line = words({"checkpoint": tmp_path, "steps": 1, "repeats": 1, "device": "cpu"})
    assert main(["bench", *line]) == 0
    assert re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[-1].strip())[1] == "dense"
    assert "the model has no sparse tokens" in refused(capsys, "bench", *line, "--schedule", "2")


# ---- info and the program -------------------------------------------------------------------------------------------


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["info", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert lines == [f"{name:14} {value}" for name, value in values.items()]
    assert values["flexdit_ext"] == flexdit_ext.__version__ and torch.__version__ in values["torch"]
    assert {"CPU backend", "CUDA backend", "threads", "machine"} <= values.keys()
    assert "oneDNN" in values["CPU backend"] and "instruction set" in values["CPU backend"]


def test_commands(capsys):
    assert exit_code("--version") == 0 and capsys.readouterr().out == f"flexdit_ext {flexdit_ext.__version__}\n"
    for line in ([], ["paint"], ["info", "--yaml"]):
        assert exit_code(*line) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    for command in ("sample", "bench", "convert", "info"):
        assert exit_code(command, "--help") == 0 and command in capsys.readouterr().out
