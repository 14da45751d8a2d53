"""What chance decides in training, as a function of the seed and the step alone.

Every number belongs to a slot of the global batch. A rank takes the numbers of its slots, so results do not depend on
how many ranks there are, and a run that goes on needs no random state, only its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..diffusion.ddpm import NUM_TIMESTEPS
from ..sampling import derive_seed, normal_noise
from ..schedule import DensitySchedule

_ORDER, _STEP = 0, 1  # streams of the seed


@dataclass(frozen=True)
class StepDraws:
    """Of one step, by slot: indices into the data set, int64 [B]; fraction, timestep / 1000, float64 [B] in [0, 1);
    dropped labels and mirrored images, bool [B]; in piecewise training the schedule's segment, int64 [B]."""

    indices: np.ndarray
    fraction: np.ndarray
    dropped: np.ndarray
    flipped: np.ndarray
    segment: np.ndarray | None = None


class Draws:
    """Draws of all steps.

    size: samples in the data set; batch: samples per step; groups: forward passes per step, over all ranks. Slots of a
    group follow each other. segments: of the density schedule, for piecewise training, where group g of step s draws
    its timesteps from segment (g + s) mod segments.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        batch: int,
        groups: int,
        *,
        stratified: bool,
        label_dropout: float,
        flip: bool,
        segments: list[tuple[float, float]] | None = None,
    ):
        self.seed, self.size, self.batch, self.groups = seed, size, batch, groups
        self.stratified, self.label_dropout, self.flip, self.segments = stratified, label_dropout, flip, segments
        self._order = lru_cache(maxsize=2)(self._new_order)

    def of_step(self, step: int) -> StepDraws:
        """The draws of step `step`, 0 being the first."""
        generator = self._generator(_STEP, step)
        dropout, flip, uniform = generator.random((3, self.batch))
        segment = None
        if self.segments is not None:
            group = np.arange(self.batch) // (self.batch // self.groups)
            segment = (group + step) % len(self.segments)
        fraction = self._fractions(generator, uniform, segment)
        return StepDraws(self._indices(step), fraction, dropout < self.label_dropout, (flip < 0.5) & self.flip, segment)

    def noise(self, step: int, slots: range, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [len(slots), *shape], float32, on the CPU."""
        return normal_noise([derive_seed(self.seed, step * self.batch + slot) for slot in slots], 0, shape)

    def _generator(self, stream: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, stream, index])))

    def _new_order(self, epoch: int) -> np.ndarray:
        return self._generator(_ORDER, epoch).permutation(self.size)

    def _indices(self, step: int) -> np.ndarray:
        """Epochs follow each other without a gap: a batch may end one and begin the next."""
        position = step * self.batch + np.arange(self.batch)
        epochs = position // self.size
        return np.concatenate(
            [self._order(int(epoch))[position[epochs == epoch] % self.size] for epoch in np.unique(epochs)]
        )

    def _fractions(self, generator: np.random.Generator, uniform: np.ndarray, segment: np.ndarray | None) -> np.ndarray:
        parts = 1 if segment is None else self.groups
        if self.stratified:
            count = self.batch // parts
            strata = np.concatenate([generator.permutation(count) for _ in range(parts)])
            uniform = (strata + uniform) / count
        if segment is None:
            return np.minimum(uniform, np.nextafter(1, 0))
        first, last = np.array(self.segments).T[:, segment]
        return np.clip(first + uniform * (last - first), first, np.nextafter(last, 0))


def equal_segments(schedule: DensitySchedule) -> list[tuple[float, float]]:
    """The segments of a schedule as fractions of the range; ValueError unless they are equal to a timestep, as taking
    them in turn draws timesteps evenly only then."""
    ends = [*schedule.begins[1:], schedule.num_timesteps]
    lengths = [end - begin for begin, end in zip(schedule.begins, ends)]
    if max(lengths) - min(lengths) > 1:
        raise ValueError(
            f"density.mode is 'piecewise', but the segments of the schedule are {lengths} timesteps long: "
            "they must be equal; 'ragged' takes any schedule"
        )
    return [(begin / schedule.num_timesteps, end / schedule.num_timesteps) for begin, end in zip(schedule.begins, ends)]


def timesteps(fraction: np.ndarray, loss: str) -> Tensor:
    """What the loss takes: int64 in 0..999 for "ddpm", float32 in [0, 1] for "flow"."""
    if loss == "flow":
        return torch.from_numpy(fraction).float()
    return torch.from_numpy(np.floor(fraction * NUM_TIMESTEPS).astype(np.int64))
