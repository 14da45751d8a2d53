"""bench/gpu.py, the one command for a GPU machine: its plan, its stages, what it makes of their outcomes."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import pytest_deadline  # noqa: E402

sys.path.remove(str(ROOT / "bench"))  # other libraries look for packages named as the scripts there


def gpu_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "bench/gpu.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_dry_run_prints_the_plan():
    result = gpu_command("--dry-run", "--model", "--rows 'XL/2 256'")
    assert result.returncode == 0, result.stderr
    for word in (
        "-DCMAKE_CUDA_ARCHITECTURES=90a",
        "-DFLEXDIT_CUDA=ON",
        "-m gpu",
        "bench/kernels.py",
        "--rows 'XL/2 256'",
    ):
        assert word in result.stdout
    for tool in gpu.TOOLS:
        assert f"--tool {tool}" in result.stdout
    assert "allowed are build, tests" in gpu_command("--stages", "build,test").stderr


def test_plan_fits_the_time():
    stages = gpu.plan(gpu.parse([]), "90a", "cs", Path("/out"))
    limits = {stage.group: stage.limit_s for stage in stages}
    assert list(limits) == ["build", "tests", "kernels", "model"] and sum(limits.values()) == pytest.approx(580)
    (command,) = stages[-1].commands
    assert gpu.full(stages[-1], command)[-2:] == ["--budget-s", f"{stages[-1].limit_s - 25:.0f}"]
    only = gpu.plan(gpu.parse(["--stages", "model", "--model", "--rows 'a b'"]), "90a", "cs", Path("/out"))
    assert only[0].limit_s == 580 and "a b" in only[0].commands[0]


def test_the_engine_has_a_call_of_its_own():
    chosen = ["--stages", "build,latency,serving", "--serving", "--max-batch 16"]
    build, latency, serving = gpu.plan(gpu.parse(chosen), "90a", "cs", Path("/out"))
    assert latency.limit_s > serving.limit_s > 60
    assert build.limit_s + latency.limit_s + serving.limit_s == pytest.approx(580)
    for stage in (latency, serving):
        assert stage.commands[0][stage.commands[0].index("--device") + 1] == "cuda"
    assert serving.commands[0][-2:] == ["--max-batch", "16"]


def stage(name: str, code: str, group: str = "one", limit_s: float = 20.0, **more) -> gpu.Stage:
    return gpu.Stage(name, group, limit_s, [[sys.executable, "-c", code]], **more)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def test_stages_run_side_by_side_and_hangs_are_stopped(logs, capsys):
    stages = [
        stage("good", "print('hello')"),
        stage("bad", "raise SystemExit(3)"),
        stage("hang", "import subprocess; subprocess.run(['sleep', '60'])", limit_s=6.0),
        stage("slow", "import time; time.sleep(2)"),
        stage("later", "pass", group="two"),
    ]
    begin = time.monotonic()
    gpu.run(stages, dict(os.environ), total_s=60)
    assert time.monotonic() - begin < 12
    assert [s.status for s in stages] == [
        "passed",
        "FAILED: exit code 3",
        "FAILED: stopped after its limit of 6 s",
        "passed",
        "passed",
    ]
    assert "hello" in (logs / "good.log").read_text()
    gpu.keep_logs(stages, logs)
    assert "| hang |" in (logs / "gpu_summary.md").read_text() and "hello" in (logs / "gpu.log").read_text()


def test_failed_build_leaves_the_rest_not_run(logs, capsys):
    stages = [stage("build", "raise SystemExit('no compiler')", group="build"), stage("tests", "pass", group="tests")]
    gpu.run(stages, dict(os.environ), total_s=30)
    assert [s.status for s in stages] == ["FAILED: exit code 1", "not run"]
    assert "no compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code,log,status",
    [
        (0, "==== 5 passed, 2 skipped in 1.23s ====", "passed (5 passed, 2 skipped)"),
        (1, "1 failed, 4 passed in 1.2s", "FAILED: exit code 1 (1 failed, 4 passed)"),
        (5, "9 deselected in 0.1s", "FAILED: no test has the marker gpu"),
        (0, "3 skipped in 0.1s", "FAILED: no test passed (3 skipped)"),
        (0, "NOT REACHED: 7 tests\n2 passed, 7 skipped in 3.0s", "FAILED: no time was left for 7 tests"),
    ],
)
def test_outcome_of_tests(code, log, status, logs):
    tests = stage("tests", "", pytest=True)
    tests.log.write_text(log)
    assert gpu.outcome(tests, code) == status


def test_outcome_of_a_sanitizer(logs):
    memcheck = stage("sanitize-memcheck", "", pytest=True)
    memcheck.log.write_text(
        "NOT REACHED: 7 tests\n= 2 passed, 7 skipped in 3.0s =\n========= ERROR SUMMARY: 0 errors\n"
    )
    assert gpu.outcome(memcheck, 0) == (
        "passed (no time was left for 7 tests, 2 passed, 7 skipped, ERROR SUMMARY: 0 errors)"
    )
    memcheck.log.write_text("= 2 passed in 3.0s =\n========= ERROR SUMMARY: 4 errors\n")
    assert gpu.outcome(memcheck, gpu.SANITIZER_FOUND).startswith("FAILED: exit code 86 (errors found, 2 passed")


def test_wheels_are_unpacked_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "a-1.whl", "w") as archive:
        archive.writestr("a/__init__.py", "")
        archive.writestr("a-1.data/data/lib/libdnnl.so.3", "library")
        archive.writestr("a-1.data/data/include/oneapi/dnnl/dnnl.hpp", "header")
    site = tmp_path / "site"
    assert gpu.unpack_wheels(tmp_path, site) == ["a-1.whl"]
    assert (site / "a/__init__.py").exists() and (site / "lib/libdnnl.so.3").read_text() == "library"
    assert gpu.find_onednn(["", str(tmp_path), str(site)]) == site
    with pytest.raises(SystemExit, match=r"oneDNN not found in .*carry the wheels"):
        gpu.find_onednn([str(tmp_path)])
    with zipfile.ZipFile(tmp_path / "b-1.whl", "w") as archive:
        archive.writestr("../out", "")
    with pytest.raises(ValueError, match="outside of its folder"):
        gpu.unpack_wheels(tmp_path, site)


@pytest.mark.parametrize("capability,name", [("9.0\n", "90a"), ("8.0", "80"), ("12.0", "120"), ("9.0\n9.0\n", "90a")])
def test_architecture(capability, name):
    assert gpu.architecture(capability) == name


def test_short_selection_takes_every_function_first():
    names = [f"f[{i}]" for i in range(5)] + ["g"] + [f"h[{i}]" for i in range(2)]
    chosen = [names[i] for i in pytest_deadline.shortened(names, 5)]
    assert chosen == ["f[0]", "g", "h[0]", "f[4]", "h[1]"]
    assert sorted(pytest_deadline.shortened(names, 100)) == list(range(8))


def test_deadline_plugin(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(5))\n@pytest.mark.gpu\ndef test_a(i): pass\n"
        "@pytest.mark.gpu\ndef test_graph(): pass\ndef test_b(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")

    def run(**environment):
        command = [*gpu.pytest_command("-m", "gpu", "-k", "not graph"), str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=tmp_path, env=environment, **output).stdout

    assert "2 passed, 5 deselected" in run(FLEXDIT_SHORT_TESTS="2")
    late = run(FLEXDIT_PYTEST_DEADLINE=str(time.time() - 1))
    assert "NOT REACHED: 5 tests" in late and "5 skipped" in late
