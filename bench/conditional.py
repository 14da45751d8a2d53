"""FlexPixArt and FlexLatte against diffusers' PixArt and Latte: one denoising step, averaged over the schedule.

    python bench/conditional.py                     # on the CPU, float32, 2 threads
    python bench/conditional.py --device cuda       # on a GPU, bfloat16
    python bench/conditional.py --smoke             # tiny models, results to a temporary folder

On the CPU run it on an idle machine with 16 GB of free memory; --rows 'of it' measures a quarter of the blocks alone,
--contenders '^(?!.*compile)' leaves compilation out. Exit code 1: flexdit_ext failed or computed something wrong.
"""

from __future__ import annotations

import statistics
import sys

import conditional_loops
import latency
import torch
from conditional_loops import DENSE, RIVAL, RIVAL_COMPILED, STEPS, Contenders, Row
from conditional_tables import markdown
from gpu_timing import NotRun, reason, relative_error
from latency import Settings
from latency_loops import COMPILED, EAGER, MODULE, SAMPLER

# Relative, of the latents: rounding, which t = 999 multiplies by 157.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SAME = [(DENSE, RIVAL), (RIVAL_COMPILED, RIVAL), (EAGER, MODULE), (SAMPLER, MODULE), (COMPILED, MODULE)]


def measured(row: Row, settings: Settings, targets_later: int) -> dict:
    """One row of the result: times, or why there are none, of every contender."""
    device = settings.device
    loops, images, facts, found = {}, {}, {}, {}
    for name, make in Contenders(row, device, settings.compiler).makers().items():
        if not settings.wants(name):
            continue
        found[name] = {}  # in this order in the result
        try:
            loops[name], images[name], facts[name] = latency.ready(make, settings, settings.limit(name, targets_later))
        except NotRun as error:
            found[name] = {"not_run": reason(error)}
    tolerance = TOLERANCES[conditional_loops.dtype_of(device)]
    for name, like in SAME:
        if name not in images or like not in images:
            continue
        facts[name]["relative_error"] = error = relative_error(images[name].to(images[like].dtype), images[like])
        if not error <= tolerance:  # NaN is wrong, too
            del loops[name]
            found[name] = {"not_run": f"WRONG: relative error {error:.2g} to {like}, allowed {tolerance}"}
    times = latency.take_turns(loops, settings, statistics.mean) if loops else {}
    found |= {name: times[name] | facts[name] for name in times}
    targets = {} if settings.smoke else row.targets.get(device.kind, {})
    return {"name": row.name, "steps": STEPS, "targets": targets, "contenders": found}


def main(argv: list[str] | None = None) -> int:
    arguments = latency.parse(__doc__, argv)
    rows = conditional_loops.smoke_rows() if arguments.smoke else conditional_loops.all_rows()
    return latency.run("conditional", arguments, rows, measured, markdown)


if __name__ == "__main__":
    sys.exit(main())
