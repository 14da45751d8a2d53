"""Sample grids of a model in training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._files import arrange, to_pixels
from ..model import FlexDiT
from ..sampling import sample
from .config import TrainingConfig

_ZOOM_BELOW = 32  # pixels: smaller samples are enlarged


@torch.no_grad()
def sample_grid(model: FlexDiT, config: TrainingConfig, decode: Callable[[Tensor], Tensor] | None = None) -> np.ndarray:
    """A row for each of the first classes, uint8 [height, width, 3]; the same noise at every step of training.

    One channel is shown in grey, three as colours in [-1, 1]. Latents that nothing decodes: their first three channels
    are shown as colours, two standard deviations in either direction.
    """
    log = config.log
    classes = min(log.sample_classes, model.config.num_classes)
    labels = torch.arange(classes).repeat_interleave(log.sample_columns)
    guidance = log.sample_cfg_scale if model.config.class_dropout_prob else 1.0
    sampler = "flow" if config.loss == "flow" else "ddim"
    size = max(1, min(len(labels), config.batch_size))
    images = sample(model, labels, log.sample_steps, sampler, guidance, config.seed, batch_size=size)
    if decode is not None:
        images = torch.cat([decode(part) for part in images.split(size)])
    return tile(images.float().cpu(), log.sample_columns)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """[n, C, h, w] -> uint8 [height, width, 3]."""
    channels = images.shape[1]
    if channels not in (1, 3):
        images = images[:, :3] if channels > 3 else images[:, :1]
        images = (images - images.mean()) / (2 * images.std().clamp(min=1e-6))
    zoom = max(1, -(-_ZOOM_BELOW // images.shape[2]))
    pixels = to_pixels(images.nan_to_num().expand(-1, 3, -1, -1))
    return arrange(list(pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)), columns)
