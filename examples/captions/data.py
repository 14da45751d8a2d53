"""Captions for real digits: of those to train on, in batches, and of those held out, to sample from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from captions.properties import Thresholds
from captions.wording import Description, describe, render
from common.training import Draw
from torch import Tensor

from flexdit_ext.evaluation.digits import DigitSplit

CAPTIONS_PER_DIGIT = 4
_UNGUIDED = 0.1  # share of the captions that training replaces by ""


@dataclass(frozen=True)
class Captions:
    """train: CAPTIONS_PER_DIGIT captions for every training digit, digit by digit; asked: what one caption for every
    held-out digit states; thresholds: of the training digits."""

    thresholds: Thresholds
    train: list[str]
    asked: list[Description]
    seed: int

    @classmethod
    def of(cls, digits: DigitSplit, seed: int) -> Captions:
        thresholds, generator = Thresholds.of(digits.train_images), random.Random(seed)
        images = digits.train_images.repeat_interleave(CAPTIONS_PER_DIGIT, dim=0)
        labels = digits.train_labels.repeat_interleave(CAPTIONS_PER_DIGIT)
        train = [render(one, generator) for one in describe(images, labels, thresholds, generator)]
        asked = describe(digits.held_out_images, digits.held_out_labels, thresholds, generator)
        return cls(thresholds, train, asked, seed)

    def sets(self, count: int) -> list[list[str]]:
        """`count` sets of captions that ask for the same in other words."""
        generator = random.Random(self.seed + 1)
        return [[render(one, generator) for one in self.asked] for _ in range(count)]

    def draw_from(self, images: Tensor) -> Draw:
        """Batches of the training digits, each with one of its captions or none."""

        def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Mapping]:
            batch = torch.randint(len(self.train), (count,), generator=generator)
            unguided = torch.rand(count, generator=generator) < _UNGUIDED
            captions = ["" if none else self.train[index] for index, none in zip(batch.tolist(), unguided.tolist())]
            return images[batch // CAPTIONS_PER_DIGIT], {"captions": captions}

        return draw
