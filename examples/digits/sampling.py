"""Which digits are sampled, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from common.sampling import sample_in_turn
from torch import Tensor

from flexdit_ext import FlexDiT, sample
from flexdit_ext.evaluation.digits import NUM_CLASSES


@dataclass(frozen=True)
class SamplingSettings:
    """sets: how many sets of samples_per_class digits of each class are drawn; see metrics.mean_distance."""

    samples_per_class: int
    sets: int
    steps: int
    seed: int
    cfg_scale: float = 1.5
    batch_size: int = 100

    @property
    def labels(self) -> Tensor:
        """Of one set: classes in turn, so that every batch holds all of them."""
        return torch.arange(NUM_CLASSES).repeat(self.samples_per_class)


def sample_digits(
    models: Mapping[str, FlexDiT], settings: SamplingSettings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images [sets, n, 1, 8, 8] and images per second of every model."""

    def draw(model: FlexDiT, labels: Tensor, before: int) -> Tensor:
        guidance, seed = settings.cfg_scale, settings.seed
        return sample(model, labels, settings.steps, "flow", guidance, seed, start_index=before)

    batches = settings.labels.repeat(settings.sets).split(settings.batch_size)
    images, rates = sample_in_turn(models, batches, draw)
    return {name: rows.unflatten(0, (settings.sets, -1)) for name, rows in images.items()}, rates
