"""Measuring: contenders take turns in one process, medians are compared, and what was printed is kept."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def measure(contenders: dict[str, Callable[[], object]], rounds: int, warmups: int = 2) -> dict[str, dict]:
    """Wall time in ms of every contender, taking turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(warmups):
            run()
    gc.disable()
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    gc.enable()
    return {
        name: {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
        for name, values in times.items()
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict:
    """What a result depends on besides the code."""
    from flexdit_ext import _C, __version__

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    build = _C.build_info()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {build['instruction_set']}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": build["onednn"],
        "flexdit_ext": __version__,
        "commit": commit or "unknown",
        "load_average": os.getloadavg()[0],
    }


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def write(name: str, result: dict, markdown: str) -> None:
    """bench/results/NAME.json and .md, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown)):
        path = RESULTS / (name + suffix)
        temporary = path.with_suffix(suffix + ".tmp")
        temporary.write_text(text)
        temporary.replace(path)
    print(markdown)
    print(f"written to {RESULTS / name}.json and .md")
