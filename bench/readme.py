"""Puts the newest results into README.md: tables between <!-- NAME --> markers, and the speed plot.

python bench/readme.py [--demo out] [--demo-text out/text] [--demo-video out/video]  # first keeps reports and pictures
python bench/readme.py --check          # exit 1 if README.md does not show bench/results/
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_tables
from harness import RESULTS, table

README = RESULTS.parents[1] / "README.md"
PICTURES = README.parent / "docs" / "pictures"
MISSING = "not measured yet\n"
# Of each demo, the files that are kept.
KEPT = {
    "demo": {"report.json": RESULTS / "digits.json", "samples.png": RESULTS / "digits.png"},
    "demo_text": {"report.json": RESULTS / "demo_text.json", "samples.png": PICTURES / "demo_text.png"},
    "demo_video": {
        "report.json": RESULTS / "demo_video.json",
        "frames.png": PICTURES / "demo_video.png",
        "samples.webp": PICTURES / "demo_video.webp",
    },
}


def markdown_section(name: str) -> str:
    """What a benchmark wrote."""
    path = RESULTS / f"{name}.md"
    return path.read_text() if path.exists() else MISSING


def demo_section(name: str, tables: Callable[[dict], str]) -> str:
    """Of a demo's report, on what it was made and its tables."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return MISSING
    report = json.loads(path.read_text())
    return demo_conditions(report) + tables(report)


def digits_tables(report: dict) -> str:
    macs, rates, accuracy = report["macs"], report["images_per_second"], report["accuracy"]
    distance = report["frechet_distance"]
    rows = [
        [
            name,
            f"{macs[key] / 1e6:.1f} M",
            f"{rates[key]:.0f}",
            f"{accuracy[key]:.1%}",
            f"{distance[key]:.2f}",
        ]
        for name, key in (("dense DiT", "dense"), ("FlexDiT", "flexdit"))
    ]
    rows.append(["held-out real digits", "", "", f"{accuracy['held_out']:.1%}", f"{distance['held_out']:.2f}"])
    headers = [
        "",
        "MACs per image and pass",
        "images/s",
        "classifier's accuracy",
        "Fréchet distance to the training digits",
    ]
    return table(headers, rows)


def demo_conditions(report: dict) -> str:
    machine = report["hardware"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, seed {report['seed']}; "
        f"{report['training']['steps']} training steps each, {report['sampling']['steps']} sampling steps, guided.\n\n"
    )


def text_tables(report: dict) -> str:
    macs, rates, fitting = report["macs"], report["images_per_second"], report["fitting"]
    distance = report["frechet_distance"]

    def row(name: str, key: str) -> list[str]:
        shares = [f"{fitting[key][judged]:.0%}" for judged in ("digit", "thickness", "tilt", "width", "properties")]
        cost = [f"{macs[key] / 1e6:.1f} M", f"{rates[key]:.0f}"] if key in macs else ["", ""]
        return [name, *cost, *shares, f"{distance[key]:.2f}" if key in distance else ""]

    rows = [
        row("dense PixArt", "dense"),
        row("FlexPixArt", "flexpixart"),
        row("held-out real digits", "held_out"),
        row("FlexPixArt, captions shuffled", "shuffled"),
        row("FlexPixArt, shuffled within each digit", "shuffled_within_digit"),
    ]
    headers = ["", "MACs", "images/s", "digit", "thickness", "tilt", "width", "all properties", "Fréchet distance"]
    return table(headers, rows)


def video_tables(report: dict) -> str:
    macs, rates, accuracy = report["macs"], report["clips_per_second"], report["accuracy"]
    rows = [
        [
            name,
            f"{macs[key] / 1e6:.1f} M",
            f"{rates[key]:.1f}",
            *(f"{accuracy[key][what]:.1%}" for what in accuracy[key]),
        ]
        for name, key in (("dense Latte", "dense"), ("FlexLatte", "flexlatte"))
    ]
    rows.append(["held-out real clips", "", "", *(f"{share:.1%}" for share in accuracy["held_out"].values())])
    headers = ["", "MACs per clip and pass", "clips/s", "digit seen, per frame", "motion seen", "both, in every frame"]
    strip, animation = (path.relative_to(README.parent) for path in list(KEPT["demo_video"].values())[1:])
    picture = f"[![Frames of FlexLatte's clips, two digits a row]({strip})]({animation})"
    return table(headers, rows) + f"\n{picture} (a click shows them move)"


def gpu_section() -> str:
    return gpu_tables.readme_section(RESULTS) or MISSING


def engine_section(kind: str) -> str:
    """A benchmark's of either device: the CPU's table, then the newest GPU's, each with its plot."""
    gpu, parts = gpu_tables.newest(RESULTS, kind), []
    for stem in filter(None, (f"{kind}_cpu", gpu and gpu.stem)):
        if not (RESULTS / f"{stem}.md").exists():
            continue
        parts.append((RESULTS / f"{stem}.md").read_text().strip())
        if (RESULTS / f"{stem}.png").exists():
            parts.append(f"![{kind}](bench/results/{stem}.png)")
    return "\n\n".join(parts) or MISSING


SECTIONS = {
    "cpu_model": functools.partial(markdown_section, "cpu_model"),
    "latency": functools.partial(engine_section, "latency"),
    "conditional": functools.partial(engine_section, "conditional"),
    "serving": functools.partial(engine_section, "serving"),
    "training": functools.partial(markdown_section, "training"),
    "digits": functools.partial(demo_section, "digits", digits_tables),
    "demo_text": functools.partial(demo_section, "demo_text", text_tables),
    "demo_video": functools.partial(demo_section, "demo_video", video_tables),
    "gpu": gpu_section,
}


def filled(readme: str) -> str:
    for name, section in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, readme, flags=re.DOTALL):
            raise ValueError(f"README.md has no <!-- {name} --> section")
        text = "\n" + section().strip() + "\n\n"
        readme = re.sub(pattern, lambda match, text=text: match[1] + text + match[2], readme, flags=re.DOTALL)
    return readme


def plot() -> None:
    """Bars of the medians of cpu_model.json, one panel per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((RESULTS / "cpu_model.json").read_text())
    figure, panels = plt.subplots(len(result["rows"]), 1, figsize=(7.5, 1.7 * len(result["rows"])), squeeze=False)
    for panel, (title, contenders) in zip(panels[:, 0], result["rows"].items()):
        names = list(contenders)[::-1]
        values = [contenders[name]["median_ms"] for name in names]
        colors = ["tab:green" if name == "flexdit_ext" else "lightgray" for name in names]
        bars = panel.barh(names, values, color=colors)
        panel.bar_label(bars, [f" {value:.0f} ms" for value in values])
        panel.set_title(title, loc="left", fontsize=10)
        panel.margins(x=0.15)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
    figure.tight_layout()
    figure.savefig(RESULTS / "cpu_model.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder that `make demo` wrote")
    parser.add_argument("--demo-text", type=Path, help="folder that `make demo-text` wrote")
    parser.add_argument("--demo-video", type=Path, help="folder that `make demo-video` wrote")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for demo, files in KEPT.items():
        if folder := getattr(arguments, demo):
            for source, kept in files.items():
                shutil.copy(folder / source, kept)
    before = README.read_text()
    after = filled(before)
    if arguments.check:
        return int(before != after)
    if (RESULTS / "cpu_model.json").exists():
        plot()
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
