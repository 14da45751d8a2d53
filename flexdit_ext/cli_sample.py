"""`flexdit sample`: images, or latents, from a checkpoint's folder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ._core import CUDA_ARCHITECTURES
from ._files import arrange, to_pixels, writable_folder, write_png, write_whole
from .diffusion.samplers import SAMPLERS
from .model import FlexDiT
from .sampler import Sampler
from .sampling import progress_bar

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_PIXEL_CHANNELS = (1, 3)

DESCRIPTION = """\
Draws images of the labels with a FlexDiT from save_pretrained's folder, in C++ from the first step to the last
(flexdit_ext.Sampler). Writes 00000_LABEL.png, 00001_LABEL.png, ... and grid.png into --out; each file appears whole or
not at all. Latents go through the autoencoder of --vae; a model of 1 or 3 channels without --vae draws pixels."""
EPILOG = """\
exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted
example: flexdit sample --checkpoint xl2 --vae sd-vae-ft-ema --labels 207,360 --cfg-scale 4 --out images"""


def labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, must be integers with commas between them") from None


def steps(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, must be an integer of at least 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}, must be HEIGHTxWIDTH, or one number for both")
    return int(match[1]), int(match[2] or match[1])


def device(text: str) -> torch.device:
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
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
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", required=True, metavar="DIR", help="save_pretrained's folder or weights file")
    files.add_argument("--out", required=True, metavar="DIR", help="folder for the images, made where it is missing")
    files.add_argument("--vae", metavar="DIR", help="folder of a diffusers AutoencoderKL, or of a pipeline with vae/")
    files.add_argument(
        "--latents",
        choices=["safetensors", "npy"],
        help="write latents.FORMAT, and images only where they are possible",
    )
    files.add_argument("--grid-columns", type=count, metavar="N", help="images in a row of grid.png")

    images = parser.add_argument_group("images")
    images.add_argument("--labels", required=True, type=labels, metavar="A,B,...", help="class labels")
    images.add_argument("--images-per-label", type=count, default=1, metavar="N", help="default %(default)s")
    images.add_argument("--seed", type=int, default=0, help="of the whole run, default %(default)s")
    images.add_argument(
        "--size", type=size, metavar="HxW", help="of what the model denoises (of latents with --vae), default its own"
    )

    solver = parser.add_argument_group("sampling")
    solver.add_argument(
        "--sampler", choices=SAMPLERS, default="ddim", help="default %(default)s; flow models: flow, heun"
    )
    solver.add_argument("--steps", type=steps, default=50, help='default %(default)s; ddim, ddpm also, say, "ddim50"')
    solver.add_argument("--eta", type=float, default=0.0, help="DDIM's, 0 to 1, default %(default)s")
    solver.add_argument(
        "--cfg-scale", type=float, default=1.0, metavar="SCALE", help="guidance; 1, the default, is none"
    )
    solver.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="timesteps that are guided, default all",
    )
    solver.add_argument(
        "--guidance-channels", metavar="N", help="first channels that are guided, or all; default 3 or what there is"
    )
    solver.add_argument("--clip-x0", action="store_true", help="clamp the predicted image to [-1, 1] in every step")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=device, help="cpu or cuda[:INDEX], default a GPU where one can be used")
    machine.add_argument("--dtype", choices=DTYPES, help="to compute with, default the checkpoint's")
    machine.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="images at once, default %(default)s"
    )
    machine.add_argument("--quiet", action="store_true", help="no progress bars, no list of files")


def run(arguments: argparse.Namespace) -> int:
    model = FlexDiT.from_pretrained(arguments.checkpoint, device=arguments.device or default_device())
    config = model.config
    last = config.num_classes - (0 if config.class_dropout_prob > 0 else 1)
    for label in arguments.labels:
        if not 0 <= label <= last:
            raise ValueError(f"--labels: {label} is not a label of this model, must be from 0 to {last}")
    decode = _decoder(arguments, model)
    folder = writable_folder(arguments.out)
    sampler = Sampler(model, DTYPES.get(arguments.dtype))
    del model
    wanted = [label for label in arguments.labels for _ in range(arguments.images_per_label)]
    latents = sampler.sample(
        wanted,
        arguments.steps,
        arguments.sampler,
        arguments.cfg_scale,
        arguments.seed,
        eta=arguments.eta,
        size=arguments.size,
        guidance_interval=arguments.guidance_interval,
        guidance_channels=_guidance_channels(arguments.guidance_channels),
        clip_x0=arguments.clip_x0,
        batch_size=min(arguments.batch_size, len(wanted)),
        progress=not arguments.quiet,
    )
    written = []
    if arguments.latents:
        written.append(_write_latents(folder / f"latents.{arguments.latents}", latents, wanted))
    if decode:
        written += _write_images(folder, latents, wanted, decode, arguments)
    if not arguments.quiet:
        print(*written, sep="\n")
    return 0


def _guidance_channels(text: str | None) -> int | str | None:
    if text in (None, "all"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--guidance-channels: {text!r}, must be an integer or all") from None


def _decoder(arguments: argparse.Namespace, model: FlexDiT):
    """What makes images [n, 1 or 3, H, W] in [-1, 1] of latents, or None where only latents are wanted."""
    channels = model.config.in_channels
    if arguments.vae:
        decode = _vae(Path(arguments.vae), channels, model.pos_embed.device)
    elif channels in _PIXEL_CHANNELS:
        decode = torch.nn.Identity()
    elif arguments.latents:
        return None
    else:
        raise ValueError(
            f"{arguments.checkpoint} is a model of latents with {channels} channels: give its autoencoder with --vae, "
            "or have the latents with --latents safetensors"
        )
    _require("PIL", "pillow", "writing PNG files")
    return decode


def _require(module: str, package: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{purpose} needs {package}: pip install {package}, or flexdit_ext[cli]")


def _vae(folder: Path, channels: int, device: torch.device):
    _require("diffusers", "diffusers", "--vae")
    if not folder.is_dir():
        raise FileNotFoundError(f"--vae: {folder} is not a folder")
    if not (folder / "config.json").exists() and (folder / "vae").is_dir():
        folder = folder / "vae"
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).to(device).eval()
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"--vae: {folder} has latents of {vae.config.latent_channels} channels, the model has {channels}: "
            "they must agree"
        )
    if vae.config.out_channels not in _PIXEL_CHANNELS:
        raise ValueError(f"--vae: {folder} gives images of {vae.config.out_channels} channels, must be 1 or 3")

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample

    return decode


def _write_latents(path: Path, latents: Tensor, wanted: list[int]) -> Path:
    latents = latents.cpu().contiguous()
    if path.suffix == ".npy":  # numpy has no bfloat16
        array = latents.to(torch.promote_types(latents.dtype, torch.float32)).numpy()
        write_whole(path, lambda file: np.save(file, array, allow_pickle=False))
    else:
        data = safetensors.torch.save({"latents": latents, "labels": torch.tensor(wanted)})
        write_whole(path, lambda file: file.write(data))
    return path


@torch.no_grad()
def _write_images(folder: Path, latents: Tensor, wanted: list[int], decode, arguments) -> list[Path]:
    paths, everything = [], []
    chunks = math.ceil(len(wanted) / arguments.batch_size)
    with progress_bar(not arguments.quiet, len(wanted), "writing", "image") as tick:
        for part in latents.chunk(chunks):
            for pixels in to_pixels(decode(part)):
                index = len(paths)
                paths.append(folder / f"{index:05d}_{wanted[index]}.png")
                write_png(paths[-1], pixels, {"flexdit": _provenance(arguments, wanted[index], index)})
                everything.append(pixels)
                tick()
    columns = arguments.grid_columns
    if columns is None:
        several = arguments.images_per_label > 1
        columns = arguments.images_per_label if several else math.ceil(math.sqrt(len(wanted)))
    paths.append(folder / "grid.png")
    write_png(paths[-1], arrange(np.stack(everything), columns), {})
    return paths


def _provenance(arguments: argparse.Namespace, label: int, index: int) -> str:
    """What it takes to draw this image again, kept in the file."""
    names = (
        "seed",
        "sampler",
        "steps",
        "eta",
        "cfg_scale",
        "guidance_interval",
        "guidance_channels",
        "size",
        "clip_x0",
    )
    return json.dumps({"label": label, "index": index} | {name: getattr(arguments, name) for name in names})
