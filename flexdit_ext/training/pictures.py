"""Sample grids of a model in training, and files that appear whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model import FlexDiT
from ..sampling import sample
from .config import TrainingConfig

_ZOOM_BELOW = 32  # pixels: smaller samples are enlarged


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary file beside `path`, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        write(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def sample_grid(model: FlexDiT, config: TrainingConfig) -> np.ndarray:
    """A row for each of the first classes, uint8 [height, width, 3]; the same noise at every step of training.

    One channel is shown in grey, three as colours in [-1, 1]. Latents of more channels are not decoded: their first
    three are shown as colours, two standard deviations in either direction.
    """
    log = config.log
    classes = min(log.sample_classes, model.config.num_classes)
    labels = torch.arange(classes).repeat_interleave(log.sample_columns)
    guidance = log.sample_cfg_scale if model.config.class_dropout_prob else 1.0
    sampler = "flow" if config.loss == "flow" else "ddim"
    size = max(1, min(len(labels), config.batch_size))
    images = sample(model, labels, log.sample_steps, sampler, guidance, config.seed, batch_size=size)
    return tile(images.float().cpu(), log.sample_columns)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """[n, C, h, w] -> uint8 [rows h, columns w, 3], with borders."""
    channels = images.shape[1]
    if channels == 2 or channels > 3:
        images = images[:, :3] if channels > 3 else images[:, :1]
        images = (images - images.mean()) / (2 * images.std().clamp(min=1e-6))
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    pixels = ((images.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    zoom = max(1, -(-_ZOOM_BELOW // images.shape[2]))
    pixels = pixels.repeat(zoom, axis=2).repeat(zoom, axis=3)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = pixels.reshape(-1, columns, *pixels.shape[1:])  # [rows, columns, 3, h, w]
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 4, 2).reshape(rows.shape[0] * rows.shape[3], -1, 3))


def save_png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    write_whole(path, lambda staged: Image.fromarray(pixels).save(staged, format="PNG"))
