"""From the JSON of bench/conditional.py to markdown: one line per contender of a model."""

from __future__ import annotations

from conditional_loops import DENSE, RIVAL
from gpu_tables import asked, header, verdict
from harness import table
from latency_loops import MODULE, SAMPLER
from latency_tables import left_out, ms

HEADERS = ["model", "", "ms a step", "times as fast as diffusers, eager", "asked"]


def step_ms(row: dict, name: str) -> float | None:
    return row["contenders"].get(name, {}).get("step_ms")


def ratio(row: dict, name: str) -> float | None:
    """How many times as fast as the rival's a contender's step is."""
    ours, rival = step_ms(row, name), step_ms(row, RIVAL)
    return rival / ours if ours and rival else None


def targets(row: dict) -> list[dict]:
    """Of the faster of Sampler and module."""
    wanted = row["targets"].get("eager_ratio")
    if wanted is None:
        return []
    reached = max(filter(None, (ratio(row, name) for name in (SAMPLER, MODULE))), default=None)
    return [verdict(f"{wanted}x diffusers, eager", reached, reached is not None and reached >= wanted)]


def lines(row: dict) -> list[list[str]]:
    checks, found = "; ".join(map(asked, targets(row))), []
    for name in row["contenders"]:
        faster = ratio(row, name)
        took = ms(step_ms(row, name)) or "not run"
        first = name == next(iter(row["contenders"]))
        times = f"{faster:.2f}x" if faster else ""
        found.append([row["name"] if first else "", name, took, times, checks if name == MODULE else ""])
    return found


def note(result: dict) -> str:
    dtype = "bfloat16" if "ceilings" in result else "float32"
    return (
        f"Random weights, {dtype}, one sample without guidance. A step is one forward pass and the solver's update, of "
        "the Sampler Session.step; of a FlexDiT the mean over four DDIM steps, one on each of the default schedule's "
        f"grids, then the median over the runs. diffusers and '{DENSE}' compute the dense model. Before measuring "
        "what contenders of the same weights compute is compared."
    )


def markdown(result: dict) -> str:
    rows = [line for row in result["rows"] for line in lines(row)]
    return f"{header(result)}\n\n{note(result)}\n\n" + table(HEADERS, rows) + left_out(result)
