"""`flexdit latents`: a folder of images or clips, once through diffusers' AutoencoderKL, and their texts, once through
a T5, into shards that training maps."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .._files import all_or_nothing
from .._text import TextEncoder
from ..checkpoint import fsync
from ..sampling import derive_seed, normal_noise
from ._folders import ClipFolder, ImageFolder
from .data import as_it_is

_METADATA_KEY = "flexdit_latents"


@dataclass(frozen=True)
class LatentSettings:
    """What decides the numbers in the shards. vae: a folder or a Hub id of an AutoencoderKL, maybe the `vae` folder of
    a pipeline. size: of the square images in pixels. flip: mirrored images follow the plain ones. mean: no sampling of
    the autoencoder's posterior; otherwise image i draws from its own stream of the seed.

    text_encoder: a folder with a T5 and its tokenizer; then there is NAME.txt beside NAME.png, in place of a folder for
    each class, and its caption is cut at max_tokens. frames: clips of so many frames, one of every frame_step, in place
    of images; 0 is images."""

    images: str
    vae: str
    size: int = 256
    flip: bool = False
    mean: bool = False
    seed: int = 0
    dtype: str = "float32"
    batch_size: int = 16
    shard_size: int = 4096
    text_encoder: str | None = None
    max_tokens: int = 120
    frames: int = 0
    frame_step: int = 1

    def __post_init__(self):
        for name in ("size", "batch_size", "shard_size", "max_tokens", "frames", "frame_step"):
            least = 0 if name == "frames" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, must be 'float32' or 'float16'")


def load_vae(path: str):
    """The AutoencoderKL, in evaluation mode; ValueError if there is none."""
    from diffusers import AutoencoderKL

    folder = os.path.join(path, "vae") if os.path.isdir(os.path.join(path, "vae")) else path
    try:
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"vae {path} is not an AutoencoderKL that diffusers can load: {error}") from error


def write_latents(
    settings: LatentSettings, target: Path, rank: int = 0, world: int = 1, device: str = "cpu", workers: int = 0
) -> list[Path]:
    """Writes latents-*.safetensors into `target` and returns the shards of this rank: every `world`-th.

    A shard holds `latents` [n, C, h, w] or `clips` [n, C, F, h, w], scaled as diffusion models take them: (z - shift -
    mean) * scaling / std of the autoencoder's configuration; and `labels` [n] int64, or with a text encoder `caption`
    [n, L, D], `caption_mask` [n, L] bool, and `null_caption`, the empty text. Whole shards of an earlier call are kept,
    so that a call that was broken off goes on; one that was made with other settings is a ValueError.
    """
    data = _source(settings)
    count = len(data) * (1 + settings.flip)
    shards = -(-count // settings.shard_size)
    made_of = {**vars(settings), "samples": count, "classes": data.classes}
    if data.captioned:
        made_of["texts"] = hashlib.sha256(json.dumps(data.texts).encode()).hexdigest()[:16]
    metadata = json.dumps(made_of, sort_keys=True)
    target.mkdir(parents=True, exist_ok=True)
    mine = [(i, target / f"latents-{i:05d}-of-{shards:05d}.safetensors") for i in range(rank, shards, world)]
    _check_others(target, metadata)
    missing = [(i, path) for i, path in mine if not _is_whole(path)]
    if missing:
        vae = load_vae(settings.vae).to(device)
        encoder = TextEncoder(Path(settings.text_encoder), torch.device(device)) if data.captioned else None
        for i, path in tqdm(missing, unit="shard", disable=None):
            rows = range(i * settings.shard_size, min(count, (i + 1) * settings.shard_size))
            tensors = _encode(data, rows, settings, vae, device, workers)
            if encoder is not None:
                tensors |= _encode_texts(data, rows, settings, encoder)
            _write_shard(path, tensors, metadata)
    return [path for _, path in mine]


def _source(settings: LatentSettings) -> ImageFolder | ClipFolder:
    captioned = settings.text_encoder is not None
    if not settings.frames:
        return ImageFolder(settings.images, 3, settings.size, "images", captioned)
    return ClipFolder(settings.images, 3, settings.frames, settings.size, settings.frame_step, "images", captioned)


def _check_others(target: Path, metadata: str) -> None:
    for path in sorted(target.glob("latents-*.safetensors")):
        if not _is_whole(path):
            continue
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_METADATA_KEY)
        if found != metadata:
            old, new = json.loads(found or "{}"), json.loads(metadata)
            keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and key != "classes"]
            changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys) or "classes"
            raise ValueError(f"{path} was made otherwise ({changes}); take another folder")


def _is_whole(path: Path) -> bool:
    """Shards are renamed into place; one that something else has cut is written again."""
    try:
        with safetensors.safe_open(path, "pt"):
            return True
    except (OSError, safetensors.SafetensorError):
        return False


@torch.no_grad()
def _encode(data, rows: range, settings: LatentSettings, vae, device, workers) -> dict[str, Tensor]:
    """Rows of the whole: images or clips, then the same mirrored."""
    shift, scaling = _normalisation(vae.config, device)
    batches = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    indices = [[row % len(data) for row in batch] for batch in batches]
    loader = DataLoader(data, batch_sampler=indices, collate_fn=as_it_is, num_workers=workers)
    latents, labels = [], []
    for batch, (samples, conditions) in zip(batches, loader):
        mirrored = torch.tensor([row >= len(data) for row in batch])
        samples = torch.where(mirrored.view(-1, *[1] * (samples.dim() - 1)), samples.flip(-1), samples)
        frames = samples.transpose(1, 2).flatten(0, 1) if settings.frames else samples
        posterior = vae.encode(frames.to(device)).latent_dist
        z = posterior.mean
        if not settings.mean:
            seeds = [derive_seed(settings.seed, row) for row in batch]
            shape = z.unflatten(0, (len(batch), -1)).shape[1:] if settings.frames else z.shape[1:]
            z = z + posterior.std * normal_noise(seeds, 0, tuple(shape)).view(z.shape).to(device)
        latent = ((z - shift) * scaling).cpu().to(getattr(torch, settings.dtype))
        latents.append(latent.unflatten(0, (len(batch), -1)).transpose(1, 2) if settings.frames else latent)
        labels += [] if data.captioned else [conditions["y"]]
    name = "clips" if settings.frames else "latents"
    tensors = {name: torch.cat(latents).contiguous()}  # convolutions may answer channels last
    return tensors if data.captioned else tensors | {"labels": torch.cat(labels)}


def _encode_texts(data, rows: range, settings: LatentSettings, encoder: TextEncoder) -> dict[str, Tensor]:
    """caption [n, L, D] with zeros behind the shorter ones, caption_mask [n, L], null_caption [L0, D]."""
    captions: list[Tensor] = []
    cut: list[str] = []
    for first in range(0, len(rows), settings.batch_size):
        batch = [row % len(data) for row in rows[first : first + settings.batch_size]]
        names = [data.name(index) for index in batch]
        states, masks = encoder(
            [data.texts[index] for index in batch],
            settings.max_tokens,
            lambda number, message, names=names: cut.append(f"the text of {names[number]} {message}"),
        )
        captions += [state[mask].cpu() for state, mask in zip(states, masks)]
    if cut:
        others = f" (and {len(cut) - 1} others in this shard)" if len(cut) > 1 else ""
        warnings.warn(f"{cut[0]}{others}", stacklevel=2)
    states, masks = encoder([""], settings.max_tokens, lambda *_: None)
    counts = torch.tensor([len(caption) for caption in captions])
    dtype = getattr(torch, settings.dtype)
    padded = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    return {
        "caption": padded.to(dtype),
        "caption_mask": torch.arange(padded.shape[1]) < counts[:, None],
        "null_caption": states[0, masks[0]].cpu().to(dtype),
    }


def _normalisation(config, device) -> tuple[Tensor, Tensor]:
    """What is taken from latents, and by what they are multiplied then; broadcast to [n, C, h, w]."""
    shift = torch.tensor(getattr(config, "shift_factor", None) or 0.0, device=device)
    scaling = torch.tensor(config.scaling_factor, device=device)
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        shift, scaling = shift + mean, scaling / std
    return shift, scaling


def _write_shard(path: Path, tensors: dict[str, Tensor], metadata: str) -> None:
    with all_or_nothing(path.parent) as folder:
        staged = folder / path.name
        try:
            safetensors.torch.save_file(tensors, staged, {_METADATA_KEY: metadata})
        except safetensors.SafetensorError as error:  # what safetensors makes of an OSError
            raise OSError(f"cannot write {path}: {error}") from error
        os.chmod(staged, 0o644)
        fsync(staged)
