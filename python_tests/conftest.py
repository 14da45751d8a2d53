"""Before torch is loaded: OpenMP's idle threads must not spin for long, or a busy neighbour makes every test crawl."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
from devices import DEVICES, use_device


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where to compute: "cpu", "emulated" (the CUDA kernels on the CPU) or "cuda", as a torch device for tensors."""
    return use_device(request.param, monkeypatch)
