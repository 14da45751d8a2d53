"""report.json and report.md: everything measured, the targets, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch
from images import write_whole

from flexdit_ext import FlexDiT, __version__

MIN_ACCURACY = 0.90
MAX_DISTANCE_RATIO = 1.15


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


def count_macs(dense: FlexDiT, flexdit: FlexDiT) -> dict:
    """Multiply-accumulates of one forward pass for one image: the schedule's mean, and each of its grids."""
    grids = flexdit.schedule.grids
    return {
        "dense": dense.macs(),
        "flexdit": flexdit.macs(),
        "flexdit_by_grid": {"x".join(map(str, grid)): flexdit.macs(grid) for grid in dict.fromkeys(grids)},
    }


def judge(results: dict) -> dict[str, bool]:
    """Target -> whether it was met."""
    accuracy = results["accuracy"]
    return {
        f"accuracy of dense samples at least {MIN_ACCURACY:.0%}": accuracy["dense"] >= MIN_ACCURACY,
        f"accuracy of FlexDiT samples at least {MIN_ACCURACY:.0%}": accuracy["flexdit"] >= MIN_ACCURACY,
        f"Fréchet distance of FlexDiT at most {MAX_DISTANCE_RATIO} of dense": (
            results["frechet_distance"]["ratio"] <= MAX_DISTANCE_RATIO
        ),
    }


def write_report(directory: Path, results: dict) -> str:
    """Writes both files; returns the Markdown."""
    text = to_markdown(results)
    content = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_whole(directory / "report.json", lambda file: file.write_text(content, encoding="utf-8"))
    write_whole(directory / "report.md", lambda file: file.write_text(text, encoding="utf-8"))
    return text


def to_markdown(results: dict) -> str:
    sections = [_model_table(results), _distance_table(results), _targets(results), _conditions(results)]
    return "# FlexDiT on handwritten digits\n\n" + "\n\n".join(sections) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _model_table(results: dict) -> str:
    macs, rate, accuracy = results["macs"], results["images_per_second"], results["accuracy"]
    by_grid = ", ".join(f"{grid}: {count / 1e6:.1f} M" for grid, count in macs["flexdit_by_grid"].items())
    rows = [
        ["MACs per image and pass", f"{macs['dense'] / 1e6:.1f} M", f"{macs['flexdit'] / 1e6:.1f} M (mean)"],
        ["MACs at each sparse grid", "", by_grid],
        ["images/s", f"{rate['dense']:.1f}", f"{rate['flexdit']:.1f} ({rate['flexdit'] / rate['dense']:.2f}x)"],
        ["classifier's accuracy on the samples", f"{accuracy['dense']:.1%}", f"{accuracy['flexdit']:.1%}"],
    ]
    return _table(["", "dense DiT", "FlexDiT"], rows)


def _distance_table(results: dict) -> str:
    distance, counts = results["frechet_distance"], results["counts"]
    by_set = "; ".join(
        f"{name} {', '.join(f'{value:.3f}' for value in values)}" for name, values in distance["by_set"].items()
    )
    rows = [
        [
            f"{counts['samples']} dense samples, training digits (mean of {counts['sets']} sets)",
            f"{distance['dense']:.3f}",
        ],
        [
            f"{counts['samples']} FlexDiT samples, training digits (mean of {counts['sets']} sets)",
            f"{distance['flexdit']:.3f}",
        ],
        [f"{counts['held_out']} held-out real digits, training digits", f"{distance['held_out']:.3f}"],
        ["two disjoint halves of the training digits", f"{distance['train_halves']:.3f}"],
        [
            "FlexDiT / dense",
            f"{distance['ratio']:.3f} (bootstrap standard error {distance['ratio_standard_error']:.3f})",
        ],
    ]
    held_out_accuracy = f"{results['accuracy']['held_out']:.1%}"
    note = (
        f"In the features of a classifier that is right on {held_out_accuracy} of the held-out digits. "
        f"The sets one by one: {by_set}; pictures and accuracies are the first set's."
    )
    return _table(["Fréchet distance", ""], rows) + "\n\n" + note


def _targets(results: dict) -> str:
    if not results["targets"]:
        return "Targets: not judged, this was a quick run."
    return "Targets:\n" + "\n".join(
        f"- {'met' if met else 'MISSED'}: {target}" for target, met in results["targets"].items()
    )


def _conditions(results: dict) -> str:
    machine, training, sampling = results["hardware"], results["training"], results["sampling"]
    times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results["seconds"].items())
    return "\n".join(
        [
            f"- Machine: {machine['processor']}, threads: {machine['threads']} of {machine['cores']} cores, "
            f"torch {machine['torch']}, flexdit_ext {machine['flexdit_ext']}",
            f"- Training: {training['steps']} steps each, FlexDiT from the dense weights of step "
            f"{training['fork_step']}, batch {training['batch_size']}",
            f"- Sampling: {sampling['steps']} Euler steps, guidance {sampling['cfg_scale']}, "
            "the same noise and labels for both models",
            f"- Seed: {results['seed']}",
            f"- Times: {times}",
        ]
    )
