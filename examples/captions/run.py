"""Trains a dense PixArt on handwritten digits with captions, converts it to a FlexPixArt, compares both and writes a
report.

    python examples/captions/run.py --out out/text

Exit status: 0 if all targets were met, 1 if one was missed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.launch import Program, launch


def _t5_folder(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a folder with a config.json")
    if importlib.util.find_spec("transformers") is None:
        raise argparse.ArgumentTypeError("T5 needs transformers: pip install 'flexdit_ext[text]'")
    return Path(text)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-encoder",
        type=_t5_folder,
        metavar="DIR",
        help="transformers' T5 encoder and tokenizer, in a local folder; frozen (default: a small encoder that learns)",
    )


if __name__ == "__main__":
    program = Program(
        __doc__, "captions.pipeline", "FlexPixArt", steps=900, quick_steps=16, out=Path("out/text"),
        add_arguments=_add_arguments,
    )  # fmt: skip
    sys.exit(launch(program))
