"""`flexdit latents`: what diffusers' autoencoder says, in shards, whoever writes them and however often it breaks."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from training_cases import make_config

from flexdit_ext.__main__ import main
from flexdit_ext.sampling import derive_seed, normal_noise
from flexdit_ext.training import FINISHED, Trainer, train
from flexdit_ext.training._latents import Shards
from flexdit_ext.training.data import ImageFolder

diffusers = pytest.importorskip("diffusers")
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven images of two classes, and a tiny autoencoder that halves their sides."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for i in range(7):
        folder = root / "images" / ("cat" if i < 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **BLOCKS
    )
    vae.save_pretrained(root / "pipeline" / "vae")
    return root, vae.eval()


def run(source, target, *options):
    root, _ = source
    arguments = [root / "images", target, "--vae", root / "pipeline", "--size", 16, "--batch-size", 2, *options]
    return main(["latents", *map(str, arguments)])


def contents(target):
    return {path.name: path.read_bytes() for path in sorted(target.iterdir())}


def test_shards_hold_what_the_autoencoder_says(source, tmp_path):
    assert run(source, tmp_path, "--shard-size", 3, "--seed", 5, "--flip") == 0
    data = Shards(tmp_path)
    assert len(data) == 14 and len(list(tmp_path.iterdir())) == 5 and data.shape == (4, 8, 8)
    latents, conditions = data.__getitems__(range(14))
    assert conditions["y"].tolist() == [0, 0, 0, 1, 1, 1, 1] * 2
    root, vae = source
    images, _ = ImageFolder(root / "images", 3, 16).__getitems__(range(7))
    with torch.no_grad():
        posterior = vae.encode(torch.cat([images, images.flip(-1)])).latent_dist
    noise = normal_noise([derive_seed(5, i) for i in range(14)], 0, (4, 8, 8))
    assert torch.allclose(latents, 0.5 * (posterior.mean + posterior.std * noise), atol=1e-5)
    assert run(source, tmp_path / "mean", "--mean", "--dtype", "float16") == 0
    (path,) = (tmp_path / "mean").iterdir()
    stored = safetensors.torch.load_file(path)["latents"]
    assert stored.dtype == torch.float16 and torch.allclose(stored.float(), 0.5 * posterior.mean[:7], atol=2e-3)


def test_it_goes_on_where_it_was_broken_off(source, tmp_path, monkeypatch, capsys):
    assert run(source, tmp_path / "whole", "--shard-size", 2) == 0
    with monkeypatch.context() as patch:
        written, original = [], safetensors.torch.save_file

        def save(tensors, path, metadata):
            written.append(path)
            if len(written) == 3:
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            original(tensors, path, metadata)

        patch.setattr(safetensors.torch, "save_file", save)
        assert run(source, tmp_path / "parts", "--shard-size", 2) == 130
    assert len(contents(tmp_path / "parts")) == 2  # whole ones, and nothing else
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert run(source, tmp_path / "parts", "--shard-size", 2) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    capsys.readouterr()
    assert run(source, tmp_path / "parts", "--shard-size", 2, "--seed", 1) == 2
    assert "was made otherwise (seed 0 -> 1); take another folder" in capsys.readouterr().err


def test_two_processes_write_the_same_files(source, tmp_path, monkeypatch):
    assert run(source, tmp_path / "one", "--shard-size", 2) == 0
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(source, tmp_path / "two", "--shard-size", 2) == 0
        assert len(list((tmp_path / "two").iterdir())) == 2 + 2 * int(rank)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_training_takes_them(source, tmp_path):
    assert run(source, tmp_path / "latents") == 0
    changes = {"model": {"in_channels": 4}, "data": {"kind": "latents", "path": str(tmp_path / "latents")}}
    vae = str(source[0] / "pipeline")
    changes["log"] = {"sample_every": 1, "sample_steps": 1, "vae": vae}
    assert train(make_config(tmp_path / "run", steps=1, batch_size=4, **changes)) == FINISHED
    with Image.open(tmp_path / "run" / "samples" / "step-00000001.png") as picture:  # 8x8 latents are 16x16 images
        assert picture.size == (4 * 34 - 2, 10 * 34 - 2)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Trainer(make_config(tmp_path / "other", **changes | {"log": {"sample_every": 1, "vae": "nowhere"}}))
    assert not (tmp_path / "other").exists()


def test_what_is_not_there(source, tmp_path, capsys):
    root, _ = source
    assert main(["latents", str(root / "none"), str(tmp_path), "--vae", str(root / "pipeline")]) == 2
    assert f"images is {root}/none, which does not exist" in capsys.readouterr().err
    assert run(source, tmp_path, "--vae", root / "images") == 2
    assert f"vae {root}/images is not an AutoencoderKL" in capsys.readouterr().err
    assert run(source, tmp_path, "--size", 0) == 2
    assert "size is 0, must be at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
