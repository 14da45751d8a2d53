"""The devices that tests run on: the CPU, the CUDA kernels on the emulator, and a GPU where there is one."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch

import flexdit_ext
from flexdit_ext import _arguments, _sampler_torch
from flexdit_ext._core import CUDA_ARCHITECTURES

# `make pytest` builds the emulated module and says where; a bare pytest finds it there if it has been built before.
EMULATED_FOLDER = Path(os.environ.get("FLEXDIT_EMULATED") or Path(__file__).parents[1] / "build" / "ctest")

NO_GPU = "no GPU" if not torch.cuda.is_available() else "built without CUDA, see `flexdit info`"
MARKS = {
    "cpu": [],
    "emulated": [],
    "cuda": [
        pytest.mark.gpu,
        pytest.mark.skipif(not (torch.cuda.is_available() and CUDA_ARCHITECTURES), reason=NO_GPU),
    ],
}
DEVICES = [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
CUDA = DEVICES[1:]


def on(name: str, *values, **keywords):
    """pytest.param(*values) that runs where device `name` does."""
    return pytest.param(*values, marks=MARKS[name], **keywords)


@functools.cache
def emulated_core():
    """flexdit_ext._C once more, its CUDA backend being the emulator; "device memory" is the host's."""
    files = sorted(EMULATED_FOLDER.glob("_C_emulated*.so"))
    if not files:
        if "FLEXDIT_EMULATED" in os.environ:
            raise FileNotFoundError(f"FLEXDIT_EMULATED is {EMULATED_FOLDER}, which has no _C_emulated*.so")
        return None
    spec = importlib.util.spec_from_file_location("_C_emulated", files[0])
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    for name in ("float32", "bfloat16", "float16", "float64"):
        core.register_dtype(getattr(torch, name), getattr(core.DType, name))
    return core


def use_device(name: str, monkeypatch) -> torch.device:
    """Sends flexdit_ext's ops on the device's tensors where `name` says, for the length of a test."""
    if name == "emulated":
        core = emulated_core()
        if core is None:
            pytest.skip("the emulated module is not built: make pytest builds it")
        for module in (flexdit_ext.sampler, flexdit_ext._sampler_numpy):
            monkeypatch.setattr(module, "_C", core)
        for module in (flexdit_ext.ops, flexdit_ext._block_ops, flexdit_ext._single_ops, _sampler_torch):
            monkeypatch.setattr(module, "_C", core)
            monkeypatch.setattr(module, "execution", lambda like: core.Execution(device_index=0, stream=0))
        for module in (flexdit_ext._layout_config, flexdit_ext.config_single):  # of a configuration's core and schedule
            monkeypatch.setattr(module, "_C", core)
        # What _C has made before is of another module's types.
        schedules = functools.lru_cache(flexdit_ext.ops._core_schedule.__wrapped__)
        monkeypatch.setattr(flexdit_ext.ops, "_core_schedule", schedules)
        monkeypatch.setattr(flexdit_ext.DensitySchedule, "_core", _core_of(core), raising=False)
        monkeypatch.setitem(_arguments.DTYPES, "cpu", _arguments.DTYPES["cuda"])
    return torch.device("cuda" if name == "cuda" else "cpu")


def _core_of(core) -> property:
    """DensitySchedule._core as `core` makes it; what is there already stays for later."""
    return property(
        lambda s: core.DensitySchedule(list(s._grids), list(s._begins), s._num_timesteps),
        lambda s, made: s.__dict__.update(_core=made),
    )


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """What a device computes with besides float32 and bfloat16: the CPU float64, CUDA float16."""
    if name == "cpu":
        return torch.float64, torch.float32, torch.bfloat16
    return torch.float32, torch.bfloat16, torch.float16


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# For tests with the argument dtype: every dtype of every device.
each_dtype = pytest.mark.parametrize(
    "backend, dtype",
    [on(name, name, dtype, id=f"{name}-{short(dtype)}") for name in MARKS for dtype in dtypes_of(name)],
    indirect=["backend"],
)
