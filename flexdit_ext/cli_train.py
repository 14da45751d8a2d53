"""`flexdit train` and `flexdit plot`."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path


def add_parser(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a DiT or FlexDiT, or go on with a run",
        description="Trains as a TOML file says, from the newest checkpoint if the run's folder has one. Several "
        "processes: torchrun --nproc-per-node 8 -m flexdit_ext train --config FILE.toml. SIGTERM and Ctrl-C save and "
        "end with status 143.",
    )
    train.add_argument("--config", required=True, help="a TOML file; its keys: flexdit_ext.training.config")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="over the file, as optimizer.betas=[0.9,0.99]",
    )
    train.add_argument("--check", action="store_true", help="check configuration, checkpoints and data, train nothing")
    train.set_defaults(run=run_train)
    plot = commands.add_parser("plot", help="draw the curves of a run", description="Draws the log of a run as a PNG.")
    plot.add_argument("folder", help="of the run")
    plot.add_argument("--out", help="the PNG; by default curves.png in the folder")
    plot.set_defaults(run=run_plot)


@contextlib.contextmanager
def needing(extra: str):
    """Around imports of what an extra brings: an ImportError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'flexdit_ext[{extra}]'") from error


def run_train(arguments: argparse.Namespace) -> int:
    with needing("train"):
        from .training import load_config, set_up, train
    config = load_config(arguments.config, arguments.set)
    if arguments.check:
        setup = set_up(config, int(os.environ.get("WORLD_SIZE", "1")))
        print(f"{len(setup.data)} samples, {sum(p.numel() for p in setup.model.parameters()):,} parameters: good")
        return 0
    return train(config)


def run_plot(arguments: argparse.Namespace) -> int:
    with needing("train"):
        from .training.plot import plot
    print(f"written: {plot(Path(arguments.folder), arguments.out and Path(arguments.out))}")
    return 0
