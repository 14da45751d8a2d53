"""`flexdit sample`: images, clips or latents from a checkpoint's folder. cli_sample_single goes on where it is of text
or of clips."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ._checkpoint_single import class_and_config
from ._clips import FORMATS, write_clip
from ._core import CUDA_ARCHITECTURES
from ._files import all_or_nothing, arrange, check_finite, png, to_pixels, write_file
from ._requests import last_label
from ._vae import PIXEL_CHANNELS, load_decoder
from .diffusion.samplers import SAMPLERS
from .model import FlexDiT
from .sampler import Sampler
from .sampling import progress_bar

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
GRID_IMAGES = 256  # in grid.png
_DECODED = 4  # frames at once: a decoder needs much more memory than the model
SETTINGS = (
    *("seed", "sampler", "steps", "eta", "cfg_scale", "guidance_interval", "guidance_channels", "size", "grid"),
    *("clip_x0", "dtype"),
)

DESCRIPTION = f"""\
Draws images of labels with a FlexDiT, images of prompts with a FlexPixArt, clips of labels or prompts with a FlexLatte,
from save_pretrained's folder, in C++ from the first step to the last (flexdit_ext.Sampler). Writes 00000_LABEL.png,
00001_LABEL.png, ... (of prompts 00000.png, clips as .gif, .webp or .mp4) and grid.png (of the first {GRID_IMAGES}
images or first frames) into --out, all of them or none. Latents go through the autoencoder of --vae; without it a model
of 1 or 3 channels draws pixels, and any other's latents are written as they are.

Prompts are read as diffusers' pipelines read them: in lower case, by a T5 encoder; what is longer than the model's
captions is cut off, and a warning says so. Nothing is fetched from a network for them."""
EPILOG = """\
exit codes: 0 done, 2 it could not be done and nothing was written, 130 interrupted
examples: flexdit sample --checkpoint xl2 --vae sd-vae-ft-ema --labels 207,360 --cfg-scale 4 --out images
          flexdit sample --checkpoint pixart --text-encoder pipeline --vae pipeline --prompt 'a red cat' --out images"""


def labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, must be integers with commas between them") from None


def steps(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, must be an integer from 1 to 999999999")
    return int(text)


def sides(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, must be HEIGHTxWIDTH, or one number for both")
    return int(match[1]), int(match[2] or match[1])


def grid(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text)
    return tuple(map(int, match.groups())) if match else sides(text)


def channels(text: str) -> int | str:
    if text != "all" and not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, must be an integer or all")
    return text if text == "all" else int(text)


def device(text: str) -> torch.device:
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, must be cpu, cuda or cuda:INDEX")
    if text != "cpu":
        if not CUDA_ARCHITECTURES:
            raise argparse.ArgumentTypeError(f"{text!r}, but this build has no CUDA backend: see `flexdit info`")
        visible = torch.cuda.device_count()
        if int(match[1] or 0) >= visible:
            raise argparse.ArgumentTypeError(f"{text!r}, but torch sees {visible} GPUs")
    return torch.device(text)


def default_device() -> torch.device:
    return torch.device("cuda" if CUDA_ARCHITECTURES and torch.cuda.is_available() else "cpu")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw images from a checkpoint",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument_group("files").add_argument
    add("--checkpoint", required=True, metavar="DIR", help="save_pretrained's folder or weights file")
    add("--out", required=True, metavar="DIR", help="folder for the images, made where it is missing")
    add("--vae", metavar="DIR", help="folder of a diffusers AutoencoderKL, or of a pipeline with vae/")
    add("--latents", choices=["safetensors", "npy"], help="write latents.FORMAT, too; the default without images")
    add("--columns", type=count, metavar="N", help="images in a row of grid.png")

    add = parser.add_argument_group("images").add_argument
    add("--labels", type=labels, metavar="A,B,...", help="class labels")
    add(
        *("--images-per-label", "--images-per-prompt"),
        dest="images_per_label",
        type=count,
        default=1,
        metavar="N",
        help="also for each caption, and clips; default %(default)s",
    )
    add("--seed", type=int, default=0, help="of the whole run, default %(default)s")
    add("--start-index", type=int, default=0, metavar="N", help="of the first image, to go on with a run's images")
    add(
        "--size", type=sides, metavar="HxW", help="of the latent, or of the pixels where there is none; default its own"
    )

    _add_text(parser)
    add = parser.add_argument_group("clips").add_argument
    add("--frames", type=count, metavar="N", help="default and at most the model's")
    add("--fps", type=count, metavar="N", help="frames a second, default 8")
    add("--format", choices=FORMATS, help="default gif; mp4 needs imageio-ffmpeg")

    add_sampling(parser)
    add_machine(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    texts = group.add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="several times for several")
    texts.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    texts.add_argument(
        "--captions",
        metavar="FILE",
        help="of another encoder, as safetensors: caption [N, L, C], and if there are any caption_mask [N, L], "
        "null_caption [L, C] for guidance, null_caption_mask",
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="guidance leads away from it, default the empty text")
    group.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="folder of transformers' T5 encoder and its tokenizer, or of a pipeline with text_encoder/ and tokenizer/",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What sampling_options reads, but for the seed."""
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=SAMPLERS, default="ddim", help="default %(default)s; flow models: flow, heun")
    add("--steps", type=steps, default=50, help='1 to 1000, default %(default)s; ddim, ddpm also, say, "ddim50"')
    add("--eta", type=float, default=0.0, help="DDIM's, 0 to 1, default %(default)s")
    add("--cfg-scale", type=float, default=1.0, metavar="SCALE", help="guidance; 1, the default, is none")
    add("--guidance-interval", type=float, nargs=2, metavar=("FIRST", "LAST"), help="timesteps guided, default all")
    add(
        "--guidance-channels",
        type=channels,
        metavar="N",
        help="the first N are guided, or all; default at most 3, for text and clips all",
    )
    add("--grid", type=grid, metavar="HxW", help="sparse grid of every step, instead of the schedule; clips: FxHxW")
    add("--clip-x0", action="store_true", help="clamp the predicted image to [-1, 1] in every step")


def sampling_options(arguments: argparse.Namespace) -> dict:
    """Keyword arguments of Sampler.sample."""
    names = (
        "steps",
        "sampler",
        "cfg_scale",
        "seed",
        "eta",
        "grid",
        "guidance_interval",
        "guidance_channels",
        "clip_x0",
    )
    return {name: getattr(arguments, name) for name in names}


def add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=device, help="cpu or cuda[:INDEX], default a GPU where one can be used")
    add("--dtype", choices=DTYPES, help="to compute with, default the checkpoint's")
    add("--batch-size", type=count, default=16, metavar="N", help="images at once, default %(default)s")
    add("--quiet", action="store_true", help="print nothing but errors")


_FOR_SINGLE = ("prompt", "prompts", "captions", "negative_prompt", "text_encoder", "frames", "fps", "format")


def run(arguments: argparse.Namespace) -> int:
    if not (arguments.labels or arguments.prompt or arguments.prompts or arguments.captions):
        raise ValueError("one of these is required: --labels, --prompt, --prompts, --captions")
    kind, config = class_and_config(arguments.checkpoint)
    if kind is FlexDiT:
        return _run(arguments)
    from . import cli_sample_single  # which takes from here what the two share

    return cli_sample_single.run(arguments, kind, config)


def _run(arguments: argparse.Namespace) -> int:
    """Of a FlexDiT."""
    for name in _FOR_SINGLE:
        if getattr(arguments, name) is not None:
            wanted = "models of clips" if name in ("frames", "fps", "format") else "models of text"
            raise ValueError(f"--{name.replace('_', '-')} is for {wanted}, {arguments.checkpoint} is a FlexDiT")
    model = FlexDiT.from_pretrained(arguments.checkpoint, device=arguments.device or default_device())
    chosen = check_labels(arguments.labels, model.config)
    decode = decoder(arguments, model.config, model.pos_embed.device)
    sampler = Sampler(model, DTYPES.get(arguments.dtype))
    del model  # the sampler has its own copy
    wanted = [label for label in chosen for _ in range(arguments.images_per_label)]
    with all_or_nothing(arguments.out) as folder:
        latents = _sample(sampler, wanted, arguments)
        if arguments.latents or decode is None:
            write_latents(folder, latents, arguments.latents or "safetensors", labels=torch.tensor(wanted))
        if decode is not None:
            endings, shown = [f"_{label}" for label in wanted], [{"label": label} for label in wanted]
            write_pictures(folder, latents, endings, shown, SETTINGS, decode, arguments)
        written = sorted(path.name for path in folder.iterdir())
    print_written(written, arguments)
    return 0


def check_labels(labels: list[int], config) -> list[int]:
    last = last_label(config)
    if bad := [label for label in labels if not 0 <= label <= last]:
        raise ValueError(f"--labels: {bad[0]}, must be from 0 to {last}")
    return labels


def print_written(names: list[str], arguments: argparse.Namespace) -> None:
    if not arguments.quiet:
        shown = names if len(names) <= 6 else [*names[:2], "...", *names[-3:]]
        print(f"written to {arguments.out}: {' '.join(shown)}")


def _sample(sampler: Sampler, wanted: list[int], arguments: argparse.Namespace) -> Tensor:
    latents = sampler.sample(
        wanted,
        **sampling_options(arguments),
        size=arguments.size,
        batch_size=min(arguments.batch_size, len(wanted)),
        start_index=arguments.start_index,
        progress=not arguments.quiet,
    )
    check_finite(latents, arguments.start_index)
    return latents


def decoder(arguments: argparse.Namespace, config, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """What makes images [n, 1 or 3, H, W] in [-1, 1] of latents, or None where they stay latents."""
    if not arguments.vae and config.in_channels not in PIXEL_CHANNELS:
        return None
    require("PIL", "pillow", "writing images")
    if arguments.format == "mp4":
        require("imageio", "imageio", "--format mp4")
        require("imageio_ffmpeg", "imageio-ffmpeg", "--format mp4")
    if not arguments.vae:
        return torch.nn.Identity()
    require("diffusers", "diffusers", "--vae")
    return load_decoder(Path(arguments.vae), config.in_channels, device)


def require(module: str, package: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{purpose} needs {package}: pip install {package}, or flexdit_ext[cli]")


def write_latents(folder: Path, latents: Tensor, form: str, **others: Tensor) -> None:
    """others: what goes beside them into a safetensors file."""
    latents, file = latents.cpu().contiguous(), io.BytesIO()
    if form == "npy":  # numpy has no bfloat16
        np.save(file, latents.to(torch.promote_types(latents.dtype, torch.float32)).numpy(), allow_pickle=False)
    else:
        file.write(safetensors.torch.save({"latents": latents} | others))
    write_file(folder / f"latents.{form}", file.getvalue())


@torch.no_grad()
def write_pictures(
    folder: Path,
    latents: Tensor,
    endings: Sequence[str],
    shown: Sequence[dict],
    settings: Sequence[str],
    decode: Callable[[Tensor], Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Images of latents [N, C, H, W] or clips of [N, C, F, H, W], and grid.png of the images or of the first frames.

    endings: of each file's name; shown: what each is of; settings: the arguments that go into the files besides.
    """
    clips, first = latents.dim() == 5, []
    what = "clip" if clips else "image"
    given = {name: getattr(arguments, name) for name in settings}
    with progress_bar(not arguments.quiet, len(latents), "writing", what) as tick:
        for i, latent in enumerate(latents):
            index = arguments.start_index + i
            frames = latent.transpose(0, 1) if clips else latent[None]
            images = torch.cat([decode(some) for some in frames.split(_DECODED)])
            check_finite(images[None], index, what)
            pixels = to_pixels(images)
            name, text = f"{index:05d}{endings[i]}", json.dumps(shown[i] | {"index": index} | given)
            if clips:
                write_clip(folder / f"{name}.{arguments.format}", pixels, arguments.fps, text)
            else:
                write_file(folder / f"{name}.png", png(pixels[0], {"flexdit": text}))
            if len(first) < GRID_IMAGES:
                first.append(pixels[0])
            tick()
    several = arguments.images_per_label if arguments.images_per_label > 1 else math.ceil(math.sqrt(len(first)))
    write_file(folder / "grid.png", png(arrange(first, arguments.columns or several)))
