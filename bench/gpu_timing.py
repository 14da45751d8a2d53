"""Measuring on a GPU: CUDA events, cold L2, contenders taking turns, ceilings and clocks of the same run.

On the CPU (--smoke) the same code runs with perf_counter, so that the tests can run every script; such figures are
never published.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import platform
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import commit, machine

Run = Callable[[], object]
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


class NotRun(Exception):
    """A contender that cannot run here, or for which no time was left; the message says why."""


class _TimeUp(BaseException):
    """Not an Exception: compilers catch those and go on."""


class Budget:
    """The seconds a script may take; what no longer fits is recorded as not run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._end = now, now() + seconds

    def remaining(self) -> float:
        return self._end - self._now()

    def require(self, seconds: float = 0.0) -> None:
        if self.remaining() <= seconds:
            raise NotRun("the time budget was used up")


@contextlib.contextmanager
def time_limit(seconds: float, what: str):
    """Raises NotRun from inside the block after `seconds`: compilations know no limit of their own."""

    def stop(signum, frame):
        raise _TimeUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    except _TimeUp:
        raise NotRun(f"{what} took longer than {seconds:.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def reason(error: BaseException) -> str:
    """One line of an exception, for a table."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if not isinstance(error, NotRun) else lines[0]
    return re.sub(r"\s+", " ", text).replace("|", "/")[:200]


class Device:
    """Where a benchmark runs, and how time passes there."""

    def __init__(self, kind: str):
        self.kind, self.cuda = kind, kind == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit("no GPU is visible to torch; --smoke runs tiny sizes on the CPU")
        if self.cuda:
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            self._flushed = torch.empty(4 * max(l2, 32 << 20), dtype=torch.uint8, device=kind)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(0) if self.cuda else f"CPU ({platform.machine()})"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def memory(self, what: str = "memory_allocated") -> int:
        return getattr(torch.cuda, what)() if self.cuda else 0

    def start(self):
        """Begins a measurement; stop() ends it, from the queue's side on a GPU, and gives the ms after a
        synchronize()."""
        if not self.cuda:
            return time.perf_counter()
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        return begin

    def stop(self, begin) -> Callable[[], float]:
        if not self.cuda:
            took = (time.perf_counter() - begin) * 1e3
            return lambda: took
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        return lambda: begin.elapsed_time(end)

    def stamp(self, run: Run, hidden_s: float | None) -> Callable[[], float]:
        """Runs once with a cold L2; the result gives the ms, after a synchronize().

        hidden_s: how long the GPU waits before it starts, so that everything is queued by then and launch overhead
        stays out; None measures from an idle GPU, launch overhead included.
        """
        if not self.cuda:
            begin = self.start()
            run()
            return self.stop(begin)
        self._flushed.fill_(1)
        if hidden_s is None:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(int(hidden_s * 2e9))  # cycles; no GPU of today runs much above 2 GHz
        begin = self.start()
        run()
        return self.stop(begin)


def rounds_for(seconds_per_round: float, most: int, limit_s: float, least: int = 5) -> int:
    """As many rounds as fit into limit_s, at most `most`; at least `least`, unless fewer are wanted."""
    return min(most, max(least, int(limit_s / max(seconds_per_round, 1e-9))))


def measure(
    contenders: dict[str, Run],
    device: Device,
    rounds: int = 50,
    warmups: int = 3,
    hide_launch: bool = False,
    limit_s: float = 2.0,
) -> dict[str, dict]:
    """Times of every contender in ms. Each has run `warmups` times; they take turns, in alternating order."""
    host, total = [], 0.0
    for run in contenders.values():
        for _ in range(warmups):
            run()
        device.synchronize()
        begin = time.perf_counter()
        run()
        host.append(time.perf_counter() - begin)
        device.synchronize()
        total += time.perf_counter() - begin
    hidden_s = min(2 * max(host) + 5e-5, 0.02) if hide_launch else None
    rounds = rounds_for(total + (hidden_s or 0) * len(contenders), rounds, limit_s)
    stamps: dict[str, list] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(contenders) if turn % 2 == 0 else reversed(list(contenders)):
                stamps[name].append(device.stamp(contenders[name], hidden_s))
        device.synchronize()
    finally:
        gc.enable()
    return {name: summary([stamp() for stamp in values]) for name, values in stamps.items()}


def summary(times: list[float]) -> dict:
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "rounds": len(times),
    }


def ceilings(device: Device, copy_bytes: int = 1 << 30, matrix: int = 8192) -> dict:
    """What this device reaches today: a device copy (bytes read + written) and a bfloat16 matrix product."""
    generator = torch.Generator(device.kind).manual_seed(0)
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device.kind, generator=generator)
    target = torch.empty_like(source)
    a, b = (torch.randn(matrix, matrix, device=device.kind, generator=generator).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    contenders = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.matmul(a, b, out=product)}
    times = {name: measure({name: run}, device, rounds=30, hide_launch=True) for name, run in contenders.items()}
    copy_ms, matmul_ms = (times[name][name]["median_ms"] for name in contenders)
    return {
        "copy_gb_per_s": 2 * copy_bytes / copy_ms / 1e6,
        "copy_bytes": copy_bytes,
        "matmul_tflop_per_s": 2 * matrix**3 / matmul_ms / 1e9,
        "matmul_size": matrix,
    }


def clocks(query: Callable[[str], str | None] | None = None) -> dict[str, str]:
    """nvidia-smi's clocks, power and why the clocks are held back, each asked alone: an unknown field fails all."""
    query = query or _nvidia_smi
    names = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the newer name and the older
    values = {name: query(name) for name in CLOCKS}
    values["clocks_held_back"] = next((value for value in map(query, names) if value is not None), None)
    return {name: value for name, value in values.items() if value is not None}


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 and result.stdout.strip() else None


def environment(device: Device) -> dict:
    """What a figure depends on besides the code."""
    from flexdit_ext import __version__

    return {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        "driver": (_nvidia_smi("driver_version") or "unknown") if device.cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flexdit_ext": __version__,
        "commit": commit(),
    }


def result_name(kind: str, where: dict) -> str:
    """gpu_kernels_2026-01-31_nvidia-h200: letters, digits, '.', '_' and '-' alone."""
    device = re.sub(r"[^a-z0-9.]+", "-", where["device"].lower()).strip("-")
    return f"gpu_{kind}_{where['date']}_{device}"


def conditions(device: Device, smoke: bool) -> dict:
    """What the result of a script that runs on either device begins with; on a GPU its ceilings and clocks, too."""
    if not device.cuda:
        return {"smoke": smoke, "machine": machine()}
    result = {"smoke": smoke, "environment": environment(device), "clocks": {"begin": clocks()}}
    return result | {"ceilings": ceilings(device, 1 << 20, 64) if smoke else ceilings(device)}


def result_file(kind: str, result: dict) -> str:
    """Without suffix: KIND_cpu, or result_name() on a GPU."""
    return result_name(kind, result["environment"]) if "environment" in result else f"{kind}_cpu"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, Euclidean, over all values; NaN where either has one."""
    actual, expected = actual.double().flatten(), expected.double().flatten()
    if actual.shape != expected.shape:
        raise ValueError(f"{actual.numel()} values against {expected.numel()}")
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def folder(argument: Path | None, smoke: bool) -> Path:
    """Where results go: --out, else bench/results; a smoke run's to a new temporary folder."""
    import tempfile

    from harness import RESULTS

    if argument is not None:
        return argument
    return Path(tempfile.mkdtemp(prefix="flexdit-smoke-")) if smoke else RESULTS
