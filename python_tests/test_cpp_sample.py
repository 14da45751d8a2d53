"""C++ programs and other languages sample as Python's Sampler does, to the bit: examples/cpp/sample.cpp, compiled here
against the library, and examples/python/ctypes_sample.py on libflexdit_c."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_model
from native import ROOT, build_folder, compile_program, run

from flexdit_ext import _C, DensitySchedule, FlexDiT, Sampler

LABELS = [2, 0, 10]  # the last is the null class
DIGITS = ROOT / "out" / "flexdit"  # what `make demo` left, if it did
# Command line and Sampler.sample's arguments.
RUNS = {
    "ddim": (["--steps", "4", "--sampler", "ddim", "--guidance", "1"], {"steps": 4}),
    "guided dpmpp": (
        ["--steps", "5", "--sampler", "dpmpp", "--guidance", "2.5", "--seed", str(2**64 - 1)],
        {"steps": 5, "sampler": "dpmpp", "cfg_scale": 2.5, "seed": 2**64 - 1},
    ),
    "learned variance": (
        ["--steps", "3", "--sampler", "ddpm", "--guidance", "0.5"],
        {"steps": 3, "sampler": "ddpm", "cfg_scale": 0.5},
    ),
}


@dataclass
class Program:
    """How to call it, and its picture's ending."""

    command: list[str]
    ending: str

    def run(self, *arguments):
        return run(*self.command, *arguments)


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory):
    program = tmp_path_factory.mktemp("cpp") / "sample"
    compile_program(ROOT / "examples/cpp/sample.cpp", program)
    return Program([str(program)], "pnm")


@pytest.fixture(scope="session")
def ctypes_program():
    """The script in a Python that cannot import torch or this library's module."""
    script = ROOT / "examples/python/ctypes_sample.py"
    start = f"import sys, runpy; sys.modules.update(torch=None, flexdit_ext=None); sys.argv[0] = {str(script)!r}; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return Program([sys.executable, "-c", start, str(build_folder() / "libflexdit_c.so")], "png")


@pytest.fixture(params=["cpp", "ctypes"])
def program(request):
    return request.getfixturevalue(f"{request.param}_program")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    schedule = DensitySchedule([(4, 4), (3, 3), (2, 2)])
    random_model(torch.float32, schedule=schedule, reinject_position=True).save_pretrained(folder)
    return folder


def pixels_of(images: np.ndarray) -> np.ndarray:
    """[n, channels, h, w] as uint8 [h, w of all side by side, colors]; halves are rounded away from zero."""
    colors = images[:, : 3 if images.shape[1] >= 3 else 1]
    row = np.concatenate(list(colors), axis=2).transpose(1, 2, 0)
    return np.floor((np.clip(row, -1, 1) + np.float32(1)) * np.float32(127.5) + np.float32(0.5)).astype(np.uint8)


def read_picture(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        image = pytest.importorskip("PIL.Image").open(path)
        return np.asarray(image).reshape(image.height, image.width, -1)
    kind, width, height, values = re.fullmatch(rb"(P[56]) (\d+) (\d+) 255\n(.*)", path.read_bytes(), re.S).groups()
    return np.frombuffer(values, np.uint8).reshape(int(height), int(width), 3 if kind == b"P6" else 1)


def check_images(program: Program, folder: Path, options: list[str], expected: np.ndarray, directory: Path):
    picture, latents = directory / f"image.{program.ending}", directory / "latents"
    result = program.run(folder, picture, "--latents", latents, *options)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(np.fromfile(latents, np.float32).reshape(expected.shape), expected)
    zoom = max(1, 64 // expected.shape[2])
    shown = pixels_of(expected).repeat(zoom, 0).repeat(zoom, 1).astype(int)
    assert np.abs(read_picture(picture) - shown).max() <= (1 if program.ending == "png" else 0)  # halves to even there
    assert sorted(directory.iterdir()) == [picture, latents]


@pytest.mark.parametrize("name", RUNS)
def test_same_images_to_the_bit(program, checkpoint, name, tmp_path):
    options, arguments = RUNS[name]
    expected = Sampler(FlexDiT.from_pretrained(checkpoint)).sample(LABELS, **arguments).numpy()
    labels = ",".join(str(label) for label in LABELS)
    check_images(program, checkpoint, ["--labels", labels, *options], expected, tmp_path)


def test_16_bit_checkpoints_are_sampled_in_float32(program, tmp_path):
    model = random_model(torch.bfloat16, num_sdtm=0, class_dropout_prob=0.0)
    model.save_pretrained(tmp_path / "model")
    expected = Sampler(model, torch.float32).sample(range(10), 2, "flow").numpy()  # every class, its default
    (tmp_path / "out").mkdir()
    check_images(program, tmp_path / "model", ["--steps", "2", "--guidance", "1"], expected, tmp_path / "out")


@pytest.mark.skipif(not DIGITS.exists(), reason="make demo leaves a checkpoint in out/flexdit")
def test_the_demos_digits(program, tmp_path):
    expected = Sampler(FlexDiT.from_pretrained(DIGITS)).sample(range(10), 25, "flow", 1.5).numpy()
    check_images(program, DIGITS, [], expected, tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--labels", "1,11"], "label is 11, must lie in [0, 11)"),
        (["--labels", "-1"], "label is -1"),
        (["--labels", "1,,2"], "--labels"),
        (["--labels", str(2**64)], str(2**64)),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "3.5"], "--steps"),
        (["--guidance", "-0.5"], "guidance is -0.5"),
        (["--guidance", "nan"], "guidance is"),
        (["--guidance", "inf"], "guidance is inf"),
        (["--sampler", "euler"], "euler"),
        (["--seed", str(2**64)], "--seed is"),
        (["--speed", "1"], "--speed"),
        (["--steps"], "--steps"),
        (["another"], "usage:"),
    ],
)
def test_bad_options(program, checkpoint, options, message, tmp_path):
    result = program.run(checkpoint, tmp_path / "image", *options)
    assert result.returncode in (1, 2) and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_bad_files(program, checkpoint, tmp_path):
    def refused(folder, out, message, *options):
        result = program.run(folder, out, "--steps", "1", *options)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr

    refused(tmp_path / "missing", tmp_path / "image", "missing does not exist")
    refused(checkpoint, tmp_path / "missing" / "image", "missing/image")
    refused(checkpoint, tmp_path, str(tmp_path))  # a folder
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((checkpoint / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-1])
    refused(broken, tmp_path / "image", "model.safetensors")
    random_model(torch.float32, num_sdtm=0, class_dropout_prob=0.0).save_pretrained(tmp_path / "unguided")
    refused(tmp_path / "unguided", tmp_path / "image", "has no null class: only 1 is allowed")
    (broken / "config.json").write_text((tmp_path / "unguided" / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    refused(broken, tmp_path / "image", "does not fit the model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "unguided"]


def test_usage(cpp_program, ctypes_program):
    for arguments in ((), ("folder",)):
        result = cpp_program.run(*arguments)
        assert result.returncode == 1 and result.stderr.startswith("usage: sample FOLDER OUT.pgm")
        assert ctypes_program.run(*arguments).returncode == 2


@pytest.mark.parametrize("library", [ROOT / "README.md", _C.__file__], ids=["no library", "another library"])
def test_a_library_that_is_none(library, tmp_path):
    result = run(sys.executable, ROOT / "examples/python/ctypes_sample.py", library, "folder", tmp_path / "out")
    assert result.returncode == 1 and Path(library).name in result.stderr and "Traceback" not in result.stderr
