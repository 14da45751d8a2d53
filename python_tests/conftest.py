"""Before torch is loaded: OpenMP's idle threads must not spin for long, or a busy neighbour makes every test crawl."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch
from devices import DEVICES, use_device
from helpers import released_features, tiny_model, use_features


@pytest.fixture(params=DEVICES)
def backend(request, monkeypatch):
    """Where the ops compute: "cpu", "emulated" (the CUDA kernels on the CPU) or "cuda"."""
    use_device(request.param, monkeypatch)
    return request.param


@pytest.fixture
def device(backend):
    """The torch device of `backend`'s tensors."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture
def saved(tmp_path):
    """A model and the directory it was saved to."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.fixture
def torch_features():
    """For comparisons with diffusers' and DiT's models: ours with timestep features as they compute them, by torch's
    float32 functions, which round in the processor's way."""
    with use_features(released_features):
        yield


@pytest.fixture
def one_thread():
    """For work so small that the threads of a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
