"""Sampling of two models side by side: the same conditions, noise and machine load for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = TypeVar("Batch")


def sample_in_turn(
    models: Mapping[str, nn.Module], batches: Sequence[Batch], draw: Callable[[nn.Module, Batch, int], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All samples [n, ...] and samples per second (of the median batch) of every model.

    draw(model, batch, number of samples before it) gives a batch's samples. The models take turns batch by batch: what
    else the machine does in the meantime slows all of them alike.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in models}
    rates: dict[str, list[float]] = {name: [] for name in models}
    with tqdm(total=len(batches) * len(models), desc="sampling", unit="batch") as bar:
        before = 0
        for batch in batches:
            for name, model in models.items():
                start = time.perf_counter()
                samples[name].append(draw(model, batch, before))
                rates[name].append(len(samples[name][-1]) / (time.perf_counter() - start))
                bar.update()
            before += len(next(iter(samples.values()))[-1])
    return (
        {name: torch.cat(parts) for name, parts in samples.items()},
        {name: statistics.median(values) for name, values in rates.items()},
    )
