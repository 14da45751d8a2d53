"""From a configuration to the model, the data and the draws, with every error before anything starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from .. import checkpoint
from ..cli_convert import LAYOUT_FIELDS, parse_layout
from ..config import FlexDiTConfig
from ..convert import sparsify
from ..diffusion.ddpm import NUM_TIMESTEPS
from ..model import FlexDiT
from .config import ModelSettings, TrainingConfig
from .data import open_data
from .draws import Draws, equal_segments


@dataclass(frozen=True)
class Setup:
    """What a run needs, checked against each other. model, teacher: on the CPU, float32."""

    model: FlexDiT
    teacher: FlexDiT | None
    data: Dataset
    draws: Draws


def set_up(config: TrainingConfig, world: int) -> Setup:
    """Reads the checkpoints and opens the data; raises OSError, TypeError or ValueError that names the key."""
    _check_split(config, world)
    model = build_model(config.model, config.seed)
    data = open_data(config.data, model.config)
    if world > len(data):
        raise ValueError(f"{world} processes are more than the {len(data)} samples of the data set")
    dropout = model.config.class_dropout_prob if config.label_dropout is None else config.label_dropout
    if dropout and not model.config.class_dropout_prob:
        raise ValueError(f"label_dropout is {dropout}, but the model has no null class (its class_dropout_prob is 0)")
    _check_density(config, model.config)
    segments = None
    if config.density.mode == "piecewise" and model.config.num_sdtm:
        segments = equal_segments(model.schedule)
    draws = Draws(
        config.seed,
        len(data),
        config.batch_size,
        world * config.accumulation,
        stratified=config.timesteps == "stratified",
        label_dropout=dropout,
        flip=config.data.flip,
        segments=segments,
    )
    return Setup(model, _load_teacher(config, model.config), data, draws)


def _check_split(config: TrainingConfig, world: int) -> None:
    groups = world * config.accumulation
    if config.batch_size % groups:
        raise ValueError(
            f"batch_size is {config.batch_size}, must be a multiple of {groups}: "
            f"{world} processes times accumulation {config.accumulation}"
        )


def _check_density(config: TrainingConfig, model: FlexDiTConfig) -> None:
    if model.num_sdtm and model.density_schedule.num_timesteps != NUM_TIMESTEPS:
        raise ValueError(
            f"model.schedule has {model.density_schedule.num_timesteps} timesteps, the losses have {NUM_TIMESTEPS}"
        )
    if config.density.mode == "fixed":
        if not model.num_sdtm:
            raise ValueError("density.mode is 'fixed', but the model is dense (model.num_sdtm is 0)")
        model.check_sparse_grid("density.grid", config.density.grid)


def build_model(settings: ModelSettings, seed: int) -> FlexDiT:
    """float32 on the CPU; fresh weights follow from the seed, torch's global generator is as it was."""
    try:
        if settings.checkpoint is not None:
            return _from_checkpoint(settings)
        if settings.layout is not None:
            raise ValueError(f"layout is {settings.layout!r}, but there is no checkpoint that could be given it")
        if settings.preset is not None:
            config = FlexDiTConfig.preset(settings.preset, settings.image_size, **settings.config)
        else:
            config = FlexDiTConfig(**settings.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return FlexDiT(config, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"model: {error}") from error


def _from_checkpoint(settings: ModelSettings) -> FlexDiT:
    if settings.preset is not None:
        raise ValueError(f"checkpoint and preset {settings.preset!r} both given: the checkpoint says what it is")
    model = checkpoint.load_pretrained(settings.checkpoint, dtype=torch.float32)
    fields = dict(settings.config)
    if settings.layout is not None:
        layout = parse_layout(settings.layout)
        fields |= {name: layout[name] for name in LAYOUT_FIELDS}
    config = dataclasses.replace(model.config, **fields)
    if config == model.config:
        return model
    if any(getattr(config, name) != getattr(model.config, name) for name in LAYOUT_FIELDS):
        return sparsify(model, config)
    return checkpoint.build_model(config, model.state_dict(), source=settings.checkpoint)


def _load_teacher(config: TrainingConfig, model: FlexDiTConfig) -> FlexDiT | None:
    path = config.distillation.teacher
    if path is None:
        return None
    teacher = checkpoint.load_pretrained(path, dtype=torch.float32)
    for name in ("input_size", "in_channels", "num_classes"):
        ours, theirs = getattr(model, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"distillation.teacher {path} has {name} {theirs}, the model {ours}: they must agree")
    if model.class_dropout_prob and not teacher.config.class_dropout_prob:
        raise ValueError(f"distillation.teacher {path} has no null class, which label dropout needs")
    return teacher.requires_grad_(False)
