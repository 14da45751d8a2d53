"""The devices that tests run on: the CPU, the CUDA kernels on the emulator, and a GPU where there is one."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch

import flexdit_ext

# `make pytest` builds the emulated module and says where; a bare pytest finds it there if it has been built before.
EMULATED_FOLDER = Path(os.environ.get("FLEXDIT_EMULATED") or Path(__file__).parents[1] / "build" / "ctest")

DEVICES = [
    pytest.param("cpu"),
    pytest.param("emulated"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


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
        for module in (flexdit_ext.ops, flexdit_ext._block_ops):
            monkeypatch.setattr(module, "_C", core)
            monkeypatch.setattr(module, "execution", lambda like: core.Execution(device_index=0, stream=0))
    return torch.device("cuda" if name == "cuda" else "cpu")


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """What a device computes with besides float32 and bfloat16: the CPU float64, CUDA float16."""
    return (
        (torch.float64, torch.float32, torch.bfloat16)
        if name == "cpu"
        else (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        )
    )
