"""Flow matching on the linear path (rectified flow): Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022
(arXiv 2209.03003); t = 0 is data, t = 1 is noise, as in SiT (arXiv 2401.08740) and Stable Diffusion 3."""

from __future__ import annotations

import torch
from torch import Tensor

from .ddpm import (
    NUM_TIMESTEPS,
    Conditions,
    DiffusionLoss,
    at_least_float32,
    call_model,
    check_batch,
    draw_noise,
    per_sample,
    split_output,
)


def flow_interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t noise; x0, noise [B, C, ...]; t floating [B] in [0, 1]."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def flow_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt = noise - x_0, the regression target; [B, C, ...]."""
    return noise - x0


def flow_loss(
    model,
    x0: Tensor,
    y: Conditions,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    grid=None,
    generator: torch.Generator | None = None,
) -> DiffusionLoss:
    """Mean squared error of the velocity, per sample (conditional flow matching, arXiv 2210.02747 eq. 23).

    model(x_t, 1000 t, y, grid=grid) is called once: the timestep embedding and the density schedule see the range
    that they see in diffusion. With 2C output channels the first C are the velocity and the others are not used.
    x0 [B, C, ...] floating; y: labels int64 [B], or the model's conditions by name, as in ddpm_loss; t: floating [B] in
    [0, 1], default uniform; noise like x0, default standard normal. Computed in at least float32. Raises TypeError or
    ValueError, naming the argument, before the model is called.
    """
    check_batch(x0, y, t, noise)
    if t is None:
        device = x0.device if generator is None else generator.device
        t = torch.rand(x0.shape[:1], generator=generator, device=device)
    elif not t.is_floating_point():
        raise TypeError(f"t: must be floating point, got {t.dtype}")
    elif not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t: must be in [0, 1], got {t.min().item()}..{t.max().item()}")
    t = at_least_float32(t).to(x0.device)
    noise = draw_noise(x0, generator) if noise is None else noise
    output = call_model(model, flow_interpolate(x0, noise, t), t * NUM_TIMESTEPS, y, grid)
    velocity, _ = split_output(at_least_float32(output), x0.shape[1])
    mse = (velocity - flow_velocity(x0, noise).to(velocity.dtype)).square().flatten(1).mean(1)
    return DiffusionLoss(mse, mse)
