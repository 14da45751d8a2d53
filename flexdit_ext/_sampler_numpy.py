"""Weights for the Sampler from files and numpy arrays, without torch; latents stay numpy arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import _C
from ._checks import DTYPE_NAMES, check_count
from ._conditions import core_schedule
from ._config_file import check_readable, find_weights, read_any_config
from ._shards import INDEX_SUFFIX
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig

_ARRAY_DTYPES = ("float32", "float64")  # numpy has no bfloat16
for _name in _ARRAY_DTYPES:
    _C.register_dtype(np.dtype(_name), getattr(_C.DType, _name))
_NAMED_ARRAYS = 5  # at most so many in a message


class _View:
    """What the C++ library reads of a tensor, of a contiguous array."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def _same(images: np.ndarray) -> np.ndarray:
    return images


def from_pretrained(path, dtype, device, threads, modulation_bytes) -> tuple:
    """Arguments of Sampler._set."""
    kind, execution = _execution(device, threads)
    if dtype is not None and dtype not in DTYPE_NAMES[kind]:
        error = ValueError if isinstance(dtype, str) else TypeError
        raise error(f"dtype is {dtype!r}, must be None or one of {', '.join(DTYPE_NAMES[kind])} on {kind}")
    weights = find_weights(Path(path))
    check_readable(weights)
    if not weights.name.endswith((".safetensors", INDEX_SUFFIX)):
        raise ValueError(f"{weights} must be a .safetensors file, or the index of one in shards")
    # The C++ library reads the file first: it says best what is wrong with a broken one.
    checkpoint = _C.Checkpoint(os.fspath(weights), None if dtype is None else getattr(_C.DType, dtype))
    if checkpoint.dtype.name not in DTYPE_NAMES[kind]:
        raise ValueError(f"{weights} is {checkpoint.dtype.name}: give the dtype, {' or '.join(DTYPE_NAMES[kind])}")
    config = read_any_config(weights)
    core = _C.SamplingModel(checkpoint=checkpoint, exec=execution)
    return config, modulation_bytes, core, checkpoint.dtype.name, device, _same


def from_arrays(config, arrays: Mapping[str, np.ndarray], device, threads) -> tuple:
    if not isinstance(config, (FlexDiTConfig, FlexPixArtConfig, FlexLatteConfig)):
        raise TypeError(
            f"config is {type(config).__name__}, must be a FlexDiTConfig, FlexPixArtConfig or FlexLatteConfig"
        )
    _, execution = _execution(device, threads)
    specs = _C.model_parameters(config.core)
    names = [name for name, _, _ in specs]
    _refuse("arrays has no", [name for name in names if name not in arrays])
    _refuse("arrays has the unknown", [str(name) for name in arrays if name not in set(names)])
    ordered = [np.ascontiguousarray(arrays[name]) for name in names]
    dtype = ordered[0].dtype.name
    if dtype not in _ARRAY_DTYPES or any(array.dtype.name != dtype for array in ordered):
        found = sorted({array.dtype.name for array in ordered})
        raise TypeError(f"arrays are {', '.join(found)}, must be all float32 or all float64")
    if dtype not in DTYPE_NAMES[str(device).partition(":")[0]]:
        raise TypeError(f"arrays are {dtype}, must be float32 on {device}")
    _refuse(
        "arrays has the wrong shape",
        [
            f"{name} {list(array.shape)}, must hold {rows} rows of {cols}"
            for (name, rows, cols), array in zip(specs, ordered)
            if array.size != rows * cols or (rows > 1 and array.shape[0] != rows)
        ],
    )
    core = _C.SamplingModel(
        config=config.core,
        schedule=core_schedule(config, config.density_schedule),
        # numpy's own dtype object, which an array from elsewhere need not have
        parameters=[_View(array.astype(np.dtype(dtype), copy=False)) for array in ordered],
        null_label=config.null_label,
        exec=execution,
    )
    return core, dtype, device, _same


def _refuse(what: str, names: list[str]) -> None:
    if names:
        rest = len(names) - _NAMED_ARRAYS
        raise ValueError(f"{what} {'; '.join(names[:_NAMED_ARRAYS])}" + (f" and {rest} more" if rest > 0 else ""))


def _execution(device, threads) -> tuple[str, _C.Execution]:
    """The device's kind, and where the C++ library computes."""
    if not isinstance(device, str):
        raise TypeError(f'device is {device!r}, must be a name such as "cpu" or "cuda:0"')
    match = re.fullmatch(r"(cpu|cuda)(?::(\d{1,4}))?", device)
    if match is None:
        raise ValueError(f'device is {device!r}, must be "cpu", "cuda" or "cuda:0" and so on')
    build = _C.build_info()
    if match[1] == "cpu":
        most = build["openmp_threads"]
        return "cpu", _C.Execution(threads=most if threads is None else check_count("threads", threads, 1, 4096))
    if not build["cuda"]:
        raise ValueError(f"device is {device!r}, but this build of flexdit_ext has no CUDA backend")
    if threads is not None:
        raise ValueError(f"threads is {threads!r}, only the CPU has them")
    return "cuda", _C.Execution(device_index=int(match[2] or 0), stream=0)
