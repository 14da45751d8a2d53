"""Trains a dense DiT on handwritten digits, converts it to a FlexDiT, compares both and writes a report.

    python examples/digits/run.py --out out

Exit status: 0 if all targets were met, 1 if one was missed, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.launch import Program, launch

PROGRAM = Program(__doc__, "digits.pipeline", "FlexDiT", steps=1600, quick_steps=16, out=Path("out"))

if __name__ == "__main__":
    sys.exit(launch(PROGRAM))
