"""The command line, `flexdit COMMAND ...`, also as `python -m flexdit_ext COMMAND ...`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata

try:
    import torch
except ImportError as error:
    sys.exit(f"flexdit: the command line needs PyTorch, pip install 'flexdit_ext[torch]' ({error})")

from . import _C, __version__, cli_bench, cli_convert, cli_evaluate, cli_latents, cli_sample, cli_train
from ._checkpoint_single import class_and_config
from .single_model import FlexLatte

_OPTIONAL = ("diffusers", "transformers", "pillow", "imageio-ffmpeg", "accelerate", "peft")


def information() -> list[tuple[str, str]]:
    """Versions, what was built, what was found."""
    build = _C.build_info()
    return [
        ("flexdit_ext", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("compiled by", build["compiler"]),
        ("CPU backend", f"built, instruction set {build['instruction_set']}, oneDNN {build['onednn']}"),
        ("CUDA backend", f"built for {build['cuda']}" if build["cuda"] else "not built"),
        *_gpus(),
        ("threads", f"{torch.get_num_threads()} (torch), {build['openmp_threads']} (OpenMP)"),
        ("machine", f"{platform.machine()}, torch sees {torch.backends.cpu.get_cpu_capability()}"),
        ("optional", ", ".join(f"{name} {_version(name)}" for name in _OPTIONAL)),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def checkpoint_information(path: str) -> list[tuple[str, str]]:
    """What a checkpoint's configuration says; its weights are not read."""
    kind, config = class_and_config(path)
    with torch.device("meta"):
        model = kind(config)
    parameters = sum(one.numel() for one in model.parameters())
    segments = f"{config.num_pooling_blocks} pooling, {config.num_sdtm} x {list(config.sdtm_blocks)} sparse and dense"
    conditions = [f"{config.num_classes} classes"] if config.num_classes else []
    if getattr(config, "caption_channels", 0):
        conditions.append(
            f"captions of at most {config.max_caption_tokens} tokens of {config.caption_channels} channels"
        )
    conditions += ["height and width"] if getattr(config, "size_conditions", False) else []
    frames = (config.num_frames,) if kind is FlexLatte else ()
    shape = (config.in_channels, *frames, config.input_size, config.input_size)
    rows = [
        ("checkpoint", str(path)),
        ("model", f"{kind.__name__}, {parameters} parameters"),
        ("blocks", f"{segments}, {config.num_dense_blocks} dense"),
        ("latents", "x".join(map(str, shape))),
        ("conditions", ", ".join(conditions) or "none"),
    ]
    if config.num_sdtm:
        grids = ", ".join("x".join(map(str, grid)) for grid in config.density_schedule.grids)
        share = model.macs() / model.macs(config.dense_grid)
        rows.append(("sparse grids", f"{grids} from data to noise, {share:.0%} of the work on all tokens"))
    return rows


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none visible to torch")]
    rows = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {i}", f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"))
    return rows


def _print_information(arguments: argparse.Namespace) -> int:
    rows = information() if arguments.checkpoint is None else checkpoint_information(arguments.checkpoint)
    print(json.dumps(dict(rows), indent=2) if arguments.json else "\n".join(f"{name:14} {it}" for name, it in rows))
    return 0


class _Parser(argparse.ArgumentParser):
    """Wrong use is one line on stderr, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for what could not be done, 130 when interrupted. What argparse
    refuses raises SystemExit(2)."""
    parser = _Parser(prog="flexdit", description="FlexDiT diffusion transformers", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flexdit_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (cli_sample, cli_train, cli_latents, cli_evaluate, cli_bench, cli_convert):
        module.add_parser(commands)
    info = commands.add_parser(
        "info", help="print versions, what was built and what was found; or what a checkpoint is"
    )
    info.add_argument("--checkpoint", metavar="DIR", help="of a FlexDiT, FlexPixArt or FlexLatte")
    info.add_argument("--json", action="store_true", help="print them as JSON")
    info.set_defaults(run=_print_information)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("flexdit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"flexdit {parsed.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(message.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
