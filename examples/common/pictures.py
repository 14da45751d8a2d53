"""Files that appear whole or not at all, and the picture of the losses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np

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
