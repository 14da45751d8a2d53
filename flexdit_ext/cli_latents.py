"""`flexdit latents`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from .cli_train import needing


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "latents",
        help="encode a folder of images for training",
        description="Encodes images (a folder for each class) with an AutoencoderKL into safetensors shards. Call it "
        "again to go on; several processes: torchrun --nproc-per-node 8 -m flexdit_ext latents ...",
    )
    parser.add_argument("images", help="a folder with a folder for each class")
    parser.add_argument("target", help="the folder of the shards: data.path of a configuration with data.kind latents")
    parser.add_argument("--vae", required=True, help="a folder or Hub id of diffusers' AutoencoderKL, or of a pipeline")
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
    names = ("images", "vae", "size", "flip", "mean", "seed", "dtype", "batch_size", "shard_size")
    target = Path(arguments.target)
    with needing("train,diffusers"):
        from .training.latents import LatentSettings, write_latents

        settings = LatentSettings(**{name: getattr(arguments, name) for name in names})
        paths = write_latents(settings, target, rank, world, arguments.device or gpu, arguments.workers)
    print(f"written: {len(paths)} shards in {target}")
    return 0
