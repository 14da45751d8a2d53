"""The configuration of a training run: TOML and --set into checked dataclasses, before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import FlexDiTConfig
from ..config_single import FlexLatteConfig, FlexPixArtConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# Of each family, the configuration whose fields stand in [model].
MODEL_CONFIGS = {"flexdit": FlexDiTConfig, "flexpixart": FlexPixArtConfig, "flexlatte": FlexLatteConfig}


@dataclass(frozen=True)
class ModelSettings:
    """What is trained: a checkpoint, or a preset (of flexdit), or the fields of the family's configuration; fields go
    over a preset's.

    family: None is that of the checkpoint, without one flexdit. checkpoint: what save_pretrained or `flexdit convert
    --to flexdit` wrote. layout: turns a dense checkpoint into the sparse model of this layout, as `flexdit convert
    --layout` does. config: fields of FlexDiTConfig, FlexPixArtConfig or FlexLatteConfig, in [model] itself.
    """

    family: Literal["flexdit", "flexpixart", "flexlatte"] | None = None
    checkpoint: str | None = None
    layout: str | None = None
    preset: str | None = None
    image_size: int = 256
    config: dict = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """kind: of a flexdit "digits" (scikit-learn's), "images" (a folder per class) or "latents" (safetensors or npz
    shards, or fast-DiT's feature folders); of a flexpixart "captions" (shards); of a flexlatte "clips" (a folder per
    class, or shards). What shards hold: docs/training.md. frame_step: of so many frames of a folder's clips one is
    taken. flip: mirror half of the samples. workers: loading processes, 0 loads in the loop."""

    kind: Literal["digits", "images", "latents", "captions", "clips"] = "images"
    path: str | None = None
    frame_step: int = 1
    flip: bool = False
    workers: int = 0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. The rate rises over warmup_steps, then stays or falls as a cosine to final_learning_rate at the last step.
    max_gradient_norm 0 does not clip."""

    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 0.0


@dataclass(frozen=True)
class AverageSettings:
    """Exponential moving average of the weights. warmup: a shorter memory in the first steps, (step + 1) / (step + 10)
    where that is less than decay, so that the initial weights are soon forgotten."""

    decay: float = 0.9999
    warmup: bool = True


@dataclass(frozen=True)
class DensitySettings:
    """ "ragged": each sample's grid is the schedule's at its own timestep. "piecewise", the paper's way: a forward pass
    draws all timesteps from one interval of the schedule, so that every rank trains one interval at a time. "fixed":
    `grid` for all, (h, w), of a flexlatte (f, h, w)."""

    mode: Literal["ragged", "piecewise", "fixed"] = "ragged"
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DistillationSettings:
    """loss = (1 - weight) * loss + weight * mean squared difference to the prediction of the teacher, a checkpoint."""

    teacher: str | None = None
    weight: float = 0.5


@dataclass(frozen=True)
class ParallelSettings:
    """strategy: with several processes, "ddp" copies the weights, "fsdp2" shards them by block. bucket_mb: of DDP's
    gradient buckets. device: "auto" takes the GPU where there is one."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    bucket_mb: float = 25.0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class CheckpointSettings:
    """A checkpoint every so many steps, and the last `keep` of them are kept."""

    every: int = 1000
    keep: int = 3


@dataclass(frozen=True)
class LogSettings:
    """every: steps per line of log.jsonl. buckets: of the timestep, a mean loss for each. sample_every: steps between
    sample grids, 0 draws none; they have a row for each of sample_classes classes or captions, which are some of the
    data's. vae: the folder of a diffusers AutoencoderKL, which makes pictures of samples that are
    latents. peak_tflops: of the device at this precision, for MFU; 0 looks it up."""

    every: int = 50
    buckets: int = 10
    tensorboard: bool = True
    peak_tflops: float = 0.0
    sample_every: int = 0
    sample_steps: int = 50
    sample_columns: int = 4
    sample_classes: int = 10
    sample_cfg_scale: float = 1.5
    vae: str | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """A run. batch_size counts samples per step over all processes; accumulation splits each process's share of it into
    so many forward passes. label_dropout: share of labels or captions that are replaced by the null class or the null
    caption; None is the model's class_dropout_prob, and 0.1 for captions. timesteps "stratified" draws one in
    each of batch_size equal parts of the range. output: the run's folder."""

    output: str
    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    loss: Literal["ddpm", "flow"] = "ddpm"
    timesteps: Literal["uniform", "stratified"] = "uniform"
    label_dropout: float | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    average: AverageSettings = field(default_factory=AverageSettings)
    density: DensitySettings = field(default_factory=DensitySettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self):
        _check_ranges(self)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping) -> TrainingConfig:
        """Raises TypeError or ValueError that names the key, and for an unknown one the nearest known."""
        values = dict(values)
        if isinstance(values.get("model"), Mapping):
            values["model"] = _with_config_table(values["model"])
        return _build(cls, values, "")


# Keys that may change when a run goes on; all others would make it another run.
FREE_KEYS = ("output", "steps", "accumulation", "compile", "activation_checkpointing")
FREE_TABLES = ("checkpoint", "log", "parallel")
FREE_PATHS = ("data.path", "data.workers", "distillation.teacher", "model.checkpoint")


def load_config(path: str | Path, settings: Sequence[str] = ()) -> TrainingConfig:
    """The configuration in a TOML file, with settings "a.b=value" over it.

    Raises FileNotFoundError, TypeError or ValueError that names the file or the key.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not a readable TOML file: {error}") from None
    for setting in settings:
        _set(values, setting)
    return TrainingConfig.from_dict(values)


def changed_keys(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """Keys by which a resumed run's configuration differs from its checkpoint's and must not, as "a.b: old -> new"."""
    changes = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        if (not prefix and key in FREE_KEYS + FREE_TABLES) or name in FREE_PATHS:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_keys(a, b, f"{name}.")
        elif a != b:
            changes.append(f"{name}: {a!r} -> {b!r}")
    return changes


def _set(values: dict, setting: str) -> None:
    name, separator, text = setting.partition("=")
    if not separator or not all(name.split(".")):
        raise ValueError(f"--set is {setting!r}, must be key=value, with dots for tables, such as optimizer.eps=1e-8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, key = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set is {setting!r}, but {table} is {values!r}, not a table")
    values[key] = value


def _with_config_table(values: Mapping) -> dict:
    """[model] with the fields of the family's configuration moved into one dict."""
    own = {item.name for item in dataclasses.fields(ModelSettings)} - {"config"}
    family = values.get("family")
    known = {name for kind in MODEL_CONFIGS for name in _fields(kind)}
    if family is None and values.get("checkpoint") is None:
        family = "flexdit"
    if family in MODEL_CONFIGS:  # else it is the checkpoint's, and its fields are checked with it
        check_fields(set(values) & known | set(values.get("config", {})), family)
        known = _fields(family)
    _check_keys(set(values) - {"config"}, own | known, "model.")
    config = dict(values.get("config", {}))
    config |= {key: value for key, value in values.items() if key in known}
    return {key: value for key, value in values.items() if key in own} | {"config": config}


def _fields(family: str) -> set[str]:
    return {item.name for item in dataclasses.fields(MODEL_CONFIGS[family])}


def check_fields(keys: Iterable[str], family: str) -> None:
    """Raises ValueError for a field that only other families have."""
    for key in sorted(set(keys) - _fields(family)):
        if others := [name for name in MODEL_CONFIGS if key in _fields(name)]:
            raise ValueError(f"model.{key} is a field of {' and '.join(others)}, but model.family is {family!r}")


def _check_keys(keys: Iterable[str], known: Iterable[str], prefix: str) -> None:
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"{prefix}{key} is not a key; the nearest is {prefix}{near[0]}")


def _build(kind, values: Mapping, prefix: str):
    """A dataclass of a table."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{prefix.rstrip('.')} is {values!r}, must be a table")
    hints = typing.get_type_hints(kind)
    _check_keys(values, hints, prefix)
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise ValueError(f"{prefix}{item.name} is missing, it has no default")
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _convert(hint, value, name: str):
    """`value` as the type `hint`; an int will do for a float, nothing else is converted."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, name)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), arguments, n=1)
            allowed = ", ".join(map(repr, arguments))
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {value!r}, must be one of {allowed}{guess}")
        return value
    if origin is tuple:
        if isinstance(value, (list, tuple)) and arguments[1:] == (...,):
            arguments = arguments[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise TypeError(f"{name} is {value!r}, must be a list of {len(arguments)}")
        return tuple(_convert(one, part, f"{name}[{i}]") for i, (one, part) in enumerate(zip(arguments, value)))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"{name} is {value!r}, must be of type {hint.__name__}")
    return value


def _check_ranges(config: TrainingConfig) -> None:
    optimizer, log = config.optimizer, config.log
    counts = {"steps": config.steps, "batch_size": config.batch_size, "accumulation": config.accumulation}
    counts |= {"data.frame_step": config.data.frame_step}
    counts |= {"checkpoint.every": config.checkpoint.every, "checkpoint.keep": config.checkpoint.keep}
    counts |= {"log.every": log.every, "log.buckets": log.buckets, "log.sample_steps": log.sample_steps}
    counts |= {"log.sample_columns": log.sample_columns, "log.sample_classes": log.sample_classes}
    for name, value in counts.items():
        _require(name, value, value >= 1, "at least 1")
    amounts = {"data.workers": config.data.workers, "optimizer.warmup_steps": optimizer.warmup_steps}
    amounts |= {"optimizer.learning_rate": optimizer.learning_rate, "optimizer.weight_decay": optimizer.weight_decay}
    amounts |= {"optimizer.final_learning_rate": optimizer.final_learning_rate}
    amounts |= {"optimizer.max_gradient_norm": optimizer.max_gradient_norm, "log.sample_every": log.sample_every}
    amounts |= {"log.peak_tflops": log.peak_tflops, "log.sample_cfg_scale": log.sample_cfg_scale}
    for name, value in amounts.items():
        _require(name, value, 0 <= value < float("inf"), "finite and at least 0")
    for i, beta in enumerate(optimizer.betas):
        _require(f"optimizer.betas[{i}]", beta, 0 <= beta < 1, "at least 0 and below 1")
    _require("optimizer.eps", optimizer.eps, 0 < optimizer.eps < 1, "above 0 and below 1")
    _require("average.decay", config.average.decay, 0 <= config.average.decay < 1, "at least 0 and below 1")
    dropout = config.label_dropout
    _require("label_dropout", dropout, dropout is None or 0 <= dropout < 1, "at least 0 and below 1")
    _require("distillation.weight", config.distillation.weight, 0 <= config.distillation.weight <= 1, "from 0 to 1")
    _require("parallel.bucket_mb", config.parallel.bucket_mb, config.parallel.bucket_mb > 0, "above 0")
    _require("seed", config.seed, 0 <= config.seed < 2**63, "at least 0 and below 2^63")
    _require("output", config.output, bool(config.output), "the name of a folder")
    if config.data.frame_step > 1 and config.data.kind != "clips":
        raise ValueError(
            f"data.frame_step is {config.data.frame_step}, but data.kind {config.data.kind!r} has no frames"
        )
    if config.data.kind != "digits" and not config.data.path:
        raise ValueError(f"data.path is missing: {config.data.kind} are read from a folder")
    if (config.density.grid is None) == (config.density.mode == "fixed"):
        raise ValueError(
            f"density.grid is {config.density.grid} and density.mode {config.density.mode!r}: "
            "a fixed grid needs one, the other modes take the schedule's"
        )


def _require(name: str, value, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r}, must be {allowed}")
