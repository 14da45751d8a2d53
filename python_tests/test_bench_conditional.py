"""bench/conditional.py end to end at tiny sizes, and what it asks for."""

import sys

import pytest
import torch
from test_bench import ROOT, pretended_gpu  # noqa: F401  a fixture
from test_bench_engine import threads, written  # noqa: F401  a fixture

sys.path.insert(0, str(ROOT / "bench"))

import conditional
import conditional_loops
import conditional_tables
import latency

sys.path.remove(str(ROOT / "bench"))
from conditional_loops import COMPILED, DENSE, EAGER, MODULE, RIVAL, RIVAL_COMPILED, SAMPLER

pytest.importorskip("diffusers")


def test_smoke(tmp_path):
    assert conditional.main(["--smoke", "--out", str(tmp_path), "--rows", "video"]) == 0
    (row,) = written(tmp_path, "conditional_cpu")["rows"]
    assert list(row["contenders"]) == [RIVAL, DENSE, MODULE, SAMPLER, EAGER, RIVAL_COMPILED, COMPILED]
    for name, found in row["contenders"].items():
        steps = 1 if name in (RIVAL, DENSE, RIVAL_COMPILED) else 4
        assert found["runs"] == 2 and all(len(run) == steps and min(run) > 0 for run in found["steps_ms"])
        assert name in (RIVAL, MODULE) or found["relative_error"] < 1e-4
        mean = sum(found["steps_ms"][0]) / steps, sum(found["steps_ms"][1]) / steps
        assert found["step_ms"] == pytest.approx(sum(mean) / 2)
    assert row["targets"] == {}  # nothing is claimed of a smoke run
    assert (tmp_path / "conditional_cpu.md").read_text().startswith("SMOKE RUN")


def test_gpu_branches(pretended_gpu, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(latency, "Device", pretended_gpu.Device)
    monkeypatch.setattr(conditional_loops, "dtype_of", lambda device: torch.bfloat16)
    arguments = ["--smoke", "--device", "cuda", "--out", str(tmp_path), "--contenders", "^(?!.*compile)"]
    assert conditional.main([*arguments, "--rows", "text"]) == 0
    (row,) = written(tmp_path, "gpu_conditional_*")["rows"]
    assert all(len(run) == 1 for found in row["contenders"].values() for run in found["steps_ms"])  # events around it


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    end = conditional_loops.SamplerSteps.end
    monkeypatch.setattr(conditional_loops.SamplerSteps, "end", lambda loop: 1.01 * end(loop))
    arguments = ["--smoke", "--out", str(tmp_path), "--contenders", f"{SAMPLER}|{MODULE}", "--rows", "text"]
    assert conditional.main(arguments) == 1
    (row,) = written(tmp_path, "conditional_cpu")["rows"]
    assert row["contenders"][SAMPLER]["not_run"].startswith("WRONG: relative error")


def test_targets_are_of_the_faster_of_ours():
    row = {"targets": {"eager_ratio": 2.8}, "contenders": {RIVAL: {"step_ms": 30}, MODULE: {"step_ms": 12}}}
    assert [target["met"] for target in conditional_tables.targets(row)] == [False]
    row["contenders"][SAMPLER] = {"step_ms": 10}
    assert [target["met"] for target in conditional_tables.targets(row)] == [True]
    row["contenders"] = {MODULE: {"step_ms": 12}}
    assert [target["met"] for target in conditional_tables.targets(row)] == [None]
    assert [row.targets["cpu"]["eager_ratio"] for row in conditional_loops.all_rows()[:2]] == [2.8, 3.5]
