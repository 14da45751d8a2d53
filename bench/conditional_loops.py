"""What bench/conditional.py measures: FlexPixArt and FlexLatte, and how each contender takes steps of one sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_timing import Device
from latency_loops import COMPILED, EAGER, MODULE, SAMPLER, SEED, Loop
from model_rows import from_diffusers, randomized

from flexdit_ext import (
    FlexLatte,
    FlexLatteConfig,
    FlexPixArt,
    FlexPixArtConfig,
    Sampler,
    convert,
    reference_single,
)
from flexdit_ext.diffusion.samplers import make_sampler
from flexdit_ext.sampling import derive_seed, normal_noise

RIVAL, RIVAL_COMPILED = "diffusers, eager", "diffusers, torch.compile"
DENSE = "flexdit_ext, dense"
QUARTER = {"num_pooling_blocks": 1, "num_sdtm": 1, "sdtm_blocks": (1, 3, 1, 1), "num_dense_blocks": 0}
SMOKE = {"hidden_size": 48, "num_heads": 2, "input_size": 8, "sdtm_blocks": (1, 1, 1, 1), "num_sdtm": 1}
STEPS = 4  # of a run: a schedule's four grids once each


@dataclass(frozen=True)
class Row:
    """One model. targets: by device, of what conditional_tables asks."""

    name: str
    config: FlexPixArtConfig | FlexLatteConfig
    targets: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_clip(self) -> bool:
        return isinstance(self.config, FlexLatteConfig)


def all_rows() -> list[Row]:
    """The models, then a quarter of each, whose blocks are as large: its ratios are known in a quarter of the time."""
    text, video = "PixArt-XL 256, 120 caption tokens", "Latte-XL, 16 frames of 256"
    quarter = "1 pooling block and 1 SDTM of it"
    return [
        Row(text, FlexPixArtConfig(), {"cpu": {"eager_ratio": 2.8}}),
        Row(video, FlexLatteConfig(), {"cpu": {"eager_ratio": 3.5}}),
        Row(f"{text}, {quarter}", FlexPixArtConfig(**QUARTER)),
        Row(f"{video}, {quarter}", FlexLatteConfig(**QUARTER | {"num_dense_blocks": 1})),  # diffusers has pairs
    ]


def smoke_rows() -> list[Row]:
    return [
        Row("smoke, text", FlexPixArtConfig(**SMOKE, caption_channels=16, max_caption_tokens=5)),
        Row("smoke, video", FlexLatteConfig(**SMOKE, num_frames=4)),
    ]


class Steps(Loop):
    """A DDIM run of one sample without guidance, as one writes it in PyTorch; a step is forward and update.

    forward: (latents in the model's dtype, t [1], step) -> output. Of a dense model, whose steps all cost the same, a
    run is the first step alone.
    """

    def __init__(self, row: Row, device: Device, forward: Callable, dense: bool):
        super().__init__(1 if dense else STEPS)
        config = row.config
        self.forward, self.table, self.dtype = forward, make_sampler("ddim", STEPS).steps, dtype_of(device)
        self.channels = config.in_channels
        frames = (config.num_frames,) if row.is_clip else ()
        shape = (config.in_channels, *frames, config.input_size, config.input_size)
        self.noise = normal_noise([derive_seed(SEED, 0)], 0, shape).to(device.kind)
        self.t = [torch.full((1,), step.timestep, device=device.kind) for step in self.table]

    def begin(self) -> None:
        self.x = self.noise

    def step(self, i: int) -> None:
        c, output = self.table[i], self.forward(self.x.to(self.dtype), self.t[i], i)
        x0 = c.x0_from_x * self.x + c.x0_from_output * output[:, : self.channels].float()
        self.x = c.x_coef * self.x + c.x0_coef * x0

    def end(self) -> torch.Tensor:
        return self.x[0]


class SamplerSteps(Loop):
    """Every step is one Session.step(); the first embeds the caption and makes the modulations of all steps."""

    def __init__(self, sampler: Sampler, caption: torch.Tensor | None):
        super().__init__(STEPS)
        self.session, self.caption = sampler.session(max_batch=1), caption

    def begin(self) -> None:
        caption = {} if self.caption is None else {"caption": self.caption[0]}
        self.request = self.session.add(steps=STEPS, sampler="ddim", seed=SEED, **caption)

    def step(self, i: int) -> None:
        self.session.step()

    def end(self) -> torch.Tensor:
        return self.session.take(self.request)


def dtype_of(device: Device) -> torch.dtype:
    return torch.bfloat16 if device.cuda else torch.float32


def empty_model(kind: type, config, device: Device) -> torch.nn.Module:
    with torch.device("meta"):
        model = kind(config)
    return model.to(dtype_of(device)).to_empty(device=device.kind).eval().requires_grad_(False)


class Contenders:
    """Makers of a row's contenders, in the order in which they are made, compilation last. Dense ones share their
    weights' values, and so do those of the FlexDiT: what they compute is compared."""

    def __init__(self, row: Row, device: Device, compiler: dict):
        self.row, self.device, self.compiler, self.config = row, device, compiler, row.config
        self.ours = FlexLatte if row.is_clip else FlexPixArt
        generator = torch.Generator().manual_seed(1)
        shape = (1, self.config.max_caption_tokens, self.config.caption_channels or 1)
        self.caption = torch.randn(shape, generator=generator).to(device.kind, dtype_of(device))
        self.reads_caption = bool(self.config.caption_channels)
        self.rival = self.flex = self.plain = None

    def makers(self) -> dict[str, Callable[[], Loop]]:
        return {
            RIVAL: lambda: self._rival(lambda model: model),
            DENSE: self._dense,
            MODULE: self._module,
            SAMPLER: self._sampler,
            EAGER: lambda: self._reference(lambda model: model),
            RIVAL_COMPILED: lambda: self._rival(self._compile),
            COMPILED: lambda: self._reference(self._compile),
        }

    def _compile(self, model: Callable) -> Callable:
        return torch.compile(model, dynamic=False, **self.compiler)

    def _steps(self, forward: Callable, dense: bool = False) -> Loop:
        return Steps(self.row, self.device, forward, dense)

    def _rival(self, wrap: Callable) -> Loop:
        if self.rival is None:
            self.rival = diffusers_model(self.config, self.row.is_clip, self.device)
        model = wrap(self.rival)
        added = {} if self.row.is_clip else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

        def forward(x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
            caption = self.caption if self.reads_caption else self.caption[:, :1]
            return model(x, encoder_hidden_states=caption, timestep=t, return_dict=False, **added)[0]

        return self._steps(forward, dense=True)

    def _dense(self) -> Loop:
        if self.rival is None:  # without diffusers
            blocks = {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": self.config.depth}
            model = randomized(empty_model(self.ours, dataclasses.replace(self.config, **blocks), self.device))
        else:
            limit = {"max_caption_tokens": self.config.max_caption_tokens}
            model = (convert.from_latte if self.row.is_clip else convert.from_pixart)(self.rival, **limit)
        model.requires_grad_(False)
        return self._steps(lambda x, t, i: model(x, t, **self._conditions()), dense=True)

    def _conditions(self) -> dict[str, torch.Tensor]:
        return {"caption": self.caption} if self.reads_caption else {}

    def _flex(self) -> torch.nn.Module:
        if self.flex is None:
            self.flex = randomized(empty_model(self.ours, self.config, self.device))
        return self.flex

    def _grids(self) -> list[tuple]:
        grids = [self.config.density_schedule.grid(step.timestep) for step in make_sampler("ddim", STEPS).steps]
        return [(1, *grid) if len(grid) < len(self.config.dense_grid) else grid for grid in grids]

    def _module(self) -> Loop:
        model, grids = self._flex(), self._grids()
        return self._steps(lambda x, t, i: model(x, t, **self._conditions(), grid=grids[i]))

    def _sampler(self) -> Loop:
        return SamplerSteps(Sampler(self._flex()), self.caption if self.reads_caption else None)

    def _reference(self, wrap: Callable) -> Loop:
        if self.plain is None:
            with torch.device("meta"):
                self.plain = getattr(reference_single, self.ours.__name__)(self.config)
            self.plain.load_state_dict(self._flex().state_dict(), assign=True)
            self.plain.eval().requires_grad_(False)
        model, grids = wrap(self.plain), self._grids()
        return self._steps(lambda x, t, i: model(x, t, **self._conditions(), grid=grids[i]))


def diffusers_model(config, is_clip: bool, device: Device) -> torch.nn.Module:
    """diffusers' dense model of the same sizes and depth, with random weights."""
    pixart, latte = from_diffusers("PixArtTransformer2DModel", "LatteTransformer3DModel")
    options = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "cross_attention_dim": config.hidden_size if config.caption_channels else None,
        "caption_channels": config.caption_channels or 1,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    with torch.device(device.kind):
        if is_clip:
            model = latte(num_layers=config.depth // 2, video_length=config.num_frames, **options)
        else:
            model = pixart(num_layers=config.depth, use_additional_conditions=False, **options)
    return randomized(model.to(dtype_of(device))).eval().requires_grad_(False)
