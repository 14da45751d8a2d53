"""examples/video: how its clips are drawn, and that the quick run writes readable files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexdit_ext import FlexLatte

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIMEOUT = 120  # seconds; a quick run takes about 8 on two idle cores
OPPOSITES = {"left": "right", "up": "down", "clockwise": "counter-clockwise"}


@pytest.fixture
def rendering(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("video.rendering")


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def paths(rendering, motion: str, count: int = 5, seed: int = 1) -> torch.Tensor:
    index = list(rendering.MOTIONS).index(motion)
    return rendering.draw_paths(torch.full((count,), index), torch.Generator().manual_seed(seed))


def test_a_digit_at_rest_is_itself_on_background(rendering):
    picture = images(2)
    clips = rendering.render(picture, torch.zeros(2, rendering.NUM_FRAMES, 3))
    assert clips.shape == (2, 1, rendering.NUM_FRAMES, 12, 12)
    expected = torch.nn.functional.pad(picture, (2, 2, 2, 2), value=-1.0)
    torch.testing.assert_close(clips, expected[:, :, None].expand_as(clips), rtol=0, atol=1e-5)


def test_render_moves_right_down_and_clockwise(rendering):
    picture = images(1)
    still = rendering.render(picture, torch.zeros(1, 1, 3))[0, 0, 0]
    moved, turned = rendering.render(
        picture.expand(2, -1, -1, -1), torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, 0.0, torch.pi / 2]]])
    )[:, 0, 0]
    torch.testing.assert_close(moved[3:11, 4:], picture[0, 0], rtol=0, atol=1e-5)
    assert (moved[:3] < -0.9999).all() and (moved[:, :4] < -0.9999).all()
    torch.testing.assert_close(turned, still.rot90(-1), rtol=0, atol=1e-5)  # rot90 is counter-clockwise


@pytest.mark.parametrize("motion", OPPOSITES)
def test_backwards_is_the_opposite_motion(rendering, motion):
    there, back = paths(rendering, motion), paths(rendering, OPPOSITES[motion])
    assert not torch.equal(there, back)
    torch.testing.assert_close(there.flip(1), back)
    torch.testing.assert_close(rendering.render(images(5), there).flip(2), rendering.render(images(5), back))


def test_each_motion_changes_one_thing_evenly(rendering):
    for name, direction in rendering.MOTIONS.items():
        steps = paths(rendering, name).diff(dim=1)
        still = torch.tensor(direction) == 0
        torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=0, atol=1e-5)
        assert (steps[..., still].abs() < 1e-6).all()
        assert (steps[..., ~still] * torch.tensor(direction)[~still] > 0.1).all(), name


def test_draws_are_seeded_and_labelled(rendering):
    digits, pictures = torch.arange(10).repeat(5), images(50)

    def draw(seed):
        return rendering.draw_clips(pictures, digits, 40, torch.Generator().manual_seed(seed))

    (clips, labels), again, other = draw(3), draw(3), draw(4)
    assert torch.equal(clips, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(clips, other[0]) and not torch.equal(labels, other[1])
    assert clips.min() >= -1 and clips.max() <= 1
    assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < rendering.NUM_LABELS
    digit, motion = rendering.split_labels(labels)
    assert digit.max() < 10 and motion.max() < rendering.NUM_MOTIONS
    assert torch.equal(digit * rendering.NUM_MOTIONS + motion, labels)


def test_labels_are_of_the_clips(rendering):
    """Image k is filled with a level of its own, so that a clip shows which one it came from."""
    levels = torch.linspace(-0.8, 1, 10)
    pictures = levels[:, None, None, None].expand(10, 1, 8, 8)
    clips, labels = rendering.draw_clips(pictures, torch.arange(10), 40, torch.Generator().manual_seed(0))
    digit, _ = rendering.split_labels(labels)
    torch.testing.assert_close(clips[:, 0, 4, 5, 5], levels[digit])


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("video") / "out"
    command = [sys.executable, str(EXAMPLES / "video" / "run.py"), "--quick", "--threads", "2", "--seed", "3"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Targets: not judged" in done.stdout
    return out


def test_checkpoints_hold_their_layouts(quick_run):
    dense, flexlatte = (FlexLatte.from_pretrained(quick_run / name).config for name in ("dense", "flexlatte"))
    assert (dense.num_pooling_blocks, dense.num_sdtm) == (0, 0) and dense.depth == flexlatte.depth == 8
    assert flexlatte.num_pooling_blocks > 0 and flexlatte.num_sdtm > 0 and len(set(flexlatte.schedule.grids)) > 1


def test_animations_show_every_class(quick_run, rendering):
    names = {path.name for path in quick_run.iterdir() if path.is_file()}
    animations = {f"samples{suffix}.{ending}" for suffix in ("", "_dense") for ending in ("gif", "webp")}
    assert names == animations | {"frames.png", "frames_dense.png", "losses.png", "report.json", "report.md"}
    for name in animations:
        with Image.open(quick_run / name) as picture:
            assert picture.n_frames == rendering.NUM_FRAMES, name
            assert picture.width / picture.height == 10 / rendering.NUM_MOTIONS
    for name in ("frames.png", "frames_dense.png"):
        with Image.open(quick_run / name) as picture:
            assert picture.width / picture.height == 2 * rendering.NUM_FRAMES / rendering.NUM_MOTIONS
            assert (quick_run / name).stat().st_size < 150_000


def test_report_has_every_measurement(quick_run, rendering):
    report = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 3 and report["targets"] == {}
    macs = report["macs"]
    assert macs["flexlatte"] < macs["dense"] and set(macs["flexlatte_by_grid"]) == {"4x3x3", "4x2x2", "3x2x2", "2x2x2"}
    assert set(report["accuracy"]) == {"dense", "flexlatte", "held_out"}
    for shares in report["accuracy"].values():
        assert set(shares) == {"digit", "motion", "clip"} and all(0 <= share <= 1 for share in shares.values())
        assert shares["clip"] <= min(shares["digit"], shares["motion"])
    assert all(rate > 0 for rate in report["clips_per_second"].values())
    classes = rendering.NUM_LABELS
    assert report["counts"] == {"samples": classes, "per_class": 1, "classes": classes, "held_out": 500, "train": 1297}
    assert report["hardware"]["threads"] == 2 and report["seconds"]["total"] > 0
    text = (quick_run / "report.md").read_text(encoding="utf-8")
    assert text.endswith("\n") and "clips/s" in text and "held-out real clips" in text


def test_targets(monkeypatch, quick_run):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    report = importlib.import_module("video.report")
    results = json.loads((quick_run / "report.json").read_text(encoding="utf-8"))
    good = {"digit": 0.97, "motion": 0.99, "clip": 0.9}
    results["accuracy"] |= {"dense": good, "flexlatte": good}
    assert all(report.judge(results).values())
    results["accuracy"]["flexlatte"] = {"digit": 0.91, "motion": 0.80, "clip": 0.7}
    results["macs"]["flexlatte"] = 0.7 * results["macs"]["dense"]
    results["targets"] = report.judge(results)
    assert [met for met in results["targets"].values()] == [True, False, False, False, False]
    assert "MISSED: FlexLatte: the motion, right" in report.to_markdown(results)


def test_judges_count_frames_and_clips(rendering):
    judges = importlib.import_module("video.judges")

    class Constant(torch.nn.Module):
        """Takes every image for class `chosen`, those whose first pixel is 1 for class 0."""

        def __init__(self, chosen):
            super().__init__()
            self.chosen = chosen

        def forward(self, x):
            classes = torch.where(x[:, 0, 0, 0] == 1, 0, self.chosen)
            return torch.nn.functional.one_hot(classes, 10).float()

    clips = torch.full((2, 1, 8, 12, 12), -1.0)
    clips[0, 0, 2:4, 0, 0] = 1  # two frames of the first clip are seen as a 0
    labels = torch.tensor([7, 7]) * rendering.NUM_MOTIONS + torch.tensor([3, 2])
    shares = judges.Judges(Constant(7), Constant(3)).accuracies(clips, labels)
    assert shares == {"digit": 14 / 16, "motion": 0.5, "clip": 0.0}
