"""The command line: `flexdit info` and `flexdit convert`, also as `python -m flexdit_ext info`."""

from __future__ import annotations

import argparse
import platform
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"flexdit: the command line needs PyTorch, pip install 'flexdit_ext[torch]' ({error})")

from . import _C, __version__, cli_convert


def information() -> list[tuple[str, str]]:
    """Versions, what was built, what was found."""
    build = _C.build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch"
    return [
        ("flexdit_ext", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("compiled by", build["compiler"]),
        ("CPU backend", f"built, instruction set {build['instruction_set']}, oneDNN {build['onednn']}"),
        ("CUDA backend", f"built for {build['cuda']}" if build["cuda"] else "not built"),
        ("GPU", gpu),
        ("threads", f"{torch.get_num_threads()} (torch), {build['openmp_threads']} (OpenMP)"),
        ("machine", f"{platform.machine()}, torch sees {torch.backends.cpu.get_cpu_capability()}"),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flexdit", description="FlexDiT diffusion transformers")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, what was built and what was found")
    cli_convert.add_parser(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command != "info":
        return parsed.run(parsed)
    for name, value in information():
        print(f"{name:14} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
