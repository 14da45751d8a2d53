"""Files that appear whole or not at all, and the two kinds of picture."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.image import imsave
from torch import Tensor

_SMOOTHING = 50  # steps


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`, which is then renamed: no reader ever sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_digit_grid(path: Path, images: Tensor, labels: Tensor, columns: int = 20, zoom: int = 6) -> None:
    """The first `columns` images of every label, one row each; images [n, 1, h, w] in [-1, 1], n labels."""
    rows = [images[labels == label][:columns, 0] for label in labels.unique()]
    columns = min(len(row) for row in rows)
    cells = np.stack([row[:columns].clamp(-1, 1).numpy() for row in rows])  # [rows, columns, h, w]
    cells = np.pad(cells.repeat(zoom, axis=2).repeat(zoom, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    picture = cells.transpose(0, 2, 1, 3).reshape(cells.shape[0] * cells.shape[2], -1)
    write_whole(path, lambda file: imsave(file, picture, cmap="gray", vmin=-1, vmax=1))


def save_loss_curves(path: Path, curves: Mapping[str, tuple[int, Sequence[float]]]) -> None:
    """curves: name -> (first step, losses); a running mean over 50 steps is drawn."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (first_step, losses) in curves.items():
        window = min(_SMOOTHING, max(1, len(losses)))
        means = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(first_step + window + np.arange(len(means)), means, label=name)
    axes.set(xlabel="training step", ylabel=f"flow matching loss, mean of {_SMOOTHING} steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, dpi=120))
    plt.close(figure)
