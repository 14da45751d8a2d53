"""Checks of public arguments, without torch: a TypeError or ValueError names the argument, says what it was and what is
allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

Grid = tuple[int, ...]
# Where and with what the library computes.
DTYPE_NAMES = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("float32", "bfloat16", "float16")}


def check_grid(name: str, grid) -> Grid:
    """Returns `grid` as a tuple of 2 or 3 positive ints."""
    if isinstance(grid, (str, bytes)) or not isinstance(grid, Sequence) or len(grid) not in (2, 3):
        raise TypeError(f"{name} is {grid!r}, must be a grid (h, w) or (f, h, w)")
    if any(isinstance(side, bool) or not isinstance(side, int) for side in grid):
        raise TypeError(f"{name} is {grid!r}, its sides must be ints")
    if any(side < 1 or side >= 2**15 for side in grid):
        raise ValueError(f"{name} is {tuple(grid)}, every side must be at least 1 and below 32768")
    return tuple(grid)


def check_grids(name: str, grids) -> list[Grid]:
    if isinstance(grids, (str, bytes)) or not isinstance(grids, Sequence):
        raise TypeError(f"{name} is {grids!r}, must be a list of grids (h, w) or (f, h, w)")
    return [check_grid(f"{name}[{i}]", grid) for i, grid in enumerate(grids)]


def check_number(name: str, value, least: float = -math.inf) -> float:
    """A finite number, not below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, must be a number")
    if not math.isfinite(value) or value < least:
        allowed = "finite" if least == -math.inf else f"finite and at least {least}"
        raise ValueError(f"{name} is {value}, must be {allowed}")
    return value


def check_count(name: str, value, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, must be an int")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, must be from {least} to {most}")
    return value
