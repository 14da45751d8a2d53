"""`flexdit plot`: the curves of a run's log as a PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .._files import all_or_nothing, write_file
from .log import LOG_NAME, read_log


def plot(run: Path, target: Path | None = None) -> Path:
    """Loss, loss by timestep, gradient norm and learning rate, images/s of a run's log; returns the PNG's path."""
    source = run / LOG_NAME
    if not source.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no {LOG_NAME}")
    lines = read_log(source)
    if not lines:
        raise ValueError(f"{source} has no lines yet")
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, by_timestep), (gradient, speed) = figure.subplots(2, 2)
    loss.plot(steps, [line["loss"] for line in lines])
    loss.set(title="loss", yscale="log")
    count = len(lines[-1]["loss_by_timestep"])
    for i in range(count):
        label = f"t {1000 * i // count}-{1000 * (i + 1) // count}"
        values = [line["loss_by_timestep"][i] if len(line["loss_by_timestep"]) == count else None for line in lines]
        by_timestep.plot(steps, [np.nan if value is None else value for value in values], label=label, linewidth=1)
    by_timestep.set(title="loss by timestep", yscale="log")
    by_timestep.legend(fontsize="x-small", ncols=2)
    gradient.plot(steps, [line["gradient_norm"] for line in lines], label="gradient norm")
    rate = gradient.twinx()
    rate.plot(steps, [line["learning_rate"] for line in lines], color="tab:orange", linewidth=1)
    gradient.set(title="gradient norm; learning rate (right, orange)", xlabel="step")
    speed.plot(steps, [line["images_per_second"] for line in lines])
    mfu = [line.get("mfu", np.nan) for line in lines]
    if not all(np.isnan(mfu)):
        speed.twinx().plot(steps, mfu, color="tab:orange", linewidth=1)
    speed.set(title="images/s" + ("" if all(np.isnan(mfu)) else "; MFU (right, orange)"), xlabel="step")
    for axes in (loss, by_timestep, gradient, speed):
        axes.grid(alpha=0.3)
    target, file = target or run / "curves.png", io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    with all_or_nothing(target.parent) as folder:
        write_file(folder / target.name, file.getvalue())
    return target
