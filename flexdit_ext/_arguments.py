"""Checks of public arguments: a TypeError or ValueError names the argument, says what it was and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import DTYPE_NAMES, Grid, check_count, check_grid, check_grids, check_number

__all__ = [
    "DTYPES",
    "Grid",
    "check_count",
    "check_device",
    "check_dtype",
    "check_floats",
    "check_grid",
    "check_grids",
    "check_number",
    "check_tensor",
    "check_timesteps",
    "check_width",
]

DTYPES = {device: tuple(getattr(torch, name) for name in names) for device, names in DTYPE_NAMES.items()}


def check_tensor(name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {'None' if value is None else type(value).__name__}, must be a torch.Tensor")
    return value


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


def check_dtype(dtype, device: torch.device) -> torch.dtype:
    known = DTYPES[device.type]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, must be a torch.dtype or None")
    if dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise TypeError(f"dtype is {dtype}, must be one of {names} on {device.type}")
    return dtype
