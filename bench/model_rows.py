"""What bench/model.py measures: rows in order of importance, their models, inputs and contenders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from gpu_tables import COMPILED, OURS
from gpu_timing import Device, NotRun, relative_error

from flexdit_ext import FlexDiT, FlexDiTConfig, reference
from flexdit_ext.diffusion import ddpm_loss

GRAPH = f"{OURS}, CUDA graph"
HOST_T = f"{OURS}, t on the CPU"
EAGER = "reference, eager"
TUNED = f"reference, {COMPILED} max-autotune (with CUDA graphs)"
REDUCED = f"reference, {COMPILED} reduce-overhead (CUDA graphs)"
DENSE = f"{OURS}, dense DiT"
DIFFUSERS = "diffusers, dense DiT"
SCHEDULE = "schedule"  # instead of a grid: every sample at its own timestep, on its own grid
RATIO = 1.15


@dataclass(frozen=True)
class Row:
    """One line of the table. dtype: of parameters and activations; "autocast" keeps float32 parameters."""

    preset: str
    image: int
    batch: int
    grid: tuple[int, int] | str
    training: bool = False
    dtype: str = "bfloat16"
    targets: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        grid = self.grid if self.grid == SCHEDULE else f"{self.grid[0]}x{self.grid[1]}"
        what = "training step" if self.training else "forward"
        return f"{self.preset} {self.image} {what}, {self.dtype}, batch {self.batch}, {grid}"


def all_rows() -> list[Row]:
    """What has a target first, then batch 1 and 2, the schedules' grids, and B/2."""
    xl, train = "XL/2", {"images_per_s": 450, "compiled_ratio": RATIO}
    rows = [
        Row(xl, 256, 32, (8, 8), targets={"ms": 9, "compiled_ratio": RATIO}),
        Row(xl, 512, 32, (8, 8), targets={"ms": 30, "compiled_ratio": RATIO}),
        Row(xl, 256, 32, (8, 8), training=True, dtype="autocast", targets=train),
        Row(xl, 256, 1, (8, 8)),
        Row(xl, 256, 2, (8, 8)),
        Row(xl, 256, 32, SCHEDULE),
        Row(xl, 512, 2, (16, 16)),
        Row(xl, 512, 32, (16, 16)),
        Row(xl, 256, 32, (8, 8), training=True, targets=train),
        Row(xl, 512, 1, (16, 16)),
        Row(xl, 512, 32, SCHEDULE),
    ]
    rows += [Row(xl, 256, 32, (side, side)) for side in (10, 7, 6)]
    rows += [Row(xl, 512, 32, (side, side)) for side in (20, 14, 12)]
    return rows + [Row("B/2", 256, batch, (8, 8)) for batch in (32, 1, 2)]


def smoke_rows() -> list[Row]:
    rows = [Row("smoke", 64, 2, (2, 2)), Row("smoke", 64, 4, SCHEDULE)]
    return [*rows, Row("smoke", 64, 2, (2, 2), training=True, dtype="autocast")]


def config_of(row: Row, dense: bool = False) -> FlexDiTConfig:
    if row.preset == "smoke":
        blocks = {"num_pooling_blocks": 1, "num_sdtm": 1, "sdtm_blocks": (1, 0, 1, 0), "num_dense_blocks": 1}
        size = {"hidden_size": 32, "num_heads": 2, "num_classes": 10, "input_size": row.image // 8}
        config = FlexDiTConfig(**blocks, **size)
    else:
        config = FlexDiTConfig.preset(row.preset, image_size=row.image)
    if dense:
        return dataclasses.replace(config, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=config.depth)
    return config


def timesteps(row: Row, config: FlexDiTConfig) -> torch.Tensor:
    """Evenly spread over the diffusion, so that the schedule's grids occur equally often, in ascending order."""
    return (torch.arange(row.batch) * 1000 + 500) // row.batch


def grid_groups(row: Row, config: FlexDiTConfig) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Runs of samples with one grid: how the reference takes a batch of several."""
    if row.grid != SCHEDULE:
        yield slice(0, row.batch), row.grid
        return
    grids = [config.density_schedule.grid(int(t)) for t in timesteps(row, config)]
    for grid, group in groupby(range(row.batch), grids.__getitem__):
        first, *rest = group
        yield slice(first, (rest[-1] if rest else first) + 1), grid


class Models:
    """The models of a row, made when first asked for and kept for later rows; training gets the memory to itself."""

    def __init__(self, device: Device):
        self._device, self._made = device, {}

    def of(self, row: Row, name: str) -> torch.nn.Module:
        return self._kept(row, name, lambda: self._make(row, name))

    def _kept(self, row: Row, name: str, make: Callable[[], object]):
        key = (row.training, row.preset, row.image, row.dtype, name)
        if any(other[0] != row.training for other in self._made):
            self._made.clear()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def optimizer(self, row: Row, name: str) -> torch.optim.Optimizer:
        """Fused AdamW, one for all contenders that train this model: states are twice the weights' memory.

        The rate is 0 so that every contender sees the same weights, however often it ran; the work is the same.
        """
        options = {"fused": True, "capturable": True} if self._device.cuda else {}
        parameters = self.of(row, name).parameters()
        return self._kept(row, f"{name}'s optimizer", lambda: torch.optim.AdamW(parameters, lr=0.0, **options))

    def _make(self, row: Row, name: str) -> torch.nn.Module:
        kind, dtype = self._device.kind, torch.float32 if row.dtype == "autocast" else torch.bfloat16
        with torch.device(kind):  # initialised there: on the CPU it takes seconds
            if name == "ours":
                model = randomized(FlexDiT(config_of(row), dtype=dtype))
            elif name == "reference":
                model = reference.FlexDiT(config_of(row)).to(dtype)
                model.load_state_dict(self.of(row, "ours").state_dict())
            elif name == "dense":
                model = randomized(FlexDiT(config_of(row, dense=True), dtype=dtype))
            else:
                model = randomized(diffusers_dit(config_of(row, dense=True)).to(dtype))
        return model.to(kind).train(row.training)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: modulations that start at zero would make blocks the identity."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def from_diffusers(*names: str) -> list[type]:
    """diffusers' classes of these names; NotRun where it is not installed or broken."""
    here, path = str(Path(__file__).parent), list(sys.path)
    sys.path[:] = [place for place in path if place != here]  # it would take bench/kernels.py for the package kernels
    try:
        import diffusers

        return [getattr(diffusers, name) for name in names]
    except (ImportError, RuntimeError) as error:  # it imports when asked for a name, and wraps what goes wrong
        raise NotRun(f"diffusers cannot be imported: {error}") from error
    finally:
        sys.path[:] = path


def diffusers_dit(config: FlexDiTConfig) -> torch.nn.Module:
    (model,) = from_diffusers("DiTTransformer2DModel")
    return model(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )


@dataclass
class Contender:
    """run() is one call; the model and the optimizer are what it keeps in memory."""

    run: Callable[[], object]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None = None

    def held_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.optimizer is not None:
            states = self.optimizer.state.values()
            tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def inputs(row: Row, device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config, generator = config_of(row), torch.Generator().manual_seed(1)
    x = torch.randn(row.batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    y = torch.randint(0, config.num_classes, (row.batch,), generator=generator)
    dtype = torch.float32 if row.dtype == "autocast" else torch.bfloat16
    return x.to(device.kind, dtype), timesteps(row, config).to(device.kind), y.to(device.kind)


def captured(run: Callable[[], object], device: Device) -> Callable[[], object]:
    """run() recorded into a CUDA graph; calling replays it."""
    if not device.cuda:
        raise NotRun("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay():
        graph.replay()
        return out

    return replay


class Forward:
    """Contenders of a forward row."""

    def __init__(self, row: Row, device: Device, models: Models, compiler: Callable[[str], dict]):
        self._row, self._device, self._models, self._compiler = row, device, models, compiler
        self._config, self._inputs = config_of(row), inputs(row, device)

    def makers(self) -> dict[str, Callable[[], Contender]]:
        """In the table's order; each makes a contender or raises NotRun."""
        row = self._row
        makers = {OURS: self._ours, GRAPH: self._graph, EAGER: lambda: self._reference(lambda model: model)}
        if row.grid == SCHEDULE:
            makers[HOST_T] = self._host_t
        makers[TUNED] = lambda: self._compiled("max-autotune")
        makers[DENSE], makers[DIFFUSERS] = self._dense, self._diffusers
        makers[REDUCED] = lambda: self._compiled("reduce-overhead")
        return makers

    def same_as_reference(self, name: str) -> bool:
        return name not in (DENSE, DIFFUSERS)

    def _no_grad(self, run: Callable[[], object], model: torch.nn.Module) -> Contender:
        def call():
            with torch.no_grad():
                return run()

        return Contender(call, model)

    def _ours(self, t: torch.Tensor | None = None) -> Contender:
        model, (x, on_device, y) = self._models.of(self._row, "ours"), self._inputs
        t = on_device if t is None else t
        grid = None if self._row.grid == SCHEDULE else self._row.grid
        return self._no_grad(lambda: model(x, t, y, grid=grid), model)

    def _host_t(self) -> Contender:
        return self._ours(self._inputs[1].cpu())

    def _graph(self) -> Contender:
        contender = self._ours()
        return dataclasses.replace(contender, run=captured(contender.run, self._device))

    def _reference(self, wrap: Callable) -> Contender:
        model, (x, t, y) = self._models.of(self._row, "reference"), self._inputs
        call, groups = wrap(model), list(grid_groups(self._row, self._config))

        def run():
            # Clones: a compiled model's output lives only until its next call where it replays CUDA graphs.
            outs = [call(x[part], t[part], y[part], grid=grid) for part, grid in groups[:-1]]
            outs = [out.clone() for out in outs] if self._device.cuda else outs
            part, grid = groups[-1]
            last = call(x[part], t[part], y[part], grid=grid)
            return torch.cat([*outs, last]) if outs else last

        return self._no_grad(run, model)

    def _compiled(self, mode: str) -> Contender:
        return self._reference(lambda model: torch.compile(model, dynamic=False, **self._compiler(mode)))

    def _dense(self) -> Contender:
        model, (x, t, y) = self._models.of(self._row, "dense"), self._inputs
        return self._no_grad(lambda: model(x, t, y), model)

    def _diffusers(self) -> Contender:
        model, (x, t, y) = self._models.of(self._row, "diffusers"), self._inputs
        return self._no_grad(lambda: model(x, timestep=t, class_labels=y).sample, model)


class Training:
    """Contenders of a training row: ddpm_loss forward and backward, then fused AdamW."""

    def __init__(self, row: Row, device: Device, models: Models, compiler: Callable[[str], dict]):
        self._row, self._device, self._models, self._compiler = row, device, models, compiler
        self._x, _, self._y = inputs(row, device)

    def makers(self) -> dict[str, Callable[[], Contender]]:
        return {
            OURS: self._ours,
            EAGER: lambda: self._step("reference", lambda model: model),
            TUNED: lambda: self._compiled("max-autotune"),
            GRAPH: self._graph,
            REDUCED: lambda: self._compiled("reduce-overhead"),
        }

    def same_as_reference(self, name: str) -> bool:
        """No: a step draws its noise. error() compares the losses instead."""
        return False

    def _loss(self, call: Callable, **drawn) -> torch.Tensor:
        with torch.autocast(self._device.kind, torch.bfloat16, enabled=self._row.dtype == "autocast"):
            return ddpm_loss(call, self._x, self._y, grid=self._row.grid, **drawn).loss.mean()

    def error(self) -> float:
        """How far ours and the reference's losses differ at the same noise, labels kept."""
        models = [self._models.of(self._row, name).eval() for name in ("ours", "reference")]
        generators = (torch.Generator(self._device.kind).manual_seed(2) for _ in models)
        with torch.no_grad():
            ours, expected = (self._loss(model, generator=draw) for model, draw in zip(models, generators))
        for model in models:
            model.train()
        return relative_error(ours, expected)

    def _step(self, name: str, wrap: Callable) -> Contender:
        model, optimizer = self._models.of(self._row, name), self._models.optimizer(self._row, name)
        call = wrap(model)

        def run():
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(call)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Contender(run, model, optimizer)

    def _ours(self) -> Contender:
        return self._step("ours", lambda model: model)

    def _compiled(self, mode: str) -> Contender:
        compiler = self._compiler(mode)
        return self._step("reference", lambda model: torch.compile(model, dynamic=False, **compiler))

    def _graph(self) -> Contender:
        contender = self._ours()
        return dataclasses.replace(contender, run=captured(contender.run, self._device))


# Contenders whose memory is a CUDA graph's pool.
POOLED = (GRAPH, TUNED, REDUCED)


def contenders_of(row: Row, device: Device, models: Models, compiler: Callable[[str], dict]) -> Forward | Training:
    return (Training if row.training else Forward)(row, device, models, compiler)
