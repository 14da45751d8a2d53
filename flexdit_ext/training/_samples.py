"""What all data sets of training are: samples and their conditions, read by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Captions:
    """Of a data set's captions: their channels D; length L, to which all are padded; tokens [N] int64, how many each
    has; null [L0, D] float32, what stands for no caption, all of whose tokens count."""

    channels: int
    length: int
    tokens: np.ndarray
    null: Tensor

    def without(self) -> dict[str, Tensor]:
        """The conditions of one sample [1, ...] without a caption."""
        count = len(self.null)
        caption = torch.zeros(1, self.length, self.channels)
        caption[0, :count] = self.null
        return {"caption": caption, "caption_mask": torch.arange(self.length)[None] < count}


class Samples(Dataset):
    """shape: of a sample, [C, H, W] or [C, F, H, W]; num_classes: labels are below it, 0 where there are none."""

    shape: tuple[int, ...]
    num_classes = 0
    captions: Captions | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples [n, *shape] float32, and their conditions by the names of the model's arguments: y [n] int64;
        caption [n, L, D] float32, caption_mask [n, L] bool; resolution [n, 2], aspect_ratio [n] float32."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        raise NotImplementedError
