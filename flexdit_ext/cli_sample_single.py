"""`flexdit sample` for FlexPixArt and FlexLatte: images and clips of prompts, captions or labels."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_dtype, check_grid
from ._clips import check_clip
from ._conditions import check_size, dense_grid
from ._files import all_or_nothing, check_finite
from ._text import Captions, check_text_encoder, encode, read_captions, read_prompts
from ._vae import PIXEL_CHANNELS, pixels_per_latent
from .cli_sample import (
    DTYPES,
    SETTINGS,
    check_labels,
    decoder,
    default_device,
    print_written,
    require,
    sampling_options,
    write_latents,
    write_pictures,
)
from .config_single import FlexLatteConfig
from .sampler import Sampler
from .single_model import FlexLatte, SingleFlexDiT

_PIXELS_PER_LATENT = 8  # of the autoencoders that diffusers' PixArt comes with


@dataclass
class _Wanted:
    """N images or clips: what Sampler.sample takes, and of each a word for the file's name and what it shows."""

    conditions: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None
    endings: list[str]
    shown: list[dict]


def run(arguments: argparse.Namespace, kind: type[SingleFlexDiT], config) -> int:
    _check_arguments(arguments, kind, config)
    device = arguments.device or default_device()
    decode = decoder(arguments, config, device)
    if arguments.dtype is not None:
        check_dtype(DTYPES[arguments.dtype], device)
    wanted = _wanted(arguments, config, device)
    sampler = Sampler(kind.from_pretrained(arguments.checkpoint, DTYPES.get(arguments.dtype), device))
    with all_or_nothing(arguments.out) as folder:
        latents = _sample(sampler, wanted, arguments)
        del sampler  # the decoder has the memory
        check_finite(latents, arguments.start_index, "image" if kind is not FlexLatte else "clip")
        if arguments.latents or decode is None:
            others = {"labels": wanted.conditions["y"]} if config.num_classes else {}
            write_latents(folder, latents, arguments.latents or "safetensors", **others)
        if decode is not None:
            settings = (*SETTINGS, "negative_prompt", *(("frames", "fps") if kind is FlexLatte else ()))
            write_pictures(folder, latents, wanted.endings, wanted.shown, settings, decode, arguments)
        written = sorted(path.name for path in folder.iterdir())
    print_written(written, arguments)
    return 0


def _sample(sampler: Sampler, wanted: _Wanted, arguments: argparse.Namespace) -> Tensor:
    """Latents [N, C, H, W] or [N, C, F, H, W]."""
    null = {f"null_{name}": value for name, value in (wanted.unconditional or {}).items() if name != "y"}
    return sampler.sample(
        **wanted.conditions,
        **null,  # the null class needs no naming
        **sampling_options(arguments),
        size=arguments.size,
        frames=arguments.frames,
        batch_size=min(arguments.batch_size, len(wanted.endings)),
        start_index=arguments.start_index,
        progress=not arguments.quiet,
    )


# ---- what may be asked for ------------------------------------------------------------------------------------------


def _check_arguments(arguments: argparse.Namespace, kind: type[SingleFlexDiT], config) -> None:
    """What fails, fails before anything is loaded. Fills in what depends on the model."""
    texts = arguments.prompt or arguments.prompts or arguments.captions
    model = f"the {kind.__name__} in {arguments.checkpoint}"
    if not config.num_classes and not config.caption_channels:
        raise ValueError(f"{model} has neither classes nor captions, nothing to draw it by")
    if arguments.labels is not None and not config.num_classes:
        raise ValueError(
            f"--labels is for models with classes, {model} reads captions: --prompt, --prompts, --captions"
        )
    if texts and not config.caption_channels:
        raise ValueError(f"--prompt, --prompts and --captions are for models of text, {model} has --labels")
    if arguments.labels is None and config.num_classes:
        raise ValueError(f"{model} has classes, required: --labels")
    if not texts and config.caption_channels:
        raise ValueError(f"{model} reads captions, one of these is required: --prompt, --prompts, --captions")
    from_words = bool(arguments.prompt or arguments.prompts)
    if from_words and not arguments.text_encoder:
        raise ValueError("--prompt needs --text-encoder, a folder of T5; --captions takes what another encoder made")
    for name in ("text_encoder", "negative_prompt"):
        if getattr(arguments, name) is not None and not from_words:
            raise ValueError(f"--{name.replace('_', '-')} is for --prompt and --prompts")
    if arguments.negative_prompt is not None and arguments.cfg_scale == 1:
        raise ValueError("--negative-prompt does nothing with --cfg-scale 1, must be with another")
    if arguments.size is not None:
        check_size(arguments.size, config)
    _check_clips(arguments, kind, config)
    if arguments.grid is not None:
        dense = dense_grid(config, arguments.size, arguments.frames or 0)
        config.check_sparse_grid("grid", check_grid("grid", arguments.grid), dense)


def _check_clips(arguments: argparse.Namespace, kind: type[SingleFlexDiT], config) -> None:
    grid = arguments.grid
    if kind is not FlexLatte:
        for name in ("frames", "fps", "format"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for clips, {arguments.checkpoint} is a {kind.__name__}")
        if grid is not None and len(grid) != 2:
            raise ValueError(f"--grid is {'x'.join(map(str, grid))}, must be HEIGHTxWIDTH for images")
        return
    if arguments.frames is not None and arguments.frames > config.num_frames:
        raise ValueError(f"--frames is {arguments.frames}, must be from 1 to the model's {config.num_frames}")
    if grid is not None and len(grid) != 3:
        raise ValueError(f"--grid is {'x'.join(map(str, grid))}, must be FRAMESxHEIGHTxWIDTH for clips")
    arguments.format, arguments.fps = arguments.format or "gif", arguments.fps or 8
    check_clip(arguments.format, arguments.fps)


# ---- conditions -----------------------------------------------------------------------------------------------------


def _wanted(arguments: argparse.Namespace, config, device: torch.device) -> _Wanted:
    """Every label, prompt or caption images_per_label times."""
    guided = arguments.cfg_scale != 1
    conditions: dict[str, Tensor] = {}
    null: dict[str, Tensor] = {}
    endings, shown = [""], [{}]
    if config.caption_channels:
        prompts = _prompts(arguments)
        captions = _captions(arguments, prompts, config, device, guided)
        count = len(captions.caption)
        endings, shown = (
            [""] * count,
            [{"caption": i} if prompts is None else {"prompt": prompts[i]} for i in range(count)],
        )
        conditions, null = _packed(captions, arguments, guided)
    if config.num_classes:
        labels = check_labels(arguments.labels, config)
        if config.caption_channels and len(labels) != len(endings):
            raise ValueError(f"--labels are {len(labels)}, the captions {len(endings)}: one label for each is required")
        if guided and not config.class_dropout_prob:
            raise ValueError(f"--cfg-scale is {arguments.cfg_scale}, must be 1: the model has no null class")
        shown = [{"label": label} | (shown[i] if config.caption_channels else {}) for i, label in enumerate(labels)]
        endings = [f"_{label}" for label in labels]
        conditions["y"], null["y"] = torch.tensor(labels), torch.tensor([config.num_classes])
    if config.size_conditions:
        conditions |= _sizes(arguments, config, len(endings))
    index = torch.arange(len(endings)).repeat_interleave(arguments.images_per_label)
    if any(len(value) > 1 for value in null.values()):  # as many of each
        null = {name: value.expand(len(endings), *value.shape[1:])[index] for name, value in null.items()}
    return _Wanted(
        {name: value[index] for name, value in conditions.items()},
        null if guided else None,
        [endings[i] for i in index],
        [shown[i] for i in index],
    )


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    return read_prompts(Path(arguments.prompts)) if arguments.prompts else arguments.prompt


def _captions(
    arguments: argparse.Namespace, prompts: list[str] | None, config, device: torch.device, guided: bool
) -> Captions:
    channels, length = config.caption_channels, config.max_caption_tokens
    if prompts is None:
        return read_captions(Path(arguments.captions), channels, length)
    folder = Path(arguments.text_encoder)
    require("transformers", "transformers", "--prompt")
    check_text_encoder(folder, channels)

    def warn(number: int, message: str) -> None:
        if not arguments.quiet:
            name = f"prompt {number}" if number < len(prompts) else "the negative prompt"
            print(f"flexdit sample: warning: {name} {message}", file=sys.stderr)

    count, texts = len(prompts), [*prompts, *([arguments.negative_prompt or ""] if guided else [])]
    states, mask = (each.cpu() for each in encode(folder, texts, length, device, warn))
    if not guided:
        return Captions(states, mask)
    null_mask = mask[count:]
    if isinstance(config, FlexLatteConfig):  # LattePipeline, with one prompt, gives the empty text the prompt's length
        null_mask = mask[:count]
    return Captions(states[:count], mask[:count], states[count:].expand(len(null_mask), -1, -1), null_mask)


def _packed(captions: Captions, arguments: argparse.Namespace, guided: bool) -> tuple[dict, dict]:
    """Conditions, and those without text, of one length, which is no longer than it must be."""
    if not guided:
        return _cut(captions.caption, captions.mask, _length(captions.mask)), {}
    if captions.null is None:
        raise ValueError(
            f"--cfg-scale is {arguments.cfg_scale}, guidance needs a tensor null_caption in {arguments.captions}"
        )
    length = max(_length(captions.mask), _length(captions.null_mask))
    return _cut(captions.caption, captions.mask, length), _cut(captions.null, captions.null_mask, length)


def _length(mask: Tensor) -> int:
    return int(mask.any(0).nonzero().max()) + 1


def _cut(caption: Tensor, mask: Tensor, length: int) -> dict[str, Tensor]:
    more = max(0, length - caption.shape[1])
    return {
        "caption": F.pad(caption, (0, 0, 0, more))[:, :length],
        "caption_mask": F.pad(mask, (0, more))[:, :length],
    }


def _sizes(arguments: argparse.Namespace, config, count: int) -> dict[str, Tensor]:
    """Height, width and their ratio in pixels, as PixArtAlphaPipeline gives them."""
    factor = 1 if config.in_channels in PIXEL_CHANNELS else _PIXELS_PER_LATENT
    if arguments.vae:
        factor = pixels_per_latent(Path(arguments.vae))
    height, width = (side * factor for side in arguments.size or (config.input_size,) * 2)
    return {
        "resolution": torch.tensor([[float(height), float(width)]]).repeat(count, 1),
        "aspect_ratio": torch.full((count,), height / width),
    }
