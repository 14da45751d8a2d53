"""Draws digits for a caption with a model that run.py has trained.

python examples/captions/draw.py "a three, thick" --model out/text/flexpixart --out three.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.launch import positive, seed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("captions", nargs="+", help="what to draw, each in quotes")
    parser.add_argument(
        "--model", type=Path, default=Path("out/text/flexpixart"), help="(default: out/text/flexpixart)"
    )
    parser.add_argument("--out", type=Path, default=Path("drawn.png"), help="the picture (default: drawn.png)")
    parser.add_argument("--count", type=positive, default=8, help="pictures for each caption (default: 8)")
    parser.add_argument("--steps", type=positive, default=25, help="Euler steps (default: 25)")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="guidance (default: 2)")
    parser.add_argument("--seed", type=seed, default=0)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from captions.models import CaptionedPixArt
    from captions.pictures import save_captioned

    captions = [caption for caption in arguments.captions for _ in range(arguments.count)]
    try:
        model = CaptionedPixArt.from_pretrained(arguments.model)
        images = model.sample(captions, arguments.steps, arguments.cfg_scale, arguments.seed)
        save_captioned(arguments.out, images, captions)
    except (OSError, ValueError, ImportError) as error:  # an unknown word, no such model
        print(f"draw.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(captions)} pictures in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
