"""Sampling of the dense model and the FlexDiT side by side: the same labels, noise and machine load for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

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


def sample_in_turn(
    models: Mapping[str, FlexDiT], settings: SamplingSettings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images [sets, n, 1, 8, 8] and images per second (of the median batch) of every model.

    The models take turns batch by batch: what else the machine does in the meantime slows all of them alike.
    """
    images: dict[str, list[Tensor]] = {name: [] for name in models}
    rates: dict[str, list[float]] = {name: [] for name in models}
    batches = settings.labels.repeat(settings.sets).split(settings.batch_size)
    with tqdm(total=len(batches) * len(models), desc="sampling", unit="batch") as bar:
        for index, labels in enumerate(batches):
            for name, model in models.items():
                start = time.perf_counter()
                images[name].append(
                    sample(
                        model,
                        labels,
                        settings.steps,
                        "flow",
                        settings.cfg_scale,
                        settings.seed,
                        start_index=index * settings.batch_size,
                    )
                )
                rates[name].append(len(labels) / (time.perf_counter() - start))
                bar.update()
    return (
        {name: torch.cat(parts).unflatten(0, (settings.sets, -1)) for name, parts in images.items()},
        {name: statistics.median(values) for name, values in rates.items()},
    )
