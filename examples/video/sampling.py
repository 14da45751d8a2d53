"""Which clips are sampled, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from common.sampling import sample_in_turn
from torch import Tensor
from video.rendering import NUM_LABELS

from flexdit_ext import FlexLatte, sample_conditional


@dataclass(frozen=True)
class SamplingSettings:
    """samples_per_class: clips of every digit in every motion."""

    samples_per_class: int
    steps: int
    seed: int
    cfg_scale: float = 2.5
    batch_size: int = NUM_LABELS

    @property
    def labels(self) -> Tensor:
        """Classes in turn, so that every batch holds all of them."""
        return torch.arange(NUM_LABELS).repeat(self.samples_per_class)


def sample_clips(
    models: Mapping[str, FlexLatte], settings: SamplingSettings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Clips [n, 1, frames, 12, 12] of settings.labels, and clips per second, of every model."""
    null = {"y": torch.tensor([NUM_LABELS])}

    def draw(model: FlexLatte, labels: Tensor, before: int) -> Tensor:
        return sample_conditional(
            model,
            {"y": labels},
            settings.steps,
            "flow",
            settings.cfg_scale,
            settings.seed,
            unconditional=null,
            start_index=before,
        )

    return sample_in_turn(models, settings.labels.split(settings.batch_size), draw)
