"""The Gaussian diffusion process of DDPM with a learned variance, and DiT's training loss.

Sources: DDPM = Ho et al. 2020 (arXiv 2006.11239); IDDPM = Nichol and Dhariwal 2021 (arXiv 2102.09672);
ADM = Dhariwal and Nichol 2021 (arXiv 2105.05233); DiT = Peebles and Xie 2022 (arXiv 2212.09748).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._requests import NUM_TIMESTEPS, space_timesteps

Conditions = Tensor | Mapping[str, Tensor]  # labels, or what a model takes besides x, t and grid, by name


class DiffusionLoss(NamedTuple):
    """Per-sample losses, each [B]: `loss` = `mse` + `vb`; `vb` is None where no variance is learned."""

    loss: Tensor
    mse: Tensor
    vb: Tensor | None = None


def linear_betas(num_timesteps: int = NUM_TIMESTEPS, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Linear variances beta_t (DDPM, section 4): float64 [num_timesteps], both ends included."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] with `like`'s rank, dtype and device."""
    return values.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


class GaussianDiffusion:
    """q(x_t | x_0) and its posterior for a full or respaced set of timesteps; tables are float64.

    timesteps: None keeps all, otherwise what space_timesteps takes, or an ascending list of timesteps.
    betas: variances of the full process, [T] in (0, 1); default linear_betas().
    Methods take an index i into .timesteps, int64 [B] (in the full process i is the timestep itself), and tensors
    [B, C, ...] of one dtype, which the result has too.
    """

    def __init__(self, timesteps: int | str | Sequence[int] | None = None, betas: Tensor | None = None):
        full = linear_betas() if betas is None else torch.as_tensor(betas, dtype=torch.float64).cpu()
        if full.ndim != 1 or full.numel() == 0 or not bool(((full > 0) & (full < 1)).all()):
            raise ValueError("betas: must be one-dimensional, with every value in (0, 1)")
        if timesteps is None:
            timesteps = range(len(full))
        elif isinstance(timesteps, (int, str)):
            timesteps = space_timesteps(len(full), timesteps)
        self.timesteps = [int(t) for t in timesteps]
        ascending = all(a < b for a, b in zip(self.timesteps, self.timesteps[1:]))
        if not self.timesteps or not ascending or self.timesteps[0] < 0 or self.timesteps[-1] >= len(full):
            raise ValueError(f"timesteps = {self.timesteps}: must ascend within 0..{len(full) - 1}")

        # The respaced process has its own betas, such that the cumulative products stay (IDDPM, eq. 19).
        self.alphas_cumprod = torch.cumprod(1 - full, 0)[self.timesteps]
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        beta_bar, beta_bar_prev = 1 - self.alphas_cumprod, 1 - self.alphas_cumprod_prev
        # DDPM, eq. 7
        self.posterior_variance = self.betas * beta_bar_prev / beta_bar
        self.posterior_mean_x0 = self.betas * self.alphas_cumprod_prev.sqrt() / beta_bar
        self.posterior_mean_x = beta_bar_prev * (1 - self.betas).sqrt() / beta_bar
        # The first posterior variance is 0; its logarithm is clipped to the second one (IDDPM's code).
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.betas[0]
        self.posterior_log_variance = clipped.log()
        self.log_betas = self.betas.log()
        self.signal_rate = self.alphas_cumprod.sqrt()
        self.noise_rate = beta_bar.sqrt()
        self._cache: dict = {}

    @property
    def num_timesteps(self) -> int:
        return len(self.timesteps)

    def _at(self, name: str, i: Tensor, like: Tensor) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._cache:  # one copy per device: a copy per call would stall the GPU
            self._cache[key] = getattr(self, name).to(like.dtype).to(like.device)
        return per_sample(self._cache[key][i.to(like.device)], like)

    def model_timesteps(self, i: Tensor) -> Tensor:
        """What the model is told at index i: timesteps of the full process, int64 [B], on i's device."""
        if self.timesteps == list(range(len(self.timesteps))):
            return i
        return torch.tensor(self.timesteps, device=i.device)[i]

    def q_sample(self, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, eq. 4)."""
        return self._at("signal_rate", i, x0) * x0 + self._at("noise_rate", i, x0) * noise

    def predict_x0(self, x: Tensor, i: Tensor, epsilon: Tensor) -> Tensor:
        """x_0 from x_t and the noise in it: q_sample solved for x_0."""
        return (x - self._at("noise_rate", i, x) * epsilon) / self._at("signal_rate", i, x)

    def posterior(self, x0: Tensor, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, ...] and clipped log variance [B, 1, ...] of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6 and 7)."""
        mean = self._at("posterior_mean_x0", i, x) * x0 + self._at("posterior_mean_x", i, x) * x
        return mean, self._at("posterior_log_variance", i, x)

    def learned_log_variance(self, v: Tensor, i: Tensor) -> Tensor:
        """log Sigma = f log beta_t + (1 - f) log betatilde_t with f = (v + 1) / 2 (IDDPM, eq. 15; v in [-1, 1])."""
        fraction = (v + 1) / 2
        low, high = self._at("posterior_log_variance", i, v), self._at("log_betas", i, v)
        return low + fraction * (high - low)

    def variational_bound(self, x0: Tensor, noise: Tensor, epsilon: Tensor, v: Tensor, i: Tensor) -> Tensor:
        """One term of the variational bound, bits per dimension, [B] (DDPM, eq. 5): KL, and at index 0 the NLL.

        x0, noise: the sample and the noise q_sample mixed; epsilon, v: what the model made of x_t.
        """
        log_variance = self.learned_log_variance(v, i)
        true_log_variance = self._at("posterior_log_variance", i, v)
        # x_t cancels from both differences of means, and with it most of float32's rounding error.
        x0_gap = self._at("noise_rate", i, v) / self._at("signal_rate", i, v) * (epsilon - noise)
        mean_gap = self._at("posterior_mean_x0", i, v) * x0_gap
        kl = 0.5 * (
            log_variance - true_log_variance - 1
            + (true_log_variance - log_variance).exp() + mean_gap**2 * (-log_variance).exp()
        )  # fmt: skip
        nll = discretized_gaussian_nll(x0, x0_gap, log_variance)  # the mean at index 0 is the predicted x_0
        terms = torch.where(per_sample(i == 0, v).bool(), nll, kl)
        return terms.flatten(1).mean(1) / math.log(2)


def discretized_gaussian_nll(x: Tensor, centered: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(x) in nats, elementwise, for x in [-1, 1] in 256 steps (DDPM, eq. 13); centered = x - mean.

    The outermost bins reach to infinity. P is floored at 1e-12 as in ADM; ADM approximates the normal distribution
    function by a tanh, here it is exact.
    """
    half_bin = 1 / 255
    inverse_std = (-0.5 * log_variance).exp()
    # Mirrored into the lower tail, where the difference of two distribution functions keeps its digits.
    lower = -centered.abs()
    inside = torch.special.ndtr(inverse_std * (lower + half_bin)) - torch.special.ndtr(inverse_std * (lower - half_bin))
    left_end = torch.special.ndtr(inverse_std * (centered + half_bin))
    right_end = torch.special.ndtr(-inverse_std * (centered - half_bin))
    probability = torch.where(x < -0.999, left_end, torch.where(x > 0.999, right_end, inside))
    return -probability.clamp(min=1e-12).log()


@functools.lru_cache(maxsize=1)
def default_diffusion() -> GaussianDiffusion:
    """The full process: linear betas, 1000 timesteps."""
    return GaussianDiffusion()


def check_batch(x0: Tensor, y: Conditions, t: Tensor | None, noise: Tensor | None) -> None:
    """Shapes and dtypes common to the losses; ValueError or TypeError names the argument."""
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(f"x0: must be a floating-point tensor, got {getattr(x0, 'dtype', type(x0).__name__)}")
    if x0.ndim < 3 or x0.shape[0] == 0:
        raise ValueError(f"x0: must be [B, C, ...] with B >= 1, got shape {tuple(x0.shape)}")
    named = isinstance(y, Mapping)
    for name, value in y.items() if named else ():
        if not isinstance(value, Tensor) or value.shape[:1] != x0.shape[:1]:
            raise ValueError(f"y: {name} must be a tensor [{len(x0)}, ...], a row per sample, got {_shape_of(value)}")
    for name, value in (("y", None if named else y), ("t", t)):
        if value is not None and (not isinstance(value, Tensor) or value.shape != x0.shape[:1]):
            wanted = tuple(x0.shape[:1])
            raise ValueError(f"{name}: must be a tensor of shape {wanted}, one per sample, got {_shape_of(value)}")
    if noise is not None and (noise.shape != x0.shape or noise.dtype != x0.dtype):
        raise ValueError(f"noise: must be {tuple(x0.shape)} {x0.dtype} like x0, got {tuple(noise.shape)} {noise.dtype}")


def _shape_of(value):
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def draw_noise(x0: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal like x0, drawn on the generator's own device."""
    device = x0.device if generator is None else generator.device
    return torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device).to(x0.device)


def call_model(model, x: Tensor, t: Tensor, y: Conditions, grid) -> Tensor:
    """The one call of a loss: conditions by their names, labels as the third argument."""
    return model(x, t, **y, grid=grid) if isinstance(y, Mapping) else model(x, t, y, grid=grid)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """[B, C or 2C, ...] -> prediction [B, C, ...] and variance values [B, C, ...] or None."""
    if output.ndim < 2 or output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model output: must have {channels} channels, or {2 * channels} with learn_sigma, "
            f"got shape {tuple(output.shape)}"
        )
    return output[:, :channels], output[:, channels:] if output.shape[1] == 2 * channels else None


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ddpm_loss(
    model,
    x0: Tensor,
    y: Conditions,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    grid=None,
    generator: torch.Generator | None = None,
    diffusion: GaussianDiffusion | None = None,
) -> DiffusionLoss:
    """DiT's training loss, per sample: MSE on the noise, plus the variational bound where the variance is learned.

    The bound (bits per dimension, IDDPM eq. 16 with weight 1) trains the variance only: the gradient of the mean is
    stopped. Whether the variance is learned shows in the output's channels, C or 2C. Computed in at least float32.

    model(x_t, t, y, grid=grid) is called once; x0 [B, C, ...] floating: images [B, C, H, W], clips [B, C, F, H, W];
    y: labels int64 [B], or what the model takes by name, {"caption": [B, L, D], ...}, passed as model(x_t, t, **y,
    grid=grid); t: int64 [B], indices into diffusion.timesteps, default uniform; noise like x0, default standard normal;
    diffusion: default 1000 linear steps.
    Raises TypeError or ValueError, naming the argument, before the model is called.
    """
    diffusion = diffusion or default_diffusion()
    check_batch(x0, y, t, noise)
    if t is None:
        device = x0.device if generator is None else generator.device
        t = torch.randint(diffusion.num_timesteps, x0.shape[:1], generator=generator, device=device)
    elif t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t: must be int64, got {t.dtype}")
    elif t.min() < 0 or t.max() >= diffusion.num_timesteps:
        raise ValueError(f"t: must be in 0..{diffusion.num_timesteps - 1}, got {t.min().item()}..{t.max().item()}")
    t = t.to(x0.device, torch.int64)
    noise = draw_noise(x0, generator) if noise is None else noise
    output = call_model(model, diffusion.q_sample(x0, t, noise), diffusion.model_timesteps(t), y, grid)
    epsilon, v = split_output(at_least_float32(output), x0.shape[1])
    noise = noise.to(epsilon.dtype)
    mse = (epsilon - noise).square().flatten(1).mean(1)
    if v is None:
        return DiffusionLoss(mse, mse)
    vb = diffusion.variational_bound(x0.to(v.dtype), noise, epsilon.detach(), v, t)
    return DiffusionLoss(mse + vb, mse, vb)
