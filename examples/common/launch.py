"""The command line of a demo, and its exit status: 0 if all targets were met, 1 if one was missed, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
FORK_SHARE = 0.25


@dataclass(frozen=True)
class Program:
    """pipeline: name of the module whose run_demo(arguments) does it all and returns False if a target was missed;
    sparse_name: of the model that is made from the dense one; add_arguments: adds the demo's own to the parser."""

    description: str
    pipeline: str
    sparse_name: str
    steps: int
    quick_steps: int
    out: Path
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def _exit_at_once(*_) -> None:
    os.write(2, b"interrupted before anything was written\n")
    os._exit(INTERRUPTED)


def positive(text: str) -> int:
    """For argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def seed(text: str) -> int:
    """For argparse."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in 0..2^32 - 1")
    return value


def _parse_arguments(program: Program) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=program.description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=program.out, help=f"folder for everything written (default: {program.out})"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the split, the weights, the batches and the samples")
    parser.add_argument("--steps", type=positive, help=f"training steps of each model (default: {program.steps})")
    parser.add_argument(
        "--fork-step", type=positive, help=f"{program.sparse_name} takes the dense weights of this step (default: 1/4)"
    )
    parser.add_argument("--threads", type=positive, help="of PyTorch and of the extension (default: all cores)")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; learns nothing, judges nothing"
    )
    program.add_arguments(parser)
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (program.quick_steps if arguments.quick else program.steps)
    arguments.fork_step = arguments.fork_step or max(1, int(arguments.steps * FORK_SHARE))
    if arguments.fork_step > arguments.steps:
        parser.error(f"--fork-step {arguments.fork_step} is beyond --steps {arguments.steps}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return arguments


def launch(program: Program) -> int:
    """Runs the demo; returns the exit status."""
    arguments = _parse_arguments(program)
    # OpenMP's threads spin while they wait, by default for milliseconds: beside any other busy process a run then takes
    # many times as long. Read when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # An interrupted import prints tracebacks of its own; nothing needs cleaning up before the run.
    signal.signal(signal.SIGINT, _exit_at_once)
    import torch

    pipeline = importlib.import_module(program.pipeline)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        met = pipeline.run_demo(arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not print a traceback
        print(f"\ninterrupted; the files in {arguments.out} are whole", file=sys.stderr)
        return INTERRUPTED
    return 0 if met else 1
