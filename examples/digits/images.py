"""The picture of sampled digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common.pictures import write_whole
from matplotlib.image import imsave
from torch import Tensor


def save_digit_grid(path: Path, images: Tensor, labels: Tensor, columns: int = 20, zoom: int = 6) -> None:
    """The first `columns` images of every label, one row each; images [n, 1, h, w] in [-1, 1], n labels."""
    rows = [images[labels == label][:columns, 0] for label in labels.unique()]
    columns = min(len(row) for row in rows)
    cells = np.stack([row[:columns].clamp(-1, 1).numpy() for row in rows])  # [rows, columns, h, w]
    cells = np.pad(cells.repeat(zoom, axis=2).repeat(zoom, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    picture = cells.transpose(0, 2, 1, 3).reshape(cells.shape[0] * cells.shape[2], -1)
    write_whole(path, lambda file: imsave(file, picture, cmap="gray", vmin=-1, vmax=1))
