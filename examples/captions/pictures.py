"""Samples with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from common.pictures import write_whole
from torch import Tensor

_COLUMNS = 8


def save_captioned(
    path: Path, images: Tensor, captions: Sequence[str], fit: Sequence[bool] | None = None, dpi: int = 80
) -> None:
    """A grid of images [n, 1, h, w] in [-1, 1], each over its caption; fit: captions that do not fit are red."""
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure, cells = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.7 * rows), squeeze=False)
    for index, cell in enumerate(cells.flat):
        cell.axis("off")
        if index < len(images):
            cell.imshow(images[index, 0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
            color = "black" if fit is None or fit[index] else "tab:red"
            text = "\n".join(textwrap.wrap(captions[index], 17))
            cell.text(0.5, -0.05, text, ha="center", va="top", fontsize=7, color=color, transform=cell.transAxes)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.33 / rows, wspace=0.1, hspace=0.42)
    write_whole(path, lambda file: figure.savefig(file, dpi=dpi))
    plt.close(figure)
