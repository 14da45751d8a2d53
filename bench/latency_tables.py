"""From the JSON of bench/latency.py to markdown: one line per model, one column per contender."""

from __future__ import annotations

from gpu_tables import asked, at_most, header, left_over, verdict
from harness import table
from latency_loops import COMPILED, DIFFUSERS, EAGER, MODULE, SAMPLER

RIVALS = (MODULE, EAGER, COMPILED, DIFFUSERS)
HEADERS = ["model", "steps", SAMPLER, "its image", *RIVALS, "asked"]
# What Row.targets may ask for: (of a step or an image, of which rival).
RATIOS = {"compiled_ratio": (COMPILED, "the compiled reference"), "module_ratio": (MODULE, "the module's forward")}


def targets(row: dict) -> list[dict]:
    wanted, ours = row["targets"], row["contenders"].get(SAMPLER, {})
    checks = []
    if "step_ms" in wanted:
        checks.append(at_most(ours.get("step_ms"), wanted["step_ms"], "ms a step"))
    if "image_ms" in wanted:
        checks.append(at_most(ours.get("image_ms"), wanted["image_ms"], f"ms for {row['steps']} steps"))
    for name, (rival, what) in RATIOS.items():
        if name in wanted:
            reached = ratio(row, rival)
            checks.append(verdict(f"{wanted[name]}x {what}", reached, reached is not None and reached >= wanted[name]))
    return checks


def ratio(row: dict, rival: str) -> float | None:
    """How many times as fast a step of the Sampler is."""
    ours, other = (row["contenders"].get(name, {}).get("step_ms") for name in (SAMPLER, rival))
    return other / ours if ours and other else None


def ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell(row: dict, rival: str) -> str:
    times = row["contenders"].get(rival)
    if times is None:
        return ""
    if "not_run" in times:
        return "not run"
    text, faster = ms(times["step_ms"]), ratio(row, rival)
    return f"{text} ({faster:.2f}x)" if faster else text


def line(row: dict) -> list[str]:
    ours = row["contenders"].get(SAMPLER, {})
    first = "not run" if "not_run" in ours else ms(ours.get("step_ms"))
    rivals = [cell(row, rival) for rival in RIVALS]
    checks = "; ".join(map(asked, targets(row)))
    return [row["name"], str(row["steps"]), first, ms(ours.get("image_ms")), *rivals, checks]


def left_out(result: dict) -> str:
    names = [(f"{row['name']}, {name}", times) for row in result["rows"] for name, times in row["contenders"].items()]
    reasons = {name: times["not_run"] for name, times in names if "not_run" in times}
    return left_over({"not_run": reasons | result["not_run"]})


def note(result: dict) -> str:
    cuda = "ceilings" in result
    how = "time between two CUDA events around a run's steps by their number" if cuda else "each step's wall time"
    middle = "median over the runs" if cuda else "median over the steps of a run, then over the runs"
    graphs = " (mode reduce-overhead: CUDA graphs)" if cuda else ""
    target = " The times asked for are an H200's." if cuda else ""
    return (
        f"Random weights, bfloat16, one image with guidance (2 samples a step), DDIM. ms a step: {how}, {middle}. "
        "A step is Session.step for the Sampler, for the module its forward of the guided pair alone, else the whole "
        "loop's step: forward, guidance, update. An image: wall time from its request to the latent, all its "
        "modulations included. In brackets: how many times as fast the Sampler's step is. "
        f"torch.compile{graphs} compiles the whole model once for each sparse grid.{target}"
    )


def markdown(result: dict) -> str:
    rows = [line(row) for row in result["rows"]]
    return f"{header(result)}\n\n{note(result)}\n\n" + table(HEADERS, rows) + left_out(result)
