"""TokenLayout: which packed rows belong to which sample, and the grid they form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Grid, check_grid


class TokenLayout:
    """Packed rows [total, C] of a batch of token grids, sample after sample.

    Args:
        grids: per sample (h, w) or (f, h, w); frame by frame, each frame row by row.

    Attributes:
        table: int32 [B + 1, 4]; columns are the sample's first row and its frames, height, width. The last line
            holds the number of rows in all.
        rows: rows that a buffer of these tokens has; more than the table's total only where torch.compile needs a
            fixed size. Rows behind the total are zero.
    """

    def __init__(self, grids: Sequence[Grid]):
        grids = [check_grid(f"grids[{i}]", grid) for i, grid in enumerate(grids)]
        table, rows = [], 0
        for grid in grids:
            frames, height, width = (1, *grid)[-3:]
            table.append([rows, frames, height, width])
            rows += frames * height * width
        if rows >= 2**31:
            raise ValueError(f"grids hold {rows} tokens in all, at most 2^31 - 1 are allowed")
        self.table = torch.tensor([*table, [rows, 0, 0, 0]], dtype=torch.int32)
        self.rows = rows

    @classmethod
    def of(cls, table: Tensor, rows: int) -> TokenLayout:
        """A layout from its table, with buffers of `rows` rows."""
        layout = cls.__new__(cls)
        layout.table, layout.rows = table, rows
        return layout

    @classmethod
    def uniform(cls, batch: int, grid: Grid) -> TokenLayout:
        """`batch` samples with the same grid. Built of torch operations so that torch.compile follows them."""
        frames, height, width = (1, *grid)[-3:]
        tokens = frames * height * width
        offsets = (torch.arange(batch + 1, dtype=torch.int32) * tokens)[:, None]
        sides = torch.tensor([[frames, height, width]], dtype=torch.int32).expand(batch, 3)
        sides = torch.cat([sides, torch.zeros(1, 3, dtype=torch.int32)])
        return cls.of(torch.cat([offsets, sides], dim=1), batch * tokens)

    @property
    def batch(self) -> int:
        return self.table.shape[0] - 1

    @property
    def grids(self) -> list[Grid]:
        """Per sample (h, w), or (f, h, w) if it has several frames."""
        return [tuple(sides) if sides[0] > 1 else tuple(sides[1:]) for sides in self.table[:-1, 1:].tolist()]

    @property
    def total(self) -> int:
        """Rows in use."""
        return int(self.table[-1, 0])

    def __repr__(self) -> str:
        return f"TokenLayout({self.grids})"
