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


def peak_memory_mb() -> float:
    """Of this process. Not getrusage's: that survives exec, so a child would begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def cpu_name() -> str:
    """With family and model: clouds call several generations by one name."""
    file = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in file.read_text().splitlines()] if file.exists() else []
    told = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    if "cpu family" not in told:
        return told["model name"]
    return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"


def commit() -> str:
    """FLEXDIT_COMMIT, for copies of the tree that have no history, else git's word."""
    if named := os.environ.get("FLEXDIT_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git there
        return "unknown"
    return result.stdout.strip() or "unknown"


def machine() -> dict:
    """What a result depends on besides the code."""
    from flexdit_ext import _C, __version__

    build = _C.build_info()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {build['instruction_set']}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": build["onednn"],
        "flexdit_ext": __version__,
        "commit": commit(),
        "load_average": os.getloadavg()[0],
    }


def machine_line(where: dict) -> str:
    """machine() in words."""
    return (
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, oneDNN {where['onednn']}, "
        f"{where['date']}, commit {where['commit']}, load average {where['load_average']:.1f} at the start."
    )


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def save(name: str, result: dict, markdown: str, folder: Path = RESULTS) -> None:
    """FOLDER/NAME.json and .md, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown)):
        path = folder / (name + suffix)  # a name may hold dots, so no with_suffix
        temporary = folder / (name + suffix + ".tmp")
        temporary.write_text(text)
        temporary.replace(path)


def write(name: str, result: dict, markdown: str, folder: Path = RESULTS) -> None:
    """save(), and the tables on the screen."""
    save(name, result, markdown, folder)
    print(markdown)
    print(f"written to {folder / name}.json and .md")


def bars(rows: list[dict], path: Path, key: str = "median_ms") -> None:
    """Bars of the contenders' times, one panel per row; ours are those whose name begins with flexdit_ext."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(rows), 1, figsize=(8, 1.9 * len(rows)), squeeze=False)
    for panel, row in zip(panels[:, 0], rows):
        names = [name for name, times in row["contenders"].items() if key in times][::-1]
        values = [row["contenders"][name][key] for name in names]
        colors = ["tab:green" if name.startswith("flexdit_ext") else "lightgray" for name in names]
        drawn = panel.barh(names, values, color=colors)
        panel.bar_label(drawn, [f" {value:.2f} ms" for value in values], fontsize=8)
        panel.set_title(row["name"], loc="left", fontsize=9)
        panel.tick_params(axis="y", labelsize=8)
        panel.margins(x=0.15)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Whole or not at all."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(path.name + ".tmp")
    figure.tight_layout()
    figure.savefig(temporary, dpi=100, format=path.suffix[1:])
    plt.close(figure)
    temporary.replace(path)
