"""Samplers as tables of numbers: every step of every sampler is one linear combination.

    x0   = x0_from_x * x + x0_from_output * output        (clamped to [-1, 1] with clip_x0)
    next = x_coef * x + x0_coef * x0 + x0_previous_coef * (the step before's x0) + noise_coef * noise

The one exception is DDPM with a learned variance, where the noise's coefficient comes from the output. The tables
and the steps are computed in float64, so an engine in another language needs only them and this formula, and its
float32 images are the same ones.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._requests import NUM_TIMESTEPS, check_clip_x0, check_eta, check_sampler, check_step_count, kept_timesteps
from .ddpm import GaussianDiffusion, split_output


@dataclass(frozen=True)
class SamplerStep:
    """Coefficients of one step, see the module's formula; `timestep` is what the model is called with."""

    timestep: int | float
    x0_from_x: float
    x0_from_output: float
    x_coef: float
    x0_coef: float
    x0_previous_coef: float = 0.0
    noise_coef: float = 0.0
    log_variances: tuple[float, float] | None = None  # smallest and largest, where the model may learn the variance


class Sampler:
    """Walks from noise to data. Subclasses fill `self.steps`, first step first (t descends)."""

    steps: list[SamplerStep]

    def __init__(self, clip_x0: bool = False):
        self.clip_x0 = check_clip_x0(clip_x0)
        self._previous: tuple[int, Tensor] | None = None  # (step, its x0), kept only where a later step reads it

    @property
    def timesteps(self) -> list:
        """What the model is called with, step by step: ints in 0..999, or floats in (0, 1000] for flow."""
        return [step.timestep for step in self.steps]

    def needs_noise(self, i: int) -> bool:
        """Whether step i reads noise."""
        return self.steps[i].noise_coef > 0

    def step(self, model_output: Tensor, i: int, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x at step i -> x at step i + 1 (after the last: the sample), [B, C, ...] in x's dtype, computed in float64.

        model_output [B, C or 2C, ...]: the first C are the prediction; i: 0-based step; noise: standard normal like
        x, needed where needs_noise(i). Call with i = 0, 1, ... in order: a two-step method remembers one tensor.
        """
        c, dtype, x = self.steps[i], x.dtype, x.double()
        prediction, variance = split_output(model_output.double(), x.shape[1])
        x0 = c.x0_from_x * x + c.x0_from_output * prediction
        if self.clip_x0:
            x0 = x0.clamp(-1, 1)
        result = c.x_coef * x + c.x0_coef * x0
        if c.x0_previous_coef:
            if self._previous is None or self._previous[0] != i - 1:
                raise RuntimeError(f"i = {i}: {type(self).__name__} needs step {i - 1} to come just before")
            result = result + c.x0_previous_coef * self._previous[1].double()
        keep = i + 1 < len(self.steps) and self.steps[i + 1].x0_previous_coef
        self._previous = (i, x0.to(dtype)) if keep else None
        if self.needs_noise(i):
            if noise is None:
                raise ValueError(f"noise: step {i} of {type(self).__name__} needs it")
            result = result + self._noise_scale(i, variance) * noise.double()
        return result.to(dtype)

    def _noise_scale(self, i: int, variance: Tensor | None) -> float | Tensor:
        return self.steps[i].noise_coef


class DDPMSampler(Sampler):
    """Ancestral sampling, DDPM (arXiv 2006.11239) algorithm 2, on DiT's respaced timesteps.

    steps: what space_timesteps takes; n gives the timesteps of DiT's create_diffusion(str(n)).
    variance: "learned" (IDDPM eq. 15), "fixed_small" (betatilde_t), or None: learned where the output has 2C channels.
    """

    def __init__(self, steps: int | str, variance: str | None = None, clip_x0: bool = False):
        super().__init__(clip_x0)
        if variance not in (None, "learned", "fixed_small"):
            raise ValueError(f"variance = {variance!r}: must be 'learned', 'fixed_small' or None")
        self.variance = variance
        self.diffusion = d = GaussianDiffusion(kept_timesteps(steps))
        self.steps = [
            SamplerStep(
                timestep=d.timesteps[k],
                x0_from_x=1 / d.signal_rate[k].item(),
                x0_from_output=-(d.noise_rate[k] / d.signal_rate[k]).item(),
                x_coef=d.posterior_mean_x[k].item(),
                x0_coef=d.posterior_mean_x0[k].item(),
                noise_coef=math.sqrt(d.posterior_variance[k].item()),
                log_variances=None
                if variance == "fixed_small"
                else (d.posterior_log_variance[k].item(), d.log_betas[k].item()),
            )
            for k in reversed(range(d.num_timesteps))
        ]

    def _noise_scale(self, i: int, variance: Tensor | None) -> float | Tensor:
        if self.variance == "fixed_small" or (self.variance is None and variance is None):
            return self.steps[i].noise_coef
        if variance is None:
            raise ValueError("model_output: variance='learned' needs 2C channels, the second half being the variance")
        k = torch.full((variance.shape[0],), len(self.steps) - 1 - i, device=variance.device)
        return (0.5 * self.diffusion.learned_log_variance(variance, k)).exp()


class DDIMSampler(Sampler):
    """DDIM (arXiv 2010.02502), eq. 12 and 16, on DiT's respaced timesteps; eta in [0, 1], 0 is deterministic.

    steps: what space_timesteps takes; n gives the timesteps of DiT's create_diffusion(str(n)), "ddimN" those of
    diffusers' default spacing ("leading"). With clip_x0 the noise is derived again from the clamped x0, as in ADM.
    """

    def __init__(self, steps: int | str, eta: float = 0.0, clip_x0: bool = False):
        super().__init__(clip_x0)
        eta = check_eta(eta)
        d = GaussianDiffusion(kept_timesteps(steps))
        self.steps = []
        for k in reversed(range(d.num_timesteps)):
            signal, noise = d.signal_rate[k].item(), d.noise_rate[k].item()
            signal_next = math.sqrt(d.alphas_cumprod_prev[k].item())
            std = eta * math.sqrt(d.posterior_variance[k].item())
            # next = signal_next * x0 + direction * epsilon with epsilon = (x - signal * x0) / noise
            direction = math.sqrt(max(0.0, 1 - d.alphas_cumprod_prev[k].item() - std**2))
            self.steps.append(
                SamplerStep(
                    timestep=d.timesteps[k],
                    x0_from_x=1 / signal,
                    x0_from_output=-noise / signal,
                    x_coef=direction / noise,
                    x0_coef=signal_next - direction * signal / noise,
                    noise_coef=std,
                )
            )


class DPMSolverPPSampler(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): midpoint form, ending at x0, first and last step first-order.

    Timesteps and orders are those of diffusers' DPMSolverMultistepScheduler: n of n + 1 evenly spaced timesteps
    999..0, the last left out (with n = 1000, where they would repeat: 999, 998, ..., 0).
    """

    def __init__(self, steps: int, clip_x0: bool = False):
        super().__init__(clip_x0)
        steps = check_step_count(steps)
        full = GaussianDiffusion()
        last = NUM_TIMESTEPS - 1
        timesteps = [round(k * (last / steps)) for k in range(steps, 0, -1)] if steps <= last else range(last, -1, -1)
        signal = [full.signal_rate[t].item() for t in timesteps] + [1.0]
        noise = [full.noise_rate[t].item() for t in timesteps] + [0.0]
        half_log_snr = [math.log(s / n) if n else math.inf for s, n in zip(signal, noise)]
        self.steps = []
        for i, t in enumerate(timesteps):
            h = half_log_snr[i + 1] - half_log_snr[i]
            x0_coef = -signal[i + 1] * math.expm1(-h)
            previous = 0.0
            if 0 < i < len(timesteps) - 1:
                previous = -0.5 * x0_coef * h / (half_log_snr[i] - half_log_snr[i - 1])
            self.steps.append(
                SamplerStep(
                    timestep=t,
                    x0_from_x=1 / signal[i],
                    x0_from_output=-noise[i] / signal[i],
                    x_coef=noise[i + 1] / noise[i],
                    x0_coef=x0_coef - previous,
                    x0_previous_coef=previous,
                )
            )


class FlowEulerSampler(Sampler):
    """Euler steps x += (t' - t) velocity along the linear path, t = 1, 1 - 1/n, ..., 1/n -> 0.

    The model is called with 1000 t. The same times as diffusers' FlowMatchEulerDiscreteScheduler with
    sigmas = linspace(1, 1/n, n), which the Flux and SD3 pipelines pass.
    """

    def __init__(self, steps: int, clip_x0: bool = False):
        super().__init__(clip_x0)
        steps = check_step_count(steps)
        # x0 = x - t velocity, so x + (t' - t) velocity = (t'/t) x + (1 - t'/t) x0
        self.steps = [
            SamplerStep(
                timestep=NUM_TIMESTEPS * k / steps,
                x0_from_x=1.0,
                x0_from_output=-k / steps,
                x_coef=(k - 1) / k,
                x0_coef=1 / k,
            )
            for k in range(steps, 0, -1)
        ]


class FlowHeunSampler(Sampler):
    """Heun's steps x += (t' - t) (v + v') / 2 at Euler's times, v' being the velocity at Euler's x'; the last step is
    Euler's.

    2 n - 1 passes of the model. v = (x - x0) / t and x = (t / t') x' + (1 - t / t') x0 bring the second pass into the
    tables' form. Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1, on the linear path.
    """

    def __init__(self, steps: int, clip_x0: bool = False):
        super().__init__(clip_x0)
        euler = FlowEulerSampler(steps).steps
        self.steps = []
        for step, following in itertools.pairwise(euler):
            t, s = -step.x0_from_output, -following.x0_from_output
            half = (s - t) / 2
            second = SamplerStep(
                timestep=following.timestep,
                x0_from_x=1.0,
                x0_from_output=-s,
                x_coef=(1 + half / t) * t / s + half / s,
                x0_coef=-half / s,
                x0_previous_coef=(1 + half / t) * (1 - t / s) - half / t,
            )
            self.steps += [step, second]
        self.steps.append(euler[-1])


SAMPLERS = {
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "dpmpp": DPMSolverPPSampler,
    "flow": FlowEulerSampler,
    "heun": FlowHeunSampler,
}


def make_sampler(sampler: str = "ddim", steps: int | str = 50, eta: float = 0.0, clip_x0: bool = False) -> Sampler:
    """A sampler by name: "ddim", "ddpm", "dpmpp" (DPM-Solver++(2M)), "flow" (Euler) or "heun" (flow, second order).

    steps: int in 1..1000; ddim and ddpm also take a respacing string such as "ddim50" (see space_timesteps).
    eta: DDIM's, in [0, 1]; the others take only 0. Raises ValueError or TypeError naming the argument.
    """
    if check_sampler(sampler, eta) == "ddim":
        return DDIMSampler(steps, eta, clip_x0)
    return SAMPLERS[sampler](steps, clip_x0=clip_x0)
