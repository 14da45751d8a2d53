"""`flexdit bench`: a short measurement of the installed build on this machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import _C, __version__
from .cli_sample import DTYPES, count, default_device, device
from .config import _PRESETS, FlexDiTConfig
from .model import FlexDiT
from .sampler import Sampler

DESCRIPTION = """\
Measures one of the paper's layouts with random weights: a forward pass of the module, a step of the Sampler, and from
that images per second. The steps measured are spread over the whole density schedule. Medians; a busy machine shows in
the spread."""
EPILOG = "The repository's bench/ folder compares with other implementations; this is a check of an installation."

_MEASURED_STEPS = 8  # of a trajectory: two for every segment of the schedule


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the Sampler on this machine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--preset", choices=[f"{name}/2" for name in _PRESETS], default="S/2", help="default %(default)s"
    )
    parser.add_argument("--image-size", type=int, choices=[256, 512], default=256, help="default %(default)s")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="images at once, default %(default)s")
    parser.add_argument("--cfg-scale", type=float, default=4.0, metavar="SCALE", help="default %(default)s, 1 is none")
    parser.add_argument("--steps", type=count, default=50, metavar="N", help="of an image, default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument("--device", type=device, help="cpu or cuda[:INDEX], default a GPU where one can be used")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement, default %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.seconds < float("inf"):
        raise ValueError(f"--seconds: {arguments.seconds}, must be above 0")
    results = measure(arguments)
    print(json.dumps(results, indent=2) if arguments.json else _text(results))
    return 0


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict:
    where, dtype = arguments.device or default_device(), DTYPES[arguments.dtype]
    config = FlexDiTConfig.preset(arguments.preset, arguments.image_size)
    model = FlexDiT(config, dtype=dtype, device=where).eval()
    generator = torch.Generator(where).manual_seed(0)
    for parameter in model.parameters():  # fresh models' blocks are the identity, in which zeros might be quick
        parameter.normal_(std=0.02, generator=generator)
    batch = arguments.batch_size
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=where).to(dtype)
    t = (torch.arange(batch) + 0.5) * 1000 / batch
    y = torch.arange(batch, device=where) % config.num_classes
    forward = _times(lambda: _finished(model(x, t, y)), arguments.seconds)

    session = Sampler(model).session(batch)

    def trajectory():
        for i in range(batch):
            session.add(i % config.num_classes, _MEASURED_STEPS, cfg_scale=arguments.cfg_scale, seed=i)
        while session.step():
            pass
        session.take()

    steps = [each / _MEASURED_STEPS for each in _times(trajectory, arguments.seconds)]
    return {
        "date": datetime.date.today().isoformat(),
        "flexdit_ext": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads() if where.type == "cpu" else None,
        "instruction_set": _C.build_info()["instruction_set"] if where.type == "cpu" else None,
        "preset": arguments.preset,
        "image_size": arguments.image_size,
        "dtype": arguments.dtype,
        "batch_size": batch,
        "cfg_scale": arguments.cfg_scale,
        "steps": arguments.steps,
        "forward_ms": _summary(forward),
        "step_ms": _summary(steps),
        "images_per_second": batch / (arguments.steps * statistics.median(steps)),
    }


def _finished(out: torch.Tensor) -> None:
    if out.is_cuda:
        torch.cuda.synchronize(out.device)


def _times(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of at least three runs, after two that do not count."""
    run(), run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def _summary(times: list[float]) -> dict:
    values = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return {name: value * 1e3 for name, value in values.items()} | {"runs": len(times)}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _text(r: dict) -> str:
    guided = "" if r["cfg_scale"] == 1 else f", guided by {r['cfg_scale']:g}"
    threads = "" if r["threads"] is None else f", {r['threads']} threads, {r['instruction_set']}"

    def row(name: str, ms: dict) -> str:
        return f"{name:24}{ms['median']:10.2f} ms    {ms['min']:.2f} to {ms['max']:.2f}, {ms['runs']} runs"

    return "\n".join([
        f"FlexDiT-{r['preset']} {r['image_size']}, {r['dtype']}, batch {r['batch_size']}, random weights",
        f"{r['device']}{threads}; flexdit_ext {r['flexdit_ext']}, torch {r['torch']}",
        row("forward of the module", r["forward_ms"]),
        row("step of the Sampler", r["step_ms"]) + guided,
        f"{'images per second':24}{r['images_per_second']:10.3g}       at {r['steps']} steps",
    ])  # fmt: skip
