"""From the JSON of bench/kernels.py and bench/model.py to markdown: targets, tables, README's summary."""

from __future__ import annotations

import json
from pathlib import Path

from harness import machine_line, table

OURS = "flexdit_ext"
COMPILED = "torch.compile"  # in the name of every compiled rival


def fastest(contenders: dict, wanted) -> float | None:
    """Smallest median among the contenders whose name is `wanted`."""
    times = [times["median_ms"] for name, times in contenders.items() if wanted(name) and "median_ms" in times]
    return min(times, default=None)


def verdict(asked: str, reached: float | None, met: bool) -> dict:
    return {"asked": asked, "reached": reached, "met": None if reached is None else met}


def ratio_target(contenders: dict, least: float, wanted, what: str) -> dict:
    """Ours at least `least` times as fast as the fastest wanted rival."""
    ours, rival = contenders.get(OURS, {}).get("median_ms"), fastest(contenders, wanted)
    reached = rival / ours if ours and rival else None
    return verdict(f"{least}x {what}", reached, reached is not None and reached >= least)


def at_most(value: float | None, most: float, unit: str) -> dict:
    return verdict(f"at most {most:g} {unit}", value, value is not None and value <= most)


def at_least(value: float | None, least: float, text: str) -> dict:
    return verdict(text, value, value is not None and value >= least)


def asked(target: dict) -> str:
    if target["met"] is None:
        return f"{target['asked']}: not measured"
    return f"{target['asked']}: {target['reached']:.3g}, {'met' if target['met'] else 'MISSED'}"


def header(result: dict) -> str:
    """Where and when, for results of every device."""
    if "machine" in result:
        return ("SMOKE RUN, no measurement. " if result["smoke"] else "") + machine_line(result["machine"])
    where, ceilings = result["environment"], result["ceilings"]
    begin = result.get("clocks", {}).get("begin", {})
    end = result.get("clocks", {}).get("end", {})
    smoke = "" if where["cuda"] != "none" else "SMOKE RUN ON A CPU, no measurement. "
    text = smoke + (
        f"{where['device']}, driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, {where['date']}, "
        f"commit {where['commit']}. Ceilings of the same run: device copy {ceilings['copy_gb_per_s']:.0f} GB/s (read + "
        f"written), bfloat16 {ceilings['matmul_size']}³ matrix product {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s."
    )
    if end:
        held = begin.get("clocks_held_back", "?"), end.get("clocks_held_back", "?")
        text += (
            f" SM clock {begin.get('clocks.sm', '?')} before, {end.get('clocks.sm', '?')} at the end "
            f"(held back: {held[0]}, {held[1]}), power {end.get('power.draw', '?')} of {end.get('power.limit', '?')}."
        )
    return text


# bench/kernels.py


def share(row: dict, times: dict, ceilings: dict) -> tuple[str, float]:
    """A row's rate as text, and its share of the ceiling."""
    ms = times["median_ms"]
    if row["bound"] == "memory":
        rate = row["bytes"] / ms / 1e6
        return f"{rate:.0f} GB/s", rate / ceilings["copy_gb_per_s"]
    rate = row["flops"] / ms / 1e9
    return f"{rate:.0f} TFLOP/s", rate / ceilings["matmul_tflop_per_s"]


def kernel_target(row: dict, ceilings: dict) -> dict | None:
    """row["target"] is a share of the copy bandwidth for memory-bound ops, else the ratio to the fastest SDPA."""
    if row.get("target") is None:
        return None
    if row["bound"] == "memory":
        times = row["contenders"].get(OURS, {})
        reached = share(row, times, ceilings)[1] if "median_ms" in times else None
        return at_least(reached, row["target"], f"{row['target']:.0%} of the copy")
    return ratio_target(row["contenders"], row["target"], lambda name: name != OURS, "the fastest SDPA")


def kernel_rows(result: dict, only_targets: bool = False) -> list[list[str]]:
    rows = []
    for row in result["rows"]:
        target = kernel_target(row, result["ceilings"])
        if only_targets and target is None:
            continue
        for name, times in row["contenders"].items():
            verdict_text = asked(target) if target and name == OURS else ""
            if "median_ms" in times:
                rate, part = share(row, times, result["ceilings"])
                cells = [f"{times['median_ms'] * 1e3:.1f}", f"{rate} ({part:.0%})", ratio(row, times), verdict_text]
            else:
                cells = ["", "", "", "; ".join(filter(None, [verdict_text, "not run: " + times["not_run"]]))]
            rows.append([row["op"], row["size"], name, *cells])
    return rows


def ratio(row: dict, times: dict) -> str:
    ours = row["contenders"].get(OURS, {}).get("median_ms")
    return f"{times['median_ms'] / ours:.2f}x" if ours else ""


KERNEL_HEADERS = ["op", "size", "contender", "µs", "rate (of the ceiling)", "ratio", "asked"]
KERNEL_NOTE = (
    "bfloat16, medians, cold L2, launch overhead left out. Bytes: each input read once, each output written once; "
    "ratio: how many times as fast flexdit_ext is."
)


def kernel_markdown(result: dict) -> str:
    return f"{header(result)}\n\n{KERNEL_NOTE}\n\n" + table(KERNEL_HEADERS, kernel_rows(result)) + left_over(result)


def left_over(result: dict) -> str:
    return "".join(f"\nNot run: {name} ({why})\n" for name, why in result.get("not_run", {}).items())


# bench/model.py

MODEL_HEADERS = ["what", "contender", "ms", "images/s", "MB", "ratio", "asked"]
MODEL_NOTE = (
    "Medians, launch overhead included. MB: weights and what one call needs besides (a CUDA graph's pool included); "
    "ratio: how many times as fast flexdit_ext is."
)


def model_targets(row: dict) -> list[dict]:
    """row["targets"]: {"ms": most, "images_per_s": least, "compiled_ratio": least}, each optional."""
    wanted, ours = row.get("targets", {}), row["contenders"].get(OURS, {}).get("median_ms")
    checks = []
    if "ms" in wanted:
        checks.append(at_most(ours, wanted["ms"], "ms"))
    if "images_per_s" in wanted:
        rate = row["batch"] / ours * 1e3 if ours else None
        checks.append(at_least(rate, wanted["images_per_s"], f"{wanted['images_per_s']} images/s"))
    if "compiled_ratio" in wanted:
        compiled = lambda name: COMPILED in name  # noqa: E731
        checks.append(ratio_target(row["contenders"], wanted["compiled_ratio"], compiled, "the compiled reference"))
    return checks


def model_rows(result: dict, only_targets: bool = False) -> list[list[str]]:
    rows = []
    for row in result["rows"]:
        targets = model_targets(row)
        if only_targets and not targets:
            continue
        for name, times in row["contenders"].items():
            text = "; ".join(map(asked, targets)) if name == OURS else ""
            if "median_ms" in times:
                ms, memory = times["median_ms"], times.get("memory_mb")
                cells = [f"{ms:.2f}", f"{row['batch'] / ms * 1e3:.0f}", f"{memory:.0f}" if memory else ""]
                cells += [ratio(row, times), text]
            else:
                cells = ["", "", "", "", "; ".join(filter(None, [text, "not run: " + times["not_run"]]))]
            rows.append([row["name"], name, *cells])
    return rows


def model_markdown(result: dict) -> str:
    return f"{header(result)}\n\n{MODEL_NOTE}\n\n" + table(MODEL_HEADERS, model_rows(result)) + left_over(result)


# README.md


def newest(folder: Path, kind: str) -> Path | None:
    """The newest gpu_KIND_*.json, by the date inside."""
    found = [
        (json.loads(path.read_text())["environment"]["date"], path.name) for path in folder.glob(f"gpu_{kind}_*.json")
    ]
    return folder / max(found)[1] if found else None


def readme_section(folder: Path) -> str | None:
    """The rows with targets of the newest results; None where there are none."""
    parts = []
    for kind, headers, rows, note in (
        ("model", MODEL_HEADERS, model_rows, MODEL_NOTE),
        ("kernels", KERNEL_HEADERS, kernel_rows, KERNEL_NOTE),
    ):
        path = newest(folder, kind)
        if path is None:
            continue
        result = json.loads(path.read_text())
        full = f"All rows: [{path.stem}.md](bench/results/{path.stem}.md)."
        text = f"{header(result)}\n\n{note} {full}\n\n" + table(headers, rows(result, only_targets=True))
        if (folder / f"{path.stem}.png").exists():
            text += f"\n![{kind} on {result['environment']['device']}](bench/results/{path.stem}.png)\n"
        parts.append(text)
    return "\n".join(parts) or None
