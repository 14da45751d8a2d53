"""XL/2 and B/2 on a GPU: forward and training step beside the reference, compiled and not, and dense DiTs.

    python bench/model.py [--budget-s 240] [--rows REGEX] [--contenders REGEX] [--out DIR]
    python bench/model.py --smoke      # a tiny model on the CPU, results to a temporary folder

Rows run in order of importance; what the time budget leaves out is recorded as not run. Exit code 1: flexdit_ext failed
or computed something wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_tables import COMPILED, OURS, model_markdown
from gpu_timing import (
    Budget,
    Device,
    NotRun,
    ceilings,
    clocks,
    environment,
    folder,
    measure,
    reason,
    relative_error,
    result_name,
    time_limit,
)
from harness import bars, save, write
from model_rows import EAGER, POOLED, REDUCED, Contender, Models, Row, all_rows, contenders_of, smoke_rows

TOLERANCE = 0.05  # relative, bfloat16 through 28 blocks against the eager reference in bfloat16
LEAST_S = 5  # a row is not begun with less


class Session:
    """What a run was asked for, what time is left, and what the contenders of a row share."""

    def __init__(self, arguments: argparse.Namespace):
        self.smoke, self.device = arguments.smoke, Device("cpu" if arguments.smoke else "cuda")
        self.budget, self.compile_s = Budget(arguments.budget_s), arguments.compile_s
        self.rounds, self.wanted = 2 if arguments.smoke else arguments.rounds, arguments.contenders
        self.models, self.slowest_compile = Models(self.device), 30.0

    def compiler(self, mode: str) -> dict:
        return {"backend": "eager"} if self.smoke else {"mode": mode}

    def limit(self, name: str, targets_later: int) -> float:
        """Seconds that getting a contender ready may take."""
        left = self.budget.remaining() - LEAST_S
        if name == REDUCED:  # the second compiled rival only once the rows with targets have had their first
            left -= targets_later * self.slowest_compile
        if left <= 1:
            raise NotRun("the time budget was used up" if name != REDUCED else "time was kept for rows with targets")
        return min(left, self.compile_s) if COMPILED in name else left


def memory_mb(contender: Contender, reserved_before: int | None, device: Device) -> float | None:
    """What the contender keeps, plus what a call needs besides: its peak, or the pool of its CUDA graph."""
    if not device.cuda:
        return None
    device.synchronize()
    torch.cuda.empty_cache()
    pool = 0 if reserved_before is None else max(0, device.memory("memory_reserved") - reserved_before)
    torch.cuda.reset_peak_memory_stats()
    before = device.memory()
    contender.run()
    device.synchronize()
    peak = device.memory("max_memory_allocated") - before
    return (contender.held_bytes() + max(peak, pool)) / 1e6


def ready(name: str, make: Callable[[], Contender], session: Session, limit_s: float) -> tuple[Contender, dict]:
    """A contender that has run once. Raises NotRun with torch's reason where it cannot run."""
    device, begin = session.device, time.monotonic()
    if device.cuda:
        torch.cuda.empty_cache()
    reserved = device.memory("memory_reserved") if name in POOLED else None
    try:
        with time_limit(limit_s, "getting ready"):
            contender = make()
            contender.run()
            device.synchronize()
            facts = {"ready_s": time.monotonic() - begin, "memory_mb": memory_mb(contender, reserved, device)}
    except NotRun:
        raise
    except Exception as error:
        raise NotRun(reason(error)) from error
    finally:
        if COMPILED in name:
            session.slowest_compile = max(session.slowest_compile, time.monotonic() - begin)
    return contender, facts


def check(group, contenders: dict[str, Contender]) -> dict[str, float]:
    """Relative error of every contender that computes what the reference does."""
    if EAGER not in contenders:
        return {}
    if hasattr(group, "error"):
        return {OURS: group.error()}
    expected = contenders[EAGER].run().clone()
    return {
        name: relative_error(contender.run(), expected)
        for name, contender in contenders.items()
        if name != EAGER and group.same_as_reference(name)
    }


def measured(row: Row, session: Session, targets_later: int) -> dict:
    """One row of the result: times, or why there are none, of every contender."""
    group = contenders_of(row, session.device, session.models, session.compiler)
    for name in ("ours", "reference"):
        session.models.of(row, name)
    contenders, facts, table = {}, {}, {}
    for name, make in group.makers().items():
        if not re.search(session.wanted, name):
            continue
        table[name] = {}  # in this order in the table
        try:
            contenders[name], facts[name] = ready(name, make, session, session.limit(name, targets_later))
        except NotRun as error:
            table[name] = {"not_run": reason(error)}
    for name, error in check(group, contenders).items():
        facts[name]["relative_error"] = error
        if not error <= TOLERANCE:  # NaN is wrong, too
            del contenders[name]
            table[name] = {"not_run": f"WRONG: relative error {error:.2g}, allowed {TOLERANCE}"}
    runs = {name: contender.run for name, contender in contenders.items()}
    times = measure(runs, session.device, session.rounds, limit_s=4.0) if runs else {}
    table |= {name: times[name] | facts[name] for name in times}
    targets = {} if session.smoke else row.targets
    return {"name": row.name, "batch": row.batch, "targets": targets, "contenders": table}


def run_rows(rows: list[Row], session: Session, result: dict, keep: Callable[[], None]) -> None:
    for i, row in enumerate(rows):
        try:
            session.budget.require(LEAST_S)
            later = sum(bool(other.targets) for other in rows[i + 1 :])
            result["rows"].append(measured(row, session, later))
        except (NotRun, torch.OutOfMemoryError) as error:
            result["not_run"][row.name] = reason(error)
        keep()
        torch._dynamo.reset()
        if session.device.cuda:
            torch.cuda.empty_cache()


def failures(result: dict) -> list[str]:
    """Rows where flexdit_ext failed or was wrong; a row that was not begun for want of time is none."""
    rows = [(row["name"], row["contenders"].get(OURS, {})) for row in result["rows"]]
    return [f"{name}: {times['not_run']}" for name, times in rows if "not_run" in times]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--compile-s", type=float, default=150, help="most seconds for one compilation")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--rows", default="", help="regular expression for rows, such as 'XL/2 256 forward'")
    parser.add_argument("--contenders", default="", help="regular expression for contenders")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args(arguments)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    rows = smoke_rows() if arguments.smoke else all_rows()
    skipped = [row.name for row in rows if not re.search(arguments.rows, row.name)]
    rows = [row for row in rows if row.name not in skipped]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return 0
    session, out = Session(arguments), folder(arguments.out, arguments.smoke)
    device = session.device
    result = {"environment": environment(device), "clocks": {"begin": clocks()}}
    result["ceilings"] = ceilings(device, 1 << 20, 64) if arguments.smoke else ceilings(device)
    result |= {"rows": [], "not_run": {name: f"--rows {arguments.rows}" for name in skipped}}
    name = result_name("model", result["environment"])
    run_rows(rows, session, result, lambda: save(name, result, model_markdown(result), out))
    result["clocks"]["end"] = clocks()
    if result["rows"]:
        bars(result["rows"], out / f"{name}.png")
    write(name, result, model_markdown(result), out)
    for line in failures(result):
        print("FAILED", line, file=sys.stderr)
    return int(bool(failures(result)) or not result["rows"])


if __name__ == "__main__":
    sys.exit(main())
