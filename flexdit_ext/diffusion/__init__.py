"""Diffusion and flow matching around a FlexDiT, in plain PyTorch: training losses and samplers."""

from .ddpm import DiffusionLoss, GaussianDiffusion, ddpm_loss, linear_betas, space_timesteps
from .flow import flow_interpolate, flow_loss, flow_velocity
from .samplers import (
    SAMPLERS,
    DDIMSampler,
    DDPMSampler,
    DPMSolverPPSampler,
    FlowEulerSampler,
    FlowHeunSampler,
    Sampler,
    SamplerStep,
    make_sampler,
)

__all__ = [
    "SAMPLERS",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverPPSampler",
    "DiffusionLoss",
    "FlowEulerSampler",
    "FlowHeunSampler",
    "GaussianDiffusion",
    "Sampler",
    "SamplerStep",
    "ddpm_loss",
    "flow_interpolate",
    "flow_loss",
    "flow_velocity",
    "linear_betas",
    "make_sampler",
    "space_timesteps",
]
