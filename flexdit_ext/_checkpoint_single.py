"""Checkpoints of FlexPixArt and FlexLatte: as FlexDiT's, with the class in config.json. Loading of any of the three."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._config_file import CLASS_KEY, parse_object, parse_single_config, read_any_config, read_config_text
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

_KINDS = {kind.__name__ + "Config": kind for kind in (FlexDiT, FlexPixArt, FlexLatte)}


def class_and_config(path) -> tuple[type, object]:
    """The class whose save_pretrained wrote the checkpoint, and its configuration. Errors as load_any's."""
    config = read_any_config(locate(path))
    return _KINDS[type(config).__name__], config


def load_any(path, dtype: torch.dtype | None = None, device=None) -> FlexDiT | SingleFlexDiT:
    """As checkpoint.load_pretrained, for a checkpoint of any of the three classes."""
    kind, _ = class_and_config(path)
    return load_pretrained(path, dtype, device) if kind is FlexDiT else load_single(kind, path, dtype, device)


def save_single(model: SingleFlexDiT, directory: str | os.PathLike, max_shard_size: int | str | None) -> None:
    most = None if max_shard_size is None else parse_size("max_shard_size", max_shard_size)
    text = json.dumps({CLASS_KEY: type(model).__name__} | model.config.to_dict(), indent=2) + "\n"
    write_checkpoint(model.state_dict(), Path(directory), text, most)


def load_single(kind: type[SingleFlexDiT], path, dtype, device, *, device_map=None, **options) -> SingleFlexDiT:
    """As checkpoint.load_pretrained."""
    device = one_device(device, device_map)
    weights = locate(path, **options)
    text, source = read_config_text(weights)
    values = parse_object(text, source)
    if values.get(CLASS_KEY) != kind.__name__:
        raise ValueError(f"{source} is not the configuration of a {kind.__name__}")
    config = parse_single_config(values, source)
    return build_single(kind, config, load_state_dict_file(weights), dtype, device, str(weights))


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
