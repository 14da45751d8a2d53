"""Models and inputs that the CUDA kernels take, and how far results may be from reference.py in float64."""

import copy

import torch
from helpers import (
    VARIANTS,
    forward_backward,
    model_inputs,
    randn,
    random_model,
    reference_of,
    relative_error,
    tensors_of,
)

from flexdit_ext import DensitySchedule

SCHEDULE = DensitySchedule([(4, 4), (3, 3), (2, 2)], begins=[0, 300, 600])
T = torch.tensor([3.0, 299.5, 1000.0])  # the first segment twice, then the last
HEADS = {"hidden_size": 32, "num_heads": 2}
CUDA_VARIANTS = {name: HEADS | overrides for name, overrides in VARIANTS.items() if "head size" not in name} | {
    "head size 40, narrow MLP": {"hidden_size": 40, "num_heads": 1, "mlp_ratio": 1.5},
    "head size 72": {"hidden_size": 72, "num_heads": 1, "sdtm_blocks": (1, 1, 1, 1), "num_sdtm": 1},
}


def device_model(device, dtype=torch.float32, seed=0, **overrides):
    return random_model(dtype, seed, **(HEADS | {"schedule": SCHEDULE, "num_sdtm": 1} | overrides)).to(device)


def device_inputs(config, device, batch=3, dtype=torch.float32):
    x, t, y = model_inputs(config, batch, dtype)
    return x.to(device), (T if batch == 3 else t).to(device), y.to(device)


def results(model, *arguments):
    """On the CPU, by name."""
    return {name: tensor.cpu() for name, tensor in tensors_of(forward_backward(model, *arguments)).items()}


# Of the relative errors of output, gradient of x and of every parameter; beside them the worst on the emulator,
# 2026-11-25, all in attention's query, whose gradients are small differences.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 8e-2, torch.float16: 1.5e-2}  # 6.0e-6, 2.6e-2, 5.0e-3


def compare_with_reference(model, x, t, y, grid):
    dtype = x.dtype
    grad = randn(len(x), model.config.out_channels, *x.shape[2:], seed=77).to(dtype)
    actual = results(model, x, t, y, grid, grad.to(x.device))
    grids = [model.schedule.grid(step) for step in t.tolist()] if grid is None and model.config.num_sdtm else grid
    twin = reference_of(copy.deepcopy(model).cpu())
    expected = tensors_of(forward_backward(twin, x.cpu().double(), t.cpu(), y.cpu(), grids, grad.double()))
    errors = {name: relative_error(actual[name].double(), tensor, least=1e-2) for name, tensor in expected.items()}
    beyond = {name: error for name, error in errors.items() if error > BOUNDS[dtype]}
    assert not beyond
