"""A set of images for evaluation: drawn by all ranks, resumable, the same whatever their number and batches."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import all_or_nothing, check_finite, to_pixels, write_file
from ..sampler import Sampler
from ..sampling import progress_bar
from .archive import read_settings, write_archive
from .ranks import Ranks

SHARD_IMAGES = 256
_MANIFEST = "manifest.json"


def balanced_labels(count: int, classes: Sequence[int]) -> list[int]:
    """The classes in turn, so that none has more than one image more than another."""
    return [classes[i % len(classes)] for i in range(count)]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts_folder(out: str | os.PathLike) -> Path:
    """Where unfinished work of `out` lies."""
    return Path(f"{os.fspath(out)}.parts")


def draw_set(
    sampler: Sampler,
    labels: Sequence[int],
    out: str | os.PathLike,
    *,
    decode: Callable[[Tensor], Tensor],
    options: dict,
    identity: dict,
    ranks: Ranks,
    batch_size: int = 64,
    shard_images: int = SHARD_IMAGES,
    progress: bool = False,
) -> bool:
    """Draws an image for each label and joins them into `out`, an .npz of arr_0, uint8 [N, H, W, 3], and arr_1, labels.

    Image i has the noise of derive_seed(seed, i), so the set depends neither on the ranks nor on batch_size (on CPUs
    with AVX2 but not AVX-512, and on GPUs, up to the rounding of products of other shapes). Shards are written to
    `out`.parts, each whole or not at all; a run that was killed goes on from there, with any number of ranks.

    decode: latents [n, C, h, w] -> images [n, 1 or 3, H, W] in [-1, 1]; called for one image at a time.
    options: of Sampler.sample, seed among them. identity: what else decides the images, for the manifest: model, VAE.

    Returns whether anything was to be done: False if `out` was there with the same settings. Raises ValueError where
    `out` or its parts have other settings, naming the difference; OSError naming the file.
    """
    out, parts = Path(out), _parts_folder(out)
    settings = json.loads(json.dumps({**identity, **options, "num_images": len(labels), "shard_images": shard_images}))
    settings["labels"] = hashlib.sha256(np.asarray(labels, dtype=np.int64).tobytes()).hexdigest()
    todo = ranks.agree(_begin(out, parts, settings) if ranks.is_main else None)
    if todo is None:
        return False
    mine = todo[ranks.index :: ranks.count]
    count = sum(len(_range(shard, settings)) for shard in mine)
    with progress_bar(progress, count, "images", "image") as tick:
        for shard in mine:
            images = _draw(sampler, labels, _range(shard, settings), decode, options, batch_size, tick)
            _write_shard(parts, shard, images)
    ranks.wait()
    if ranks.is_main:
        _join(out, parts, np.asarray(labels, dtype=np.int64), settings)
        shutil.rmtree(parts)
    return True


def _begin(out: Path, parts: Path, settings: dict) -> list[int] | None:
    """The shards that are missing; None if `out` is there."""
    if out.exists():
        _same_settings(out, read_settings(out), settings)
        if _read_manifest(parts) == settings:  # killed just before they were removed
            shutil.rmtree(parts)
        return None
    manifest = _read_manifest(parts)
    if manifest is not None and any(parts.glob("*.npy")):
        _same_settings(parts, manifest, settings)
        for leftover in parts.glob(".writing-*"):  # of a process that was killed
            shutil.rmtree(leftover)
    else:
        with all_or_nothing(parts) as folder:
            write_file(folder / _MANIFEST, json.dumps(settings, indent=2).encode())
    shards = range(-(-settings["num_images"] // settings["shard_images"]))
    return [shard for shard in shards if not _path(parts, shard).exists()]


def _read_manifest(parts: Path) -> dict | None:
    path = parts / _MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _same_settings(path: Path, found: dict | None, settings: dict) -> None:
    if found is None:
        raise ValueError(f"{path} is there and not a file of this command: give another --out or remove it")
    different = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{path} was made with {key} {found.get(key)!r}, this run has {settings.get(key)!r}: give another --out, "
            "or remove it"
        )


def _range(shard: int, settings: dict) -> range:
    first = shard * settings["shard_images"]
    return range(first, min(first + settings["shard_images"], settings["num_images"]))


def _path(parts: Path, shard: int) -> Path:
    return parts / f"{shard:06d}.npy"


@torch.no_grad()
def _draw(sampler: Sampler, labels, images: range, decode, options: dict, batch_size: int, tick) -> np.ndarray:
    """uint8 [n, H, W, 3]"""
    pixels = []
    for start in range(images.start, images.stop, batch_size):
        wanted = labels[start : min(start + batch_size, images.stop)]
        latents = sampler.sample(wanted, **options, batch_size=len(wanted), start_index=start)
        check_finite(latents, start)
        for i in range(len(wanted)):
            image = decode(latents[i : i + 1])
            check_finite(image, start + i)
            pixels.append(to_pixels(image)[0])
            tick()
    pixels = np.stack(pixels)
    return pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels


def _write_shard(parts: Path, shard: int, images: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, images, allow_pickle=False)
    with all_or_nothing(parts) as folder:
        write_file(folder / _path(parts, shard).name, data.getvalue())


def _join(out: Path, parts: Path, labels: np.ndarray, settings: dict) -> None:
    def shards() -> Iterator[np.ndarray]:
        for shard in range(-(-settings["num_images"] // settings["shard_images"])):
            path = _path(parts, shard)
            try:
                images = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{path} is damaged, remove it and run again: {error}") from error
            expected = (len(_range(shard, settings)), *first[1:])
            if images.shape != expected or images.dtype != np.uint8:
                raise ValueError(
                    f"{path} is {images.dtype} {images.shape}, must be uint8 {expected}: remove it and run again"
                )
            yield images

    first = np.load(_path(parts, 0), mmap_mode="r", allow_pickle=False).shape
    joined = parts / "joined.npz"  # a killed process's is overwritten by the next
    write_archive(joined, (settings["num_images"], *first[1:]), shards(), labels, settings)
    os.replace(joined, out)
