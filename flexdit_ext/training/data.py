"""What is trained on: folders of images, precomputed latents, scikit-learn's digits; all read by index."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import FlexDiTConfig
from ..evaluation.digits import IMAGE_SIZE, NUM_CLASSES, load_split
from ._latents import FeatureFolder, Shards, is_feature_folder
from .config import DataSettings, TrainingConfig
from .draws import Draws

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Digits(Dataset):
    """The 1,297 handwritten digits, [1, 8, 8] float32 in [-1, 1], that `flexdit evaluate --metric digits` does not hold
    out; read from the installed scikit-learn."""

    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    num_classes = NUM_CLASSES

    def __init__(self):
        self.images, self.labels = load_split(0)[:2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def name(self, index: int) -> str:
        return f"digit {index}"


class ImageFolder(Dataset):
    """A folder per class, in the order of their names: [channels, size, size] float32 in [-1, 1], the middle square of
    an image, resized. channels: 1 or 3; name: of the path, in messages."""

    def __init__(self, path: str | os.PathLike, channels: int, size: int, name: str = "data.path"):
        self.root = _existing_folder(path, name)
        if channels not in (1, 3):
            raise ValueError(f"data.kind is 'images', which have 1 or 3 channels; the model has in_channels {channels}")
        self.shape = (channels, size, size)
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{name} is {self.root}, which has no folders: there must be one for each class")
        self.num_classes = len(self.classes)
        self.files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(self.classes):
            files = sorted(_images_below(self.root / folder))
            if not files:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise ValueError(f"{name}: the class {self.root / folder} is empty, it has no image ({suffixes})")
            self.files += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._read(self.files[index]) for index in indices]), self.labels[indices]

    def name(self, index: int) -> str:
        return self.files[index]

    def _read(self, file: str) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        channels, size, _ = self.shape
        try:
            with Image.open(file) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                image = image.convert("L" if channels == 1 else "RGB")
                image = image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{file} is not a readable image: {error}") from error
        pixels = torch.from_numpy(np.array(image)).view(size, size, channels)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _images_below(folder: Path) -> Iterator[str]:
    for directory, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(directory, name)


def _existing_folder(path: str | os.PathLike, name: str) -> Path:
    if not os.path.isdir(path):
        problem = "is not a folder" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"{name} is {path}, which {problem}")
    return Path(path)


def open_data(settings: DataSettings, model: FlexDiTConfig) -> Dataset:
    """The data set of these settings; ValueError or FileNotFoundError unless it is there and fits the model."""
    if settings.kind == "digits":
        data = Digits()
    elif settings.kind == "images":
        data = ImageFolder(settings.path, model.in_channels, model.input_size)
    else:
        root = _existing_folder(settings.path, "data.path")
        data = FeatureFolder(root) if is_feature_folder(root) else Shards(root)
    wanted = (model.in_channels, model.input_size, model.input_size)
    if data.shape != wanted:
        raise ValueError(
            f"data ({settings.kind}) has samples of shape {data.shape}, the model takes {wanted} "
            "(model.in_channels, model.input_size twice)"
        )
    if data.num_classes > model.num_classes:
        raise ValueError(
            f"data ({settings.kind}) has {data.num_classes} classes, model.num_classes is only {model.num_classes}"
        )
    return data


class _Batches:
    """Indices for the forward passes of one rank, from `first_step` on; a fresh iterator each time."""

    def __init__(self, draws: Draws, config: TrainingConfig, first_step: int, rank: int, world: int):
        self.draws, self.config, self.first_step, self.rank, self.world = draws, config, first_step, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.config.steps):
            indices = self.draws.of_step(step).indices
            for slots in rank_slots(self.config, self.rank, self.world):
                yield indices[slots.start : slots.stop].tolist()

    def __len__(self) -> int:
        return (self.config.steps - self.first_step) * self.config.accumulation


@lru_cache(maxsize=8)
def _slots(batch: int, accumulation: int, rank: int, world: int) -> list[range]:
    size = batch // (accumulation * world)
    return [range(g * size, (g + 1) * size) for g in range(rank, accumulation * world, world)]


def rank_slots(config: TrainingConfig, rank: int, world: int) -> list[range]:
    """The slots of the global batch in each of a rank's forward passes."""
    return _slots(config.batch_size, config.accumulation, rank, world)


def as_it_is(batch):
    """For DataLoader, whose data sets here give whole batches."""
    return batch


def batches(
    data: Dataset, draws: Draws, config: TrainingConfig, first_step: int, rank: int, world: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples [n, C, H, W] and labels [n] for one forward pass after the other."""
    sampler = _Batches(draws, config, first_step, rank, world)
    workers = config.data.workers
    options = {"num_workers": workers, "pin_memory": pin, "worker_init_fn": _ignore_signals}
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=as_it_is, **options))


def _ignore_signals(_) -> None:
    """A signal to the whole process group must not take the loaders from a run that is about to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
