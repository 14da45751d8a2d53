"""Checkpoints: model.safetensors with config.json beside it, written all or nothing, read without running pickle."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .config import FlexDiTConfig

if TYPE_CHECKING:
    from .model import FlexDiT

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_METADATA_KEY = "config"  # the configuration's JSON in the safetensors header: one file is a whole checkpoint
_WRAPPER_KEYS = ("ema", "model", "state_dict")  # of training checkpoints, the one for sampling first
_NAMED_TENSORS = 5  # at most so many per kind in an error message


def save_pretrained(model: FlexDiT, directory: str | os.PathLike) -> None:
    """Writes `directory`/model.safetensors and config.json; creates the directory.

    The configuration also goes into the safetensors file's metadata (key "config"), so that file alone can be loaded.
    All or nothing: a failure (full disk, no permission, Ctrl-C) leaves the previous checkpoint or the whole new one,
    and no temporary files; a killed process may leave a directory .saving-*, which can be deleted.
    Raises OSError, TypeError if `model` is no FlexDiT.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(config, FlexDiTConfig):
        raise TypeError(f"model is a {type(model).__name__}, must be a FlexDiT")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
        staged = Path(staging)
        (staged / CONFIG_NAME).write_text(text, encoding="utf-8")
        _write_safetensors(tensors, staged / WEIGHTS_NAME, {"format": "pt", _METADATA_KEY: text})
        shutil.copymode(staged / CONFIG_NAME, staged / WEIGHTS_NAME)  # safetensors lets nobody else read the file
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _fsync(staged / name)
        _publish(staged, directory)
    _fsync(directory)


def _write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"cannot write {WEIGHTS_NAME} to {path.parent.parent}: {error}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, directory: Path) -> None:
    """Moves the staged pair into place.

    No moment shows new weights with another model's config.json: that is set aside first, and the configuration in the
    weights' own metadata serves until the new config.json is there.
    """
    config, previous = directory / CONFIG_NAME, staged / "previous_config.json"
    try:
        if config.exists() and config.read_bytes() != (staged / CONFIG_NAME).read_bytes():
            os.replace(config, previous)
        os.replace(staged / WEIGHTS_NAME, directory / WEIGHTS_NAME)
        os.replace(staged / CONFIG_NAME, config)
    except BaseException:  # Ctrl-C too
        if (staged / WEIGHTS_NAME).exists() and previous.exists():
            os.rename(previous, config)
        raise


def load_pretrained(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FlexDiT:
    """The model that save_pretrained wrote, in evaluation mode.

    Args:
        path: a directory with model.safetensors, or one weights file. The configuration comes from config.json beside
            it or from the safetensors metadata; config.json is asked first, except for a file of another name.
        dtype: of the parameters; None keeps the file's.
        device: None means the CPU.

    Raises FileNotFoundError, or ValueError naming the file: unreadable, truncated or corrupt files, a configuration
    that is not JSON, has unknown keys or wrong types, and tensors that do not match it (see check_state_dict).
    """
    path = Path(path)
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    state_dict = load_state_dict_file(weights)
    config, source = _read_config(weights)
    return build_model(config, state_dict, dtype, device, source=f"{weights} with the configuration in {source}")


def _read_config(weights: Path) -> tuple[FlexDiTConfig, str]:
    """The configuration and where it was found."""
    sources = [_config_beside, _config_within]
    for read in sources if weights.name == WEIGHTS_NAME else reversed(sources):
        text, source = read(weights)
        if text is not None:
            return _parse_config(text, source), source
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
    if weights.suffix != ".safetensors":
        return None, source
    with safetensors.safe_open(weights, framework="pt") as file:
        return (file.metadata() or {}).get(_METADATA_KEY), source


def _parse_config(text: str | bytes, source: str) -> FlexDiTConfig:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{source} is not JSON: {error}") from error
    try:
        if not isinstance(values, dict):
            raise TypeError(f"a JSON {type(values).__name__}, must be an object")
        return FlexDiTConfig.from_dict(values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{source} is not a FlexDiT configuration: {error}") from error


def load_state_dict_file(path: str | os.PathLike, key: str | None = None) -> dict[str, Tensor]:
    """Named tensors, on the CPU, of a .safetensors file or of any other file through torch.load(weights_only=True).

    A training checkpoint that wraps state dicts ({"ema": ..., "model": ..., "args": ...}, as facebookresearch/DiT and
    changsn/SparseDiT write) gives the one called `key`, or if that is None "ema" before "model" before "state_dict".
    Raises FileNotFoundError, or ValueError naming the file; code in a pickle is refused, never run.
    """
    path = Path(path)
    _check_readable(path)
    try:
        content = _read_tensors(path)
    except MemoryError:
        raise
    except Exception as error:  # torch.load and safetensors raise about ten types for broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if path.suffix != ".safetensors":
            reason = (
                "truncated, corrupt, or pickled objects other than tensors (not loaded, they can run code): " + reason
            )
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    try:
        return select_state_dict(content, key, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None


def _check_readable(path: Path) -> None:
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _read_tensors(path: Path):
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training checkpoints carry their arguments
        return torch.load(path, map_location="cpu", weights_only=True)


def select_state_dict(content, key: str | None = None, source: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint, unwrapped as load_state_dict_file describes.

    Raises TypeError if it holds anything but tensors, ValueError if there is none called `key`.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{source} holds a {type(content).__name__}, must hold a dict of tensors")
    if key is None:
        key = next((name for name in _WRAPPER_KEYS if isinstance(content.get(name), Mapping)), None)
    elif not isinstance(content.get(key), Mapping):
        wrappers = [name for name, value in content.items() if isinstance(value, Mapping)]
        raise ValueError(f"{source} has no state dict {key!r}; it has {wrappers or 'none'}")
    state_dict = dict(content if key is None else content[key])
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{source}: {name!r} is a {type(value).__name__}, must be a tensor")
    return state_dict


def check_state_dict(model: torch.nn.Module, state_dict: Mapping[str, Tensor], source: str = "state_dict") -> None:
    """Raises ValueError unless `state_dict` has exactly the model's tensors, in its shapes and of floating dtypes.

    The message starts with `source` and names up to five tensors of each kind, missing, unexpected and misshaped with
    both shapes. Values are not looked at.
    """
    expected = model.state_dict()
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [str(name) for name in state_dict if name not in expected],
        "misshaped": [
            f"{name} {_shape(state_dict[name])}, must be {_shape(tensor)}"
            for name, tensor in expected.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ],
        "not floating point": [
            f"{name} ({tensor.dtype})" for name, tensor in state_dict.items() if not tensor.is_floating_point()
        ],
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} does not fit the model; " + "; ".join(found))


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED_TENSORS
    return ", ".join(names[:_NAMED_TENSORS]) + (f" and {rest} more" if rest > 0 else "")


def build_model(
    config: FlexDiTConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    source: str = "state_dict",
) -> FlexDiT:
    """FlexDiT with these tensors (copied), in evaluation mode. Raises ValueError as check_state_dict does."""
    from .model import FlexDiT  # not on top: model.py offers save_pretrained and from_pretrained

    _check_sizes(config, state_dict, source)
    if dtype is None:
        dtype = state_dict["patch_embed.weight"].dtype
        dtype = dtype if dtype.is_floating_point else None  # check_state_dict will say it
    with torch.device("meta"):  # no memory before the check, no random initialisation before the load
        model = FlexDiT(config, dtype=dtype)
    check_state_dict(model, state_dict, source)
    model.to_empty(device="cpu" if device is None else device)
    model.load_state_dict(state_dict)
    return model.eval()


def _check_sizes(config: FlexDiTConfig, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Compares every number that decides the model's size, so that a wrong one is found before memory is asked for."""
    hidden, patch = config.hidden_size, config.patch_size
    shapes = {
        "pos_embed": [config.dense_grid[0] * config.dense_grid[1], hidden],
        "patch_embed.weight": [hidden, config.in_channels, patch, patch],
        "label_embed.weight": [config.num_classes + (config.class_dropout_prob > 0), hidden],
        "final_layer.linear.weight": [patch * patch * config.out_channels, hidden],
    }
    mlp = next((name for name in state_dict if str(name).endswith("mlp.fc1.weight")), None)
    if mlp is not None:
        shapes[mlp] = [config.mlp_hidden_size, hidden]
    missing = [name for name in shapes if name not in state_dict]
    wrong = [
        f"{name} {_shape(state_dict[name])}, must be {shape}"
        for name, shape in shapes.items()
        if name in state_dict and list(state_dict[name].shape) != shape
    ]
    if missing:
        raise ValueError(f"{source} does not fit the model; missing: {_some(missing)}")
    if wrong:
        raise ValueError(f"{source} does not fit the model; misshaped: {_some(wrong)}")
    if config.depth > len(state_dict):
        raise ValueError(f"{source} does not fit the model; {config.depth} blocks, only {len(state_dict)} tensors")
