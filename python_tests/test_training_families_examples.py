"""examples/train_clips.toml and examples/train_captions.toml through the command line, with their logs and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import captions, clips, family_config, save, save_random
from PIL import Image

from flexdit_ext import FlexLatte, FlexPixArt, sample_conditional
from flexdit_ext.__main__ import main
from flexdit_ext.training import load_average, set_up
from flexdit_ext.training.log import read_log
from flexdit_ext.training.pictures import sample_grid, shown_conditions, tile, tile_clips

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def run_example(name, tmp_path, arrays):
    """4 steps of it on these data; the run's folder, its log, and the samples in tensorboard by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save(tmp_path / "data", arrays)
    settings = {"output": tmp_path / "run", "data.path": tmp_path / "data", "steps": 4, "batch_size": 4}
    settings |= {"optimizer.warmup_steps": 1, "checkpoint.every": 2, "log.every": 2, "log.peak_tflops": 0.1}
    settings |= {"log.sample_every": 4, "log.sample_steps": 2, "log.sample_columns": 3}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", "--config", str(ROOT / "examples" / name), *words]) == 0
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == [2, 4]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Images("samples")] == [4]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    for line in log:
        flops = 6 * line["macs_per_image"] * line["images_per_second"]
        assert line["mfu"] == pytest.approx(flops / 1e11, rel=0.02)
    return tmp_path / "run", log


def test_clips(tmp_path):
    folder, log = run_example("train_clips.toml", tmp_path, clips(count=20, frames=8))
    model = FlexLatte.from_pretrained(folder / "model")
    assert all(model.macs((4, 2, 2)) <= line["macs_per_image"] <= model.macs((6, 3, 3)) for line in log)
    with Image.open(folder / "samples" / "step-00000004.png") as still:  # a strip of four frames for each clip
        assert still.size == (3 * (4 * 33 - 1 + 2) - 2, 10 * 34 - 2)
    with Image.open(folder / "samples" / "step-00000004.webp") as moving:
        assert moving.n_frames == 8 and moving.size == (3 * 34 - 2, 10 * 34 - 2)


def test_captions(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32),
        "caption": rng.standard_normal((12, 3, 16)).astype(np.float32),
        "caption_mask": np.arange(3) <= np.arange(12)[:, None] % 3,
        "null_caption": np.ones((2, 16), np.float32),
    }
    folder, log = run_example("train_captions.toml", tmp_path, arrays)
    model = FlexPixArt.from_pretrained(folder / "model")
    assert all(model.macs((3, 3), 1) <= line["macs_per_image"] <= model.macs((5, 5), 3) for line in log)
    with Image.open(folder / "samples" / "step-00000004.png") as still:
        assert still.size == (3 * 34 - 2, 10 * 34 - 2)
    assert not list((folder / "samples").glob("*.webp"))
    assert isinstance(load_average(newest_in(folder)), FlexPixArt)


def newest_in(folder):
    return sorted((folder / "checkpoints").iterdir())[-1]


def test_pictures_are_guided_samples_of_the_data_s_captions(tmp_path):
    arrays = captions(null_caption=np.full((2, 6), 0.5))
    model = {"checkpoint": save_random(tmp_path / "model", "flexpixart")}
    log = {"sample_steps": 2, "sample_columns": 2, "sample_classes": 3, "sample_cfg_scale": 3.0}
    config = family_config(tmp_path / "run", "flexpixart", save(tmp_path / "d", arrays), model=model, log=log)
    setup = set_up(config, 1)
    shown = shown_conditions(setup.family, setup.data, setup.model.config, 3)
    assert np.array_equal(shown["caption"], arrays["caption"][[0, 3, 6]])
    pictures = sample_grid(setup.family, setup.model, shown, setup.null, config)
    null = {"caption": torch.zeros(1, 4, 6), "caption_mask": torch.tensor([[True, True, False, False]])}
    null["caption"][0, :2] = 0.5
    twice = {name: value[[0, 0, 1, 1, 2, 2]] for name, value in shown.items()}
    wanted = sample_conditional(setup.model, twice, 2, "flow", 3.0, config.seed, unconditional=null)
    assert np.array_equal(pictures.still, tile(wanted, 2).still) and pictures.frames is None


def test_clips_are_decoded_frame_by_frame(tmp_path):
    model = {"checkpoint": save_random(tmp_path / "model", "flexlatte")}
    log = {"sample_steps": 1, "sample_columns": 1, "sample_classes": 2}
    config = family_config(tmp_path / "run", "flexlatte", save(tmp_path / "d", clips()), model=model, log=log)
    setup = set_up(config, 1)
    shown = shown_conditions(setup.family, setup.data, setup.model.config, 2)
    assert shown["y"].tolist() == [0, 1]
    parts = []

    def decode(part):
        parts.append(part)
        return part.repeat_interleave(4, 2).repeat_interleave(4, 3)

    pictures = sample_grid(setup.family, setup.model, shown, setup.null, config, decode)
    assert all(part.shape[1:] == (1, 8, 8) for part in parts)
    samples = sample_conditional(
        setup.model, shown, 1, "flow", config.log.sample_cfg_scale, config.seed, unconditional=setup.null
    )
    same = tile_clips(samples.transpose(1, 2), 1)  # enlarged four times, too
    assert np.array_equal(pictures.still, same.still) and len(pictures.frames) == 3
    assert all(np.array_equal(a, b) for a, b in zip(pictures.frames, same.frames))


def test_tiles_of_clips():
    clip = torch.linspace(-1, 1, 7).view(1, 7, 1, 1, 1).expand(1, 7, 1, 32, 32)
    pictures = tile_clips(torch.cat([clip, -clip]), columns=1)
    assert pictures.still.shape == (66, 4 * 33 - 1, 3)
    assert pictures.still[0, [0, 33, 66, 99], 0].tolist() == [0, 85, 170, 255]  # frames 0, 2, 4, 6
    rising = pytest.approx([0, 42, 85, 128, 170, 212, 255], abs=1)
    assert [int(frame[0, 0, 0]) for frame in pictures.frames] == rising
    assert [255 - int(frame[65, 0, 0]) for frame in pictures.frames] == rising


def test_tall_grids_are_cut():
    """A WebP has at most 16,383 rows."""
    pictures = tile_clips(torch.zeros(485, 2, 1, 32, 32), columns=1)
    assert pictures.still.shape[0] == 485 * 34 - 2 and pictures.frames.shape == (2, 16383, 32, 3)
