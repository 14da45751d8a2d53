"""Checkpoints of FlexPixArt and FlexLatte: as FlexDiT's, with the class in config.json. Loading of any of the three."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._config_file import read_config, read_config_text
from ._shards import parse_size
from .checkpoint import (
    check_state_dict,
    load_pretrained,
    load_state_dict_file,
    locate,
    one_device,
    write_checkpoint,
)
from .model import FlexDiT
from .single_model import FlexLatte, FlexPixArt, SingleFlexDiT

_CLASS = "_class_name"
_KINDS = {"FlexPixArt": FlexPixArt, "FlexLatte": FlexLatte}


def class_of(path) -> type[FlexDiT] | type[SingleFlexDiT]:
    """The class whose save_pretrained wrote the checkpoint: FlexDiT unless config.json names another."""
    text, _ = read_config_text(locate(path))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return FlexDiT  # whose loader says what is wrong
    name = values.get(_CLASS) if isinstance(values, dict) else None
    return _KINDS.get(name, FlexDiT) if isinstance(name, str) else FlexDiT


def read_any_config(path):
    """The configuration of such a checkpoint. Raises as load_any."""
    kind, weights = class_of(path), locate(path)
    return read_config(weights)[0] if kind is FlexDiT else read_single_config(kind, weights)


def load_any(path, dtype: torch.dtype | None = None, device=None) -> FlexDiT | SingleFlexDiT:
    """As checkpoint.load_pretrained, for a checkpoint of any of the three classes."""
    kind = class_of(path)
    return load_pretrained(path, dtype, device) if kind is FlexDiT else load_single(kind, path, dtype, device)


def save_single(model: SingleFlexDiT, directory: str | os.PathLike, max_shard_size: int | str | None) -> None:
    most = None if max_shard_size is None else parse_size("max_shard_size", max_shard_size)
    text = json.dumps({_CLASS: type(model).__name__} | model.config.to_dict(), indent=2) + "\n"
    write_checkpoint(model.state_dict(), Path(directory), text, most)


def load_single(kind: type[SingleFlexDiT], path, dtype, device, *, device_map=None, **options) -> SingleFlexDiT:
    """As checkpoint.load_pretrained."""
    device = one_device(device, device_map)
    weights = locate(path, **options)
    config = read_single_config(kind, weights)
    return build_single(kind, config, load_state_dict_file(weights), dtype, device, str(weights))


def read_single_config(kind: type[SingleFlexDiT], weights: Path):
    """The configuration of such a model; weights as locate gives them. Raises ValueError naming the file."""
    text, source = read_config_text(weights)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.pop(_CLASS, None) != kind.__name__:
        raise ValueError(f"{source} is not the configuration of a {kind.__name__}")
    try:
        return kind.config_class.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def build_single(
    kind: type[SingleFlexDiT], config, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device, source: str
) -> SingleFlexDiT:
    """A model with these tensors (copied), in evaluation mode; dtype None is theirs. Raises ValueError as
    check_state_dict does."""
    first = tensors.get("patch_embed.weight")
    if dtype is None and first is not None and first.is_floating_point():
        dtype = first.dtype
    with torch.device("meta"):  # no memory before the check, no random initialisation before the load
        model = kind(config, dtype=dtype)
    check_state_dict(model, tensors, source)
    model.to_empty(device="cpu" if device is None else device)
    model.load_state_dict(tensors)
    return model.eval()
