"""`make try-wheel`: installs a wheel into fresh environments and runs smoke.py in each; the latents must be the same.

cpu: torch's CPU build; cuda: the newest torch, a CUDA build of 5.5 GB; none: no torch at all.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

SMOKE = Path(__file__).with_name("smoke.py")
TORCH = {"cpu": ["torch==2.13.0"], "cuda": ["torch"], "none": []}


def try_in(kind: str, wheel: Path, folder: Path, options: list[str]) -> np.ndarray:
    """The latents that smoke.py computes in a new environment, which is removed again."""
    environment = folder / kind
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *options, wheel, *TORCH[kind]], check=True)
    if kind != "none":  # what the wheel says of torch must hold, too
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", f"{wheel}[torch]"], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)
    output = folder / f"{kind}.npy"
    subprocess.run([python, SMOKE, folder / "checkpoint", output, kind], check=True, cwd=folder)
    shutil.rmtree(environment)
    return np.load(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("kinds", nargs="+", choices=TORCH)
    parser.add_argument("--pip", action="append", default=[], help="an option of pip install, such as --pip=--pre")
    arguments = parser.parse_args()
    if not arguments.wheel.is_file():
        parser.error(f"{arguments.wheel} does not exist: make wheel")
    with tempfile.TemporaryDirectory(prefix="flexdit-try-") as temporary:
        latents = [try_in(kind, arguments.wheel.resolve(), Path(temporary), arguments.pip) for kind in arguments.kinds]
    for kind, one in zip(arguments.kinds, latents, strict=True):
        if not np.array_equal(one, latents[0]):
            sys.exit(f"the latents of {kind} are not those of {arguments.kinds[0]}")
    print(f"the latents are the same in: {', '.join(arguments.kinds)}")


if __name__ == "__main__":
    main()
