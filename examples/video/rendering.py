"""Clips of real digits that move: scikit-learn's 8x8 digits, drawn into larger frames between the pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexdit_ext.evaluation.digits import IMAGE_SIZE, NUM_CLASSES

NUM_FRAMES = 8
FRAME_SIZE = 12
# What a motion changes: (x, y, angle), y downwards, the angle clockwise.
MOTIONS = {
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "clockwise": (0, 0, 1),
    "counter-clockwise": (0, 0, -1),
}
NUM_MOTIONS = len(MOTIONS)
NUM_LABELS = NUM_CLASSES * NUM_MOTIONS  # label = digit * NUM_MOTIONS + motion
_SPEEDS = (0.4, 0.55)  # pixels a frame
_TURN = math.radians(20)  # at a speed of one pixel a frame
_SPREAD, _SPREAD_ALONG = 1.0, 0.5  # of the path's middle around the frame's; the latter in the direction of the motion


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(digits, motions) of labels, each [n]."""
    return labels // NUM_MOTIONS, labels % NUM_MOTIONS


def draw_paths(motions: Tensor, generator: torch.Generator) -> Tensor:
    """Random paths [n, frames, 3] of (x, y, angle): pixels off the frame's middle, radians; motions int64 [n].

    A path is symmetric in time: backwards it is the path of the opposite motion.
    """
    random = torch.rand(len(motions), 3, generator=generator)
    directions = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motions]
    slowest, fastest = _SPEEDS
    speeds = slowest + (fastest - slowest) * random[:, 2:]
    velocities = directions * speeds * torch.tensor([1.0, 1.0, _TURN])
    spread = torch.where(directions[:, :2] == 0, _SPREAD, _SPREAD_ALONG)
    middles = F.pad((2 * random[:, :2] - 1) * spread, (0, 1))
    times = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    return middles[:, None] + times[:, None] * velocities[:, None]


def render(images: Tensor, paths: Tensor) -> Tensor:
    """Clips [n, 1, frames, 12, 12] in [-1, 1] of images [n, 1, 8, 8] in [-1, 1] along paths [n, frames, 3]; bilinear,
    outside of an image there is background, -1."""
    count, frames, _ = paths.shape
    x, y, angle = paths.flatten(0, 1).unbind(1)
    cos, sin = angle.cos(), angle.sin()
    # From a frame's pixel back to the image's: off the digit's middle, turned back; both sides in half widths.
    rows = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    offsets = rows @ torch.stack([x, y], 1)[:, :, None]
    theta = torch.cat([rows * (FRAME_SIZE / IMAGE_SIZE), offsets * (-2 / IMAGE_SIZE)], dim=2)
    grid = F.affine_grid(theta, [len(theta), 1, FRAME_SIZE, FRAME_SIZE], align_corners=False)
    ink = (images + 1).repeat_interleave(frames, 0)  # 0 outside, which grid_sample pads with
    drawn = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1
    return drawn.unflatten(0, (count, frames)).transpose(1, 2)


def draw_clips(images: Tensor, digits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random images (of images [m, 1, 8, 8], digits [m]) in random motions: clips and their labels [count]."""
    chosen = torch.randint(len(digits), (count,), generator=generator)
    motions = torch.randint(NUM_MOTIONS, (count,), generator=generator)
    clips = render(images[chosen], draw_paths(motions, generator))
    return clips, digits[chosen] * NUM_MOTIONS + motions
