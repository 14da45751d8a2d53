"""`flexdit sample`: what it writes and prints, and what it refuses. The other commands: test_cli_bench.py."""

import errno
import json
import os
import re
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from devices import on
from helpers import tiny_model
from PIL import Image

import flexdit_ext
from flexdit_ext import FlexDiT, Sampler, convert
from flexdit_ext.__main__ import main

LATENT = {"in_channels": 4, "hidden_size": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints: of pixels with 1 and 3 channels, and of latents."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, overrides in (("gray", {}), ("rgb", {"in_channels": 3}), ("latent", LATENT)):
        tiny_model(**overrides).save_pretrained(folder / name)
    return folder


def make_vae(seed=0, **overrides):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    values = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**(values | overrides)).eval()


@pytest.fixture
def vae(tmp_path):
    """An autoencoder and its folder."""
    model = make_vae()
    model.save_pretrained(tmp_path / "vae")
    return model, tmp_path / "vae"


def words(options: dict) -> list[str]:
    """Command line of {"cfg_scale": 2, ...}; True is a flag, a list several words."""
    line = []
    for name, value in options.items():
        line.append("--" + name.replace("_", "-"))
        line += [] if value is True else [str(each) for each in (value if isinstance(value, list) else [value])]
    return line


def draw(checkpoint, out, **options):
    options = {"labels": "0,1,2", "steps": 3, "quiet": True} | options
    assert main(["sample", *words({"checkpoint": checkpoint, "out": out} | options)]) == 0
    return {path.name: path for path in out.iterdir()}


def exit_code(*line) -> int:
    try:
        return main([str(word) for word in line])
    except SystemExit as stopped:  # argparse
        return stopped.code


def refused(capsys, command, *line) -> str:
    """The one line that says why."""
    assert exit_code(command, *line) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(rf"flexdit( {command})?: error: .+\n", captured.err), captured
    return captured.err.rstrip("\n")


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).reshape(image.height, image.width, -1)


def as_pixels(images) -> np.ndarray:
    """[n, C, H, W] in [-1, 1] -> uint8 [n, H, W, C], apart from the library's own."""
    return np.rint(np.clip(images.double().numpy(), -1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


# ---- sample: what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gray", "rgb"])
def test_pixels(name, checkpoints, tmp_path):
    files = draw(checkpoints / name, tmp_path / "a" / "b", labels="0,3,2", cfg_scale=2, seed=5)
    assert sorted(files) == ["00000_0.png", "00001_3.png", "00002_2.png", "grid.png"]
    images = as_pixels(Sampler(FlexDiT.from_pretrained(checkpoints / name)).sample([0, 3, 2], 3, cfg_scale=2, seed=5))
    drawn = [pixels_of(files[file]) for file in sorted(files)[:3]]
    for image, expected in zip(drawn, images, strict=True):
        assert np.array_equal(image, expected)
    grid = np.full((2 * 8 + 2, 2 * 8 + 2, images.shape[3]), 255, np.uint8)  # two columns, white between
    grid[:8, :8], grid[:8, 10:], grid[10:, :8] = images
    assert np.array_equal(pixels_of(files["grid.png"]), grid)
    assert images.std() > 10  # there is something to see
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask for file in files.values())


def test_files_say_how_they_were_drawn(checkpoints, tmp_path):
    files = draw(checkpoints / "gray", tmp_path / "out", labels="1", seed=7, size="8x4", cfg_scale=1.5)
    with Image.open(files["00000_1.png"]) as image:
        settings = json.loads(image.text["flexdit"])
    assert settings["label"] == 1 and settings["index"] == 0 and settings["seed"] == 7
    assert settings["size"] == [8, 4] and settings["cfg_scale"] == 1.5 and settings["sampler"] == "ddim"


def test_latents(checkpoints, tmp_path):
    """Of a model without pictures, and beside pictures where asked for."""
    expected = Sampler(FlexDiT.from_pretrained(checkpoints / "latent")).sample([0, 1, 2], 3)
    files = draw(checkpoints / "latent", tmp_path / "a")
    assert list(files) == ["latents.safetensors"]
    tensors = safetensors.torch.load_file(files["latents.safetensors"])
    assert torch.equal(tensors["latents"], expected) and tensors["labels"].tolist() == [0, 1, 2]
    assert np.array_equal(np.load(draw(checkpoints / "latent", tmp_path / "b", latents="npy")["latents.npy"]), expected)
    files = draw(checkpoints / "latent", tmp_path / "c", latents="npy", dtype="bfloat16")
    half = Sampler(FlexDiT.from_pretrained(checkpoints / "latent"), torch.bfloat16).sample([0, 1, 2], 3)
    assert half.dtype == torch.bfloat16 and np.array_equal(np.load(files["latents.npy"]), half.float())
    files = draw(checkpoints / "gray", tmp_path / "d", latents="safetensors")
    assert len(files) == 5 and safetensors.torch.load_file(files["latents.safetensors"])["latents"].shape == (
        3,
        1,
        8,
        8,
    )


RUNS = [
    ({"sampler": "heun", "cfg_scale": 2.0, "guidance_interval": [100, 800], "guidance_channels": "all", "seed": 7,
      "size": "8x12", "grid": "2x3", "clip_x0": True, "dtype": "float64", "batch_size": 2, "start_index": 5},
     {"size": (8, 12), "grid": (2, 3), "guidance_interval": (100, 800)}),
    ({"steps": "ddim4", "eta": 0.5, "size": "4", "cfg_scale": 0, "guidance_channels": 2},
     {"size": (4, 4)}),
    ({"sampler": "ddpm"}, {}),
]  # fmt: skip


@pytest.mark.parametrize("options, changed", RUNS)
def test_options_are_samples_arguments(options, changed, checkpoints, tmp_path):
    files = draw(checkpoints / "latent", tmp_path / "out", labels="2,0", images_per_label=2, **options)
    arguments = {"steps": 3} | options | changed
    sampler = Sampler(
        FlexDiT.from_pretrained(checkpoints / "latent"), getattr(torch, arguments.pop("dtype", "float32"))
    )
    tensors = safetensors.torch.load_file(files["latents.safetensors"])
    assert tensors["labels"].tolist() == [2, 2, 0, 0]
    assert torch.equal(tensors["latents"], sampler.sample([2, 2, 0, 0], **arguments))


def test_a_run_goes_on_where_it_ended(checkpoints, tmp_path):
    whole = draw(checkpoints / "gray", tmp_path / "whole", labels="0,1,2,3", batch_size=3, images_per_label=2)
    end = draw(checkpoints / "gray", tmp_path / "end", labels="3", images_per_label=2, start_index=6)
    assert sorted(end) == ["00006_3.png", "00007_3.png", "grid.png"]
    for name in sorted(end)[:2]:
        assert np.array_equal(pixels_of(end[name]), pixels_of(whole[name]))
    assert pixels_of(whole["grid.png"]).shape == (4 * 10 - 2, 2 * 10 - 2, 1)  # a row for each label
    wide = draw(checkpoints / "gray", tmp_path / "wide", labels="0,1,2,3", columns=4)
    assert pixels_of(wide["grid.png"]).shape == (8, 4 * 10 - 2, 1)


CONSTANTS = [{}, {"shift_factor": 0.2, "scaling_factor": 0.5},
             {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0]},
             {"out_channels": 1, "in_channels": 1}]  # fmt: skip


@pytest.mark.parametrize("constants", CONSTANTS)
def test_through_an_autoencoder(constants, checkpoints, tmp_path):
    vae = make_vae(**constants)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    files = draw(checkpoints / "latent", tmp_path / "out", vae=tmp_path / "pipeline")
    latents = Sampler(FlexDiT.from_pretrained(checkpoints / "latent")).sample([0, 1, 2], 3)
    mean = torch.tensor(constants.get("latents_mean", [0.0] * 4)).view(4, 1, 1) + constants.get("shift_factor", 0)
    std = torch.tensor(constants.get("latents_std", [1.0] * 4)).view(4, 1, 1)
    with torch.no_grad():
        images = vae.decode(latents / constants.get("scaling_factor", 0.18215) * std + mean).sample
    assert images.shape == (3, constants.get("out_channels", 3), 16, 16)
    drawn = np.stack([pixels_of(files[name]) for name in sorted(files)[:3]]).astype(int)
    assert np.abs(drawn - as_pixels(images)).max() <= 1 and drawn.std() > 2  # torch may round a batch otherwise
    assert sorted(files)[3:] == ["grid.png"]


@pytest.mark.parametrize("name", [on("cuda", "cuda")])
def test_on_a_gpu(name, tmp_path):
    tiny_model(hidden_size=32).save_pretrained(tmp_path / "model")
    drawn = [
        np.stack([pixels_of(path).astype(int) for _, path in sorted(files.items())[:3]])
        for files in (draw(tmp_path / "model", tmp_path / where, device=where) for where in ("cpu", name))
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_progress_and_what_was_written(checkpoints, tmp_path, capsys):
    pytest.importorskip("tqdm")
    line = {"checkpoint": checkpoints / "gray", "labels": "0,1", "steps": 3, "out": tmp_path / "out"}
    assert main(["sample", *words(line)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"written to {tmp_path / 'out'}: 00000_0.png 00001_1.png grid.png\n"
    assert "sampling: 100%" in captured.err and "3/3" in captured.err and "2/2" in captured.err
    assert main(["sample", *words(line), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_as_a_program(checkpoints, tmp_path):
    line = words({"checkpoint": checkpoints / "gray", "labels": "1", "out": tmp_path / "out", "steps": 1})
    done = subprocess.run([sys.executable, "-m", "flexdit_ext", "sample", *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("written to ") and (tmp_path / "out" / "grid.png").exists()


# ---- sample: what is refused ----------------------------------------------------------------------------------------

REFUSED = [
    ({"labels": "0,4"}, "--labels: 4, must be from 0 to 3"),
    ({"labels": "-1"}, "--labels: -1, must be from 0 to 3"),
    ({"labels": "0,,1"}, "argument --labels: '0,,1', must be integers with commas between them"),
    ({"labels": "cat"}, "argument --labels: 'cat', must be integers"),
    ({"sampler": "euler"}, "argument --sampler: invalid choice: 'euler' (choose from "),
    ({"steps": 0}, "steps = 0: must be in 1..1000"),
    ({"steps": 1001}, "steps = 1001: must be in 1..1000"),
    ({"steps": -5}, "steps = -5"),
    ({"steps": "ddim300"}, "steps = 'ddim300'"),
    ({"steps": "many"}, "steps = 'many'"),
    ({"steps": "ddim4", "sampler": "heun"}, "steps = 'ddim4'"),
    ({"eta": 2}, "eta = 2.0"),
    ({"cfg_scale": -1}, "cfg_scale = -1.0: must be finite and at least 0"),
    ({"cfg_scale": "nan"}, "cfg_scale = nan"),
    ({"seed": -1}, "seed = -1"),
    ({"seed": 1.5}, "argument --seed: invalid int value: '1.5'"),
    ({"start_index": -1}, "start_index = -1"),
    ({"size": "7x8"}, "size is (7, 8), must be (height, width): multiples of the patch size 2"),
    ({"size": 0}, "size is (0, 0)"),
    ({"size": "8x"}, "argument --size: '8x', must be HEIGHTxWIDTH, or one number for both"),
    ({"grid": "5x1"}, "grid has the sparse grid (5, 1), at most the dense grid (4, 4) is allowed"),
    ({"guidance_interval": [5, 1]}, "guidance_interval"),
    ({"guidance_channels": 2}, "guidance_channels = 2"),
    ({"guidance_channels": "most"}, "argument --guidance-channels: 'most', must be an integer or all"),
    ({"batch_size": 0}, "argument --batch-size: '0', must be an integer from 1"),
    ({"images_per_label": "x"}, "argument --images-per-label"),
    ({"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
    ({"dtype": "float16"}, "dtype is torch.float16, must be one of float32, bfloat16, float64 on cpu"),
    ({"device": "tpu"}, "argument --device: 'tpu', must be cpu, cuda or cuda:INDEX"),
    ({"device": "cuda:99"}, "argument --device: 'cuda:99', but "),
    ({"checkpoints": "x"}, "unrecognized arguments: --checkpoints x"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED, ids=str)
def test_refuses_bad_input(change, message, checkpoints, tmp_path, capsys):
    line = {"checkpoint": checkpoints / "gray", "labels": "0", "out": tmp_path / "made" / "out", "device": "cpu"}
    assert message in refused(capsys, "sample", *words(line | change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoint", "labels", "out"])
def test_refuses_to_guess(name, capsys, tmp_path):
    line = {"checkpoint": tmp_path, "labels": "0", "out": tmp_path}
    del line[name]
    assert f"required: --{name}" in refused(capsys, "sample", *words(line))


def damage_truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_config(folder):
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel", "sample_size": 32}')


def damage_kind(folder):
    """Another model's weights."""
    safetensors.torch.save_file({"unet.conv_in.weight": torch.zeros(4)}, folder / "model.safetensors")


def damage_shape(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 16}))


def damage_values(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["final_layer.linear.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def damage_gone(folder):
    (folder / "model.safetensors").unlink()


DAMAGES = [
    (damage_truncate, "model.safetensors"),
    (damage_config, "config.json has _class_name 'DiTTransformer2DModel', must be one of FlexPixArt, FlexLatte"),
    (damage_kind, "does not fit the model"),
    (damage_shape, "does not fit the model"),
    (damage_values, "image 0 is not finite: the model, its dtype or the guidance does not bear this"),
    (damage_gone, "model.safetensors"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_refuses_damaged_checkpoints(damage, message, saved, tmp_path, capsys):
    damage(saved[1])
    line = words({"checkpoint": saved[1], "labels": "0,1", "steps": 2, "out": tmp_path / "out", "quiet": True})
    assert message in refused(capsys, "sample", *line)
    assert not (tmp_path / "out").exists()


def test_refuses_checkpoints_of_others(tmp_path, capsys):
    torch.save(convert.to_sparsedit(tiny_model()), tmp_path / "model.pt")
    for path, message in ((tmp_path / "model.pt", "`flexdit convert` reads other checkpoints"),
                          (tmp_path / "nothing", "nothing")):  # fmt: skip
        assert message in refused(capsys, "sample", *words({"checkpoint": path, "labels": 0, "out": tmp_path / "out"}))
    assert not (tmp_path / "out").exists()


def break_vae(folder, name):
    """Makes the folder's autoencoder what `name` says."""
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    tensors, values = safetensors.torch.load_file(weights), json.loads(config.read_text())
    if name == "json":
        config.write_text("{")
    elif name == "no weights":
        weights.unlink()
    elif name == "garbage":
        weights.write_bytes(b"x" * 100)
    elif name == "kind":
        config.write_text(json.dumps(values | {"_class_name": "VQModel"}))
    elif name == "a list":
        config.write_text("[]")
    elif name == "missing":
        del tensors["decoder.conv_in.bias"]
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    elif name == "misshaped":
        tensors["decoder.conv_in.bias"] = torch.zeros(3)
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    elif name == "values":
        tensors["decoder.conv_in.bias"][0] = float("inf")
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    elif name == "strange":
        config.write_text(json.dumps(values | {"layers_per_block": "two"}))


@pytest.mark.parametrize("name, message", [
    ("json", "config.json is not JSON"),
    ("no weights", "cannot be loaded"),
    ("garbage", "cannot be loaded"),
    ("kind", "is a VQModel, must be an AutoencoderKL"),
    ("a list", "must be an AutoencoderKL"),
    ("missing", "weights that do not fit its configuration: {'missing_keys': ['decoder.conv_in.bias']}"),
    ("misshaped", "cannot be loaded"),
    ("values", "image 0 is not finite"),
    ("strange", "cannot be loaded"),
])  # fmt: skip
def test_refuses_broken_autoencoders(name, message, vae, checkpoints, tmp_path, capsys):
    break_vae(vae[1], name)
    line = {"checkpoint": checkpoints / "latent", "labels": "0", "steps": 1, "out": tmp_path / "out", "vae": vae[1]}
    assert message in refused(capsys, "sample", *words(line), "--quiet")
    assert not (tmp_path / "out").exists()


def test_refuses_other_autoencoders(vae, checkpoints, tmp_path, capsys):
    line = {"labels": "0", "steps": 1, "out": tmp_path / "out", "checkpoint": checkpoints / "gray"}
    message = refused(capsys, "sample", *words(line | {"vae": vae[1]}))
    assert f"--vae: {vae[1]} has latents of 4 channels, the model has 1: they must agree" in message
    make_vae(out_channels=4).save_pretrained(tmp_path / "four")
    line["checkpoint"] = checkpoints / "latent"
    message = refused(capsys, "sample", *words(line | {"vae": tmp_path / "four"}))
    assert "gives images of 4 channels, must be 1 or 3" in message
    assert "is not a folder" in refused(capsys, "sample", *words(line | {"vae": tmp_path / "none"}))
    assert "config.json cannot be read" in refused(capsys, "sample", *words(line | {"vae": checkpoints}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, package", [("PIL", "pillow"), ("diffusers", "diffusers")])
def test_says_what_to_install(module, package, vae, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = {"checkpoint": checkpoints / "latent", "labels": "0", "steps": 1, "out": tmp_path / "out"}
    assert f"pip install {package}, or flexdit_ext[cli]" in refused(capsys, "sample", *words(line | {"vae": vae[1]}))
    assert not (tmp_path / "out").exists()
    assert main(["sample", *words(line), "--quiet"]) == 0  # latents need neither


# ---- sample: what cannot be written ---------------------------------------------------------------------------------


@pytest.fixture
def earlier(checkpoints, tmp_path):
    """A folder with an earlier run's images, and what is in it."""
    files = draw(checkpoints / "gray", tmp_path / "out")
    return tmp_path / "out", {name: path.read_bytes() for name, path in files.items()}


def assert_as_before(earlier):
    folder, contents = earlier
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_an_earlier_runs_files_are_replaced(earlier, checkpoints):
    folder, contents = earlier
    (folder / "notes.txt").write_text("mine")
    files = draw(checkpoints / "gray", folder, labels="0,1", seed=1)
    changed = {name for name, path in files.items() if path.read_bytes() != contents.get(name)}
    assert changed == {"00000_0.png", "00001_1.png", "grid.png", "notes.txt"}


def test_a_file_that_grows_too_large(earlier, checkpoints, tmp_path, capsys):
    """The images may be written, their grid not."""
    line = {"checkpoint": checkpoints / "gray", "labels": "0,1", "steps": 1, "size": 32, "quiet": True}
    *images, grid = (path.stat().st_size for _, path in sorted(draw(out=tmp_path / "sizes", **line).items()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((max(images) + grid) // 2, before[1]))
    try:
        message = refused(capsys, "sample", *words(line | {"out": earlier[0]}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.endswith(f"cannot write grid.png to {earlier[0]}: {os.strerror(errno.EFBIG)}")
    assert_as_before(earlier)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_full_disk(failing, earlier, checkpoints, capsys, monkeypatch):
    """That shows when the data reach it, in any of the four files."""
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    line = {"checkpoint": checkpoints / "gray", "labels": "0,1,2", "steps": 1, "out": earlier[0]}
    message = refused(capsys, "sample", *words(line), "--quiet")
    assert message.endswith(f" to {earlier[0]}: No space left on device") and len(calls) == failing
    assert_as_before(earlier)


def test_folders_that_cannot_be_written(checkpoints, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/flexdit"):
        line = {"checkpoint": checkpoints / "gray", "labels": "0", "steps": 1, "out": out}
        assert f"cannot write to the folder {out}: " in refused(capsys, "sample", *words(line))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_way(checkpoints, tmp_path, capsys):
    (tmp_path / "grid.png").mkdir()
    line = {"checkpoint": checkpoints / "gray", "labels": "0", "steps": 1, "out": tmp_path, "quiet": True}
    assert f"cannot write {tmp_path / 'grid.png'}: it is a folder" in refused(capsys, "sample", *words(line))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_interrupted(earlier, checkpoints, capsys, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(flexdit_ext.cli_sample, "png", interrupt)
    line = words({"checkpoint": checkpoints / "gray", "labels": "0", "steps": 1, "out": earlier[0], "quiet": True})
    assert main(["sample", *line]) == 130
    assert capsys.readouterr().err == "flexdit: interrupted\n"
    assert_as_before(earlier)
