"""One command for a GPU machine: build, test, sanitize, measure, in ten minutes. `make gpu` and bench/GPU.md use it.

    python3 bench/gpu.py [--stages build,tests,sanitize,kernels,model] [--total-s 580] [--dry-run]
    python3 bench/gpu.py --stages build,latency,serving      # the sampling engine, in a second call

Needs no installation and no network: it builds in place with the running Python, for the visible card only. Wheels in
.whl/ are unpacked first (oneDNN, diffusers). Results go to $OUT, else bench/results/; logs to $OUT/gpu.log, else
build/gpu/. Every stage has its own time limit; those of a group run side by side. Exit code 1 unless all went well.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Benchmarks and the share of the time left that each takes where others follow. No call brings back the files of all.
BENCHES = {"kernels": 0.4, "model": 0.5, "latency": 0.7, "conditional": 0.7, "serving": 1.0}
STAGES = ("build", "tests", "sanitize", *BENCHES)
FIRST = ("build", "tests", "sanitize", "kernels", "model")  # those of a call that names none
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FOUND = 86  # exit code of compute-sanitizer for errors of its own finding
SHORT = 40  # tests that the sanitizers run
OUT = os.environ.get("OUT")
LOGS = ROOT / "build" / "gpu"


@dataclass
class Stage:
    name: str
    group: str
    limit_s: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    pytest: bool = False
    share: float | None = None  # benchmarks: of the time left when they begin, which then is their limit
    status: str = "not run"
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status.startswith("passed")

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"


# Before the build: wheels, oneDNN, the card


def unpack_wheels(wheels: Path, site: Path) -> list[str]:
    """Unpacks wheels into `site`. pip's --target drops their data/lib, and so libdnnl.so.3."""
    names = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                inner = re.sub(r"^[^/]+\.data/(data|purelib|platlib)/", "", member.filename)
                target = (site / inner).resolve()
                if not target.is_relative_to(site.resolve()):
                    raise ValueError(f"{wheel.name} holds {member.filename!r}, outside of its folder")
                if member.is_dir():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
        names.append(wheel.name)
    return names


def find_onednn(places: list[str]) -> Path:
    """The first folder with oneDNN's headers and library."""
    for place in filter(None, places):
        root = Path(place)
        if (root / "include/oneapi/dnnl/dnnl.hpp").exists() and (root / "lib/libdnnl.so.3").exists():
            return root
    raise SystemExit(
        f"oneDNN not found in {', '.join(filter(None, places))}: carry the wheels onednn-cpu-gomp and "
        "onednn-devel-cpu-gomp 2023.2.0 in .whl (bench/GPU.md), or name its folder in FLEXDIT_ONEDNN_ROOT"
    )


def architecture(compute_capability: str) -> str:
    """CMake's name for nvidia-smi's compute capability; Hopper's own instructions need the a."""
    number = compute_capability.strip().splitlines()[0].replace(".", "")
    return "90a" if number == "90" else number


def visible_architecture() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
        return architecture(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"no GPU: nvidia-smi says {error}") from error


def find_sanitizer() -> str:
    for place in (None, "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"):
        if found := shutil.which("compute-sanitizer", path=place):
            return found
    raise SystemExit("compute-sanitizer not found on PATH or in /usr/local/cuda; leave the stage sanitize out")


def environment(site: Path, onednn: Path) -> dict[str, str]:
    def joined(name: str, *first: Path) -> str:
        return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get(name)])])

    return os.environ | {
        "PYTHONPATH": joined("PYTHONPATH", ROOT, site),
        "LD_LIBRARY_PATH": joined("LD_LIBRARY_PATH", onednn / "lib"),
        "FLEXDIT_ONEDNN_ROOT": str(onednn),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor"),
    }


# The plan


def build_stage(arch: str, limit_s: float) -> Stage:
    pybind = [sys.executable, "-m", "pybind11", "--cmakedir"]
    found = subprocess.run(pybind, capture_output=True, text=True)
    folder = ROOT / "build" / "gpu-cmake"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DFLEXDIT_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'flexdit_ext'}", "-DFLEXDIT_TESTS=OFF"]
    if found.returncode == 0:  # else CMake looks for it and says what is missing
        configure.append(f"-Dpybind11_DIR={found.stdout.strip()}")
    configure += shlex.split(os.environ.get("FLEXDIT_CMAKE_ARGS", ""))
    build = ["cmake", "--build", str(folder), f"-j{os.cpu_count() or 1}"]
    return Stage("build", "build", limit_s, [configure, build, [sys.executable, "-m", "flexdit_ext", "info"]])


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "bench.pytest_deadline", "-p", "no:cacheprovider", *arguments]


def sanitizer_stage(sanitizer: str, tool: str, index: int, limit_s: float) -> Stage:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--port", str(49152 + 100 * index)]
    command += ["--target-processes", "application-only", "--print-limit", "20"]
    if tool != "initcheck":  # it must see who writes what our kernels read: torch's kernels, cuBLAS
        command += ["--kernel-name", "kernel_substring=flexdit"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch probes for features, and failing probes are no errors
    environment = {"FLEXDIT_SHORT_TESTS": str(SHORT)}
    tests = ["-v", "-m", "gpu"]
    if tool in ("memcheck", "initcheck"):
        # Each tensor its own allocation, so that the tool sees where it ends; graphs cannot be captured that way.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        tests += ["-k", "not graph"]
    command += pytest_command(*tests)
    return Stage(f"sanitize-{tool}", "tests", limit_s, [command], environment, pytest=True)


def plan(arguments: argparse.Namespace, arch: str, sanitizer: str, out: Path) -> list[Stage]:
    """The stages in order; the benchmarks share what the others leave of the time."""
    stages, checks_s, made = arguments.stages, arguments.checks_s, []
    if "build" in stages:
        made.append(build_stage(arch, arguments.build_s))
    if "tests" in stages:
        made.append(Stage("tests", "tests", checks_s, [pytest_command("-m", "gpu", "--durations=5")], pytest=True))
    if "sanitize" in stages:
        made += [sanitizer_stage(sanitizer, tool, i, checks_s) for i, tool in enumerate(TOOLS)]
    left = arguments.total_s - sum({stage.group: stage.limit_s for stage in made}.values())
    benches = [name for name in BENCHES if name in stages]
    for name in benches:
        share = BENCHES[name] if name != benches[-1] else 1.0
        command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--out", str(out)]
        command += ["--device", "cuda"] if name in ("latency", "conditional", "serving") else []
        command += shlex.split(getattr(arguments, name))
        made.append(Stage(name, name, share * left, [command], share=share))
        left -= share * left
    return made


def full(stage: Stage, command: list[str]) -> list[str]:
    """A benchmark's budget ends before its limit, so that it writes what it has."""
    return command if stage.share is None else [*command, "--budget-s", f"{max(stage.limit_s - 25, 1):.0f}"]


# Running it


def start(stage: Stage, command: list[str], limit_s: float, base: dict[str, str]) -> subprocess.Popen:
    deadline = {"FLEXDIT_PYTEST_DEADLINE": str(time.time() + max(limit_s - 20, 1))}
    with stage.log.open("ab") as log:
        log.write(f"\n$ {shlex.join(full(stage, command))}\n".encode())
        log.flush()
        return subprocess.Popen(
            full(stage, command),
            cwd=ROOT,
            env=base | stage.environment | deadline,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that all that it started can be ended with it
        )


def stop(process: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def outcome(stage: Stage, code: int) -> str:
    """What an exit code means, with pytest's and compute-sanitizer's closing words."""
    text = stage.log.read_text(errors="replace") if stage.log.exists() else ""
    said = []
    if stage.pytest:
        if missed := re.search(r"^NOT REACHED: (\d+) tests$", text, flags=re.MULTILINE):
            if stage.name == "tests":
                return f"FAILED: no time was left for {missed[1]} tests"
            said.append(f"no time was left for {missed[1]} tests")
        closing = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", text, flags=re.MULTILINE)
        said += closing[-1:]
        said += re.findall(r"^(?:=+ )?(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)$", text, flags=re.MULTILINE)[-1:]
        if code == 5:
            return "FAILED: no test has the marker gpu"
        if code == 0 and not re.search(r"\b[1-9]\d* passed", " ".join(said)):
            return "FAILED: no test passed" + "".join(f" ({words})" for words in said)
    if code == SANITIZER_FOUND:
        said.insert(0, "errors found")
    words = "".join(f" ({', '.join(said)})" if said else "")
    return f"passed{words}" if code == 0 else f"FAILED: exit code {code}{words}"


def run_group(stages: list[Stage], base: dict[str, str], end: float) -> None:
    """Runs the stages side by side, each up to its limit and none beyond `end`."""
    waiting = {stage.name: list(stage.commands) for stage in stages}
    running: dict[str, subprocess.Popen] = {}
    begin = time.monotonic()
    limits = {stage.name: min(stage.limit_s, end - begin) for stage in stages}
    try:
        active = list(stages)
        while active:
            for stage in list(active):
                stage.seconds = time.monotonic() - begin
                process = running.get(stage.name)
                code = process.poll() if process else 0
                if process and code is None:
                    if stage.seconds > limits[stage.name]:
                        stop(process)
                        stage.status = f"FAILED: stopped after its limit of {limits[stage.name]:.0f} s"
                        active.remove(stage)
                elif code or not waiting[stage.name]:
                    stage.status = outcome(stage, code)
                    active.remove(stage)
                elif limits[stage.name] - stage.seconds < 5:
                    stage.status = "FAILED: no time was left"
                    active.remove(stage)
                else:
                    command = waiting[stage.name].pop(0)
                    running[stage.name] = start(stage, command, limits[stage.name] - stage.seconds, base)
            time.sleep(0.2)
    finally:
        for process in running.values():
            if process.poll() is None:
                stop(process)


def run(stages: list[Stage], base: dict[str, str], total_s: float) -> None:
    end = time.monotonic() + total_s
    for group in dict.fromkeys(stage.group for stage in stages):
        members = [stage for stage in stages if stage.group == group]
        for stage in members:
            if stage.share is not None:
                stage.limit_s = stage.share * (end - time.monotonic())
        print(f"[{group}] {', '.join(stage.name for stage in members)} ...", flush=True)
        run_group(members, base, end)
        for stage in members:
            print(f"[{group}] {stage.name}: {stage.status}, {stage.seconds:.0f} s", flush=True)
        if group == "build" and not members[0].ok:
            print(tail(members[0].log, 4000))
            return  # what is left stays "not run"


def tail(path: Path, characters: int) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text if len(text) <= characters else "[...]\n" + text[-characters:]


def summary(stages: list[Stage]) -> str:
    lines = ["| stage | seconds | outcome |", "|---|---|---|"]
    return "\n".join(lines + [f"| {stage.name} | {stage.seconds:.0f} | {stage.status} |" for stage in stages]) + "\n"


def keep_logs(stages: list[Stage], out: Path) -> None:
    """One log and the summary, small enough to come back from the machine."""
    parts = [f"===== {stage.name}: {stage.status}\n{tail(stage.log, 1_500_000)}\n" for stage in stages]
    (out / "gpu.log").write_text("".join(parts))
    (out / "gpu_summary.md").write_text(summary(stages))


def described(stages: list[Stage]) -> str:
    lines = []
    for stage in stages:
        lines.append(f"[{stage.group}] {stage.name}, at most {stage.limit_s:.0f} s")
        settings = " ".join(f"{name}={value}" for name, value in stage.environment.items())
        lines += [
            f"    {settings + ' ' if settings else ''}{shlex.join(full(stage, command))}" for command in stage.commands
        ]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(FIRST), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--total-s", type=float, default=580)
    parser.add_argument("--build-s", type=float, default=150, help="limit of the build")
    parser.add_argument("--checks-s", type=float, default=170, help="limit of the tests and of each sanitizer")
    for name in BENCHES:
        parser.add_argument(f"--{name}", default="", help=f"more arguments for bench/{name}.py, in one string")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parsed = parser.parse_args(arguments)
    parsed.stages = parsed.stages.split(",")
    if unknown := sorted(set(parsed.stages) - set(STAGES)):
        parser.error(f"--stages has {', '.join(unknown)}, allowed are {', '.join(STAGES)}")
    return parsed


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    out = Path(OUT) if OUT else ROOT / "bench" / "results"
    if arguments.dry_run:
        print(described(plan(arguments, "90a", "compute-sanitizer", out)))
        return 0
    begin = time.monotonic()
    site = Path(os.environ.get("FLEXDIT_SITE", "/tmp/site"))
    unpacked = unpack_wheels(ROOT / ".whl", site)
    print(f"unpacked into {site}: {', '.join(unpacked) or 'nothing'}")
    places = [os.environ.get("FLEXDIT_ONEDNN_ROOT", ""), str(site), sys.prefix, sys.base_prefix]
    onednn = find_onednn([*places, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    sanitizer = find_sanitizer() if "sanitize" in arguments.stages else ""
    stages = plan(arguments, visible_architecture(), sanitizer, out)
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` ends what was started
    try:
        run(stages, environment(site, onednn), arguments.total_s - (time.monotonic() - begin))
    finally:
        if OUT:
            keep_logs(stages, out)
        for stage in stages:
            if not stage.ok:
                print(f"\n----- {stage.name}\n{tail(stage.log, 1500)}")
            elif stage.name in BENCHES:
                print(tail(stage.log, 4000))
        print(summary(stages), flush=True)
    return 0 if all(stage.ok for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
