"""Parts of the demos' reports, and their two files."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch
from common.pictures import write_whole
from common.training import Models
from torch import nn

from flexdit_ext import __version__


def hardware() -> dict:
    """Processor, threads, versions."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flexdit_ext": __version__,
    }


def count_macs(models: Models, dense: nn.Module, sparse: nn.Module, **options) -> dict:
    """Multiply-accumulates of one forward pass for one sample: the schedule's mean, and each of its grids. options: of
    the models' macs()."""
    grids = sparse.schedule.grids
    return {
        "dense": dense.macs(**options),
        models.key: sparse.macs(**options),
        f"{models.key}_by_grid": {
            "x".join(map(str, grid)): sparse.macs(grid, **options) for grid in dict.fromkeys(grids)
        },
    }


def write_report(directory: Path, results: dict, text: str) -> None:
    """report.json with the results, report.md with the text."""
    content = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_whole(directory / "report.json", lambda file: file.write_text(content, encoding="utf-8"))
    write_whole(directory / "report.md", lambda file: file.write_text(text, encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def cost_rows(results: dict, key: str, sample: str) -> list[list[str]]:
    """Rows of MACs and samples per second, dense and sparse (`key`), from results["macs"], which count_macs gave, and
    results[f"{sample}s_per_second"]."""
    macs, rate = results["macs"], results[f"{sample}s_per_second"]
    by_grid = ", ".join(f"{grid}: {count / 1e6:.1f} M" for grid, count in macs[f"{key}_by_grid"].items())
    return [
        [f"MACs per {sample} and pass", f"{macs['dense'] / 1e6:.1f} M", f"{macs[key] / 1e6:.1f} M (mean)"],
        ["MACs at each sparse grid", "", by_grid],
        [f"{sample}s/s", f"{rate['dense']:.1f}", f"{rate[key]:.1f} ({rate[key] / rate['dense']:.2f}x)"],
    ]


def targets_section(results: dict) -> str:
    if not results["targets"]:
        return "Targets: not judged, this was a quick run."
    return "Targets:\n" + "\n".join(
        f"- {'met' if met else 'MISSED'}: {target}" for target, met in results["targets"].items()
    )


def conditions_section(results: dict, name: str, conditions: str = "labels") -> str:
    """Of Demo.conditions. name: of the sparse model; conditions: what both models are sampled from."""
    machine, training, sampling = results["hardware"], results["training"], results["sampling"]
    times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results["seconds"].items())
    return "\n".join(
        [
            f"- Machine: {machine['processor']}, threads: {machine['threads']} of {machine['cores']} cores, "
            f"torch {machine['torch']}, flexdit_ext {machine['flexdit_ext']}",
            f"- Training: {training['steps']} steps each, {name} from the dense weights of step "
            f"{training['fork_step']}, batch {training['batch_size']}",
            f"- Sampling: {sampling['steps']} Euler steps, guidance {sampling['cfg_scale']}, "
            f"the same noise and {conditions} for both models",
            f"- Seed: {results['seed']}",
            f"- Times: {times}",
        ]
    )
