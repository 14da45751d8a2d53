"""The engine behind Sampler against the Python samplers: the same images. Requests that come and go: test_session.py."""

import copy
import functools
import math
import pickle
import threading

import pytest
import torch
from devices import CUDA, short
from helpers import VARIANTS, random_model, reference_of, relative_error
from torch import nn

import flexdit_ext
from flexdit_ext import _C, DensitySchedule, FlexDiT, Sampler, _block_ops, sample
from flexdit_ext.diffusion import make_sampler

SCHEDULE = DensitySchedule([(4, 4), (3, 3), (2, 2)])
VARIANT_MODELS = VARIANTS | {"noise alone": {"learn_sigma": False}}
Y = [3, 1, 10, 5]  # the null class is among them
SAMPLERS = ("ddim", "ddpm", "dpmpp", "flow", "heun")


@functools.cache
def model_of(variant: str = "plain", dtype: torch.dtype = torch.float32, **overrides) -> FlexDiT:
    return random_model(dtype, **({"schedule": SCHEDULE} | VARIANT_MODELS[variant] | overrides))


@functools.cache
def sampler_of(variant: str = "plain", dtype: torch.dtype = torch.float32) -> Sampler:
    return Sampler(model_of(variant, dtype))


class ScheduledReference(nn.Module):
    """reference.py with a density schedule."""

    def __init__(self, model: FlexDiT):
        super().__init__()
        self.reference, self.config, self.schedule = reference_of(model), model.config, model.schedule

    def forward(self, x, t, y, grid=None):
        if grid is None and self.config.num_sdtm:
            grid = [self.schedule.grid(step) for step in t.tolist()]
        return self.reference(x, t, y, grid)


def rounded_features(t, dtype, shift=0):
    """timestep_features with every operation rounded as csrc/cpu/embed_cpu.cpp does it. torch's float32 exp is an ulp
    off now and then, which times t = 1000 is 6e-5 of an angle: more than all else between the two."""
    half = _block_ops.TIMESTEP_FEATURES // 2
    exponents = torch.tensor(-math.log(10000)) * torch.arange(half, dtype=torch.float32) / (half - shift)
    angles = (t.float()[:, None] * exponents.double().exp().float()).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(dtype)


@pytest.fixture
def same_features(monkeypatch):
    monkeypatch.setattr(_block_ops, "timestep_features", rounded_features)


# What a run is given besides the model and the labels.
STEPS = {f"{name}, {steps} steps": {"sampler": name, "steps": steps} for name in SAMPLERS for steps in (1, 2, 7)}
OPTIONS = {
    "eta": {"steps": 5, "eta": 0.6},
    "eta 1, respaced": {"steps": "ddim5", "eta": 1.0},
    "ddim in sections": {"steps": "3,1,2"},
    "ddpm respaced": {"sampler": "ddpm", "steps": "ddim4"},
    "seeds": {"sampler": "ddpm", "steps": 3, "seed": [5, 0, 2**64 - 1, 5]},
    "later images": {"sampler": "ddpm", "steps": 3, "seed": 2**63, "start_index": 1000},
    "one grid": {"steps": 3, "grid": (2, 3)},
    "grids": {"steps": 3, "grid": [(1, 1), (4, 2), (2, 3), (3, 4)]},
    "clipped ddim": {"steps": 4, "eta": 0.5, "clip_x0": True},
    "clipped ddpm": {"sampler": "ddpm", "steps": 4, "clip_x0": True},
    "clipped dpmpp": {"sampler": "dpmpp", "steps": 4, "clip_x0": True},
    "clipped heun": {"sampler": "heun", "steps": 4, "clip_x0": True},
    "two at once": {"sampler": "dpmpp", "steps": 4, "batch_size": 2},
    "three at once": {"sampler": "ddpm", "steps": 3, "batch_size": 3},
}
# Where there is a null class.
GUIDED = {f"guided {name}": {"sampler": name, "steps": 4, "cfg_scale": [2.5, 1.0, 0.0, 0.4]} for name in SAMPLERS} | {
    "one scale": {"steps": 4, "cfg_scale": 3.0},
    "all channels": {"sampler": "ddpm", "steps": 4, "cfg_scale": 2.0, "guidance_channels": "all"},
    "one channel": {"steps": 4, "cfg_scale": 2.0, "guidance_channels": 1},
    "interval": {"steps": 6, "cfg_scale": [3.0, 1.0, 2.0, 0.0], "guidance_interval": (150, 800)},
    "interval of heun": {"sampler": "heun", "steps": 5, "cfg_scale": 2.0, "guidance_interval": (300, 600.5)},
    "interval between steps": {"steps": 2, "cfg_scale": 2.0, "guidance_interval": (100, 101)},
    "guided, two at once, grids": {
        "steps": 3, "cfg_scale": [2.0, 1.0, 1.0, 3.0], "batch_size": 3, "grid": [(2, 2), (4, 4), (1, 3), (2, 2)],
    },
}  # fmt: skip
RUNS = STEPS | OPTIONS | GUIDED
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())

# Relative errors allowed of images against the Python samplers with the same model in the same dtype, and the worst
# measured on the 2-core AMD machine with AVX-512, torch 2.13, 2026-11-25.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25}


def assert_same_images(sampler, model, run, dtype):
    expected = sample(model, Y, **({"seed": 9} | run))
    actual = sampler.sample(Y, **({"seed": 9} | run))
    assert actual.shape == expected.shape and actual.dtype == dtype and actual.device == expected.device
    assert actual.isfinite().all()
    assert relative_error(actual.double(), expected.double(), least=1e-3) <= BOUNDS[dtype]


@each_run
@pytest.mark.parametrize("dtype", BOUNDS, ids=short)
def test_same_images_as_python(dtype, run):
    assert_same_images(sampler_of(dtype=dtype), model_of(dtype=dtype), run, dtype)
