"""Precomputed latents on disk, memory-mapped: shards in safetensors or npz, and fast-DiT's feature folders."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.lib import format as npy
from torch import Tensor
from torch.utils.data import Dataset

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}

_UNREADABLE = (struct.error, zipfile.BadZipFile, safetensors.SafetensorError)


class Shards(Dataset):
    """Files *.safetensors or *.npz of a folder, in the order of their names, each with `latents` [n, C, H, W], floating
    point, and `labels` [n], integers. `flexdit latents` writes such."""

    def __init__(self, root: Path):
        paths = sorted(path for path in root.iterdir() if path.suffix in (".safetensors", ".npz"))
        if not paths:
            raise ValueError(f"data.path is {root}, which has no .safetensors or .npz files and no *_features folder")
        self.paths = paths
        shards = [_open_shard(path) for path in paths]
        self.shape = tuple(shards[0][0].shape[1:])
        for path, (latents, _) in zip(paths, shards):
            if latents.shape[1:] != self.shape:
                raise ValueError(f"{path} has latents of shape {latents.shape[1:]}, {paths[0].name} of {self.shape}")
        labels = np.concatenate([labels for _, labels in shards]).astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"the labels in {root} go down to {labels.min()}, must be at least 0")
        self.labels = torch.from_numpy(labels)
        self.num_classes = int(labels.max()) + 1
        self.begins = np.cumsum([0] + [len(latents) for latents, _ in shards])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getstate__(self):  # a loading process opens its own maps
        return self.__dict__ | {"_maps": {}}

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.stack([self._map(shard)[row] for shard, row in map(self._place, indices)])
        return torch.from_numpy(rows.astype(np.float32)), self.labels[indices]

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.paths[shard]}[{row}]"

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.begins, index, side="right")) - 1
        return shard, index - int(self.begins[shard])

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = _open_shard(self.paths[shard])[0]
        return self._maps[shard]


def _open_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mapped latents and read labels of a file, checked."""
    try:
        arrays = _map_safetensors(path) if path.suffix == ".safetensors" else _map_npz(path)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        struct.error,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(f"{path} is not a readable shard of latents: {error}") from error
    for name in ("latents", "labels"):
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}; it has {sorted(arrays)}")
    latents, labels = arrays["latents"], np.array(arrays["labels"])
    if latents.ndim != 4 or latents.dtype.kind != "f":
        raise ValueError(f"{path}: latents are {latents.dtype} {latents.shape}, must be floating-point [n, C, H, W]")
    if labels.shape != latents.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, must be integers [{len(latents)}]")
    return latents, labels


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="numpy"):  # checks the header and the length
        pass
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"{name} is {entry['dtype']}, must be one of {', '.join(_TYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        arrays[name] = _memmap(path, _TYPES[entry["dtype"]], offset, tuple(entry["shape"]))
    return arrays


def _map_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz, each mapped where it lies in the archive."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, it cannot be mapped: write it with numpy.savez")
            file.seek(entry.header_offset)
            name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, column_major, dtype = read_header(file)
            if dtype.hasobject or column_major:
                raise ValueError(f"{entry.filename} holds objects or is in column-major order")
            arrays[entry.filename.removesuffix(".npy")] = _memmap(path, dtype, file.tell(), shape)
    return arrays


def _memmap(path: Path, dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:
        raise ValueError(f"an array of shape {shape} is empty")
    return np.memmap(path, dtype, "r", offset, shape)


def is_feature_folder(root: Path) -> bool:
    return any(entry.is_dir() and entry.name.endswith("_features") for entry in root.iterdir())


class FeatureFolder(Dataset):
    """fast-DiT's output: NAME_features/*.npy, each [1, C, H, W] or [C, H, W], and NAME_labels/ with files of the same
    names, each one label. Labels of a million files are read with their samples, not at the start."""

    def __init__(self, root: Path):
        features = [entry for entry in root.iterdir() if entry.is_dir() and entry.name.endswith("_features")]
        if len(features) != 1:
            raise ValueError(f"data.path is {root}, which has {len(features)} *_features folders, must be one")
        self.features = features[0]
        self.label_folder = root / (features[0].name.removesuffix("_features") + "_labels")
        if not self.label_folder.is_dir():
            raise ValueError(f"{self.features} has no {self.label_folder.name} beside it")
        self.files = sorted(name for name in os.listdir(self.features) if name.endswith(".npy"))
        labels = {name for name in os.listdir(self.label_folder) if name.endswith(".npy")}
        if not self.files:
            raise ValueError(f"{self.features} has no .npy files")
        if labels != set(self.files):
            odd = sorted(labels ^ set(self.files))[0]
            raise ValueError(f"{self.features} and {self.label_folder.name} differ: only one of them has {odd}")
        self.shape = tuple(_one_sample(self.features / self.files[0]).shape)
        self.num_classes = self._label(0) + 1  # the least it can be

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        samples = [_one_sample(self.features / self.files[index]) for index in indices]
        for index, sample in zip(indices, samples):
            if sample.shape != self.shape:
                raise ValueError(f"{self.name(index)} has a latent of shape {sample.shape}, must be {self.shape}")
        return torch.from_numpy(np.stack(samples)), torch.tensor([self._label(index) for index in indices])

    def name(self, index: int) -> str:
        return str(self.features / self.files[index])

    def _label(self, index: int) -> int:
        path = self.label_folder / self.files[index]
        label = _load_npy(path)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise ValueError(f"{path} is {label.dtype} {label.shape}, must be one integer")
        return int(label.item())


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error


def _one_sample(path: Path) -> np.ndarray:
    """[C, H, W] float32."""
    array = _load_npy(path)
    sample = array[0] if array.ndim == 4 and len(array) == 1 else array
    if sample.ndim != 3 or sample.dtype.kind != "f":
        raise ValueError(f"{path} is {array.dtype} {array.shape}, must be floating-point [1, C, H, W] or [C, H, W]")
    return np.array(sample, dtype=np.float32)
