"""Checkpoints: model.safetensors with config.json beside it, written all or nothing, read without running pickle."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ._adapters import has_adapters
from ._config_file import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, check_readable, find_weights, read_config
from ._hub import fetch, is_hub_id
from ._shards import INDEX_SUFFIX, index_text, is_shard, load_shards, parse_size, shard_names, split
from .config import FlexDiTConfig

if TYPE_CHECKING:
    from .model import FlexDiT

_WRAPPER_KEYS = ("ema", "model", "state_dict")  # of training checkpoints, the one for sampling first
_NAMED_TENSORS = 5  # at most so many per kind in an error message


def save_pretrained(model: FlexDiT, directory: str | os.PathLike, *, max_shard_size: int | str | None = None) -> None:
    """Writes `directory`/model.safetensors and config.json; creates the directory.

    max_shard_size: bytes, or a string such as "5GB": weights that are larger go into several files
        model-00001-of-0000N.safetensors, listed in model.safetensors.index.json.

    The configuration also goes into the metadata of the safetensors file (key "config") or of the index, so that those
    alone can be loaded. All or nothing: a failure (full disk, no permission, Ctrl-C) leaves the previous checkpoint or
    the whole new one, and no temporary files; a killed process may leave a directory .saving-* and unlisted shards,
    which can be deleted. Raises OSError, TypeError if `model` is no FlexDiT.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(config, FlexDiTConfig):
        raise TypeError(f"model is a {type(model).__name__}, must be a FlexDiT")
    if has_adapters(model):
        raise ValueError(
            "model has adapters: save them with peft's save_pretrained, or the weights with them merged, "
            "flexdit_ext.lora.merge(model)"
        )
    most = None if max_shard_size is None else parse_size("max_shard_size", max_shard_size)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_checkpoint(model.state_dict(), Path(directory), text, most)


def write_checkpoint(
    state_dict: Mapping[str, Tensor],
    directory: Path,
    config_text: str,
    most: int | None = None,
    weights_name: str = WEIGHTS_NAME,
) -> None:
    """What save_pretrained does, for any tensors and any config.json; `most` bytes a file."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    parts = [tensors] if most is None else split(tensors, most)
    stem = weights_name.removesuffix(".safetensors")
    names, index = [weights_name], stem + INDEX_SUFFIX
    if len(parts) > 1:
        names = shard_names(stem, len(parts), set(os.listdir(directory)), secrets.token_hex(4))
    metadata = {"format": "pt", METADATA_KEY: config_text}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
        staged = Path(staging)
        (staged / CONFIG_NAME).write_text(config_text, encoding="utf-8")
        if len(parts) > 1:
            (staged / index).write_text(index_text(parts, names, {METADATA_KEY: config_text}), encoding="utf-8")
        for part, name in zip(parts, names, strict=True):
            _write_safetensors(part, staged / name, metadata)
            shutil.copymode(staged / CONFIG_NAME, staged / name)  # safetensors lets nobody else read the file
        for path in sorted(staged.iterdir()):
            fsync(path)
        if len(parts) > 1:
            _publish_shards(staged, directory, names, index, weights_name)
        else:
            _publish(staged, directory, weights_name)
        _remove_shards(directory, stem, keep=names if len(parts) > 1 else [])
    fsync(directory)


def _write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"cannot write {path.name} to {path.parent.parent}: {error}") from error


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, directory: Path, weights_name: str) -> None:
    """Moves the staged pair into place.

    No moment shows new weights with another model's config.json: that is set aside first, and the configuration in the
    weights' own metadata serves until the new config.json is there.
    """
    config, previous = directory / CONFIG_NAME, staged / "previous_config.json"
    try:
        _set_aside(config, staged / CONFIG_NAME, previous)
        os.replace(staged / weights_name, directory / weights_name)
        os.replace(staged / CONFIG_NAME, config)
    except BaseException:  # Ctrl-C too
        if (staged / weights_name).exists() and previous.exists():
            os.rename(previous, config)
        raise


def _publish_shards(staged: Path, directory: Path, names: list[str], index: str, weights_name: str) -> None:
    """As _publish. Shards have names that nobody uses yet, so they come first; then the index is replaced, and a single
    file of weights, which readers prefer to an index, is removed: the one or the other is the moment of change."""
    config, previous = directory / CONFIG_NAME, staged / "previous_config.json"
    single = directory / weights_name
    try:
        for name in names:
            os.replace(staged / name, directory / name)
        _set_aside(config, staged / CONFIG_NAME, previous)
        os.replace(staged / index, directory / index)
        single.unlink(missing_ok=True)
        os.replace(staged / CONFIG_NAME, config)
    except BaseException:
        if (staged / index).exists() or single.exists():  # the old checkpoint is still the one that is read
            if previous.exists():
                os.rename(previous, config)
            if not (staged / index).exists():
                (directory / index).unlink()
            for name in names:
                (directory / name).unlink(missing_ok=True)
        raise


def _set_aside(config: Path, staged_config: Path, previous: Path) -> None:
    if config.exists() and config.read_bytes() != staged_config.read_bytes():
        os.replace(config, previous)


def _remove_shards(directory: Path, stem: str, keep: list[str]) -> None:
    """What an earlier, sharded checkpoint has left; files of other names stay."""
    if not keep:
        (directory / (stem + INDEX_SUFFIX)).unlink(missing_ok=True)
    for name in os.listdir(directory):
        if is_shard(name, stem) and name not in keep:
            (directory / name).unlink(missing_ok=True)


def load_pretrained(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    device_map: torch.device | str | int | Mapping | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> FlexDiT:
    """The model that save_pretrained wrote, in evaluation mode. Reads JSON and safetensors only, never a pickle.

    Args:
        path: a directory with model.safetensors or model.safetensors.index.json, one such file, or if there is no such
            path the id "owner/name" of a repository on the Hugging Face Hub, which huggingface_hub fetches. The
            configuration comes from config.json beside the weights or from their metadata; config.json is asked first,
            except for a file of another name.
        dtype: of the parameters; None keeps the file's.
        device: None means the CPU.
        device_map: another way to name the one device: "cuda:0", 0, or {"": "cuda:0"}.
        revision, cache_dir, token, local_files_only: as in huggingface_hub, for an id.

    Raises FileNotFoundError, or ValueError naming the file: unreadable, truncated or corrupt files, a configuration
    that is not JSON, has unknown keys or wrong types, and tensors that do not match it (see check_state_dict).
    """
    device = one_device(device, device_map)
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    weights = locate(path, **options)
    state_dict = load_state_dict_file(weights)
    config, source = read_config(weights)
    return build_model(config, state_dict, dtype, device, source=f"{weights} with the configuration in {source}")


def locate(path: str | os.PathLike, **options) -> Path:
    """The safetensors file or index of a folder, a file, or an id on the Hub, fetched with the options."""
    if not os.path.exists(path) and is_hub_id(path):
        path = fetch(path, **options)
    weights = find_weights(Path(path))
    check_readable(weights)
    if not weights.name.endswith((".safetensors", INDEX_SUFFIX)):
        raise ValueError(f"{weights} is not a .safetensors file; `flexdit convert` reads other checkpoints")
    return weights


def one_device(device, device_map) -> torch.device | None:
    if device_map is None:
        return None if device is None else torch.device(device)
    if device is not None:
        raise ValueError(f"device is {device} and device_map {device_map!r}: give one of them")
    one = device_map
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(f'device_map is {device_map!r}, must be one device, such as "cuda:0" or {{"": "cuda:0"}}')
        one = device_map[""]
    try:
        return torch.device(one)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f'device_map is {device_map!r}, must be one device, such as "cuda:0" or "cpu"') from None


def load_state_dict_file(path: str | os.PathLike, key: str | None = None) -> dict[str, Tensor]:
    """Named tensors, on the CPU, of a .safetensors file, of an index of several (.safetensors.index.json), or of any
    other file through torch.load(weights_only=True).

    A training checkpoint that wraps state dicts ({"ema": ..., "model": ..., "args": ...}, as facebookresearch/DiT and
    changsn/SparseDiT write) gives the one called `key`, or if that is None "ema" before "model" before "state_dict".
    Raises FileNotFoundError, or ValueError naming the file; code in a pickle is refused, never run.
    """
    try:
        return select_state_dict(load_checkpoint_file(path), key, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None


def load_checkpoint_file(path: str | os.PathLike):
    """What a file of load_state_dict_file's kinds holds, before a state dict is selected."""
    path = Path(path)
    check_readable(path)
    try:
        return _read_tensors(path)
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # torch.load and safetensors raise about ten types for broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not path.name.endswith((".safetensors", INDEX_SUFFIX)):
            reason = (
                "truncated, corrupt, or pickled objects other than tensors (not loaded, they can run code): " + reason
            )
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def _read_tensors(path: Path):
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        return load_shards(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training checkpoints carry their arguments
        return torch.load(path, map_location="cpu", weights_only=True)


def state_dict_key(content: Mapping, key: str | None = None) -> str | None:
    """Under which key of a loaded checkpoint its state dict is; None if it is one itself."""
    if key is not None:
        return key
    return next((name for name in _WRAPPER_KEYS if isinstance(content.get(name), Mapping)), None)


def select_state_dict(content, key: str | None = None, source: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint, unwrapped as load_state_dict_file describes.

    Raises TypeError if it holds anything but tensors, ValueError if there is none called `key`.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{source} holds a {type(content).__name__}, must hold a dict of tensors")
    if key is not None and not isinstance(content.get(key), Mapping):
        wrappers = [name for name, value in content.items() if isinstance(value, Mapping)]
        raise ValueError(f"{source} has no state dict {key!r}; it has {wrappers or 'none'}")
    key = state_dict_key(content, key)
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
