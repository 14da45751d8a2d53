"""Draws docs/pictures from the library's own numbers: python docs/pictures.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np

from flexdit_ext import _C, FlexDiTConfig, TokenLayout
from flexdit_ext.schedule import DensitySchedule

CONFIG = FlexDiTConfig.preset("XL/2", image_size=256)
DENSE = FlexDiTConfig.preset("XL/2", image_size=256, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=28)
SCHEDULE = CONFIG.density_schedule
COLOURS = ["#d95f0e", "#fe9929", "#41b6c4", "#225ea8"]  # data to noise


def windows(length: int, count: int) -> list[tuple[int, int]]:
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def token_grids(figure) -> None:
    """For every segment the sparse tokens' windows on the dense grid, and the side over the timesteps."""
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.8))
    ends = [*SCHEDULE.begins[1:], SCHEDULE.num_timesteps]
    side = CONFIG.dense_grid[0]
    segments = list(zip(SCHEDULE.grids, SCHEDULE.begins, ends, COLOURS))[::-1]  # noise first
    for axes, (grid, begin, end, colour) in zip(top.subplots(1, len(segments)), segments):
        for y0, y1 in windows(side, grid[0]):
            for x0, x1 in windows(side, grid[1]):
                box = (x0 + 0.12, y0 + 0.12), x1 - x0 - 0.24, y1 - y0 - 0.24
                axes.add_patch(plt.Rectangle(*box, facecolor=colour, alpha=0.35, edgecolor=colour))
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=range(side + 1), yticks=range(side + 1))
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.grid(alpha=0.25)
        axes.set_title(f"t = {end} to {begin}\n{grid[0]}×{grid[1]} = {grid[0] * grid[1]} of {side * side}", fontsize=10)
    axes, steps = bottom.subplots(), np.arange(0, 1001)
    continuous = DensitySchedule.continuous(0.61, 0.86, CONFIG.dense_grid)
    axes.step(steps, [np.prod(continuous.grid(int(t))) for t in steps], where="post", color="grey", lw=1,
              label="the continuous rate, r = 0.61 to 0.86")  # fmt: skip
    axes.step(steps, [np.prod(SCHEDULE.grid(int(t))) for t in steps], where="post", color="black",
              label="in four segments, as trained")  # fmt: skip
    axes.set(xlim=(1000, 0), ylim=(0, 110), xlabel="timestep t: noise on the left, data on the right",
             ylabel="sparse tokens")  # fmt: skip
    axes.legend(loc="upper left", frameon=False)


def block_kinds() -> list[str]:
    generation, sparse, recovery, dense = CONFIG.sdtm_blocks
    module = ["generation"] * generation + ["sparse"] * sparse + ["recovery"] * recovery + ["dense"] * dense
    return ["pooling"] * CONFIG.num_pooling_blocks + module * CONFIG.num_sdtm + ["dense"] * CONFIG.num_dense_blocks


def blocks(figure) -> None:
    """Tokens that each block computes on, at both ends of the schedule."""
    axes, kinds = figure.subplots(), block_kinds()
    dense = int(np.prod(CONFIG.dense_grid))
    colour = {
        "pooling": "#7fcdbb",
        "generation": "#fe9929",
        "sparse": "#d95f0e",
        "recovery": "#a6bddb",
        "dense": "#225ea8",
    }
    for i, kind in enumerate(kinds):
        is_sparse = kind in ("generation", "sparse")
        tokens = int(np.prod(SCHEDULE.grids[0])) if is_sparse else dense
        axes.bar(i + 1, tokens, color=colour[kind], alpha=0.45 if is_sparse else 1)
        if is_sparse:
            axes.bar(i + 1, int(np.prod(SCHEDULE.grids[-1])), color=colour[kind])
    words = {
        "pooling": "pooling: the mean in place of attention",
        "generation": "generation: sparse tokens read the dense ones",
        "sparse": "sparse (pale: near data, full: near noise)",
        "recovery": "recovery: dense tokens read the sparse ones",
        "dense": "dense: a DiT block",
    }
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colour[kind]) for kind in words], words.values(),
                loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)  # fmt: skip
    axes.set(xlabel="block", ylabel="tokens", xlim=(0, len(kinds) + 1), xticks=range(1, len(kinds) + 1, 3))


def macs(figure) -> None:
    """Multiply-accumulates of a forward pass over the timesteps."""
    axes, steps = figure.subplots(), np.arange(0, 1001)
    costs = {grid: _C.model_macs(CONFIG.core, grid) / 1e9 for grid in SCHEDULE.grids}
    axes.axhline(_C.model_macs(DENSE.core, (1, 1)) / 1e9, color="grey", label="dense DiT-XL/2")
    axes.step(steps, [costs[SCHEDULE.grid(int(t))] for t in steps], where="post", color="#d95f0e", label="FlexDiT-XL/2")
    axes.set(xlim=(1000, 0), ylim=(0, None), xlabel="timestep t", ylabel="GMACs of an image and step")
    axes.legend(frameon=False, loc="lower left")


def ragged(figure) -> None:
    """The packed rows of four samples, each at its own timestep."""
    axes, timesteps = figure.subplots(), (950, 600, 300, 40)
    layouts = {
        "dense tokens": TokenLayout([CONFIG.dense_grid] * 4),
        "sparse tokens": TokenLayout([SCHEDULE.grid(t) for t in timesteps]),
    }
    for line, layout in enumerate(layouts.values()):
        begins = layout.table[:, 0].tolist()
        for i, t in enumerate(timesteps):
            length = begins[i + 1] - begins[i]
            axes.barh(-line, length, left=begins[i], height=0.6, color=COLOURS[3 - i], edgecolor="white", linewidth=2)
            text = f"t = {t}" if line == 0 else f"{length}"
            axes.text(begins[i] + length / 2, -line, text, ha="center", va="center", color="white", fontsize=9)
        axes.text(begins[-1] + 8, -line, f"{begins[-1]} rows", va="center", fontsize=9)
    axes.set(
        yticks=[0, -1], yticklabels=list(layouts), xlabel="row of the packed buffer", xlim=(0, 1180), ylim=(-1.5, 0.5)
    )
    axes.spines[["top", "right", "left"]].set_visible(False)


PICTURES = {"token_grids": (token_grids, (9, 5.2)), "blocks": (blocks, (9, 4.2)), "macs": (macs, (9, 3)),
            "ragged": (ragged, (9, 1.9))}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in PICTURES.items():
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / f".{name}.png", dpi=110)
        (folder / f".{name}.png").replace(folder / f"{name}.png")
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures"))
