"""What a caption says of a digit besides its class, measured on the picture: thickness, tilt and width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The names of a property's three levels, lowest first.
LEVELS = {
    "thickness": ("thin", "medium", "thick"),
    "tilt": ("left", "upright", "right"),
    "width": ("narrow", "medium", "wide"),
}


def measure(images: Tensor) -> dict[str, Tensor]:
    """Property -> its value for every image, float64 [n]; images [n, 1, h, w], ink 1 on background -1, clamped to that.

    thickness: the amount of ink, in pixels; the digits fill their frame, so it hardly depends on the class.
    tilt: how far the strokes lean to the right per pixel upwards: -cov(x, y) / var(y) of the ink, y downwards.
    width: standard deviation of the ink along x, in pixels.
    An image without ink has 0 everywhere.
    """
    ink = (images[:, 0].double().clamp(-1, 1) + 1) / 2
    share = ink / ink.sum((1, 2), keepdim=True).clamp_min(1e-9)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in ink.shape[1:])
    by_row, by_column = share.sum(2), share.sum(1)
    y, x = rows - (by_row @ rows)[:, None], columns - (by_column @ columns)[:, None]
    variance_y, variance_x = (by_row * y**2).sum(1), (by_column * x**2).sum(1)
    covariance = torch.einsum("nyx,ny,nx->n", share, y, x)
    return {
        "thickness": ink.sum((1, 2)),
        "tilt": -covariance / variance_y.clamp_min(1e-9),
        "width": variance_x.clamp_min(0).sqrt(),
    }


@dataclass(frozen=True)
class Thresholds:
    """limits: property -> the two values that part its three levels."""

    limits: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, images: Tensor) -> Thresholds:
        """Terciles of the images, [n, 1, h, w]: a third of them has each level."""
        thirds = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
        return cls({name: tuple(values.quantile(thirds).tolist()) for name, values in measure(images).items()})

    def levels(self, images: Tensor) -> dict[str, list[str]]:
        """Property -> the name of its level for every image; a value on a limit has the lower level."""
        return {
            name: [LEVELS[name][index] for index in torch.bucketize(values, torch.tensor(self.limits[name]).double())]
            for name, values in measure(images).items()
        }
