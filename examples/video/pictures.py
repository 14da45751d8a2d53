"""Pictures of sampled clips: animations of all classes, and a strip of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common.pictures import write_whole
from PIL import Image
from torch import Tensor
from video.rendering import NUM_MOTIONS

from flexdit_ext.evaluation.digits import NUM_CLASSES

_FRAME_MS, _PAUSE_MS = 110, 450  # the last frame stays a little


def _tiled(cells: np.ndarray, zoom: int) -> np.ndarray:
    """[rows, columns, h, w] in [-1, 1] to one picture, uint8 [H, W], with a thin line between the cells."""
    pixels = np.rint((cells.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    large = pixels.repeat(zoom, axis=2).repeat(zoom, axis=3)
    framed = np.pad(large, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=90)
    return framed.transpose(0, 2, 1, 3).reshape(framed.shape[0] * framed.shape[2], -1)


def _first_of_each(clips: Tensor, labels: Tensor) -> np.ndarray:
    """The first clip of every class: [digits, motions, frames, h, w]."""
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    return clips[first, 0].unflatten(0, (NUM_CLASSES, NUM_MOTIONS)).numpy()


def save_animations(paths: list[Path], clips: Tensor, labels: Tensor, zoom: int = 4) -> None:
    """The first clip of every class, a row for each motion and a column for each digit; the name's ending, .gif or
    .webp, is the format."""
    cells = _first_of_each(clips, labels)
    frames = [Image.fromarray(_tiled(cells[:, :, k].swapaxes(0, 1), zoom)) for k in range(cells.shape[2])]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_PAUSE_MS]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "lossless": True}
    for path in paths:
        write_whole(path, lambda file: frames[0].save(file, **options))


def save_strip(path: Path, clips: Tensor, labels: Tensor, zoom: int = 3) -> None:
    """Frames from left to right: row m shows motion m of two digits, other ones in every row."""
    cells = _first_of_each(clips, labels)
    rows = [
        np.concatenate([cells[(2 * m) % NUM_CLASSES, m], cells[(2 * m + 1) % NUM_CLASSES, m]])
        for m in range(NUM_MOTIONS)
    ]
    picture = _tiled(np.stack(rows), zoom)
    write_whole(path, lambda file: Image.fromarray(picture).save(file))
