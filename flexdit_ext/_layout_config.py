"""What the configurations of all models share: the three segments, their schedule, and their way to JSON."""

from __future__ import annotations

import dataclasses

from . import _C
from ._checks import Grid
from .schedule import DensitySchedule


class LayoutConfig:
    """Base of frozen dataclasses with num_pooling_blocks, num_sdtm, sdtm_blocks, num_dense_blocks, schedule,
    the sizes of a transformer on patches, and the properties dense_grid and out_channels."""

    _family = "dit"  # a name of _C.ModelFamily
    # What a model may lack.
    num_classes = 0
    class_dropout_prob = 0.0
    caption_channels = 0
    size_conditions = False
    num_frames = 1

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
    def label_rows(self) -> int:
        """Labels and the null class; 0: the model has no labels."""
        return self.num_classes + (self.null_label >= 0)

    @property
    def null_label(self) -> int:
        """The null class, or -1: none."""
        return self.num_classes if self.num_classes and self.class_dropout_prob > 0 else -1

    @property
    def core(self) -> _C.Config:
        """The same for the C++ library."""
        core = _C.Config()
        core.family = getattr(_C.ModelFamily, self._family)
        core.input_height = core.input_width = self.input_size
        core.patch_size, core.in_channels, core.out_channels = self.patch_size, self.in_channels, self.out_channels
        core.hidden, core.mlp_hidden, core.num_heads = self.hidden_size, self.mlp_hidden_size, self.num_heads
        core.label_rows = self.label_rows
        core.num_pooling_blocks, core.num_sdtm = self.num_pooling_blocks, self.num_sdtm
        core.generation_blocks, core.sparse_blocks, core.recovery_blocks, core.dense_blocks = self.sdtm_blocks
        core.num_dense_blocks = self.num_dense_blocks
        return core

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
