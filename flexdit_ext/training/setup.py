"""From a configuration to the model, the data and the draws, with every error before anything starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._arguments import check_grid
from .._checkpoint_single import load_any
from ..cli_convert import LAYOUT_FIELDS, parse_layout
from ..config import FlexDiTConfig
from ..convert import sparsify
from ..diffusion.ddpm import NUM_TIMESTEPS
from ._samples import Samples
from .config import MODEL_CONFIGS, ModelSettings, TrainingConfig, check_fields
from .data import open_data
from .draws import Draws, equal_segments
from .families import CAPTION_DROPOUT, FAMILIES, Family, family_of


@dataclass(frozen=True)
class Setup:
    """What a run needs, checked against each other. model, teacher: on the CPU, float32. null: what a condition that is
    dropped becomes, [1, ...] by the model's arguments."""

    family: Family
    model: nn.Module
    teacher: nn.Module | None
    data: Samples
    draws: Draws
    null: dict[str, Tensor]


def set_up(config: TrainingConfig, world: int) -> Setup:
    """Reads the checkpoints and opens the data; raises OSError, TypeError or ValueError that names the key."""
    _check_split(config, world)
    family = model_family(config.model)
    model = build_model(config.model, config.seed)
    _check_model(family, model.config)
    _check_density(config, model.config)
    data = open_data(config.data, family, model.config)
    if world > len(data):
        raise ValueError(f"{world} processes are more than the {len(data)} samples of the data set")
    null = family.null(model.config, data.captions)
    segments = None
    if config.density.mode == "piecewise" and model.config.num_sdtm:
        segments = equal_segments(model.schedule)
    draws = Draws(
        config.seed,
        len(data),
        config.batch_size,
        world * config.accumulation,
        stratified=config.timesteps == "stratified",
        label_dropout=_dropout(config, model.config, null),
        flip=config.data.flip,
        segments=segments,
    )
    return Setup(family, model, _load_teacher(config, family, model.config), data, draws, null)


def _dropout(config: TrainingConfig, model, null: dict[str, Tensor]) -> float:
    dropout = config.label_dropout
    if dropout is None:
        dropout = model.class_dropout_prob or (CAPTION_DROPOUT if "caption" in null else 0.0)
    if dropout and not null:
        raise ValueError(f"label_dropout is {dropout}, but the model has no null class (its class_dropout_prob is 0)")
    return dropout


def _check_model(family: Family, model) -> None:
    if not family.conditions(model):
        raise ValueError("model.num_classes and model.caption_channels are 0: there is nothing to train the model on")
    if model.out_channels not in (model.in_channels, 2 * model.in_channels):
        raise ValueError(
            f"model.out_channels is {model.out_channels}, must be in_channels {model.in_channels}, or twice as many to "
            "learn the variance"
        )


def _check_split(config: TrainingConfig, world: int) -> None:
    groups = world * config.accumulation
    if config.batch_size % groups:
        raise ValueError(
            f"batch_size is {config.batch_size}, must be a multiple of {groups}: "
            f"{world} processes times accumulation {config.accumulation}"
        )


def _check_density(config: TrainingConfig, model) -> None:
    if model.num_sdtm and model.density_schedule.num_timesteps != NUM_TIMESTEPS:
        raise ValueError(
            f"model.schedule has {model.density_schedule.num_timesteps} timesteps, the losses have {NUM_TIMESTEPS}"
        )
    if config.density.mode == "fixed":
        if not model.num_sdtm:
            raise ValueError("density.mode is 'fixed', but the model is dense (model.num_sdtm is 0)")
        grid = check_grid("density.grid", config.density.grid)
        if len(grid) != len(model.dense_grid):
            sides = "(f, h, w)" if len(model.dense_grid) == 3 else "(h, w)"
            raise ValueError(f"density.grid is {grid}, must be {sides} for this model.family")
        model.check_sparse_grid("density.grid", grid)


def model_family(settings: ModelSettings) -> Family:
    """Raises ValueError where [model] names another one than the checkpoint has."""
    if settings.checkpoint is None:
        return FAMILIES[settings.family or "flexdit"]
    family = family_of(settings.checkpoint)
    if settings.family not in (None, family.name):
        raise ValueError(f"model.family is {settings.family!r}, the checkpoint {settings.checkpoint} a {family.name}")
    return family


def build_model(settings: ModelSettings, seed: int) -> nn.Module:
    """float32 on the CPU; fresh weights follow from the seed, torch's global generator is as it was."""
    family = model_family(settings)
    check_fields(settings.config, family.name)
    try:
        if settings.checkpoint is not None:
            return _from_checkpoint(settings, family)
        if settings.layout is not None:
            raise ValueError(f"layout is {settings.layout!r}, but there is no checkpoint that could be given it")
        kind = MODEL_CONFIGS[family.name]
        if settings.preset is None:
            config = kind(**settings.config)
        elif kind is FlexDiTConfig:
            config = kind.preset(settings.preset, settings.image_size, **settings.config)
        else:
            raise ValueError(f"preset is {settings.preset!r}, but only a flexdit has presets, not a {family.name}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return family.model(config, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"model: {error}") from error


def _from_checkpoint(settings: ModelSettings, family: Family) -> nn.Module:
    if settings.preset is not None:
        raise ValueError(f"checkpoint and preset {settings.preset!r} both given: the checkpoint says what it is")
    model = load_any(settings.checkpoint, torch.float32)
    fields = dict(settings.config)
    if settings.layout is not None:
        layout = parse_layout(settings.layout)
        fields |= {name: layout[name] for name in LAYOUT_FIELDS}
    config = dataclasses.replace(model.config, **fields)
    if config == model.config:
        return model
    if any(getattr(config, name) != getattr(model.config, name) for name in LAYOUT_FIELDS):
        return sparsify(model, config)
    return family.build(config, model.state_dict(), settings.checkpoint)


def _load_teacher(config: TrainingConfig, family: Family, model) -> nn.Module | None:
    path = config.distillation.teacher
    if path is None:
        return None
    if (other := family_of(path)) is not family:
        raise ValueError(f"distillation.teacher {path} is a {other.name}, the model a {family.name}: they must agree")
    teacher = load_any(path, torch.float32)
    for name in family.agree:
        ours, theirs = getattr(model, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"distillation.teacher {path} has {name} {theirs}, the model {ours}: they must agree")
    if model.class_dropout_prob and not teacher.config.class_dropout_prob:
        raise ValueError(f"distillation.teacher {path} has no null class, which label dropout needs")
    return teacher.requires_grad_(False)
