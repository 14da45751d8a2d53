"""Weights in several safetensors files: who goes where, and the index that says so (the Hugging Face Hub's format).

The index, NAME.safetensors.index.json, is {"metadata": {...}, "weight_map": {tensor: file beside the index}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(name: str, size: int | str) -> int:
    """Bytes of 5000000, "5MB" or "5GiB"."""
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", size, re.IGNORECASE)):
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f'{name} is {size!r}, must be a number of bytes or a string such as "500MB" or "5GB"')
    if size < 1:
        raise ValueError(f"{name} is {size}, must be at least 1")
    return size


def split(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in parts of at most `most` bytes; a larger tensor is a part of its own."""
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def shard_names(stem: str, count: int, taken: set[str], tag: str) -> list[str]:
    """stem-00001-of-00002.safetensors and so on, tagged if one is taken: a shard in use is never overwritten."""

    def names(middle: str) -> list[str]:
        return [f"{stem}{middle}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]

    return names(f"-{tag}") if taken.intersection(names("")) else names("")


def is_shard(name: str, stem: str) -> bool:
    """Whether shard_names may have made this name."""
    return re.fullmatch(re.escape(stem) + r"(-\w+)?-\d{5}-of-\d{5}\.safetensors", name) is not None


def index_text(parts: list[dict[str, Tensor]], names: list[str], metadata: Mapping[str, str]) -> str:
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    weight_map = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
    return json.dumps({"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}, indent=2) + "\n"


def read_index(path: Path) -> tuple[dict[str, str], dict]:
    """weight_map and metadata. Raises ValueError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map, must be the index of a sharded checkpoint")
    for tensor, name in weight_map.items():
        # Only files beside the index, and never a pickle: the index comes from others.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} puts {tensor} into {name!r}, must be a .safetensors file beside it")
    metadata = content.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def load_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of an index, on the CPU. Raises FileNotFoundError or ValueError naming the file."""
    import safetensors.torch  # not on top: the index can be read without torch

    weight_map, _ = read_index(path)
    tensors = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = path.with_name(name)
        wanted = [tensor for tensor, place in weight_map.items() if place == name]
        if not shard.exists():
            raise FileNotFoundError(f"{shard} does not exist, {path} puts {len(wanted)} tensors into it")
        try:
            part = safetensors.torch.load_file(shard)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is not a readable checkpoint: {error}") from error
        if missing := [tensor for tensor in wanted if tensor not in part]:
            raise ValueError(f"{shard} has no {missing[0]}, {path} says it has")
        if extra := [tensor for tensor in part if weight_map.get(tensor) != name]:
            raise ValueError(f"{shard} has {extra[0]}, {path} does not say so")
        tensors |= part
    return tensors
