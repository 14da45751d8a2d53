"""`flexdit bench`: how long the Sampler takes on this machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from . import _C, __version__
from ._arguments import check_dtype
from .cli_sample import DTYPES, count, default_device, device, sides
from .config import _PRESETS, FlexDiTConfig
from .model import FlexDiT
from .sampler import Sampler, check_size
from .schedule import DensitySchedule

DESCRIPTION = """\
Times the Sampler on this machine: a preset with random weights, or a checkpoint, for every combination of the given
sizes, schedules and dtypes. One batch of images at a time, --repeats of them after one that does not count.
  ms a step: wall time of Session.step, the device's work included; the median over a batch's steps, then over batches.
  ms an image: wall time from request to latents, modulations included, over the batch size; the median over batches.
Nothing else should run meanwhile: the spread and the load average tell."""
EPILOG = """\
The repository's bench/ folder compares with other implementations; this is a check of an installation.
example: flexdit bench --preset XL/2 --image-size 256 --schedule 10,8,7,6 --schedule 16 --dtype bfloat16,float32"""

_COLUMNS = ("size", "schedule", "dtype", "ms a step", "ms an image", "images/s", "spread")


def schedule(text: str) -> DensitySchedule:
    try:
        return DensitySchedule([sides(part) for part in text.split(",")])
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}, must be sparse grids from data to noise: {error}") from None


def dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}, must be of {', '.join(DTYPES)}")
    return names


def sizes(text: str) -> list[tuple[int, int]]:
    return [sides(part) for part in text.split(",")]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the Sampler on this machine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=[f"{name}/2" for name in _PRESETS], help="one of the paper's layouts, default S/2")
    add("--image-size", type=int, choices=[256, 512], help="of the preset, in pixels, default 256")
    add("--checkpoint", metavar="DIR", help="save_pretrained's folder or weights file, instead of a preset")

    add = parser.add_argument_group("what is measured, every combination").add_argument
    add("--sizes", type=sizes, metavar="HxW,...", help="of the latents, default the model's")
    add("--schedule", type=schedule, action="append", metavar="A,B,...", help="sparse grids from data to noise, HxW or "
        "one number for both; may be given again; default the model's")  # fmt: skip
    add("--dtype", type=dtypes, metavar="A,B", help="default bfloat16, a checkpoint's own")
    add("--batch-size", type=count, default=1, metavar="N", help="images at once, default %(default)s")
    add("--steps", type=count, default=20, metavar="N", help="of DDIM, default %(default)s")
    add("--cfg-scale", type=float, default=4.0, metavar="SCALE", help="default %(default)s; 1 is no guidance")

    add = parser.add_argument_group("measurement").add_argument
    add("--device", type=device, help="cpu or cuda[:INDEX], default a GPU where one can be used")
    add("--repeats", type=count, default=5, metavar="N", help="default %(default)s")
    add("--json", action="store_true", help="print the results, with every time, as JSON")


def run(arguments: argparse.Namespace) -> int:
    where = arguments.device or default_device()
    result = conditions(arguments, where)
    model = _model(arguments, where)
    names = arguments.dtype or [str(model.pos_embed.dtype).removeprefix("torch.")]
    config = model.config
    wanted = arguments.sizes or [(config.input_size, config.input_size)]
    _check(arguments, config, names, wanted, where)
    for each, name in itertools.product(arguments.schedule or [model.schedule], names):
        model.schedule = each
        sampler = Sampler(model, DTYPES[name])
        grids = [list(grid) for grid in each.grids] if config.num_sdtm else []
        for size in wanted:
            row = {"size": list(size), "schedule": grids, "dtype": name}
            result["rows"].append(row | measure(sampler, size, arguments))
    print(json.dumps(result, indent=2) if arguments.json else table(result))
    return 0


def _check(arguments: argparse.Namespace, config: FlexDiTConfig, names: list[str], wanted, where: torch.device) -> None:
    """What would fail after others have been measured."""
    if arguments.schedule and not config.num_sdtm:
        raise ValueError("--schedule is given, but the model has no sparse tokens")
    for grid in (grid for each in arguments.schedule or [] for grid in each.grids):
        config.check_sparse_grid("--schedule", grid)
    for name in names:
        check_dtype(DTYPES[name], where)
    for size in wanted:
        check_size(size, config)


def conditions(arguments: argparse.Namespace, where: torch.device) -> dict:
    """What the times depend on besides a row's own settings; rows are to be filled in."""
    cpu = where.type == "cpu"
    return {
        "date": datetime.date.today().isoformat(),
        "flexdit_ext": __version__,
        "torch": torch.__version__,
        "device": _cpu_name() if cpu else torch.cuda.get_device_name(where),
        "threads": torch.get_num_threads() if cpu else None,
        "instruction_set": _C.build_info()["instruction_set"] if cpu else None,
        "load_average": os.getloadavg()[0],
        "model": arguments.checkpoint or f"{arguments.preset or 'S/2'}, {arguments.image_size or 256}, random weights",
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "cfg_scale": arguments.cfg_scale,
        "rows": [],
    }


@torch.no_grad()
def _model(arguments: argparse.Namespace, where: torch.device) -> FlexDiT:
    if arguments.checkpoint:
        if arguments.preset or arguments.image_size:
            raise ValueError("--checkpoint is given: --preset and --image-size are for a model without one")
        return FlexDiT.from_pretrained(arguments.checkpoint, device=where)
    config = FlexDiTConfig.preset(arguments.preset or "S/2", arguments.image_size or 256)
    model = FlexDiT(config, dtype=torch.bfloat16, device=where).eval()
    generator = torch.Generator(where).manual_seed(0)
    for parameter in model.parameters():  # a fresh model's gates are zero: let every number matter
        parameter.normal_(std=0.02, generator=generator)
    return model


def measure(sampler: Sampler, size: tuple[int, int], arguments: argparse.Namespace) -> dict:
    """Times in ms of --repeats batches, each of its own labels and seeds."""
    session = sampler.session(arguments.batch_size)
    config = sampler.config

    def batch(number: int) -> tuple[float, list[float]]:
        begin, steps = time.perf_counter(), []
        for i in range(arguments.batch_size):
            index = number * arguments.batch_size + i
            session.add(
                index % config.num_classes, arguments.steps, cfg_scale=arguments.cfg_scale, seed=index, size=size
            )
        left = 1
        while left:
            step = time.perf_counter()
            left = session.step()
            if sampler.device.type == "cuda":
                torch.cuda.synchronize(sampler.device)
            steps.append(1e3 * (time.perf_counter() - step))
        for image in session.take().values():
            if isinstance(image, RuntimeError):
                raise image
        return 1e3 * (time.perf_counter() - begin), steps

    batch(0)
    runs = [batch(1 + i) for i in range(arguments.repeats)]
    images = [elapsed / arguments.batch_size for elapsed, _ in runs]
    return {
        "step_ms": statistics.median(statistics.median(steps) for _, steps in runs),
        "image_ms": statistics.median(images),
        "images_ms": images,
        "steps_ms": [steps for _, steps in runs],
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def table(result: dict) -> str:
    r = result
    cpu = "" if r["threads"] is None else f", {r['threads']} threads, {r['instruction_set']}"
    guided = "" if r["cfg_scale"] == 1 else f", guided by {r['cfg_scale']:g}"
    lines = [
        f"{r['model']}; batch {r['batch_size']}, {r['steps']} DDIM steps{guided}",
        f"{r['device']}{cpu}; flexdit_ext {r['flexdit_ext']}, torch {r['torch']}; {r['date']}, load average "
        f"{r['load_average']:.1f} at the start",
    ]
    rows = [_COLUMNS, *map(_cells, r["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(lines)


def _cells(row: dict) -> tuple[str, ...]:
    grids = [str(grid[0]) if grid[0] == grid[1] else "x".join(map(str, grid)) for grid in row["schedule"]]
    times = row["images_ms"]
    return (
        "x".join(map(str, row["size"])),
        ",".join(grids) or "dense",
        row["dtype"],
        f"{row['step_ms']:.2f}",
        f"{row['image_ms']:.2f}",
        f"{1e3 / row['image_ms']:.3g}",
        f"{min(times):.2f} to {max(times):.2f}",
    )
