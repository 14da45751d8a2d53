"""TokenLayout: which packed rows belong to which sample, and the grid they form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._arguments import Grid, check_grid, check_grids, check_tensor


def row_map_slices(largest: int) -> int:
    """So many tables take as many bytes as a row map for samples of at most `largest` tokens."""
    return -(-largest // 4)


def _with_row_map(table: Tensor, largest: int) -> Tensor:
    """int32 [K, B + 1, 4]: the table, then its row map, flat. Spare rows count to the last sample."""
    slices = row_map_slices(largest)
    begins = torch.clone(table.select(1, 0).narrow(0, 1, max(table.shape[0] - 2, 0)))  # of all samples but the first
    rows = torch.arange(slices * table.numel(), dtype=torch.int32, device=table.device)
    row_map = torch.searchsorted(begins, rows, right=True, out_int32=True)
    return torch.cat([table.flatten(), row_map]).view(1 + slices, *table.shape)


@lru_cache(maxsize=256)
def _uniform_tables(batch: int, sides: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, because making one on a GPU copies from the host, which waits and cannot be captured into a graph."""
    tokens = sides[0] * sides[1] * sides[2]
    rows = [[sample * tokens, *sides] for sample in range(batch)]
    mapped = _with_row_map(torch.tensor([*rows, [batch * tokens, 0, 0, 0]], dtype=torch.int32, device=device), tokens)
    return mapped, mapped.select(0, 0)


def _checked_device(device) -> torch.device:
    if isinstance(device, torch.device):  # as torch.compile traces it
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device is {device!r}, must be a torch.device or a name such as 'cuda:0'") from error


class TokenLayout:
    """Packed rows [total, C] of a batch of token grids, sample after sample.

    Args:
        grids: per sample (h, w) or (f, h, w); frame by frame, each frame row by row.
        device: of the table; where the tokens are.

    Attributes:
        table: int32 [B + 1, 4]; columns are the sample's first row and its frames, height, width. The last line
            holds the number of rows in all.
        mapped: what the ops take: int32 [K, B + 1, 4], the table and behind it, flat, the row map, which says to which
            sample each row belongs; or the table alone, in which the kernels then search.
        rows: rows that a buffer of these tokens has; more than the table's total only where torch.compile or a GPU
            whose table the host has not seen needs a fixed size. Rows behind the total are zero.
        positions: no less than the sum of height * width over the samples.
        max_frames: no less than the frames of any sample, or None: unknown.
    """

    def __init__(self, grids: Sequence[Grid], device: torch.device | str = "cpu"):
        device = _checked_device(device)
        lines, rows, positions, largest, most = [], 0, 0, 0, 1
        for grid in check_grids("grids", grids):
            frames, height, width = (1, *grid)[-3:]
            lines.append([rows, frames, height, width])
            rows += frames * height * width
            positions += height * width
            largest, most = max(largest, frames * height * width), max(most, frames)
        if rows >= 2**31:
            raise ValueError(f"grids hold {rows} tokens in all, at most 2^31 - 1 are allowed")
        table = torch.tensor([*lines, [rows, 0, 0, 0]], dtype=torch.int32, device=device)
        self._set(table if torch.compiler.is_compiling() else _with_row_map(table, largest), rows, positions, most)

    def _set(self, mapped: Tensor, rows: int, positions: int, max_frames: int | None, table: Tensor | None = None):
        self.mapped, self.rows, self.positions, self.max_frames = mapped, rows, positions, max_frames
        self.table = table if table is not None else mapped if mapped.dim() == 2 else mapped.select(0, 0)

    @classmethod
    def of(cls, table: Tensor, rows: int, positions: int | None = None, max_frames: int | None = None) -> TokenLayout:
        """A layout from its table, with buffers of `rows` rows; None: as many positions, unknown frames."""
        check_tensor("table", table)
        if table.dtype != torch.int32:
            raise TypeError(f"table is {table.dtype}, must be torch.int32")
        if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != 4 or not table.is_contiguous():
            raise ValueError(f"table has shape {tuple(table.shape)}, must be [B + 1, 4] and contiguous")
        return cls._of(table, rows, rows if positions is None else positions, max_frames)

    @classmethod
    def _of(cls, mapped: Tensor, *rest) -> TokenLayout:
        layout = cls.__new__(cls)
        layout._set(mapped, *rest)
        return layout

    @classmethod
    def uniform(cls, batch: int, grid: Grid, device: torch.device | str = "cpu") -> TokenLayout:
        """`batch` samples with the same grid. Built of torch operations so that torch.compile follows them."""
        device = _checked_device(device)
        frames, height, width = (1, *check_grid("grid", grid))[-3:]
        tokens = frames * height * width
        if batch < 0 or batch * tokens >= 2**31:
            raise ValueError(f"batch is {batch}, must be at least 0 and give fewer than 2^31 tokens of {grid}")
        if not torch.compiler.is_compiling():
            real = type(torch.empty(0, device="cpu")) is Tensor  # FakeTensorMode's table must not be kept for others
            make = _uniform_tables if real else _uniform_tables.__wrapped__
            mapped, table = make(batch, (frames, height, width), device)
            return cls._of(mapped, batch * tokens, batch * height * width, frames, table)
        offsets = (torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens)[:, None]
        sides = torch.tensor([[frames, height, width]], dtype=torch.int32, device=device).expand(batch, 3)
        sides = torch.cat([sides, torch.zeros(1, 3, dtype=torch.int32, device=device)])
        return cls.of(torch.cat([offsets, sides], dim=1), batch * tokens, batch * height * width, frames)

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with its table on another device."""
        mapped = self.mapped.to(_checked_device(device), non_blocking=True)
        return TokenLayout._of(mapped, self.rows, self.positions, self.max_frames)

    def frames(self) -> TokenLayout:
        """The same rows with every frame as a sample of its own, for attention within frames. There are max_frames of
        them for each sample, empty ones behind those it has."""
        count = int(self.table[:-1, 1].max()) if self.max_frames is None else self.max_frames
        first, frames, height, width = self.table[:-1, :, None].unbind(1)  # each [B, 1]
        index = torch.arange(count, dtype=torch.int32, device=self.table.device)
        offsets = first + torch.minimum(index, frames) * (height * width)
        sides = torch.stack([torch.ones_like(offsets), height.expand_as(offsets), width.expand_as(offsets)], dim=2)
        lines = torch.cat([offsets[:, :, None], sides * (index < frames)[:, :, None]], dim=2)
        table = torch.cat([lines.reshape(-1, 4), self.table[-1:]])
        return TokenLayout.of(table, self.rows, self.rows, 1)

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
