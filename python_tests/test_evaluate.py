"""`flexdit evaluate`: the same set from any processes and batches, after a kill too; what it refuses; its metrics."""

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model
from test_cli import as_pixels, make_vae, refused, words

import flexdit_ext
from flexdit_ext import FlexDiT, Sampler
from flexdit_ext.__main__ import main
from flexdit_ext.evaluation import Archive

IMAGES = 11
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(flexdit_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "gray"
    tiny_model().save_pretrained(folder)
    return folder


def line(checkpoint, out, **options):
    defaults = {"num_images": IMAGES, "steps": 3, "seed": 4, "cfg_scale": 1.5, "shard_images": 4, "quiet": True}
    return ["evaluate", *words({"checkpoint": checkpoint, "out": out} | defaults | options)]


def draw(checkpoint, out, **options):
    assert main(line(checkpoint, out, **options)) == 0
    with np.load(out, allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The set as the sampler draws it at once."""
    labels = [i % 3 for i in range(IMAGES)]
    images = Sampler(FlexDiT.from_pretrained(checkpoint)).sample(labels, 3, cfg_scale=1.5, seed=4)
    return as_pixels(images).repeat(3, axis=3), labels


# ---- the set --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 3}, {"batch_size": 1, "shard_images": 5}, {"shard_images": 100}]
)
def test_set_does_not_depend_on_batches(options, checkpoint, expected, tmp_path):
    images, labels = draw(checkpoint, tmp_path / "set.npz", **options)
    assert images.dtype == np.uint8 and np.array_equal(images, expected[0])
    assert labels.dtype == np.int64 and labels.tolist() == expected[1]  # balanced: no class has two more than another
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]
    assert images.std() > 10


def test_set_does_not_depend_on_ranks(checkpoint, expected, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "flexdit_ext"]
    done = subprocess.run(
        [*command, *line(checkpoint, tmp_path / "set.npz", batch_size=3, device="cpu")],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "set.npz") as archive:
        assert np.array_equal(archive["arr_0"], expected[0])
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_killed_run_goes_on(checkpoint, tmp_path, monkeypatch):
    options = {"num_images": 60, "shard_images": 2, "steps": 10, "batch_size": 60}
    out, parts = tmp_path / "set.npz", tmp_path / "set.npz.parts"
    command = [sys.executable, "-m", "flexdit_ext", *line(checkpoint, out, **options)]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        while process.poll() is None and len(list(parts.glob("*.npy"))) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = [int(path.stem) for path in parts.glob("*.npy")]
    assert process.returncode == -signal.SIGKILL and 3 <= len(done) < 30 and not out.exists()
    (parts / ".writing-half").mkdir()  # what a kill within a write leaves
    drawn, sample = [], Sampler.sample

    def watched(self, labels, *arguments, start_index, **options):
        drawn.extend(range(start_index, start_index + len(labels)))
        return sample(self, labels, *arguments, start_index=start_index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", watched)
        images, _ = draw(checkpoint, out, **options)
    assert drawn == [i for i in range(60) if i // 2 not in done]
    assert np.array_equal(images, draw(checkpoint, tmp_path / "other.npz", **options | {"shard_images": 60})[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "set.npz"]


def test_finished_set_is_not_drawn_again(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "set.npz")
    monkeypatch.setattr(Sampler, "sample", None)
    draw(checkpoint, tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed 4, this run has 5"),
        ({"num_images": 12}, "num_images 11, this run has 12"),
        ({"labels": "1,2"}, "labels"),
        ({"steps": 4}, "steps 3, this run has 4"),
        ({"dtype": "float64"}, r"torch\.float64"),
        ({"guidance_interval": [1, 2]}, r"guidance_interval None, this run has \[1.0, 2.0\]"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_settings_are_not_mixed(change, message, finished, checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "set.npz"
    if finished:
        draw(checkpoint, out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr("flexdit_ext.evaluation.drawing._join", lambda *_: 1 / 0)
            assert main(line(checkpoint, out)) == 2
        capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    error = refused(capsys, *line(checkpoint, out, **change))
    assert re.search(message, error), error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_weights_are_not_mixed(checkpoint, tmp_path, capsys):
    draw(checkpoint, tmp_path / "set.npz")
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    assert "weights" in refused(capsys, *line(tmp_path / "other", tmp_path / "set.npz"))


def test_wrong_start_leaves_no_settings(checkpoint, tmp_path, capsys):
    assert "steps" in refused(capsys, *line(checkpoint, tmp_path / "set.npz", steps=0))
    draw(checkpoint, tmp_path / "set.npz")


def test_damaged_shard_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flexdit_ext.evaluation.drawing._join", lambda *_: 1 / 0)
        assert main(line(checkpoint, tmp_path / "set.npz")) == 2
    capsys.readouterr()
    shard = tmp_path / "set.npz.parts" / "000001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "000001.npy is damaged" in refused(capsys, *line(checkpoint, tmp_path / "set.npz"))
    assert not (tmp_path / "set.npz").exists()
    shard.unlink()
    draw(checkpoint, tmp_path / "set.npz")


def test_file_is_as_adm_reads_it(checkpoint, tmp_path):
    """guided-diffusion's evaluator opens the member itself, uncompressed, and reads it in pieces."""
    images, _ = draw(checkpoint, tmp_path / "set.npz")
    with zipfile.ZipFile(tmp_path / "set.npz") as archive:
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED and archive.testzip() is None
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == ((IMAGES, 8, 8, 3), False, np.dtype("uint8"))
            assert member.read() == images.tobytes()
    assert np.array_equal(np.concatenate(list(Archive(tmp_path / "set.npz").batches(4))), images)


def test_latents_go_through_the_autoencoder(tmp_path, capsys):
    tiny_model(in_channels=4, hidden_size=16).save_pretrained(tmp_path / "latent")
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    assert "--vae" in refused(capsys, *line(tmp_path / "latent", tmp_path / "set.npz"))
    images, _ = draw(tmp_path / "latent", tmp_path / "set.npz", vae=tmp_path / "vae", num_images=3)
    latents = Sampler(FlexDiT.from_pretrained(tmp_path / "latent")).sample([0, 1, 2], 3, cfg_scale=1.5, seed=4)
    with torch.no_grad():
        wanted = torch.cat([vae.decode(latents[i : i + 1] / vae.config.scaling_factor).sample for i in range(3)])
    assert images.shape == (3, 16, 16, 3) and np.abs(images.astype(int) - as_pixels(wanted)).max() <= 1
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    other = line(tmp_path / "latent", tmp_path / "set.npz", vae=tmp_path / "other", num_images=3)
    assert "vae" in refused(capsys, *other)


def test_labels_are_given(checkpoint, tmp_path, capsys):
    np.save(tmp_path / "labels.npy", np.arange(IMAGES) % 2)
    assert draw(checkpoint, tmp_path / "a.npz", labels_file=tmp_path / "labels.npy")[1].tolist() == [0, 1] * 5 + [0]
    assert draw(checkpoint, tmp_path / "b.npz", labels="2,3")[1].tolist() == [2, 3] * 5 + [2]
    assert "[12]" in refused(
        capsys, *line(checkpoint, tmp_path / "c.npz", num_images=12, labels_file=tmp_path / "labels.npy")
    )
    assert "--labels: 4" in refused(capsys, *line(checkpoint, tmp_path / "c.npz", labels="0,4"))
