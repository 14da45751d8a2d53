"""The density schedule: how many sparse tokens a diffusion timestep gets. The arithmetic is the C++ library's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from . import _C
from ._checks import Grid, check_count, check_grid, check_grids, check_number

MAX_TIMESTEPS = 10**6


def _check_begins(begins) -> list[int]:
    if isinstance(begins, (str, bytes)) or not isinstance(begins, Sequence):
        raise TypeError(f"begins is {begins!r}, must be a list of ints")
    if any(isinstance(begin, bool) or not isinstance(begin, int) for begin in begins):
        raise TypeError(f"begins is {list(begins)}, must hold ints")
    return list(begins)


def _rate_arguments(r_min, r_max, dense_grid, num_timesteps):
    return (
        check_number("r_min", r_min),
        check_number("r_max", r_max),
        check_grid("dense_grid", dense_grid),
        check_count("num_timesteps", num_timesteps, 4, MAX_TIMESTEPS),
    )


class DensitySchedule:
    """Sparse grids from the data end (t = 0) to the noise end (t = num_timesteps).

    Args:
        grids: grids (h, w) or (f, h, w), from data to noise; equal segments of t unless `begins` is given.
        num_timesteps: T, the number of diffusion timesteps.
        begins: first timestep of every segment, ascending from 0.

    Raises TypeError or ValueError that names the argument. Source: arXiv 2412.06028, section on the
    timestep-wise pruning rate.
    """

    def __init__(
        self,
        grids: Sequence[Grid] = ((10, 10), (8, 8), (7, 7), (6, 6)),
        num_timesteps: int = 1000,
        begins: Sequence[int] | None = None,
    ):
        grids = check_grids("grids", grids)
        check_count("num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
        begins = () if begins is None else (_check_begins(begins),)
        self._set(_C.DensitySchedule(grids, *begins, num_timesteps))

    def _set(self, core) -> None:
        self._core = core
        # Plain values beside it, which torch.compile can read.
        self._grids, self._begins, self._num_timesteps = tuple(core.grids), tuple(core.begins), core.num_timesteps

    @classmethod
    def _of(cls, core) -> DensitySchedule:
        schedule = cls.__new__(cls)
        schedule._set(core)
        return schedule

    @classmethod
    def from_pruning_rates(cls, r_min: float, r_max: float, dense_grid: Grid, num_timesteps: int = 1000):
        """Four equal segments, each with the grid of the pruning rate at its noisy end.

        Rates are read as published, rounded to two decimals: a side is floor(side * sqrt(1 - r)) for r up to 0.005
        smaller; dense sides that are multiples of 16 keep a multiple of side / 16. [0.61, 0.86] gives the sides
        10, 8, 7, 6 on 16x16 tokens and 20, 16, 14, 12 on 32x32.
        """
        return cls._of(_C.DensitySchedule.from_pruning_rates(*_rate_arguments(r_min, r_max, dense_grid, num_timesteps)))

    @classmethod
    def continuous(cls, r_min: float, r_max: float, dense_grid: Grid, num_timesteps: int = 1000):
        """A segment for every grid that the continuous rate passes through: r = r_min for t < T/4, then
        ((4T - 4t) r_min + (4t - T) r_max) / 3T."""
        return cls._of(_C.DensitySchedule.continuous(*_rate_arguments(r_min, r_max, dense_grid, num_timesteps)))

    @property
    def grids(self) -> tuple[Grid, ...]:
        return self._grids

    @property
    def begins(self) -> tuple[int, ...]:
        return self._begins

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def grid(self, t: float) -> Grid:
        """The sparse grid of timestep t in [0, num_timesteps]; t may be fractional."""
        return self._core.grid(check_number("t", t))

    def segment(self, t: float) -> int:
        """The index into `grids` and `begins` of timestep t's segment; t as in grid."""
        self.grid(t)  # for its check
        return bisect_right(self.begins, t) - 1

    def pruning_rate(self, t: float, dense_grid: Grid) -> float:
        """1 - M / N at timestep t, N being the tokens of `dense_grid`."""
        return self._core.pruning_rate(check_number("t", t), check_grid("dense_grid", dense_grid))

    def mean(self, value: Callable[[Grid], float]) -> float:
        """The mean of value(grid) over all timesteps."""
        ends = [*self.begins[1:], self.num_timesteps]
        segments = zip(self.begins, ends, self.grids, strict=True)
        return sum((end - begin) * value(grid) for begin, end, grid in segments) / self.num_timesteps

    def to_dict(self) -> dict:
        return {
            "grids": [list(grid) for grid in self.grids],
            "begins": list(self.begins),
            "num_timesteps": self.num_timesteps,
        }

    @classmethod
    def from_dict(cls, values: dict) -> DensitySchedule:
        if not isinstance(values, dict):
            raise TypeError(f"schedule is {values!r}, must be a dict with grids, begins and num_timesteps")
        unknown = set(values) - {"grids", "begins", "num_timesteps"}
        if unknown or "grids" not in values:
            raise ValueError(
                f"schedule has the keys {sorted(values)}, must have grids and may have begins, num_timesteps"
            )
        return cls(values["grids"], values.get("num_timesteps", 1000), values.get("begins"))

    def __reduce__(self):
        return DensitySchedule, (self.grids, self.num_timesteps, self.begins)

    def __eq__(self, other) -> bool:
        return isinstance(other, DensitySchedule) and self._core == other._core

    def __hash__(self) -> int:
        return hash((self.grids, self.begins, self.num_timesteps))

    def __repr__(self) -> str:
        return f"DensitySchedule({self.grids}, num_timesteps={self.num_timesteps}, begins={self.begins})"
