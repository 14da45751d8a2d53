"""The 1,797 handwritten digits, 8x8 pixels, that scikit-learn ships (a part of UCI's Optical Recognition of
Handwritten Digits): read from the installed package, nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 8
NUM_HELD_OUT = 500  # as many as are sampled: a Fréchet distance depends on the number of images


class DigitSplit(NamedTuple):
    """Images [n, 1, 8, 8] float32 in [-1, 1], labels [n] int64."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_split(seed: int) -> DigitSplit:
    """Every class is held out in proportion; the same seed gives the same split."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # values are 0..16
    labels = torch.from_numpy(digits.target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=NUM_HELD_OUT, stratify=digits.target, random_state=seed
    )
    return DigitSplit(images[train], labels[train], images[held_out], labels[held_out])
