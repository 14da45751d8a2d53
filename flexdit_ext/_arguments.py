"""Checks of public arguments: a TypeError or ValueError names the argument, says what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, ...]
# Where and with what the ops compute.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


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


def check_tensor(name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {'None' if value is None else type(value).__name__}, must be a torch.Tensor")
    return value


def from_array(value):
    """A tensor of another library's array (numpy, CuPy, JAX), through DLPack; anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "__dlpack__"):
        return value
    if isinstance(value, np.ndarray):  # DLPack would refuse read-only ones and those of other byte orders
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True))
    return torch.from_dlpack(value)


def check_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in DTYPES:
        raise ValueError(f"{name} is on {tensor.device}, flexdit_ext computes on the CPU and on CUDA devices")


def check_floats(op: str, shapes: dict[str, tuple[Tensor, tuple[int, ...]]], **layouts) -> None:
    """Floating tensors of one op, {name: (tensor, its shape)}: all where the first one is, layouts too, and of its
    dtype."""
    first = home = None
    for name, (tensor, shape) in shapes.items():
        check_tensor(name, tensor)
        check_device(f"{op}: {name}", tensor)
        if first is None:
            first, home = name, tensor
        if tensor.device != home.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {home.device}: they must agree")
        known = DTYPES[home.device.type]
        if tensor.dtype not in known:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise TypeError(f"{op}: {name} is {tensor.dtype}, must be one of {names} on {home.device.type}")
        if tensor.dtype != home.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, must be {home.dtype} as {first}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")
    for name, layout in layouts.items():
        if layout.table.device != home.device:
            raise ValueError(
                f"{op}: {name}.table is on {layout.table.device}, {first} on {home.device}: they must agree "
                f"(TokenLayout(..., device) or {name}.to({str(home.device)!r}))"
            )


def check_width(op: str, name: str, tensor) -> int:
    """C of packed rows [R, C]."""
    if check_tensor(name, tensor).dim() != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, must be packed rows [R, C]")
    return tensor.shape[1]


def check_timesteps(name: str, t) -> None:
    """What type and shape tell; the values are checked where they are read."""
    check_tensor(name, t)
    if t.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, must be [B]")
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"{name} is {t.dtype}, must be an integer or floating-point dtype")
    check_device(name, t)
