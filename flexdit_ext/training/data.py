"""What is trained on: folders of images and clips, shards, scikit-learn's digits; all read by index."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache

from torch import Tensor
from torch.utils.data import DataLoader

from ..evaluation.digits import IMAGE_SIZE, NUM_CLASSES, load_split
from ._folders import ClipFolder, ImageFolder, existing_folder
from ._latents import FeatureFolder, Shards, is_feature_folder
from ._samples import Samples
from .config import DataSettings, TrainingConfig
from .draws import Draws
from .families import Family

__all__ = ["Digits", "ImageFolder", "batches", "open_data", "rank_slots"]


class Digits(Samples):
    """The 1,297 handwritten digits, [1, 8, 8] float32 in [-1, 1], that `flexdit evaluate --metric digits` does not hold
    out; read from the installed scikit-learn."""

    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    num_classes = NUM_CLASSES

    def __init__(self):
        self.images, self.labels = load_split(0)[:2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[indices], {"y": self.labels[indices]}

    def name(self, index: int) -> str:
        return f"digit {index}"


def open_data(settings: DataSettings, family: Family, model) -> Samples:
    """The data set of these settings; ValueError or FileNotFoundError unless it is there and fits the model's
    configuration."""
    if settings.kind not in family.kinds:
        kinds = " or ".join(map(repr, family.kinds))
        raise ValueError(f"data.kind is {settings.kind!r}, a {family.name} trains on {kinds} (model.family)")
    data = _open(settings, family.conditions(model), model)
    wanted = family.sample_shape(model)
    if data.shape != wanted:
        raise ValueError(
            f"data ({settings.kind}) has samples of shape {data.shape}, the model takes {wanted} "
            f"({', '.join(family.shape_fields)})"
        )
    if data.num_classes > model.num_classes:
        raise ValueError(
            f"data ({settings.kind}) has {data.num_classes} classes, model.num_classes is only {model.num_classes}"
        )
    if (captions := data.captions) is not None:
        if captions.channels != model.caption_channels:
            raise ValueError(
                f"data ({settings.kind}) has captions of {captions.channels} channels, model.caption_channels is "
                f"{model.caption_channels}"
            )
        if captions.length > model.max_caption_tokens:
            raise ValueError(
                f"data ({settings.kind}) has captions (or a null_caption) of {captions.length} tokens, "
                f"model.max_caption_tokens is only {model.max_caption_tokens}"
            )
    return data


def _open(settings: DataSettings, conditions: tuple[str, ...], model) -> Samples:
    if settings.kind == "digits":
        return Digits()
    if settings.kind == "images":
        return ImageFolder(settings.path, model.in_channels, model.input_size)
    root = existing_folder(settings.path, "data.path")
    if settings.kind == "latents":
        return FeatureFolder(root) if is_feature_folder(root) else Shards(root)
    if settings.kind == "captions":
        return Shards(root, conditions, ("latents", "images"))
    if any(path.suffix in (".safetensors", ".npz") for path in root.iterdir()):
        if settings.frame_step > 1:
            raise ValueError(f"data.frame_step is {settings.frame_step}, but {root} has shards, which are taken whole")
        return Shards(root, conditions, ("clips",), dims=5)
    if conditions != ("y",):
        raise ValueError(
            f"data.path is {root}, which has no shards: a folder per class gives labels alone, the model takes "
            f"{', '.join(conditions)}"
        )
    return ClipFolder(root, model.in_channels, model.num_frames, model.input_size, settings.frame_step)


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
    data: Samples, draws: Draws, config: TrainingConfig, first_step: int, rank: int, world: int, pin: bool
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Samples [n, C, ...] and their conditions for one forward pass after the other."""
    sampler = _Batches(draws, config, first_step, rank, world)
    workers = config.data.workers
    options = {"num_workers": workers, "pin_memory": pin, "worker_init_fn": _ignore_signals}
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=as_it_is, **options))


def _ignore_signals(_) -> None:
    """A signal to the whole process group must not take the loaders from a run that is about to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
