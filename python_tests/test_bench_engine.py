"""bench/latency.py and bench/serving.py end to end at tiny sizes, their targets, and the servers on a clock of ours."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_bench import ROOT, pretended_gpu  # noqa: F401  a fixture

sys.path.insert(0, str(ROOT / "bench"))

import gpu_timing
import latency
import latency_loops
import latency_tables
import readme
import serving
import serving_tables

sys.path.remove(str(ROOT / "bench"))
from latency_loops import COMPILED, DIFFUSERS, EAGER, MODULE, SAMPLER


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(folder: Path, name: str) -> dict:
    (path,) = folder.glob(f"{name}.json")
    assert path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not list(folder.glob("*.tmp"))
    return json.loads(path.read_text())


# latency.py


def test_latency_smoke(tmp_path):
    assert latency.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = written(tmp_path, "latency_cpu")
    flex, dense = result["rows"]
    assert set(flex["contenders"]) == {SAMPLER, MODULE, EAGER, COMPILED}
    assert set(dense["contenders"]) == {SAMPLER, MODULE, EAGER, COMPILED, DIFFUSERS}
    for row in result["rows"]:
        assert row["targets"] == {}  # nothing is claimed of a smoke run
        for name, found in row["contenders"].items():
            assert len(found["steps_ms"]) == found["runs"] == 2
            assert all(len(run) == row["steps"] and min(run) > 0 for run in found["steps_ms"])
            assert ("image_ms" in found) == (name != MODULE)  # a forward makes no image
        assert 0 < row["contenders"][SAMPLER]["relative_error"] < 0.02
    assert (tmp_path / "latency_cpu.md").read_text().startswith("SMOKE RUN")


def test_latency_gpu_branches(pretended_gpu, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(latency, "Device", pretended_gpu.Device)
    arguments = ["--smoke", "--device", "cuda", "--out", str(tmp_path), "--contenders", "Sampler|eager|Pipeline"]
    assert latency.main(arguments) == 0
    result = written(tmp_path, "gpu_latency_*")
    assert result["ceilings"]["copy_gb_per_s"] > 0 and {"begin", "end"} == set(result["clocks"])
    for row in result["rows"]:
        assert row["steps"] == 50
        for found in row["contenders"].values():
            assert all(len(run) == 1 for run in found["steps_ms"])  # events around the run
            assert found["image_ms"] >= 49 * found["step_ms"] > 0


def test_wrong_images_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_loops.SamplerLoop, "end", lambda loop: 2 * loop.session.take(loop.request))
    arguments = ["--smoke", "--out", str(tmp_path), "--contenders", "Sampler|eager", "--rows", "Flex"]
    assert latency.main(arguments) == 1
    (row,) = written(tmp_path, "latency_cpu")["rows"]
    assert row["contenders"][SAMPLER]["not_run"].startswith("WRONG: relative error")


def test_latency_budget_and_rows(tmp_path, capsys):
    assert latency.main(["--smoke", "--out", str(tmp_path), "--budget-s", "0"]) == 1  # nothing was measured
    result = json.loads((tmp_path / "latency_cpu.json").read_text())
    assert not result["rows"] and set(result["not_run"].values()) == {"the time budget was used up"}
    assert latency.main(["--list", "--rows", "512"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()[-3:]) == 3


def test_targets_come_first():
    rows = latency_loops.all_rows()
    assert [row.targets.get("cuda", {}).get("step_ms") for row in rows[:3]] == [0.9, 2.4, None]
    assert rows[0].targets["cpu"] == {"module_ratio": 1.15} and rows[1].targets["cuda"]["image_ms"] == 125
    assert len({row.name for row in rows}) == len(rows) == 5
    for row in rows:
        config = latency_loops.config_of(row)
        assert config.depth == 28
        if row.sides != latency_loops.DENSE:
            table = latency_loops.make_sampler("ddim", row.cpu_steps).steps
            grids = [config.density_schedule.grid(step.timestep) for step in table]
            assert {grids.count((side, side)) for side in row.sides} == {row.cpu_steps // 4}


def latency_row(**targets) -> dict:
    found = {SAMPLER: {"step_ms": 2.0, "image_ms": 110.0}, MODULE: {"step_ms": 2.2}, EAGER: {"step_ms": 1.0}}
    found[COMPILED] = {"step_ms": 3.2}
    return {"name": "XL/2", "steps": 50, "targets": targets, "contenders": found}


def test_latency_targets():
    row = latency_row(step_ms=1.9, image_ms=125, compiled_ratio=1.5, module_ratio=1.15)
    assert [check["met"] for check in latency_tables.targets(row)] == [False, True, True, False]
    row["contenders"][COMPILED] = {"not_run": "no time"}
    row["contenders"][SAMPLER] = {"not_run": "no memory"}
    assert [check["met"] for check in latency_tables.targets(row)] == [None] * 4
    line = latency_tables.line(row)
    assert line[2] == "not run" and line[-1].count("not measured") == 4
    text = latency_tables.left_out({"rows": [row], "not_run": {"another row": "no budget"}})
    assert f"XL/2, {SAMPLER} (no memory)" in text and "another row (no budget)" in text


def test_latency_line_compares_steps():
    assert latency_tables.line(latency_row())[2:] == ["2", "110", "2.2 (1.10x)", "1 (0.50x)", "3.2 (1.60x)", "", ""]


# serving.py


def test_serving_smoke(tmp_path):
    assert serving.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = written(tmp_path, "serving_cpu")
    assert [row["load"] for row in result["rows"]] == list(serving.LOADS) and result["capacity"] > 0
    for row in result["rows"]:
        assert list(row["servers"]) == [serving.CONTINUOUS, serving.FIXED, serving.SINGLE]
        for name, run in row["servers"].items():
            assert run["images_per_s"] > 0 and 1 <= run["mean_batch"] <= (1 if name == serving.SINGLE else 4)
    assert "one at a time" in (tmp_path / "serving_cpu.md").read_text()


def test_serving_gpu_branches(pretended_gpu, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(serving, "Device", pretended_gpu.Device)
    assert serving.main(["--smoke", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert {"begin", "end"} == set(written(tmp_path, "gpu_serving_*")["clocks"])


def test_wrong_images_in_company_are_found(tmp_path, monkeypatch):
    sample = serving.Sampler.sample
    monkeypatch.setattr(serving.Sampler, "sample", lambda *arguments, **options: 2 * sample(*arguments, **options))
    assert serving.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_trace_is_poisson_and_the_same_at_every_rate():
    slow, fast = (serving.trace(4000, rate, (10, 20), 1000) for rate in (2.0, 8.0))
    gaps = torch.tensor([request.at for request in slow]).diff()
    assert gaps.mean().item() == pytest.approx(0.5, rel=0.1) and gaps.std().item() == pytest.approx(0.5, rel=0.1)
    assert [(r.label, r.steps, r.cfg_scale) for r in slow] == [(r.label, r.steps, r.cfg_scale) for r in fast]
    assert fast[-1].at == pytest.approx(slow[-1].at / 4)
    assert {r.steps for r in slow} == {10, 20} and {r.cfg_scale for r in slow} == set(serving.GUIDANCE)
    assert {r.at for r in serving.trace(5, math.inf, (10,), 1000)} == {0.0}


class Clockwork:
    """A clock, and a session of max_batch places whose every step takes one second."""

    def __init__(self, max_batch: int):
        self.time, self.max_batch, self.left, self.waiting, self.sizes = 0.0, max_batch, {}, [], []
        self.finished, self.count = {}, 0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    @property
    def active(self) -> int:
        return len(self.left)

    def add(self, label, steps, sampler, cfg_scale, seed) -> int:
        self.count += 1
        self.waiting.append((self.count, steps))
        return self.count

    def step(self) -> None:
        while self.waiting and len(self.left) < self.max_batch:
            key, steps = self.waiting.pop(0)
            self.left[key] = steps
        self.sizes.append(len(self.left))
        self.time += 1.0
        self.left = {key: steps - 1 for key, steps in self.left.items()}
        self.finished |= {key: "image" for key, steps in self.left.items() if steps == 0}
        self.left = {key: steps for key, steps in self.left.items() if steps}

    def take(self) -> dict:
        taken, self.finished = self.finished, {}
        return taken

    def cancel(self, key) -> None:
        self.left.pop(key, None)


def served(policy, max_batch: int, arrivals: list[tuple[float, int]], limit_s: float = 100.0):
    clock = Clockwork(max_batch)
    requests = [serving.Request(at, 0, steps, 1.0, seed) for seed, (at, steps) in enumerate(arrivals)]
    finished = {}
    keep = lambda request, image: finished.update({request.seed: clock.time})  # noqa: E731
    run = serving.serve(policy, clock, requests, limit_s, keep, clock.now, clock.sleep)
    return finished, clock.sizes, run


ARRIVALS = [(0.0, 4), (0.5, 1), (2.0, 2), (9.0, 1)]


def test_continuous_batching_lets_requests_in_at_any_step():
    finished, sizes, run = served(serving.Continuous(), 8, ARRIVALS)
    assert finished == {0: 4.0, 1: 2.0, 2: 4.0, 3: 10.0} and sizes == [1, 2, 2, 2, 1]
    assert sorted(run["latencies_s"]) == [1.0, 1.5, 2.0, 4.0] and run["seconds"] == 10.0
    assert run["mean_batch"] == pytest.approx(8 / 5)
    assert served(serving.Continuous(), 1, ARRIVALS)[0] == {0: 4.0, 1: 5.0, 2: 7.0, 3: 10.0}


def test_fixed_batches_wait_for_size_or_time_out_and_for_the_batch_before():
    finished, sizes, _ = served(serving.FixedBatches(2, 3.0), 2, ARRIVALS)
    # 0 and 1 fill a batch at 0.5; it is done at 4.5, and the time-out of 2 is at 5.0, that of 3 at 12.0
    assert finished == {0: 4.5, 1: 1.5, 2: 7.0, 3: 13.0} and sizes == [2, 1, 1, 1, 1, 1, 1]
    one, sizes, _ = served(serving.FixedBatches(1, 0.0), 1, ARRIVALS)
    assert one == {0: 4.0, 1: 5.0, 2: 7.0, 3: 10.0} and set(sizes) == {1}


def test_unfinished_requests_count_as_slowest():
    finished, _, run = served(serving.FixedBatches(1, 0.0), 1, ARRIVALS, limit_s=4.5)
    assert finished == {0: 4.0, 1: 5.0}
    found = serving.summary(run, len(ARRIVALS))
    assert found["unfinished"] == 2 and found["p50_s"] == 4.5 and found["p95_s"] is None
    assert serving_tables.seconds(None) == "beyond the run"
    assert serving.summary(served(serving.Continuous(), 8, ARRIVALS)[2], 4)["p95_s"] == 4.0


# README.md


def test_readme_sections_show_both_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.engine_section("latency") == readme.MISSING
    (tmp_path / "latency_cpu.md").write_text("the CPU's\n")
    assert readme.engine_section("latency") == "the CPU's"
    for day in ("2026-01-31", "2026-02-01"):
        stem = tmp_path / f"gpu_latency_{day}_nvidia-h200"
        stem.with_suffix(".json").write_text(json.dumps({"environment": {"date": day}}))
        stem.with_suffix(".md").write_text(f"the GPU's of {day}")
        stem.with_suffix(".png").touch()
    text = readme.engine_section("latency")
    assert text.startswith("the CPU's\n\nthe GPU's of 2026-02-01\n\n![") and "2026-01-31" not in text
    assert readme.engine_section("serving") == readme.MISSING


def test_results_are_named_by_device():
    assert gpu_timing.result_file("latency", {"machine": {}}) == "latency_cpu"
    where = {"date": "2026-01-31", "device": "NVIDIA H200"}
    assert gpu_timing.result_file("serving", {"environment": where}) == "gpu_serving_2026-01-31_nvidia-h200"
