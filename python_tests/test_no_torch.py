"""The Sampler on numpy arrays, from files and arrays, in a process where torch cannot be imported and beside it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from devices import on
from helpers import random_model
from test_single_model import TEXT_CLIP, make

import flexdit_ext
from flexdit_ext import DensitySchedule, Sampler

REQUEST = {"y": [3, 10, 0, 7], "steps": 3, "cfg_scale": 2.0, "seed": 5}

# argv: a checkpoint, a file for the latents, the request as JSON
PROGRAM = """
import json, sys
sys.modules["torch"] = None  # every import of it fails
import numpy, pickle
import flexdit_ext
from flexdit_ext import DensitySchedule, FlexDiTConfig, Sampler

try:
    from flexdit_ext import FlexDiT
except ImportError as error:
    print(error)
assert not hasattr(flexdit_ext, "no_such_name")
assert FlexDiTConfig.preset("XL/2").density_schedule == DensitySchedule([(10, 10), (8, 8), (7, 7), (6, 6)])
sampler, request = Sampler.from_pretrained(sys.argv[1], threads=1), json.loads(sys.argv[3])
latents = sampler.sample(**request)
assert type(latents) is numpy.ndarray and latents.dtype == numpy.float32
session = sampler.session(max_batch=2)
first = session.add(label=request["y"][0], steps="ddim4", cfg_scale=2.0, size=(8, 12))
while session.step():
    pass
assert session.take(first).shape == (4, 8, 12)
numpy.save(sys.argv[2], latents)
"""


@pytest.fixture(scope="module")
def model():
    return random_model(torch.float32, num_sdtm=1, hidden_size=32, schedule=DensitySchedule([(4, 4), (3, 3), (2, 2)]))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


# argv: a FlexLatte's checkpoint and one caption's rows
CLIP_PROGRAM = """
import sys
sys.modules["torch"] = None
import numpy
from flexdit_ext import FlexLatteConfig, Sampler

sampler, caption = Sampler.from_pretrained(sys.argv[1], threads=1), numpy.load(sys.argv[2])
assert type(sampler.config) is FlexLatteConfig
null = numpy.zeros((1, 2, 10))
clips = sampler.sample(caption=caption[None], null_caption=null, steps=2, cfg_scale=2.0, frames=3)
assert type(clips) is numpy.ndarray and clips.dtype == numpy.float32
session = sampler.session()
clip = session.add(caption=caption, null_caption=null[0], steps=2, cfg_scale=2.0, frames=3)
while session.step():
    pass
assert numpy.array_equal(session.take(clip), clips[0])
numpy.save(sys.argv[3], clips)
"""


def test_clips_without_torch(tmp_path):
    model, _ = make(TEXT_CLIP, torch.float32)
    model.save_pretrained(tmp_path / "model")
    caption = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    np.save(tmp_path / "caption.npy", caption)
    arguments = [str(tmp_path / name) for name in ("model", "caption.npy", "clips.npy")]
    result = subprocess.run([sys.executable, "-c", CLIP_PROGRAM, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    given = {"caption": caption[None], "null_caption": np.zeros((1, 2, 10)), "frames": 3}
    run = {"steps": 2, "cfg_scale": 2.0}
    expected = Sampler(model).sample(**given, **run).numpy()
    assert expected.shape == (1, 4, 3, 8, 8) and np.array_equal(np.load(tmp_path / "clips.npy"), expected)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    again = Sampler.from_arrays(model.config, arrays).sample(**given, **run)
    assert np.abs(again - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def expected(model):
    return Sampler(model).sample(**REQUEST).numpy()


def test_without_torch(checkpoint, expected, tmp_path):
    arguments = [sys.executable, "-c", PROGRAM, str(checkpoint), str(tmp_path / "latents.npy"), json.dumps(REQUEST)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        "flexdit_ext.FlexDiT needs PyTorch, which is not installed: pip install 'flexdit_ext[torch]'" in result.stdout
    )
    assert np.array_equal(np.load(tmp_path / "latents.npy"), expected)


def test_command_line_says_what_it_needs():
    program = "import sys; sys.modules['torch'] = None; from flexdit_ext.__main__ import main"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("flexdit: the command line needs PyTorch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes(model, checkpoint, dtype):
    """As of tensors, with the same rounding of the weights."""
    sampler = Sampler.from_pretrained(checkpoint, dtype)
    latents = sampler.sample(**REQUEST)
    assert (sampler.dtype, sampler.device) == (dtype, "cpu")
    assert latents.dtype == ("float64" if dtype == "float64" else "float32")
    tensors = Sampler(model, getattr(torch, dtype)).sample(**REQUEST)
    assert torch.equal(torch.from_numpy(latents).to(tensors.dtype), tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays(model, expected, dtype):
    arrays = {name: tensor.numpy().astype(dtype) for name, tensor in model.state_dict().items()}
    arrays["pos_embed"] = np.asfortranarray(arrays["pos_embed"])
    latents = Sampler.from_arrays(model.config, arrays).sample(**REQUEST)
    assert latents.dtype == dtype
    assert np.abs(latents - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("backend", [on("emulated", "emulated"), on("cuda", "cuda")], indirect=True)
def test_device(backend, checkpoint, expected):
    sampler = Sampler.from_pretrained(checkpoint, device="cuda:0")
    latents = sampler.sample(**REQUEST)
    assert np.abs(latents - expected).max() < 1e-3 * np.abs(expected).max()


def test_session_gives_arrays(checkpoint, expected):
    session = Sampler.from_pretrained(checkpoint).session()
    ids = [session.add(label=3, steps=3, cfg_scale=2.0, seed=seed) for seed in (5, 6)]
    assert session.take(ids[0]) is None
    while session.step():
        pass
    taken = session.take()
    assert list(taken) == ids
    assert np.array_equal(taken[ids[0]], expected[0])


@pytest.mark.parametrize("steps", ["ddim50", "3,1,2", "7"])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_respaced_tables_are_the_cpp_librarys(name, steps):
    from flexdit_ext._requests import kept_timesteps
    from flexdit_ext.diffusion import make_sampler

    table = flexdit_ext._C.sampler_steps(name, kept_timesteps(steps), 0.0, False)
    for step, other in zip(make_sampler(name, steps).steps, table, strict=True):
        coefficients = [step.x0_from_x, step.x0_from_output, step.x_coef, step.x0_coef, step.x0_previous_coef]
        assert other.values()[0] == step.timestep
        assert other.values()[1:7] == pytest.approx([*coefficients, step.noise_coef], rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("arguments, message", [
    (("dpmpp", [1, 2], 0.0, False), "timesteps are only for ddim and ddpm"),
    (("ddim", [], 0.0, False), "timesteps is empty"),
    (("ddim", [5, 5], 0.0, False), "timesteps has 5 at 1, must ascend within 0...999"),
    (("ddpm", [5, 1000], 0.0, False), "timesteps has 1000 at 1"),
    (("ddpm", [-1, 2], 0.0, False), "timesteps has -1 at 0"),
    (("ddpm", [2], 0.5, False), "eta is 0.5"),
])  # fmt: skip
def test_cpp_tables_refuse_bad_timesteps(arguments, message):
    with pytest.raises(ValueError, match=message):
        flexdit_ext._C.sampler_steps(*arguments)


@pytest.mark.parametrize("arguments, error, message", [
    ({"path": "missing"}, FileNotFoundError, r"missing does not exist"),
    ({"dtype": "float16"}, ValueError, "dtype is 'float16', must be None or one of float32, bfloat16, float64 on cpu"),
    ({"dtype": torch.float32}, TypeError, r"dtype is torch\.float32"),
    ({"device": torch.device("cpu")}, TypeError, "device is device"),
    ({"device": "tpu"}, ValueError, "device is 'tpu', must be"),
    ({"threads": 0}, ValueError, "threads is 0, must be from 1"),
    ({"threads": 1.0}, TypeError, "threads"),
    ({"modulation_bytes": 0}, ValueError, "modulation_bytes is 0"),
])  # fmt: skip
def test_bad_arguments(checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        Sampler.from_pretrained(**({"path": checkpoint} | arguments))


@pytest.mark.skipif(flexdit_ext._C.build_info()["cuda"] is not None, reason="built with CUDA")
def test_no_cuda_backend(checkpoint):
    with pytest.raises(ValueError, match="device is 'cuda', but this build of flexdit_ext has no CUDA backend"):
        Sampler.from_pretrained(checkpoint, device="cuda")


def test_broken_file_and_shards(model, checkpoint, expected, tmp_path):
    whole = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Sampler.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    for path in (tmp_path / "shards", tmp_path / "shards" / "model.safetensors.index.json"):
        assert np.array_equal(Sampler.from_pretrained(path).sample(**REQUEST), expected)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} does not exist"):
        Sampler.from_pretrained(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"config\.json must be a \.safetensors file, or the index of one in shards"):
        Sampler.from_pretrained(checkpoint / "config.json")
    with pytest.raises(
        TypeError, match=r"model is str, must be a FlexDiT, .*; Sampler\.from_pretrained takes a checkpoint"
    ):
        Sampler("folder")


def test_bad_arrays(model):
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    name = "final_layer.linear.weight"
    for change, error, message in (
        ({name: arrays[name].astype(np.float64)}, TypeError, "arrays are float32, float64, must be all float32"),
        ({name: arrays[name][:5]}, ValueError, r"arrays has the wrong shape final_layer\.linear\.weight \[5, 32\]"),
        ({"more": arrays[name]}, ValueError, "arrays has the unknown more"),
    ):
        with pytest.raises(error, match=message):
            Sampler.from_arrays(model.config, arrays | change)
    del arrays[name]
    with pytest.raises(ValueError, match=f"arrays has no {name}"):
        Sampler.from_arrays(model.config, arrays)
    with pytest.raises(TypeError, match="config is dict"):
        Sampler.from_arrays({}, arrays)
