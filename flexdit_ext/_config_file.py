"""Where a checkpoint's weights and its configuration are; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors

from ._shards import INDEX_SUFFIX, read_index
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model" + INDEX_SUFFIX
CONFIG_NAME = "config.json"
CLASS_KEY = "_class_name"  # of FlexPixArt and FlexLatte
SINGLE_CONFIGS = {"FlexPixArt": FlexPixArtConfig, "FlexLatte": FlexLatteConfig}
METADATA_KEY = "config"  # the configuration's JSON in the safetensors header: one file is a whole checkpoint


def find_weights(path: Path, weights_name: str = WEIGHTS_NAME) -> Path:
    """The file of weights in a directory, or its index; a file is taken as it is."""
    if not path.is_dir():
        return path
    index = path / (weights_name.removesuffix(".safetensors") + INDEX_SUFFIX)
    return index if index.exists() and not (path / weights_name).exists() else path / weights_name


def check_readable(path: Path) -> None:
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_config(weights: Path) -> tuple[FlexDiTConfig, str]:
    """The configuration and where it was found."""
    text, source = read_config_text(weights)
    return _parse_config(parse_object(text, source), source), source


def read_any_config(weights: Path) -> FlexDiTConfig | FlexPixArtConfig | FlexLatteConfig:
    """The configuration of whichever model it is."""
    text, source = read_config_text(weights)
    values = parse_object(text, source)
    if CLASS_KEY not in values:
        return _parse_config(values, source)
    return parse_single_config(values, source)


def read_config_text(weights: Path) -> tuple[str | bytes, str]:
    """The configuration's JSON and where it was found."""
    sources = [_config_beside, _config_within]
    usual = weights.name in (WEIGHTS_NAME, INDEX_NAME)
    for read in sources if usual else reversed(sources):
        text, source = read(weights)
        if text is not None:
            return text, source
    raise FileNotFoundError(f"{weights} has no configuration: neither {CONFIG_NAME} beside it nor one in its metadata")


def _config_beside(weights: Path) -> tuple[bytes | None, str]:
    path = weights.with_name(CONFIG_NAME)
    try:
        return path.read_bytes(), str(path)
    except FileNotFoundError:
        return None, str(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _config_within(weights: Path) -> tuple[str | None, str]:
    source = f"the metadata of {weights}"
    if weights.name.endswith(INDEX_SUFFIX):
        text = read_index(weights)[1].get(METADATA_KEY)
        return text if isinstance(text, str) else None, source
    with safetensors.safe_open(weights, framework="np") as file:
        return (file.metadata() or {}).get(METADATA_KEY), source


def parse_object(text: str | bytes, source: str) -> dict:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} is not a FlexDiT configuration: a JSON {type(values).__name__}, must be an object")
    return values


def _parse_config(values: dict, source: str) -> FlexDiTConfig:
    if CLASS_KEY in values:
        raise ValueError(f"{source} is the configuration of a {values[CLASS_KEY]!r}, must be a FlexDiT's")
    return _built(FlexDiTConfig, values, source)


def parse_single_config(values: dict, source: str) -> FlexPixArtConfig | FlexLatteConfig:
    """By the class that it names."""
    name = values.get(CLASS_KEY)
    if not isinstance(name, str) or name not in SINGLE_CONFIGS:
        raise ValueError(f"{source} has {CLASS_KEY} {name!r}, must be one of {', '.join(SINGLE_CONFIGS)}")
    return _built(SINGLE_CONFIGS[name], {key: value for key, value in values.items() if key != CLASS_KEY}, source)


def _built(kind, values: dict, source: str):
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{source} is not a {kind.__name__.removesuffix('Config')} configuration: {error}") from error
