"""What the configurations of all models share: the three segments, their schedule, and their way to JSON."""

from __future__ import annotations

import dataclasses

from ._checks import Grid
from .schedule import DensitySchedule


class LayoutConfig:
    """Base of frozen dataclasses with num_pooling_blocks, num_sdtm, sdtm_blocks, num_dense_blocks, schedule,
    hidden_size, mlp_ratio, and the property dense_grid."""

    def _check_layout(self) -> None:
        """Also makes a tuple of sdtm_blocks and a DensitySchedule of its dict."""
        blocks = self.sdtm_blocks
        if not isinstance(blocks, (tuple, list)) or len(blocks) != 4 or any(type(n) is not int for n in blocks):
            raise TypeError(f"sdtm_blocks is {blocks!r}, must be 4 ints (generation, sparse, recovery, dense)")
        object.__setattr__(self, "sdtm_blocks", tuple(blocks))
        if self.num_sdtm and (blocks[0] < 1 or blocks[2] < 1 or min(blocks) < 0):
            raise ValueError(f"sdtm_blocks is {blocks}, must have a generation and a recovery block, and none below 0")
        if self.depth == 0:
            raise ValueError("num_pooling_blocks, num_sdtm and num_dense_blocks are all 0, the model has no blocks")
        if isinstance(self.schedule, dict):
            object.__setattr__(self, "schedule", DensitySchedule.from_dict(self.schedule))
        if self.schedule is not None and not isinstance(self.schedule, DensitySchedule):
            raise TypeError(f"schedule is {self.schedule!r}, must be a DensitySchedule or None")
        for grid in self.schedule.grids if self.schedule else ():
            self.check_sparse_grid("schedule", grid)

    def check_sparse_grid(self, name: str, grid: Grid, dense: Grid | None = None) -> Grid:
        """Raises ValueError unless `grid` fits into the dense grid: the config's, or `dense` of another size."""
        dense = dense or self.dense_grid
        sides = zip((1, *grid)[-3:], (1, *dense)[-3:], strict=True)  # (h, w) is one frame
        if any(side > most for side, most in sides):
            raise ValueError(f"{name} has the sparse grid {grid}, at most the dense grid {dense} is allowed")
        return grid

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.num_pooling_blocks + self.num_sdtm * sum(self.sdtm_blocks) + self.num_dense_blocks

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["sdtm_blocks"] = list(self.sdtm_blocks)
        values["schedule"] = self.schedule.to_dict() if self.schedule else None
        return values

    @classmethod
    def from_dict(cls, values: dict):
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has unknown keys {unknown}, allowed are {sorted(known)}")
        return cls(**values)
