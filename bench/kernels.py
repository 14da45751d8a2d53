"""Every public op and its backward on a GPU, in bfloat16, beside its rivals and the ceilings of the same run.

    python bench/kernels.py [--budget-s 120] [--only REGEX] [--no-compile] [--out DIR]
    python bench/kernels.py --smoke      # tiny sizes on the CPU, results to a temporary folder

Cases run in order of importance; what the time budget leaves out is recorded as not run. Exit code 1: flexdit_ext
failed or computed something wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config
from gpu_tables import COMPILED, OURS, kernel_markdown
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
from harness import save, write
from kernel_cases import LARGE, Case, all_cases, smoke_cases

DTYPE = torch.bfloat16
TOLERANCE = 0.02  # relative, against the reference in float32
TUNED = f"reference, {COMPILED} max-autotune"
COMPILE_SHARE = 0.6  # of the time budget; the rest is for measuring
Results = list[torch.Tensor]


class Options:
    """What a run was asked for, and how much time is left."""

    def __init__(self, arguments: argparse.Namespace):
        self.device = Device("cpu" if arguments.smoke else "cuda")
        self.compiles, self.rounds = not arguments.no_compile, 2 if arguments.smoke else arguments.rounds
        # Launch overhead is left out of the times, so CUDA graphs would change nothing here.
        compiler = {"backend": "aot_eager"} if arguments.smoke else {"mode": "max-autotune-no-cudagraphs"}
        torch._functorch.config.donated_buffer = False  # backward runs many times on one graph
        self.compile = lambda function: torch.compile(function, dynamic=False, **compiler)
        self.budget = Budget(arguments.budget_s)
        self.compile_seconds = COMPILE_SHARE * arguments.budget_s


def forward_of(function: Callable, tensors: Results) -> Callable[[], Results]:
    def run():
        with torch.no_grad():
            return [function(*tensors)]

    return run


def backward_of(function: Callable, tensors: Results) -> Callable[[], Results]:
    """The backward pass alone: forward has run once, its graph is kept."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    generator = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
    return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))


def error_of(actual: Results, expected: Results) -> float:
    return max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))


def prepared(function: Callable, make: Callable, tensors: Results, expected: Results) -> Callable:
    """A contender that has run once and was right. Raises NotRun with torch's reason where it cannot run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = make(function, tensors)
            actual = run()
        except NotRun:
            raise
        except Exception as error:
            said = [str(warning.message).split(" (Triggered")[0] for warning in caught]
            raise NotRun("; ".join([reason(error), *said])[:300].replace("|", "/").replace("\n", " ")) from error
    error = error_of(actual, expected)
    if not error <= TOLERANCE:  # NaN is wrong, too
        raise NotRun(f"WRONG: relative error {error:.2g}, allowed {TOLERANCE}")
    return run


def compiled(case: Case, make: Callable, tensors: Results, expected: Results, options: Options) -> Callable:
    if not options.compiles:
        raise NotRun("--no-compile")
    allowed = min(options.compile_seconds, options.budget.remaining())
    if allowed <= 1:
        raise NotRun("the time budget for compiling was used up")
    begin = time.monotonic()
    try:
        with time_limit(allowed, "compiling"):
            return prepared(options.compile(case.compiled), make, tensors, expected)
    finally:
        options.compile_seconds -= time.monotonic() - begin


def measured(case: Case, backward: bool, options: Options) -> dict:
    """One row of the result: times, or why there are none, of every contender."""
    device, make = options.device, backward_of if backward else forward_of
    tensors = case.tensors(device.kind, DTYPE)
    exact = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
    expected = make(case.compiled, exact)()
    functions = {OURS: case.ours(device.kind), **case.rivals}
    makers = {name: partial(prepared, function, make, tensors, expected) for name, function in functions.items()}
    makers[TUNED] = partial(compiled, case, make, tensors, expected, options)
    runs, contenders = {}, {}
    for name, maker in makers.items():
        contenders[name] = {}  # in this order in the table
        try:
            runs[name] = maker()
        except NotRun as error:
            contenders[name] = {"not_run": reason(error)}
    del exact, expected
    if runs:
        contenders |= measure(runs, device, options.rounds, hide_launch=True, limit_s=1.0)
    return {
        "op": case.op + (" backward" if backward else ""),
        "size": case.size,
        "bound": "memory" if case.memory_bound else "compute",
        "bytes": case.bytes(backward),
        "flops": case.backward_flops if backward else case.flops,
        "target": target_of(case, device),
        "contenders": contenders,
    }


def target_of(case: Case, device: Device) -> float | None:
    """The bandwidth is asked of large tensors; nothing is asked of a smoke run."""
    applies = device.cuda and (not case.memory_bound or case.largest >= LARGE)
    return case.target if applies else None


def passes(case: Case) -> list[bool]:
    return [False, True] if case.differentiable else [False]


def run_cases(cases: list[Case], options: Options, result: dict, keep: Callable[[], None]) -> None:
    for case in cases:
        for backward in passes(case):
            name = f"{case.op}{' backward' if backward else ''}, {case.size}"
            try:
                options.budget.require(1)
                result["rows"].append(measured(case, backward, options))
            except (NotRun, torch.OutOfMemoryError) as error:
                result["not_run"][name] = reason(error)
            keep()
        torch._dynamo.reset()
        if options.device.cuda:
            torch.cuda.empty_cache()


def plot(result: dict, path: Path) -> None:
    """Share of the ceiling of ours and of the fastest rival, one bar pair per op at its largest size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from gpu_tables import fastest, share

    largest = {}
    for row in result["rows"]:
        if row["bytes"] >= largest.get(row["op"], row)["bytes"]:
            largest[row["op"]] = row
    rows = list(largest.values())[::-1]
    figure, panel = plt.subplots(figsize=(8.5, 1 + 0.42 * len(rows)))
    for offset, label, wanted, color in (
        (0.2, "flexdit_ext", lambda name: name == OURS, "tab:green"),
        (-0.2, "fastest rival", lambda name: name != OURS, "lightgray"),
    ):
        times = [fastest(row["contenders"], wanted) for row in rows]
        shares = [
            share(row, {"median_ms": ms}, result["ceilings"])[1] * 100 if ms else 0 for row, ms in zip(rows, times)
        ]
        bars = panel.barh([i + offset for i in range(len(rows))], shares, 0.38, label=label, color=color)
        panel.bar_label(bars, [f" {value:.0f}%" if value else " not run" for value in shares], fontsize=7)
    panel.set_yticks(range(len(rows)), [f"{row['op']}\n{row['size']}" for row in rows], fontsize=7)
    panel.set_xlabel(
        "% of the device copy (memory-bound) or of cuBLAS's matrix product (compute-bound) of the same run"
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def failures(result: dict) -> list[str]:
    """Rows where flexdit_ext did not run or was wrong."""
    rows = [(f"{row['op']}, {row['size']}", row["contenders"].get(OURS, {})) for row in result["rows"]]
    return [f"{name}: {times['not_run']}" for name, times in rows if "not_run" in times]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", default="", help="regular expression for 'op, size'")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args(arguments)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    options = Options(arguments)
    device, out = options.device, folder(arguments.out, arguments.smoke)
    cases = smoke_cases() if arguments.smoke else all_cases()
    cases = [case for case in cases if re.search(arguments.only, f"{case.op}, {case.size}")]
    result = {"environment": environment(device), "clocks": {"begin": clocks()}}
    result["ceilings"] = ceilings(device, 1 << 20, 64) if arguments.smoke else ceilings(device)
    result |= {"rows": [], "not_run": {}}
    name = result_name("kernels", result["environment"])
    run_cases(cases, options, result, lambda: save(name, result, kernel_markdown(result), out))
    result["clocks"]["end"] = clocks()
    if result["rows"]:
        plot(result, out / f"{name}.png")
    write(name, result, kernel_markdown(result), out)
    for line in failures(result):
        print("FAILED", line, file=sys.stderr)
    return int(bool(failures(result)) or not result["rows"])


if __name__ == "__main__":
    sys.exit(main())
