"""`flexdit latents`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from .cli_train import needing


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "latents",
        help="encode a folder of images or clips for training",
        description="Encodes images or clips (a folder for each class; with --text-encoder NAME.txt beside NAME.png) "
        "with an AutoencoderKL into safetensors shards. Call it again to go on; several processes: "
        "torchrun --nproc-per-node 8 -m flexdit_ext latents ...",
    )
    parser.add_argument("images", help="a folder with a folder for each class, or with texts beside the images")
    parser.add_argument(
        "target",
        help="the folder of the shards: data.path of a configuration with data.kind latents, clips or captions",
    )
    parser.add_argument("--vae", required=True, help="a folder or Hub id of diffusers' AutoencoderKL, or of a pipeline")
    parser.add_argument(
        "--text-encoder",
        help="a folder of a T5 with its tokenizer, or of a pipeline: NAME.txt is beside NAME.png",
    )
    parser.add_argument("--max-tokens", type=int, default=120, help="of a caption, longer ones are cut (120)")
    parser.add_argument(
        "--frames", type=int, default=0, help="encode clips of so many frames: animated GIF, WebP, folders of pictures"
    )
    parser.add_argument("--frame-step", type=int, default=1, help="of so many frames one is taken (1)")
    parser.add_argument("--size", type=int, default=256, help="of the square images, in pixels (256)")
    parser.add_argument("--flip", action="store_true", help="mirrored images, too")
    parser.add_argument("--mean", action="store_true", help="the posterior's mean in place of a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior's samples")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=4096, help="samples in a file (4096)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="by default this process's GPU where there is one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    target = Path(arguments.target)
    with needing("train,diffusers,text"):
        from .training.latents import LatentSettings, write_latents

        names = [field.name for field in dataclasses.fields(LatentSettings)]
        settings = LatentSettings(**{name: getattr(arguments, name) for name in names})
        paths = write_latents(settings, target, rank, world, arguments.device or gpu, arguments.workers)
    print(f"written: {len(paths)} shards in {target}")
    return 0
