"""From the JSON of bench/serving.py to markdown and a plot."""

from __future__ import annotations

from pathlib import Path

from gpu_tables import header
from harness import save_figure, table

CONTINUOUS, FIXED, SINGLE = "continuous batching (Session)", "fixed batches", "one at a time"
COLORS = {CONTINUOUS: "tab:green", FIXED: "tab:orange", SINGLE: "gray"}
HEADERS = ["load", "server", "images/s", "p50", "p95", "mean batch", "requests unfinished"]


def note(result: dict) -> str:
    def listed(values) -> str:
        return ", ".join(f"{value:g}" for value in values)

    return (
        f"{result['model']}, random weights, {result['dtype']}. Poisson arrivals (seeded), DDIM with "
        f"{listed(result['steps'])} steps and guidance {listed(result['guidance'])} (1: none), mixed evenly; every "
        f"server gets the same requests at the same times. Load: share of the {result['capacity']:.3g} images/s that "
        f"continuous batching gives when all requests are there at once. At most {result['max_batch']} advance "
        f"together. Fixed batches begin when {result['max_batch']} wait or the oldest has waited "
        f"{result['timeout_s'] * 1e3:.0f} ms, and only when all of the batch before have finished; each image is given "
        "out when it is done. Latency: from arrival to latent; unfinished requests count as slower than all others. "
        "Mean batch: requests per pass of the model."
    )


def seconds(value: float | None) -> str:
    return "beyond the run" if value is None else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def lines(result: dict) -> list[list[str]]:
    made = []
    for row in result["rows"]:
        load = f"{row['load']:.0%}, {row['rate']:.3g} requests/s"
        for name, run in row["servers"].items():
            if "not_run" in run:
                made.append([load, name, "not run: " + run["not_run"], "", "", "", ""])
                continue
            cells = [f"{run['images_per_s']:.3g}", seconds(run["p50_s"]), seconds(run["p95_s"])]
            made.append([load, name, *cells, f"{run['mean_batch']:.1f}", f"{run['unfinished']} of {row['requests']}"])
    return made


def markdown(result: dict) -> str:
    return f"{header(result)}\n\n{note(result)}\n\n" + table(HEADERS, lines(result))


def plot(result: dict, path: Path) -> None:
    """Latency over the load: p50 as a broken line, p95 as a full one, one colour for each server."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4))
    for name, color in COLORS.items():
        for key, style in (("p50_s", "--"), ("p95_s", "-")):
            runs = [(row["load"], row["servers"].get(name, {}).get(key)) for row in result["rows"]]
            points = [(load * 100, value) for load, value in runs if value is not None]
            label = f"{name}, {key[:3]}"
            panel.plot(*(zip(*points) if points else ([], [])), style, marker="o", color=color, label=label)
    panel.set_yscale("log")
    panel.set_xlabel(f"load, % of {result['capacity']:.3g} images/s")
    panel.set_ylabel("latency, s")
    panel.set_title(result["model"], loc="left", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
