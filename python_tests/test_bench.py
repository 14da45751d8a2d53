"""The GPU benchmarks end to end at tiny sizes on the CPU, and the arithmetic behind their tables."""

import contextlib
import json
import math
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_tables  # noqa: E402
import gpu_timing  # noqa: E402
import kernel_cases  # noqa: E402
import kernels  # noqa: E402
import model as model_bench  # noqa: E402
import model_rows  # noqa: E402

# Other libraries look for packages of these names.
sys.path.remove(str(ROOT / "bench"))
for name in ("kernels", "model"):
    del sys.modules[name]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Device("cuda") whose tensors lie on the CPU and whose events read the clock: the scripts' GPU branches run."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    slept = []
    fakes = {
        "is_available": lambda: True,
        "get_device_properties": lambda index: types.SimpleNamespace(L2_cache_size=1 << 10),
        "get_device_name": lambda index: "Pretended GPU",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": slept.append,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 2_000_100,
        "memory_reserved": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Pretended(gpu_timing.Device):
        def __init__(self, kind):
            self.kind, self.cuda = "cpu", True
            self._flushed = torch.empty(16, dtype=torch.uint8)

    monkeypatch.setattr(kernels, "Device", Pretended)
    monkeypatch.setattr(model_bench, "Device", Pretended)
    monkeypatch.setattr(torch.optim, "AdamW", _without(torch.optim.AdamW, "capturable"))
    return types.SimpleNamespace(slept=slept, Graph=Graph, Device=Pretended)


def _without(function, *names):
    return lambda *arguments, **options: function(*arguments, **{k: v for k, v in options.items() if k not in names})


def written(folder: Path, kind: str) -> dict:
    (path,) = folder.glob(f"gpu_{kind}_*.json")
    assert path.with_name(path.stem + ".md").read_text()
    assert path.with_name(path.stem + ".png").stat().st_size > 1000
    return json.loads(path.read_text())


# Scripts


def test_kernels_smoke(tmp_path):
    assert kernels.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = written(tmp_path, "kernels")
    ops = {row["op"] for row in result["rows"]}
    assert len(result["rows"]) == 2 * len(kernel_cases.smoke_cases()) - 1  # select_tokens has no backward
    assert "modulated_layer_norm backward" in ops and "select_tokens" in ops and not result["not_run"]
    for row in result["rows"]:
        assert row["contenders"]["flexdit_ext"]["median_ms"] > 0
        assert row["contenders"][kernels.TUNED]["median_ms"] > 0
        assert row["target"] is None  # nothing is claimed of a smoke run
    attention = next(row for row in result["rows"] if row["op"].startswith("attention"))
    assert set(kernel_cases.SDPA) < set(attention["contenders"])
    assert "not_run" in attention["contenders"]["SDPA, cuDNN"]
    (markdown,) = tmp_path.glob("*.md")
    assert markdown.read_text().startswith("SMOKE RUN")


def test_model_smoke(tmp_path):
    assert model_bench.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = written(tmp_path, "model")
    forward, schedule, training = result["rows"]
    assert "not_run" in forward["contenders"][model_rows.GRAPH]
    assert forward["contenders"][model_rows.OURS]["relative_error"] < 0.05
    assert forward["contenders"][model_rows.TUNED]["relative_error"] < 0.05
    assert "relative_error" not in forward["contenders"][model_rows.DENSE]
    assert {model_rows.HOST_T, model_rows.DIFFUSERS} < set(schedule["contenders"])
    assert training["contenders"][model_rows.OURS]["relative_error"] < 0.05


def test_kernels_gpu_branches(pretended_gpu, tmp_path):
    arguments = ["--smoke", "--out", str(tmp_path), "--only", "modulated_layer_norm|attention"]
    assert kernels.main(arguments) == 0
    assert pretended_gpu.slept
    rows = {row["op"]: row for row in written(tmp_path, "kernels")["rows"]}
    assert rows["modulated_layer_norm"]["target"] is None  # too small for a bandwidth
    assert rows["attention, head size 16"]["target"] == kernel_cases.ATTENTION_RATIO


def test_model_gpu_branches(pretended_gpu, tmp_path):
    arguments = ["--smoke", "--out", str(tmp_path), "--contenders", "^flexdit_ext|eager"]
    assert model_bench.main(arguments) == 0
    rows = written(tmp_path, "model")["rows"]
    assert pretended_gpu.Graph.replays > 0
    for row in rows:
        assert row["contenders"][model_rows.GRAPH]["median_ms"] > 0
        assert row["contenders"][model_rows.OURS]["memory_mb"] > 2


def test_model_lists_and_chooses_rows(tmp_path, capsys):
    assert model_bench.main(["--list", "--rows", "B/2"]) == 0
    assert capsys.readouterr().out.count("B/2 256 forward") == 3
    arguments = ["--smoke", "--out", str(tmp_path), "--rows", "training", "--contenders", "^flexdit_ext$"]
    assert model_bench.main(arguments) == 0
    result = written(tmp_path, "model")
    assert [list(row["contenders"]) for row in result["rows"]] == [["flexdit_ext"]]
    assert set(result["not_run"].values()) == {"--rows training"} and len(result["not_run"]) == 2


@pytest.mark.parametrize("script", [kernels, model_bench])
def test_exhausted_budget_is_recorded(script, tmp_path):
    assert script.main(["--smoke", "--out", str(tmp_path), "--budget-s", "0"]) == 1  # nothing was measured
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert not result["rows"] and set(result["not_run"].values()) == {"the time budget was used up"}
    (markdown,) = tmp_path.glob("*.md")
    assert "the time budget was used up" in markdown.read_text()


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cases.ops, "gated_residual", lambda x, y, gate, layout: x + 2 * y + 0 * gate.sum())
    assert kernels.main(["--smoke", "--no-compile", "--out", str(tmp_path), "--only", "gated"]) == 1
    forward, _ = written(tmp_path, "kernels")["rows"]
    assert forward["contenders"]["flexdit_ext"]["not_run"].startswith("WRONG: relative error")
    assert forward["contenders"][kernels.TUNED] == {"not_run": "--no-compile"}


# Sizes


def test_bytes_and_operations():
    norm = kernel_cases.norm_case(512, (16, 16), 1152)
    rows, vectors = 512 * 256 * 1152 * 2, 512 * 1152 * 2
    assert norm.bytes() == 2 * rows + 2 * vectors
    assert norm.bytes(backward=True) == 3 * rows + 3 * vectors  # x, gradient, its gradient; scale, two gradients
    assert norm.largest == rows >= kernel_cases.LARGE
    residual = kernel_cases.residual_case(2, (4, 4), 8)
    assert residual.bytes() == 2 * (3 * 2 * 16 * 8 + 2 * 8)
    assert residual.bytes(backward=True) == 2 * (3 * 2 * 16 * 8 + 2 * 2 * 8)
    pool = kernel_cases.pool_case(3, (4, 4), (2, 2), 8)
    assert pool.bytes() == pool.bytes(backward=True) == 2 * (3 * 16 * 8 + 3 * 4 * 8)
    gather = kernel_cases.gather_case(3, (4, 4), (2, 2), 8)
    assert gather.bytes() == 2 * (2 * 3 * 16 * 8 + 3 * 4 * 8)
    assert gather.bytes(backward=True) == 2 * (3 * 16 * 8 + 3 * 4 * 8)
    attention = kernel_cases.attention_case(32, 16, 72, (8, 8), (16, 16))
    assert attention.flops == 2 * 2 * 32 * 16 * 64 * 256 * 72 and attention.backward_flops == 2.5 * attention.flops
    linear = kernel_cases.linear_case(100, 20, 30)
    assert (linear.flops, linear.backward_flops) == (2 * 100 * 20 * 30, 4 * 100 * 20 * 30)


def test_cases_hold_what_was_asked():
    cases = kernel_cases.all_cases()
    large = [case for case in cases if case.memory_bound and case.target and case.largest >= kernel_cases.LARGE]
    assert len(large) == 5 and cases[:5] == [*large[:5]]
    asked = [case.size for case in cases if case.op == "attention, head size 72" and case.target]
    assert asked == [f"32 x {q} queries, {k} keys" for q, k in ((256, 256), (1024, 1024), (64, 256), (256, 64))]
    keys = {case.size for case in cases if case.op == "attention, head size 72"}
    assert {"32 x 36 queries, 1024 keys", "32 x 1024 queries, 400 keys"} < keys
    assert len({(case.op, case.size) for case in cases}) == len(cases)


@pytest.mark.parametrize("case", kernel_cases.smoke_cases(), ids=lambda case: case.op)
def test_cases_shapes_are_their_tensors(case):
    tensors = case.tensors("cpu", torch.bfloat16)
    assert [tuple(tensor.shape) for tensor in tensors] == list(case.inputs.values())
    for function in (case.ours("cpu"), case.compiled):
        assert tuple(function(*tensors).shape) == case.out
    assert set(case.saved) | set(case.grads) <= {*case.inputs, "out"}


def test_model_rows_targets_come_first():
    rows = model_rows.all_rows()
    assert [row.targets.get("ms") for row in rows[:2]] == [9, 30] and rows[2].targets["images_per_s"] == 450
    assert all(row.targets["compiled_ratio"] == 1.15 for row in rows if row.targets)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.batch for row in rows if row.preset == "B/2"} == {1, 2, 32}


def test_schedule_rows_cover_every_grid_once():
    row = model_rows.Row("XL/2", 256, 32, model_rows.SCHEDULE)
    groups = list(model_rows.grid_groups(row, model_rows.config_of(row)))
    assert [grid for _, grid in groups] == [(10, 10), (8, 8), (7, 7), (6, 6)]
    assert [(part.start, part.stop) for part, _ in groups] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    uniform = model_rows.Row("XL/2", 256, 32, (8, 8))
    assert list(model_rows.grid_groups(uniform, model_rows.config_of(uniform))) == [(slice(0, 32), (8, 8))]


# Timing


def test_contenders_take_turns():
    order = []
    device = gpu_timing.Device("cpu")
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = gpu_timing.measure(runs, device, rounds=4, warmups=1, limit_s=60)
    assert "".join(order) == "aabb" + "abba" * 2  # warm-up and trial of each, then four rounds
    assert times["a"]["rounds"] == 4 and times["a"]["min_ms"] <= times["a"]["median_ms"] <= times["a"]["max_ms"]


def test_rounds_fit_the_time():
    assert gpu_timing.rounds_for(0.1, most=50, limit_s=2.0) == 20
    assert gpu_timing.rounds_for(1e-6, most=50, limit_s=2.0) == 50
    assert gpu_timing.rounds_for(10.0, most=50, limit_s=2.0) == 5


def test_ceilings_count_both_ways():
    found = gpu_timing.ceilings(gpu_timing.Device("cpu"), copy_bytes=1 << 16, matrix=32)
    assert found["copy_gb_per_s"] > 0 and found["matmul_tflop_per_s"] > 0


def test_time_limit_passes_through_handlers_of_exceptions():
    limit = gpu_timing.time_limit(0.05, "compiling")
    swallowed = contextlib.suppress(Exception)  # as compilers do
    with pytest.raises(gpu_timing.NotRun, match="compiling took longer than 0 s"), limit, swallowed:
        time.sleep(5)
    with gpu_timing.time_limit(5, "nothing"):
        pass


def test_budget():
    now = [0.0]
    budget = gpu_timing.Budget(10, lambda: now[0])
    budget.require(9)
    now[0] = 5.0
    assert budget.remaining() == 5
    with pytest.raises(gpu_timing.NotRun, match="used up"):
        budget.require(5)


def test_relative_error_of_nan_is_never_small():
    x = torch.tensor([1.0, 2.0])
    assert gpu_timing.relative_error(x, x) == 0
    assert gpu_timing.relative_error(2 * x, x) == pytest.approx(1)
    assert math.isnan(gpu_timing.relative_error(torch.tensor([1.0, math.nan]), x))
    with pytest.raises(ValueError, match="1 values against 2"):
        gpu_timing.relative_error(x[:1], x)


def test_clocks_skip_unknown_fields():
    known = {"clocks.sm": "1980 MHz", "clocks_throttle_reasons.active": "0x0"}
    assert gpu_timing.clocks(known.get) == {"clocks.sm": "1980 MHz", "clocks_held_back": "0x0"}
    assert gpu_timing.clocks(lambda field: None) == {}


def test_result_name_is_a_plain_file_name():
    where = {"date": "2026-01-31", "device": "NVIDIA H100 80GB HBM3"}
    assert gpu_timing.result_name("kernels", where) == "gpu_kernels_2026-01-31_nvidia-h100-80gb-hbm3"


# Tables


def times(ms: float, **more) -> dict:
    return {"median_ms": ms, "min_ms": ms, "max_ms": ms, "rounds": 1, **more}


CEILINGS = {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": 800.0, "matmul_size": 8192}
ENVIRONMENT = {
    "date": "2026-01-31",
    "device": "NVIDIA H200",
    "driver": "580",
    "cuda": "13.0",
    "torch": "2.11",
    "commit": "abc1234",
}


def kernel_result(ours_ms: float = 0.25, date: str = "2026-01-31") -> dict:
    """A memory-bound op of 600 MB: 0.25 ms are 2400 GB/s, 80% of the copy; and attention."""
    norm = {"op": "norm", "size": "big", "bound": "memory", "bytes": 600_000_000, "flops": 0, "target": 0.8}
    norm["contenders"] = {"flexdit_ext": times(ours_ms), "reference, eager": times(1.0)}
    attention = {"op": "attention", "size": "64", "bound": "compute", "bytes": 1, "flops": 10**12, "target": 1.2}
    attention["contenders"] = {
        "flexdit_ext": times(2.0),
        "SDPA, flash": times(2.3),
        "SDPA, cuDNN": {"not_run": "no kernel"},
        "SDPA, math": times(9.0),
    }
    other = norm | {"op": "other", "target": None}
    environment = ENVIRONMENT | {"date": date}
    return {"environment": environment, "ceilings": CEILINGS, "rows": [norm, attention, other], "not_run": {"x": "why"}}


def model_result(ours_ms: float = 8.0) -> dict:
    row = {"name": "XL/2", "batch": 32, "targets": {"ms": 9, "images_per_s": 450, "compiled_ratio": 1.15}}
    compiled = {f"reference, torch.compile {mode}": times(ms) for mode, ms in (("a", 9.4), ("b", 9.1))}
    row["contenders"] = {"flexdit_ext": times(ours_ms, memory_mb=1500.0), "reference, eager": times(5.0), **compiled}
    return {"environment": ENVIRONMENT, "ceilings": CEILINGS, "rows": [row], "not_run": {}}


@pytest.mark.parametrize("ours_ms,met", [(0.2499, True), (0.2501, False)])
def test_bandwidth_target(ours_ms, met):
    result = kernel_result(ours_ms)
    assert gpu_tables.kernel_target(result["rows"][0], CEILINGS)["met"] is met
    assert gpu_tables.kernel_target(result["rows"][2], CEILINGS) is None


def test_attention_target_takes_the_fastest_backend():
    row = kernel_result()["rows"][1]
    target = gpu_tables.kernel_target(row, CEILINGS)
    assert target["reached"] == pytest.approx(1.15) and target["met"] is False
    row["contenders"]["flexdit_ext"] = times(1.9)
    assert gpu_tables.kernel_target(row, CEILINGS)["met"] is True
    row["contenders"] = {"flexdit_ext": times(1.9), "SDPA, flash": {"not_run": "no kernel"}}
    assert gpu_tables.asked(gpu_tables.kernel_target(row, CEILINGS)) == "1.2x the fastest SDPA: not measured"


@pytest.mark.parametrize(
    "ours_ms,met", [(7.9, [True, True, True]), (8.0, [True, True, False]), (9.01, [False, True, False])]
)
def test_model_targets(ours_ms, met):
    """The fastest compiled reference takes 9.1 ms; eager is no compiled one, even when it is faster."""
    assert [check["met"] for check in gpu_tables.model_targets(model_result(ours_ms)["rows"][0])] == met


def test_model_targets_without_ours():
    row = model_result()["rows"][0]
    row["contenders"]["flexdit_ext"] = {"not_run": "OutOfMemoryError: no memory"}
    assert [check["met"] for check in gpu_tables.model_targets(row)] == [None] * 3
    assert "not measured" in gpu_tables.model_rows({"rows": [row]})[0][-1]


def test_tables_show_everything():
    text = gpu_tables.kernel_markdown(kernel_result())
    assert "| norm | big | flexdit_ext | 250.0 | 2400 GB/s (80%) | 1.00x | 80% of the copy: 0.8, met |" in text
    assert "| attention | 64 | SDPA, flash | 2300.0 | 435 TFLOP/s (54%) | 1.15x |  |" in text
    assert "not run: no kernel" in text and "Not run: x (why)" in text
    for fact in (
        "NVIDIA H200",
        "driver 580",
        "CUDA 13.0",
        "torch 2.11",
        "2026-01-31",
        "abc1234",
        "3000 GB/s",
        "800 TFLOP/s",
    ):
        assert fact in text
    text = gpu_tables.model_markdown(model_result())
    assert "| XL/2 | flexdit_ext | 8.00 | 4000 | 1500 | 1.00x | at most 9 ms: 8, met; " in text
    assert "MISSED" in text


def test_readme_section_shows_the_newest_targets(tmp_path):
    assert gpu_tables.readme_section(tmp_path) is None
    for name, result in (
        ("gpu_kernels_2026-01-31_nvidia-h200", kernel_result()),
        ("gpu_kernels_2026-02-01_nvidia-h100", kernel_result(date="2026-02-01")),
        ("gpu_model_2026-01-31_nvidia-h200", model_result()),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "gpu_model_2026-01-31_nvidia-h200.png").touch()
    text = gpu_tables.readme_section(tmp_path)
    assert "gpu_kernels_2026-02-01_nvidia-h100.md" in text and "gpu_kernels_2026-01-31" not in text
    assert "bench/results/gpu_model_2026-01-31_nvidia-h200.png" in text
    assert "| norm |" in text and "| other |" not in text  # only rows with targets
