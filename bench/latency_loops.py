"""What bench/latency.py measures: rows in order of importance, and how each contender samples one guided image."""

from __future__ import annotations

import dataclasses
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_timing import Device
from model_rows import diffusers_dit, from_diffusers, randomized

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, Sampler, reference
from flexdit_ext.diffusion.samplers import make_sampler
from flexdit_ext.model import sincos_position_embedding
from flexdit_ext.sampling import derive_seed, normal_noise

SAMPLER = "flexdit_ext, Sampler"
MODULE = "flexdit_ext, the module's forward"
EAGER = "reference, eager"
COMPILED = "reference, torch.compile"  # on a GPU with mode reduce-overhead, which replays CUDA graphs
DIFFUSERS = "diffusers, DiTPipeline"
DENSE = "dense"
LABEL, SEED, CFG_SCALE, DTYPE = 207, 0, 4.0, torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One line of the table. sides: of the schedule's sparse grids from data to noise, or "dense", a dense DiT.

    targets: by device, each a bound of latency_tables.BOUNDS.
    """

    preset: str
    image: int
    sides: tuple[int, ...] | str
    cpu_steps: int  # DDIM steps of a run on the CPU; a multiple of 4 has each of the schedule's grids equally often
    targets: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        layout = "dense DiT" if self.sides == DENSE else f"FlexDiT ({', '.join(map(str, self.sides))})"
        return f"{self.preset} {self.image} {layout}"


def all_rows() -> list[Row]:
    """What has a target first."""
    small, large = (10, 8, 7, 6), (20, 16, 14, 12)
    ratio = {"compiled_ratio": 1.5}
    return [
        Row("XL/2", 256, small, 8, {"cuda": {"step_ms": 0.9} | ratio, "cpu": {"module_ratio": 1.15}}),
        Row("XL/2", 512, large, 4, {"cuda": {"step_ms": 2.4, "image_ms": 125} | ratio}),
        Row("XL/2", 256, DENSE, 4),
        Row("XL/2", 512, small, 4),
        Row("XL/2", 512, DENSE, 4),
    ]


def smoke_rows() -> list[Row]:
    return [Row("smoke", 64, (4, 3, 2, 1), 8), Row("smoke", 64, DENSE, 4)]


def config_of(row: Row) -> FlexDiTConfig:
    if row.preset == "smoke":
        blocks = {"num_pooling_blocks": 1, "num_sdtm": 1, "sdtm_blocks": (1, 0, 1, 0), "num_dense_blocks": 1}
        config = FlexDiTConfig(**blocks, hidden_size=32, num_heads=2, input_size=row.image // 8)
    else:
        config = FlexDiTConfig.preset(row.preset, image_size=row.image)
    if row.sides == DENSE:
        return dataclasses.replace(config, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=config.depth)
    return dataclasses.replace(config, schedule=DensitySchedule([(side, side) for side in row.sides]))


def random_weights(config: FlexDiTConfig, device: str, dtype: torch.dtype = DTYPE) -> dict[str, torch.Tensor]:
    """Random everywhere: modulations that start at zero would make blocks the identity. Models share these tensors."""
    with torch.device("meta"):
        shapes = FlexDiT(config, dtype=dtype).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    empty = {name: torch.empty(tensor.shape, dtype=dtype, device=device) for name, tensor in shapes.items()}
    state = {name: tensor.normal_(std=0.02, generator=generator) for name, tensor in empty.items()}
    state["pos_embed"] = sincos_position_embedding(config.dense_grid, config.hidden_size).to(device, dtype)
    return state


def model_of(kind: type, config: FlexDiTConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A FlexDiT, ours or the reference's, with these very tensors as its parameters."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


class Loop:
    """A contender that samples one guided image: begin(), step(0), step(1), ..., end() -> the latent."""

    makes_images = True

    def __init__(self, steps: int):
        self.steps = steps

    def begin(self) -> None: ...

    def step(self, i: int) -> None:
        raise NotImplementedError

    def end(self) -> torch.Tensor | None: ...

    @torch.no_grad()
    def run(self, device: Device) -> tuple[torch.Tensor | None, dict[str, float | list[float]]]:
        """One image, {"image_ms": wall time from its request to the latent, "steps_ms": of every step on the CPU by
        the wall, on a GPU one number, the time between two events around the steps by their number}."""
        times = []
        device.synchronize()
        begin = time.perf_counter()
        stamp = device.start()
        self.begin()
        for i in range(self.steps):
            before = time.perf_counter()
            self.step(i)
            times.append((time.perf_counter() - before) * 1e3)
        elapsed = device.stop(stamp)
        image = self.end()
        device.synchronize()
        wall = (time.perf_counter() - begin) * 1e3
        return image, {"image_ms": wall, "steps_ms": [elapsed() / self.steps] if device.cuda else times}


class SamplerLoop(Loop):
    """Ours: every step is one Session.step(); the first makes the modulations of all steps."""

    def __init__(self, steps: int, model: FlexDiT):
        super().__init__(steps)
        self.session = Sampler(model).session(max_batch=1, guidance_channels="all")

    def begin(self) -> None:
        self.request = self.session.add(LABEL, self.steps, "ddim", CFG_SCALE, SEED)

    def step(self, i: int) -> None:
        self.session.step()

    def end(self) -> torch.Tensor:
        return self.session.take(self.request)


class ForwardLoop(Loop):
    """Only the model's forward of the guided pair, at the timesteps and grids of the run; no sampler around it."""

    makes_images = False

    def __init__(self, steps: int, model: Callable, config: FlexDiTConfig, device: str):
        super().__init__(steps)
        self.model, self.config, self.device = model, config, device
        self.table = make_sampler("ddim", steps).steps
        self.t = [torch.full((2,), step.timestep, device=device) for step in self.table]
        schedule, dense = config.density_schedule, config.num_sdtm == 0
        self.grids = [None if dense else schedule.grid(step.timestep) for step in self.table]
        self.y = torch.tensor([LABEL, config.num_classes], device=device)
        shape = (config.in_channels, config.input_size, config.input_size)
        self.noise = normal_noise([derive_seed(SEED, 0)], 0, shape).to(device)

    def forward(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return self.model(torch.cat([x, x]).to(DTYPE), self.t[i], self.y, grid=self.grids[i])

    def step(self, i: int) -> None:
        self.forward(self.noise, i)


class ModelLoop(ForwardLoop):
    """The same model in a DDIM loop as one writes it in PyTorch, state in float32, nothing read back to the host."""

    makes_images = True

    def begin(self) -> None:
        self.x = self.noise

    def step(self, i: int) -> None:
        c, channels = self.table[i], self.config.in_channels
        cond, uncond = self.forward(self.x, i)[:, :channels].float().chunk(2)
        x0 = c.x0_from_x * self.x + c.x0_from_output * (uncond + CFG_SCALE * (cond - uncond))
        self.x = c.x_coef * self.x + c.x0_coef * x0

    def end(self) -> torch.Tensor:
        return self.x[0].to(DTYPE)


class NoDecoder(torch.nn.Module):
    """In place of the pipeline's VAE: latents are what is compared."""

    config = types.SimpleNamespace(scaling_factor=1.0)

    def __init__(self, device: str):
        super().__init__()
        self.device, self.dtype = torch.device(device), DTYPE

    def decode(self, latents: torch.Tensor):
        return types.SimpleNamespace(sample=latents)


class DiffusersLoop(Loop):
    """diffusers' own pipeline, its VAE left out; a step is the time from one call of the transformer to the next."""

    def __init__(self, steps: int, config: FlexDiTConfig, device: str):
        super().__init__(steps)
        pipeline, scheduler = from_diffusers("DiTPipeline", "DDIMScheduler")
        with torch.device(device):
            transformer = randomized(diffusers_dit(config).to(DTYPE)).eval().requires_grad_(False)
        options = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}
        self.pipeline = pipeline(transformer, NoDecoder(device), scheduler(**options))
        self.pipeline.set_progress_bar_config(disable=True)
        self.starts: list[float] = []
        transformer.register_forward_pre_hook(lambda *_: self.starts.append(time.perf_counter()))

    def run(self, device: Device) -> tuple[None, dict[str, float | list[float]]]:
        self.starts.clear()
        device.synchronize()
        begin = time.perf_counter()
        stamp = device.start()
        options = {"guidance_scale": CFG_SCALE, "num_inference_steps": self.steps, "output_type": "pt"}
        self.pipeline([LABEL], generator=torch.Generator().manual_seed(SEED), **options)
        elapsed = device.stop(stamp)
        device.synchronize()
        end = time.perf_counter()
        steps = [(after - before) * 1e3 for before, after in zip(self.starts, [*self.starts[1:], end])]
        return None, {"image_ms": (end - begin) * 1e3, "steps_ms": [elapsed() / self.steps] if device.cuda else steps}


class Contenders:
    """Makers of a row's contenders, in the order in which they are made: compilation last, so that what it takes
    too long for is there already."""

    def __init__(self, row: Row, steps: int, device: Device, compiler: dict):
        self.row, self.steps, self.device, self.compiler = row, steps, device, compiler
        self.config = config_of(row)
        self.weights = random_weights(self.config, device.kind)

    def makers(self) -> dict[str, Callable[[], Loop]]:
        makers = {SAMPLER: self._sampler, MODULE: self._module, EAGER: self._eager}
        if self.row.sides == DENSE:
            makers[DIFFUSERS] = lambda: DiffusersLoop(self.steps, self.config, self.device.kind)
        return makers | {COMPILED: self._compiled}

    def _sampler(self) -> Loop:
        return SamplerLoop(self.steps, model_of(FlexDiT, self.config, self.weights))

    def _module(self) -> Loop:
        model = model_of(FlexDiT, self.config, self.weights)
        return ForwardLoop(self.steps, model, self.config, self.device.kind)

    def _reference(self, wrap: Callable) -> Loop:
        model = wrap(model_of(reference.FlexDiT, self.config, self.weights))
        return ModelLoop(self.steps, model, self.config, self.device.kind)

    def _eager(self) -> Loop:
        return self._reference(lambda model: model)

    def _compiled(self) -> Loop:
        return self._reference(lambda model: torch.compile(model, dynamic=False, **self.compiler))
