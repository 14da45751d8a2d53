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

from ._samples import Captions, Samples

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}

# What a model takes: the array that holds it, its sides after the number of samples, its kinds of dtype.
_CONDITIONS = {
    "y": ("labels", (), "iu"),
    "caption": ("caption", ("L", "D"), "f"),
    "caption_mask": ("caption_mask", ("L",), "biu"),
    "resolution": ("resolution", (2,), "iuf"),
    "aspect_ratio": ("aspect_ratio", (), "iuf"),
}
_KINDS = {"iu": "integers", "f": "floating-point", "biu": "booleans or integers", "iuf": "numbers"}
_UNREADABLE = (struct.error, zipfile.BadZipFile, safetensors.SafetensorError)


class Shards(Samples):
    """Files *.safetensors or *.npz of a folder, in the order of their names, each with samples under the first of
    `names` that it has, floating-point [n, C, ...] of `dims` dimensions, and what `conditions` ask for:

    y: `labels` [n], integers; caption: `caption` [n, L, D], floating point; caption_mask: `caption_mask` [n, L], true
    or 1 where there is a token, without it everywhere; resolution: `resolution` [n, 2]; aspect_ratio: `aspect_ratio`
    [n]. A file may hold `null_caption` [L, D], what stands for no caption; if none does it is zeros [1, D].

    `flexdit latents` writes such, with labels or with captions. Raises ValueError that names the file.
    """

    def __init__(
        self,
        root: Path,
        conditions: Sequence[str] = ("y",),
        names: Sequence[str] = ("latents",),
        dims: int = 4,
    ):
        paths = sorted(path for path in root.iterdir() if path.suffix in (".safetensors", ".npz"))
        if not paths:
            other = " and no *_features folder" if tuple(names) == ("latents",) else ""
            raise ValueError(f"data.path is {root}, which has no .safetensors or .npz files{other}")
        self.paths, self.conditions = paths, tuple(conditions)
        self._names, self._dims = tuple(names), dims
        shards = [self._open(path) for path in paths]
        self.shape = tuple(shards[0]["samples"].shape[1:])
        for path, shard in zip(paths, shards):
            if (shape := shard["samples"].shape[1:]) != self.shape:
                raise ValueError(f"{path} has samples of shape {shape}, {paths[0].name} of {self.shape}")
        if "y" in self.conditions:
            labels = np.concatenate([shard["y"] for shard in shards]).astype(np.int64)
            if labels.min() < 0:
                raise ValueError(f"the labels in {root} go down to {labels.min()}, must be at least 0")
            self.labels = torch.from_numpy(labels)
            self.num_classes = int(labels.max()) + 1
        if "caption" in self.conditions:
            self.captions = _captions(paths, shards)
        self.begins = np.cumsum([0] + [len(shard["samples"]) for shard in shards])
        self._maps: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getstate__(self):  # a loading process opens its own maps
        return self.__dict__ | {"_maps": {}}

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [(self._map(shard), row) for shard, row in map(self._place, indices)]
        samples = np.stack([arrays["samples"][row] for arrays, row in rows]).astype(np.float32)
        conditions = {}
        for name in self.conditions:
            if name == "y":
                conditions[name] = self.labels[list(indices)]
            elif name in ("caption", "caption_mask"):
                conditions[name] = self._padded(name, rows)
            else:
                conditions[name] = torch.from_numpy(np.stack([arrays[name][row] for arrays, row in rows])).float()
        return torch.from_numpy(samples), conditions

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.paths[shard]}[{row}]"

    def _padded(self, name: str, rows: list[tuple[dict[str, np.ndarray], int]]) -> Tensor:
        """caption [n, L, D] or caption_mask [n, L], with tokens that the mask leaves out at the end."""
        shape, dtype = (len(rows), self.captions.length), np.bool_
        if name == "caption":
            shape, dtype = (*shape, self.captions.channels), np.float32
        padded = np.zeros(shape, dtype)
        for out, (arrays, row) in zip(padded, rows):
            own = len(arrays["caption"][row])
            given = arrays[name][row] if name in arrays else np.ones(own)
            out[:own] = given
        return torch.from_numpy(padded)

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.begins, index, side="right")) - 1
        return shard, index - int(self.begins[shard])

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._maps:
            self._maps[shard] = self._open(self.paths[shard])
        return self._maps[shard]

    def _open(self, path: Path) -> dict[str, np.ndarray]:
        """Mapped arrays of a file, checked: samples, conditions by the model's names, null_caption."""
        try:
            arrays = _map_safetensors(path) if path.suffix == ".safetensors" else _map_npz(path)
        except (OSError, ValueError, KeyError, EOFError, *_UNREADABLE) as error:
            raise ValueError(f"{path} is not a readable shard: {error}") from error
        name = next((name for name in self._names if name in arrays), self._names[0])
        samples = _get(path, arrays, name)
        if samples.ndim != self._dims or samples.dtype.kind != "f":
            wanted = "[n, C, H, W]" if self._dims == 4 else "[n, C, F, H, W]"
            raise ValueError(f"{path}: {name} are {samples.dtype} {samples.shape}, must be floating-point {wanted}")
        opened, sides = {"samples": samples}, {"n": len(samples)}
        for condition in self.conditions:
            name, axes, kinds = _CONDITIONS[condition]
            if condition == "caption_mask" and name not in arrays:
                continue
            array = _get(path, arrays, name)
            wanted = [sides.get(side, side) for side in ("n", *axes)]
            fits = len(array.shape) == len(wanted) and all(
                isinstance(b, str) or a == b for a, b in zip(array.shape, wanted)
            )
            if not fits or array.dtype.kind not in kinds:
                allowed = f"{_KINDS[kinds]} [{', '.join(map(str, wanted))}]"
                raise ValueError(f"{path}: {name} are {array.dtype} {array.shape}, must be {allowed}")
            sides |= dict(zip(("n", *axes), array.shape))
            opened[condition] = array
        if "caption" in self.conditions and "null_caption" in arrays:
            opened["null_caption"] = arrays["null_caption"]
        return opened


def _get(path: Path, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"{path} has no array {name!r}; it has {sorted(arrays)}")
    return arrays[name]


def _captions(paths: Sequence[Path], shards: Sequence[dict[str, np.ndarray]]) -> Captions:
    """What the captions of all shards have in common."""
    channels, tokens, null = shards[0]["caption"].shape[2], [], None
    for path, shard in zip(paths, shards):
        caption = shard["caption"]
        if caption.shape[2] != channels:
            raise ValueError(f"{path} has captions of {caption.shape[2]} channels, {paths[0].name} of {channels}")
        mask = shard.get("caption_mask", np.ones(caption.shape[:2], dtype=bool))
        counts = np.count_nonzero(mask, axis=1)
        if not counts.all():
            raise ValueError(
                f"{path}: caption_mask[{int(counts.argmin())}] has no token, every caption must have one (the empty "
                "text has one)"
            )
        tokens.append(counts)
        found = shard.get("null_caption")
        if found is None:
            continue
        if found.ndim != 2 or found.shape[1] != channels or found.dtype.kind != "f":
            raise ValueError(
                f"{path}: null_caption is {found.dtype} {found.shape}, must be floating-point [L, {channels}]"
            )
        if null is not None and not np.array_equal(found, null):
            raise ValueError(f"{path} has another null_caption than the shards before it")
        null = found
    null = np.zeros((1, channels)) if null is None else null
    length = max(len(null), *(shard["caption"].shape[1] for shard in shards))
    return Captions(channels, length, np.concatenate(tokens), torch.from_numpy(null.astype(np.float32)))


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


class FeatureFolder(Samples):
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

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        samples = [_one_sample(self.features / self.files[index]) for index in indices]
        for index, sample in zip(indices, samples):
            if sample.shape != self.shape:
                raise ValueError(f"{self.name(index)} has a latent of shape {sample.shape}, must be {self.shape}")
        labels = torch.tensor([self._label(index) for index in indices])
        return torch.from_numpy(np.stack(samples)), {"y": labels}

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
