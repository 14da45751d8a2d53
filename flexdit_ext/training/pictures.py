"""Sample grids of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._files import arrange, to_pixels
from ._samples import Samples
from .config import TrainingConfig
from .families import Family

_ZOOM_BELOW = 32  # pixels: smaller samples are enlarged
_STRIP = 4  # frames of a clip in the still picture
FRAMES_PER_SECOND = 8
_MOST_PIXELS = 16383  # a side of a WebP


class Pictures(NamedTuple):
    """A sample grid, uint8 [height, width, 3], a clip in it as a strip of some of its frames; and of clips the grid at
    every frame, [F, height, width, 3], as much of it as a WebP can hold."""

    still: np.ndarray
    frames: np.ndarray | None = None


def shown_conditions(family: Family, data: Samples, config, count: int) -> dict[str, Tensor]:
    """What the rows of a sample grid show, [rows, ...] by the model's arguments: the first classes; of a model that
    takes more than labels, samples of the data at equal distances."""
    if family.conditions(config) == ("y",):
        return {"y": torch.arange(min(count, config.num_classes))}
    count = min(count, len(data))
    return data.__getitems__([i * len(data) // count for i in range(count)])[1]


@torch.no_grad()
def sample_grid(
    family: Family,
    model: nn.Module,
    shown: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    config: TrainingConfig,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Pictures:
    """A row for each of the conditions `shown`; the same noise at every step of training. null: what stands for no
    condition.

    One channel is shown in grey, three as colours in [-1, 1]. Latents that nothing decodes: their first three channels
    are shown as colours, two standard deviations in either direction.
    """
    log = config.log
    device = next(model.parameters()).device
    shown = {name: value.repeat_interleave(log.sample_columns, 0).to(device) for name, value in shown.items()}
    total = len(next(iter(shown.values())))
    size = max(1, min(total, config.batch_size))
    samples = family.sample(
        model,
        shown,
        {name: value.to(device) for name, value in null.items()},
        log.sample_cfg_scale,
        steps=log.sample_steps,
        sampler="flow" if config.loss == "flow" else "ddim",
        seed=config.seed,
        batch_size=size,
    )
    clips = samples.dim() == 5
    images = samples.transpose(1, 2).flatten(0, 1) if clips else samples
    if decode is not None:
        images = torch.cat([decode(part) for part in images.split(size)])
    images = images.float().cpu()
    if clips:
        return tile_clips(images.unflatten(0, (total, -1)), log.sample_columns)
    return tile(images, log.sample_columns)


def tile(images: Tensor, columns: int) -> Pictures:
    """[n, C, h, w] in rows of `columns`."""
    return Pictures(arrange(list(_pixels(images)), columns))


def tile_clips(clips: Tensor, columns: int) -> Pictures:
    """[n, F, C, h, w] in rows of `columns`."""
    count, frames = clips.shape[:2]
    pixels = _pixels(clips.flatten(0, 1))
    pixels = pixels.reshape(count, frames, *pixels.shape[1:])
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, _STRIP)).round().astype(int))
    strips = [arrange(list(clip[chosen]), len(chosen), gap=1) for clip in pixels]
    moving = np.stack([arrange(list(pixels[:, i]), columns) for i in range(frames)])
    return Pictures(arrange(strips, columns), moving[:, :_MOST_PIXELS, :_MOST_PIXELS])


def _pixels(images: Tensor) -> np.ndarray:
    """[n, C, h, w] as uint8 [n, height, width, 3]."""
    channels = images.shape[1]
    if channels not in (1, 3):
        images = images[:, :3] if channels > 3 else images[:, :1]
        images = (images - images.mean()) / (2 * images.std().clamp(min=1e-6))
    zoom = max(1, -(-_ZOOM_BELOW // images.shape[2]))
    pixels = to_pixels(images.nan_to_num().expand(-1, 3, -1, -1))
    return pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
