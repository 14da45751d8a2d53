"""Trains a dense Latte on clips of handwritten digits that move, converts it to a FlexLatte, compares both and writes a
report.

    python examples/video/run.py --out out/video

Exit status: 0 if all targets were met, 1 if one was missed, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.launch import Program, launch

PROGRAM = Program(__doc__, "video.pipeline", "FlexLatte", steps=3000, quick_steps=4, out=Path("out/video"))

if __name__ == "__main__":
    sys.exit(launch(PROGRAM))
