"""examples/density_strip.py: its pooling windows against torch's, its picture and its words."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_model
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from flexdit_ext import DensitySchedule

PROGRAM = Path(__file__).parents[1] / "examples" / "density_strip.py"
spec = importlib.util.spec_from_file_location("density_strip", PROGRAM)
density_strip = importlib.util.module_from_spec(spec)
spec.loader.exec_module(density_strip)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 5), (6, 6)])
def test_windows_are_those_of_the_pooling(grid):
    values = torch.randn(3, 12, 12, dtype=torch.float64)
    expected = adaptive_avg_pool2d(adaptive_avg_pool2d(values, (6, 6)), grid)
    assert density_strip.means(values.numpy(), (6, 6), grid) == pytest.approx(expected.numpy(), abs=1e-12)


def test_strip_of_a_checkpoint(tmp_path):
    model = random_model(torch.float32, num_sdtm=1, schedule=DensitySchedule([(5, 4), (3, 3), (2, 1)]))
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "strip.png"
    result = run(tmp_path / "model", "--steps", 7, "--columns", 3, "--label", 10, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "sparse tokens [2, 2, 9, 9, 20, 20, 20]" in result.stdout
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (438, 3 * 168 + 8, 3)
    # The bars of the first, the middle and the last step, as shares of 36 dense tokens.
    bars = [(pixels[345:404, 8 + 168 * i + 80] == density_strip.LINE).all(axis=1).sum() for i in range(3)]
    assert bars == pytest.approx([60 * n / 36 for n in (2, 9, 20)], abs=1.1)
    # The last column is the image that the model ends at.
    way = density_strip.denoise(model, 10, 7, "ddim", 0)
    assert [grid for _, grid, _, _ in way] == [(2, 1)] * 2 + [(3, 3)] * 2 + [(5, 4)] * 3
    from flexdit_ext import sample

    torch.testing.assert_close(way[-1][3], sample(model, [10], steps=7)[0], rtol=1e-4, atol=1e-4)


def test_no_checkpoint_and_bad_arguments(tmp_path):
    assert re.search(r"tokens \[4, 16, 64\]", run("--steps", 3, "--out", tmp_path / "strip.png").stdout)
    random_model(torch.float32, num_sdtm=0, num_pooling_blocks=0).save_pretrained(tmp_path / "dense")
    for arguments, message in (
        ([tmp_path / "dense"], "is a dense DiT"),
        (["--label", 11], "--label is 11, must be in 0..10"),
        (["--columns", 0], "--columns is 0"),
    ):
        result = run(*arguments, "--out", tmp_path / "none.png")
        assert result.returncode == 2 and message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "strip.png"]
