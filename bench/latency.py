"""Latency of one guided image, per step and per image: the Sampler, the module, the reference, diffusers, in one run.

    python bench/latency.py                      # XL/2 at 256 and 512 on the CPU, bfloat16, 2 threads
    python bench/latency.py --device cuda        # on a GPU
    python bench/latency.py --smoke              # a tiny model, results to a temporary folder

Rows run in order of importance; what the time budget leaves out is recorded as not run. On the CPU run it on an idle
machine with 10 GB of free memory. Exit code 1: flexdit_ext failed or computed something wrong.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_timing import (
    Budget,
    Device,
    NotRun,
    clocks,
    conditions,
    folder,
    reason,
    relative_error,
    result_file,
    time_limit,
)
from harness import bars, save, write
from latency_loops import COMPILED, EAGER, MODULE, SAMPLER, Contenders, Loop, Row, all_rows, smoke_rows
from latency_tables import markdown

TOLERANCE = 0.1  # relative, of the image: bfloat16 rounding, amplified by guidance, against the eager reference
LEAST_S = 10  # a row is not begun with less
KEPT_S = {"cuda": 30, "cpu": 60}  # for what a later row with targets has beside its compilation


class Settings:
    """What a run was asked for and what time is left."""

    def __init__(self, arguments: argparse.Namespace):
        self.smoke, self.device = arguments.smoke, Device(arguments.device)
        self.budget, self.compile_s, self.row_s = Budget(arguments.budget_s), arguments.compile_s, arguments.row_s
        self.rounds, self.wanted, self.steps = arguments.rounds, arguments.contenders, arguments.steps

    @property
    def compiler(self) -> dict:
        if self.smoke:
            return {"backend": "eager"}
        return {"mode": "reduce-overhead"} if self.device.cuda else {}

    def steps_of(self, row: Row) -> int:
        return self.steps or (50 if self.device.cuda else row.cpu_steps)

    def wants(self, name: str) -> bool:
        return bool(re.search(self.wanted, name))

    def limit(self, name: str, targets_later: int) -> float:
        """Seconds that getting a contender ready may take; the measurement needs some after it."""
        left = self.budget.remaining() - min(self.row_s, LEAST_S)
        compiled = "torch.compile" in name
        if compiled:
            left -= targets_later * KEPT_S[self.device.kind]
        if left <= 1:
            raise NotRun("the time budget was used up" if not targets_later else "time was kept for rows with targets")
        return min(left, self.compile_s) if compiled else left


def ready(make: Callable[[], Loop], settings: Settings, limit_s: float) -> tuple[Loop, torch.Tensor | None, dict]:
    """A contender that has sampled one image, and this image. Raises NotRun with the reason where it cannot run."""
    begin = time.monotonic()
    try:
        with time_limit(limit_s, "getting ready"):
            loop = make()
            image, _ = loop.run(settings.device)
    except NotRun:
        raise
    except Exception as error:
        raise NotRun(reason(error)) from error
    image = None if image is None else image.clone()
    return loop, image, {"ready_s": time.monotonic() - begin}


def take_turns(
    loops: dict[str, Loop], settings: Settings, middle: Callable[[list[float]], float] = statistics.median
) -> dict[str, dict]:
    """Times of every contender over its runs, in alternating order; at least two runs, unless the budget ends.

    middle: of a run's steps."""
    runs: dict[str, list[dict]] = {name: [] for name in loops}
    begin, left_s = time.monotonic(), settings.budget.remaining()
    gc.collect()
    gc.disable()
    try:
        for turn in range(settings.rounds):
            allowed_s = left_s if turn == 1 else min(left_s, settings.row_s)
            if turn and (time.monotonic() - begin) * (turn + 1) / turn > allowed_s:
                break
            for name in list(loops) if turn % 2 == 0 else reversed(list(loops)):
                runs[name].append(loops[name].run(settings.device)[1])
    finally:
        gc.enable()
    return {name: summary(loops[name], values, middle) for name, values in runs.items()}


def summary(loop: Loop, runs: list[dict], middle: Callable[[list[float]], float]) -> dict:
    times = {
        "step_ms": statistics.median(middle(run["steps_ms"]) for run in runs),
        "steps_ms": [run["steps_ms"] for run in runs],
        "runs": len(runs),
    }
    if loop.makes_images:
        times["image_ms"] = statistics.median(run["image_ms"] for run in runs)
    return times


def measured(row: Row, settings: Settings, targets_later: int) -> dict:
    """One row of the result: times, or why there are none, of every contender."""
    device, steps = settings.device, settings.steps_of(row)
    loops, images, facts, table = {}, {}, {}, {}
    for name, make in Contenders(row, steps, device, settings.compiler).makers().items():
        if not settings.wants(name):
            continue
        table[name] = {}  # in this order in the result
        try:
            loops[name], images[name], facts[name] = ready(make, settings, settings.limit(name, targets_later))
        except NotRun as error:
            table[name] = {"not_run": reason(error)}
    for name in (SAMPLER, COMPILED):
        if images.get(EAGER) is None or images.get(name) is None:
            continue
        facts[name]["relative_error"] = error = relative_error(images[name], images[EAGER])
        if not error <= TOLERANCE:  # NaN is wrong, too
            del loops[name]
            table[name] = {"not_run": f"WRONG: relative error {error:.2g}, allowed {TOLERANCE}"}
    times = take_turns(loops, settings) if loops else {}
    table |= {name: times[name] | facts[name] for name in times}
    targets = {} if settings.smoke else row.targets.get(device.kind, {})
    if steps != 50:
        targets = {name: bound for name, bound in targets.items() if name != "image_ms"}
    return {"name": row.name, "steps": steps, "targets": targets, "contenders": table}


def run_rows(rows: list, measured: Callable, settings: Settings, result: dict, keep: Callable[[], None]) -> None:
    for i, row in enumerate(rows):
        try:
            settings.budget.require(LEAST_S)
            later = sum(settings.device.kind in other.targets for other in rows[i + 1 :])
            result["rows"].append(measured(row, settings, later))
        except (NotRun, torch.OutOfMemoryError, MemoryError) as error:
            result["not_run"][row.name] = reason(error)
        keep()
        torch._dynamo.reset()
        gc.collect()  # modules hold themselves in cycles, and the next row wants their memory
        if settings.device.cuda:
            torch.cuda.empty_cache()


def failures(result: dict) -> list[str]:
    """Rows where flexdit_ext failed or was wrong; a row that was not begun for want of time is none."""
    pairs = [
        (row["name"], name, row["contenders"].get(name, {})) for row in result["rows"] for name in (SAMPLER, MODULE)
    ]
    return [f"{row}, {name}: {times['not_run']}" for row, name, times in pairs if "not_run" in times]


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--budget-s", type=float, help="default: 900 on the CPU, 240 on a GPU")
    parser.add_argument("--compile-s", type=float, default=240, help="most seconds for a row's compilations")
    parser.add_argument("--row-s", type=float, help="of measuring a row; default: 45 on the CPU, 6 on a GPU")
    parser.add_argument("--rounds", type=int, default=20, help="most images of every contender")
    parser.add_argument("--steps", type=int, help="DDIM steps; default: 50 on a GPU, 4 or 8 on the CPU")
    parser.add_argument("--rows", default="", help="regular expression for rows, such as 'XL/2 256'")
    parser.add_argument("--contenders", default="", help="regular expression for contenders")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--smoke", action="store_true")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1 or (parsed.steps is not None and parsed.steps < 1) or parsed.threads < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    if parsed.smoke:
        parsed.rounds = min(parsed.rounds, 2)
    cuda = parsed.device == "cuda"
    parsed.budget_s = parsed.budget_s if parsed.budget_s is not None else 240 if cuda else 900
    parsed.row_s = parsed.row_s if parsed.row_s is not None else 6 if cuda else 45
    return parsed


def run(
    kind: str,
    arguments: argparse.Namespace,
    rows: list,
    measured: Callable[..., dict],
    markdown: Callable[[dict], str],
) -> int:
    """Measures the rows and writes KIND_cpu, or on a GPU gpu_KIND_...; the exit code."""
    skipped = [row.name for row in rows if not re.search(arguments.rows, row.name)]
    rows = [row for row in rows if row.name not in skipped]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return 0
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    settings, out = Settings(arguments), folder(arguments.out, arguments.smoke)
    result = conditions(settings.device, settings.smoke)
    result |= {"rows": [], "not_run": {name: f"--rows {arguments.rows}" for name in skipped}}
    name = result_file(kind, result)
    run_rows(rows, measured, settings, result, lambda: save(name, result, markdown(result), out))
    if settings.device.cuda:
        result["clocks"]["end"] = clocks()
    if result["rows"]:
        bars(result["rows"], out / f"{name}.png", "step_ms")
    write(name, result, markdown(result), out)
    for line in failures(result):
        print("FAILED", line, file=sys.stderr)
    return int(bool(failures(result)) or not result["rows"])


def main(argv: list[str] | None = None) -> int:
    arguments = parse(__doc__, argv)
    return run("latency", arguments, smoke_rows() if arguments.smoke else all_rows(), measured, markdown)


if __name__ == "__main__":
    sys.exit(main())
