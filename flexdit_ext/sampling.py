"""Sampling from a FlexDiT (or any model with its interface): sampler, classifier-free guidance, seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import _C
from ._requests import (
    check_cfg_scale,
    check_grids,
    check_guidance_channels,
    check_int,
    check_interval,
    check_labels,
    check_seeds,
    derive_seed,
    progress_bar,
)
from .diffusion.ddpm import split_output
from .diffusion.samplers import Sampler, make_sampler

__all__ = ["derive_seed", "normal_noise", "sample"]

_CONFIG_FIELDS = ("input_size", "in_channels", "num_classes", "class_dropout_prob")


def normal_noise(seeds: Sequence[int], draw: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal [len(seeds), *shape] on the CPU; row b is draw `draw` of the stream of seeds[b], whatever the
    others are (csrc/include/flexdit/ops.h, NormalNoise: Philox4x32-10 and Box-Muller)."""
    out = torch.empty(len(seeds), *shape, dtype=dtype, device="cpu")
    _C.normal_noise(list(seeds), draw, out, torch.get_num_threads())
    return out


@torch.no_grad()
def sample(
    model: nn.Module,
    y: Tensor | Sequence[int],
    steps: int | str = 50,
    sampler: str = "ddim",
    cfg_scale: float | Sequence[float] | Tensor = 1.0,
    seed: int | Sequence[int] = 0,
    *,
    eta: float = 0.0,
    grid=None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int | str | None = None,
    clip_x0: bool = False,
    batch_size: int | None = None,
    start_index: int = 0,
    progress: bool = False,
) -> Tensor:
    """Latents for the labels y: [B, C, H, W] in the dtype and on the device of the model's parameters.

    The solver's own state is float32 (float64 for a float64 model). The model runs in eval mode, without gradients;
    its training flags are restored, and torch's global random state is neither read nor changed.

    model: called as model(x, t, y, grid=grid); has .config with input_size, in_channels, num_classes and
        class_dropout_prob. A flow model for "flow" and "heun", a DDPM model (epsilon, maybe learned variance)
        otherwise. flexdit_ext.Sampler gives a FlexDiT's same images faster.
    y: int64 (or int32) [B], an array of numpy, CuPy or JAX (cfg_scale and seed may be arrays, too), or a list of ints:
        labels in 0..num_classes - 1, or num_classes, the null class, where class_dropout_prob > 0.
    steps: int in 1..1000; for ddim and ddpm also a respacing string such as "ddim50" (see space_timesteps).
    sampler: "ddim", "ddpm" (learned variance where the model has one), "dpmpp" (DPM-Solver++(2M)), "flow" (Euler) or
        "heun" (flow, second order: 2 steps - 1 passes of the model).
    cfg_scale: classifier-free guidance, >= 0, one for all or one per sample:
        uncond + cfg_scale * (cond - uncond) (Ho and Salimans, arXiv 2207.12598, with cfg_scale = 1 + w).
        1 is no guidance, and one model call per step in place of a doubled batch.
    seed: int in [0, 2**64): sample i draws all its noise from a stream of its own, of derive_seed(seed,
        start_index + i), so that an image does not depend on the batch it is in. A list of B ints gives sample i the
        noise that a run with seed[i] gives its sample 0.
    eta: DDIM's eta in [0, 1].
    grid: sparse grid for the model: None (its schedule), one grid (h, w), or a list of B grids.
    guidance_interval: (first, last) timestep at which cfg_scale guides, both included; None: all (Kynkäänniemi et al.,
        arXiv 2404.07724).
    guidance_channels: how many of the first prediction channels are guided: None is DiT's min(3, C); "all"; or an int
        in 1..C. The other channels and the learned variance are the conditional ones.
    clip_x0: clamp the predicted x0 to [-1, 1] at each step (for models of pixels).
    batch_size: most samples at once (guidance doubles it inside); None is all.
    start_index: number of the first sample, so that several calls or processes continue one run.
    progress: a tqdm bar over all steps.

    Raises TypeError or ValueError, naming the argument, what it was and what is allowed, before anything is computed.
    """
    config = _check_config(model)
    labels = torch.from_numpy(check_labels(y, config))
    total = len(labels)
    walker = make_sampler(sampler, steps, eta, clip_x0)
    scales = check_cfg_scale(cfg_scale, total, config)
    interval = check_interval(guidance_interval)
    channels = check_guidance_channels(guidance_channels, config)
    seeds = check_seeds(seed, check_int("start_index", start_index, 0), total)
    grids = check_grids(grid, total)
    batch_size = total if batch_size is None else check_int("batch_size", batch_size, 1)
    dtype, device = _dtype_and_device(model)

    size = config.input_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    chunks = [slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    out = torch.empty(total, *shape, dtype=dtype, device=device)
    with _eval_mode(model), progress_bar(progress, len(chunks) * len(walker.steps)) as tick:
        for part in chunks:
            denoiser = _Denoiser(
                model,
                labels[part].to(device),
                None if scales is None else torch.from_numpy(scales[part]).to(device),
                interval,
                channels,
                grids[part] if isinstance(grids, list) else grids,
                config,
                dtype,
            )
            out[part] = _walk(walker, denoiser, seeds[part], shape, tick).to(dtype)
    return out


def _walk(walker: Sampler, denoiser: _Denoiser, seeds: list[int], shape: tuple, tick) -> Tensor:
    """One batch from noise to latents, in the solver's dtype."""
    state_dtype = torch.promote_types(denoiser.dtype, torch.float32)
    device = denoiser.labels.device
    x = normal_noise(seeds, 0, shape, state_dtype).to(device)
    for i, timestep in enumerate(walker.timesteps):
        noise = normal_noise(seeds, i + 1, shape, state_dtype).to(device) if walker.needs_noise(i) else None
        x = walker.step(denoiser(x, timestep), i, x, noise)
        tick()
    return x


class _Denoiser:
    """The model's output for one batch, guided."""

    def __init__(self, model, labels, scales, interval, channels, grids, config, dtype):
        self.interval = interval
        self.model, self.labels, self.channels, self.dtype = model, labels, channels, dtype
        self.in_channels = config.in_channels
        # All scales 1: the conditional output alone is the same thing.
        self.scales = None if scales is None or bool((scales == 1).all()) else scales.view(-1, 1, 1, 1)
        self.grids = self.both_grids = grids
        if self.scales is not None:
            self.both_grids = grids + grids if isinstance(grids, list) else grids
            self.both_labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    def __call__(self, x: Tensor, timestep: float) -> Tensor:
        """x [B, C, H, W] in the solver's dtype -> [B, C or 2C, H, W], float64 where it is guided."""
        guided = self.scales is not None and self.interval[0] <= timestep <= self.interval[1]
        labels = self.both_labels if guided else self.labels
        # Integer timesteps stay integers, as in DiT; flow's are the solver's.
        t_dtype = torch.int64 if isinstance(timestep, int) else x.dtype
        t = torch.full((len(labels),), timestep, dtype=t_dtype, device=x.device)
        inputs = torch.cat([x, x]) if guided else x
        output = self.model(inputs.to(self.dtype), t, labels, grid=self.both_grids if guided else self.grids)
        split_output(output, self.in_channels)  # for its check
        if not guided:
            return output
        cond, uncond = output.double().chunk(2)
        k = self.channels
        # uncond + scale * (cond - uncond), and exactly cond at 1: a neighbour's scale must not change an image
        mixed = torch.lerp(uncond[:, :k], cond[:, :k], self.scales)
        return torch.cat([mixed, cond[:, k:]], dim=1)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.float32, torch.device("cpu")


def _check_config(model):
    config = getattr(model, "config", None)
    missing = [name for name in _CONFIG_FIELDS if not hasattr(config, name)]
    if not isinstance(model, nn.Module) or missing:
        raise TypeError(
            f"model: must be an nn.Module whose .config has {', '.join(_CONFIG_FIELDS)}; got {type(model).__name__}"
            + (f" without {', '.join(missing)}" if missing else "")
        )
    return config
