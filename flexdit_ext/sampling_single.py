"""Sampling from FlexPixArt and FlexLatte: what flexdit_ext.sample does, from captions or labels, images or clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._conditions import check_frames, check_size
from ._requests import (
    check_grids,
    check_guidance_channels,
    check_int,
    check_interval,
    check_scales,
    check_seeds,
    progress_bar,
)
from .diffusion.samplers import make_sampler
from .sampling import _eval_mode, _walk
from .single_model import FlexLatte, SingleFlexDiT

__all__ = ["sample_conditional"]


@torch.no_grad()
def sample_conditional(
    model: SingleFlexDiT,
    conditions: Mapping[str, Tensor],
    steps: int | str = 50,
    sampler: str = "ddim",
    cfg_scale: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    *,
    unconditional: Mapping[str, Tensor] | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    eta: float = 0.0,
    grid=None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int | str | None = "all",
    clip_x0: bool = False,
    batch_size: int | None = None,
    start_index: int = 0,
    progress: bool = False,
) -> Tensor:
    """Latents [B, C, H, W] of a FlexPixArt, [B, C, F, H, W] of a FlexLatte, in the model's dtype and on its device.

    conditions: what the model's forward takes by name besides x, t and grid, B samples each: caption, caption_mask,
        resolution, aspect_ratio; y.
    unconditional: the same for the passes without condition, one sample or B each; needed where cfg_scale is not 1.
        Conditions that it does not name are as in `conditions`.
    size: (H, W) of the latents; None is the config's. frames: F of a clip; None is num_frames.
    guidance_channels: "all" as in PixArt and Latte.

    The other arguments, the noise and the errors are flexdit_ext.sample's; a sample does not depend on its batch.
    """
    if not isinstance(model, SingleFlexDiT):
        raise TypeError(f"model is {type(model).__name__}, must be a FlexPixArt or a FlexLatte")
    config, weight = model.config, model.patch_embed.weight
    total = _check_conditions("conditions", conditions)
    walker = make_sampler(sampler, steps, eta, clip_x0)
    scales = check_scales(cfg_scale, total)
    if scales is not None and unconditional is None:
        raise ValueError(f"cfg_scale is {cfg_scale}, guidance needs unconditional")
    interval = check_interval(guidance_interval)
    channels = check_guidance_channels(guidance_channels, config)
    seeds = check_seeds(seed, check_int("start_index", start_index, 0), total)
    grids = check_grids(grid, total)
    batch_size = total if batch_size is None else check_int("batch_size", batch_size, 1)
    shape = _shape(model, size, frames)
    null = None if unconditional is None else _completed(unconditional, conditions, total)
    chunks = [slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    out = torch.empty(total, *shape, dtype=weight.dtype, device=weight.device)
    with _eval_mode(model), progress_bar(progress, len(chunks) * len(walker.steps)) as tick:
        for part in chunks:
            own = {name: value[part] for name, value in conditions.items()}
            denoiser = _Denoiser(
                model,
                own,
                None if null is None else {name: value[part] for name, value in null.items()},
                None if scales is None else torch.from_numpy(scales[part]).to(weight.device),
                interval,
                channels,
                grids[part] if isinstance(grids, list) else grids,
            )
            out[part] = _walk(walker, denoiser, seeds[part], shape, tick).to(weight.dtype)
    return out


def _check_conditions(name: str, conditions) -> int:
    """The number of samples."""
    if not isinstance(conditions, Mapping) or not all(isinstance(value, Tensor) for value in conditions.values()):
        raise TypeError(f"{name} is {type(conditions).__name__}, must map names to tensors")
    counts = {key: len(value) for key, value in conditions.items() if value.dim()}
    if len(counts) != len(conditions) or len(set(counts.values())) != 1:
        raise ValueError(f"{name} has {counts} samples, must have a tensor, and in all of them the same number")
    return next(iter(counts.values()))


def _completed(unconditional, conditions: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
    count = _check_conditions("unconditional", unconditional)
    if unknown := sorted(set(unconditional) - set(conditions)):
        raise ValueError(f"unconditional names {unknown}, conditions {sorted(conditions)}")
    if count not in (1, total):
        raise ValueError(f"unconditional has {count} samples, must have 1 or {total}")
    return dict(conditions) | {n: v.expand(total, *v.shape[1:]) for n, v in unconditional.items()}


def _shape(model: SingleFlexDiT, size, frames) -> tuple[int, ...]:
    config = model.config
    height, width = (config.input_size,) * 2 if size is None else check_size(size, config)
    frames = check_frames(config, frames) or config.num_frames
    clip = (frames,) if isinstance(model, FlexLatte) else ()
    return (config.in_channels, *clip, height, width)


class _Denoiser:
    """The model's output for one batch, guided."""

    def __init__(self, model, conditions, null, scales, interval, channels, grids):
        self.model, self.conditions, self.grids = model, conditions, grids
        self.interval, self.channels = interval, channels
        self.dtype, self.labels = model.patch_embed.weight.dtype, next(iter(conditions.values()))
        # All scales 1: the conditional output alone is the same thing.
        self.scales = None if scales is None or bool((scales == 1).all()) else scales
        if self.scales is not None:
            self.both = {name: torch.cat([value, null[name]]) for name, value in conditions.items()}
            self.both_grids = grids + grids if isinstance(grids, list) else grids

    def __call__(self, x: Tensor, timestep: float) -> Tensor:
        """x [B, C, ...] in the solver's dtype -> [B, C or 2C, ...], float64 where it is guided."""
        guided = self.scales is not None and self.interval[0] <= timestep <= self.interval[1]
        inputs = torch.cat([x, x]) if guided else x
        t_dtype = torch.int64 if isinstance(timestep, int) else x.dtype
        t = torch.full((len(inputs),), timestep, dtype=t_dtype, device=x.device)
        conditions, grids = (self.both, self.both_grids) if guided else (self.conditions, self.grids)
        output = self.model(inputs.to(self.dtype), t, **conditions, grid=grids)
        if not guided:
            return output
        cond, uncond = output.double().chunk(2)
        k, scales = self.channels, self.scales.view(-1, *[1] * (x.dim() - 1))
        return torch.cat([torch.lerp(uncond[:, :k], cond[:, :k], scales), cond[:, k:]], dim=1)
