"""`flexdit evaluate --features` and `--metric digits`: from a file of images to the numbers."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from test_cli import refused, words

from flexdit_ext.__main__ import main
from flexdit_ext.evaluation import Archive, Statistics, digits, frechet_distance, inception_score, precision_recall

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import torch

def linear(images):
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 4, 4)
    return images.double().flatten(1)[:, :5] / 50

def everything(images):
    features = linear(images)
    return {"features": features, "spatial": images[:, :2, :2, :2].double() / 100, "probabilities": features.softmax(1)}

def short(images):
    return linear(images)[1:]

def other(images):
    return {"features": linear(images), "logits": linear(images)}

constant = 5
"""


def make_images(path, count, seed, **more):
    images = np.random.default_rng(seed).integers(0, 256 - 20 * seed, (count, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images, **more)
    return images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two sets of images and a module of feature extractors, in the current folder."""
    (tmp_path / "my_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    make_images(tmp_path / "sampled.npz", 70, 1)
    make_images(tmp_path / "real.npz", 50, 2)
    return tmp_path


def features_of(path, name):
    spec = importlib.util.spec_from_file_location("apart", "my_features.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return getattr(module, name)(images)


def score(capsys, **options):
    defaults = {"images": "sampled.npz", "quiet": True, "features_batch_size": 16}
    assert main(["evaluate", *words(defaults | options)]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_metric(folder, capsys):
    result = score(capsys, features="my_features:everything", reference="real.npz", report="report.json")
    sampled, real = (features_of(f"{name}.npz", "everything") for name in ("sampled", "real"))
    fits = [[Statistics.of(x[kind].flatten(1).numpy()) for x in (sampled, real)] for kind in ("features", "spatial")]
    expected = {
        "fid": frechet_distance(*fits[0]),
        "sfid": frechet_distance(*fits[1]),
        "inception_score": inception_score(sampled["probabilities"].numpy())[0],
        "inception_score_deviation": inception_score(sampled["probabilities"].numpy())[1],
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name  # features are kept as float32
    shares = precision_recall(real["features"].numpy(), sampled["features"].numpy())
    assert (result["precision"], result["recall"]) == shares
    assert result["left_out"] == {} and result["num_images"] == 70
    assert json.loads((folder / "report.json").read_text()) == result


def test_statistics_are_a_reference(folder, capsys):
    options = {"features": "my_features:everything"}
    first = score(capsys, images="real.npz", statistics="statistics.npz", **options)
    assert set(first["left_out"]) == {"fid", "sfid", "precision", "recall"}
    assert set(np.load("statistics.npz")) == {"mu", "sigma", "mu_s", "sigma_s"}  # as ADM's reference batches
    by_images, by_statistics = (score(capsys, reference=f"{n}.npz", **options) for n in ("real", "statistics"))
    for name in ("fid", "sfid", "inception_score"):
        assert by_statistics[name] == pytest.approx(by_images[name], rel=1e-9)
    assert set(by_statistics["left_out"]) == {"precision", "recall"}
    # Statistics beside images stand for a larger set: FID is from them, precision from the images.
    images = np.load("real.npz")["arr_0"]
    np.savez("both.npz", arr_0=images, mu=np.zeros(5), sigma=np.eye(5))
    both = score(capsys, reference="both.npz", **options)
    fit = Statistics.of(features_of("sampled.npz", "linear").numpy())
    assert both["fid"] == pytest.approx(frechet_distance(fit, Statistics(np.zeros(5), np.eye(5))), rel=1e-4)
    assert both["sfid"] == by_images["sfid"] and both["precision"] == by_images["precision"]


def test_features_alone(folder, capsys):
    result = score(capsys, features="my_features:linear", reference="real.npz")
    assert set(result["left_out"]) == {"sfid", "inception_score"}
    same = score(capsys, features="my_features:linear", reference="sampled.npz")
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1


class Network(torch.nn.Module):
    def forward(self, images: torch.Tensor):
        return images.double().flatten(1)[:, :5] / 50


class Inception(torch.nn.Module):
    """With the arguments of NVIDIA's inception-2015-12-05.pt."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        features = img.double().flatten(1)[:, :5] / 50
        if return_features:
            return features
        return (features + (0.0 if no_output_bias else 1e3)).softmax(1)


@pytest.mark.parametrize("network", [Network, Inception])
def test_jit_file(network, folder, capsys):
    torch.jit.script(network()).save("network.pt")
    from_file = score(capsys, features="network.pt", reference="real.npz")
    from_function = score(capsys, features="my_features:everything", reference="real.npz")
    assert from_file["fid"] == from_function["fid"] and from_file["recall"] == from_function["recall"]
    assert ("inception_score" in from_file) == (network is Inception)
    if network is Inception:
        assert from_file["inception_score"] == pytest.approx(from_function["inception_score"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "nothing"}, "is no file; must be one of"),
        ({"features": "my_features:absent"}, "my_features has no absent"),
        ({"features": "my_features:constant"}, "which is a int, must be a function"),
        ({"features": "no_such_module:f"}, "no_such_module"),
        ({"features": "my_features:short"}, r"must be \[16, ...\] for 16 images"),
        ({"features": "my_features:other"}, "must give a tensor or a dict of features, spatial, probabilities"),
        ({"features": "my_features.py"}, "is not a torch.jit file"),
        ({"features": "my_features:linear", "features_weights": "real.npz"}, "for torch-fidelity and clean-fid alone"),
        ({"features": "my_features:linear", "reference": "absent.npz"}, "absent.npz"),
        ({"features": "my_features:linear", "reference": "my_features.py"}, "my_features.py is not an .npz file"),
        ({"features": "my_features:linear", "reference": "odd.npz"}, "must have images, arr_0, or statistics"),
        ({"features": "my_features:linear", "images": "floats.npz"}, r"arr_0 is float64 \(2, 4, 4, 3\), must be uint8"),
        ({"features": "my_features:linear", "reference": "wide.npz"}, "5 and 3 dimensions"),
        ({"reference": "real.npz"}, "--images needs --features or --metric"),
        ({"metric": "digits", "out": "other.npz"}, "--images has none"),
        ({"metric": "digits", "reference": "real.npz"}, "--reference needs --features"),
        ({"metric": "digits"}, r"the digits metric takes \[n, 8, 8, 3\]"),
    ],
)
def test_bad_input(options, message, folder, capsys):
    np.savez("odd.npz", other=np.zeros(3))
    np.savez("floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez("wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    defaults = {"images": "sampled.npz", "quiet": True, "features_batch_size": 16}
    error = refused(capsys, "evaluate", *words(defaults | options))
    assert re.search(message, error), error


@pytest.mark.parametrize("library", ["torch-fidelity", "clean-fid"])
def test_missing_libraries_are_named(library, folder, capsys, monkeypatch):
    for module in ("torch_fidelity", "cleanfid"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    assert f"pip install {library}" in refused(capsys, "evaluate", "--images", "sampled.npz", "--features", library)


def test_images_that_end_early_are_an_error(folder):
    archive = Archive("sampled.npz")
    archive.shape = (71, 4, 4, 3)
    with pytest.raises(ValueError, match="ends within image 70"):
        list(archive.batches(16))


def test_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "CLASSIFIER_STEPS", 150)
    split = digits.load_split(3)
    pixels = ((split.train_images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy().repeat(3, axis=3)
    np.savez(tmp_path / "real.npz", pixels, split.train_labels.numpy())
    np.savez(tmp_path / "wrong.npz", 255 - pixels, split.train_labels.numpy())
    np.savez(tmp_path / "unlabelled.npz", pixels)
    state = torch.get_rng_state()
    real, wrong = (
        score(capsys, images=tmp_path / f"{name}.npz", metric="digits")["digits"] for name in ("real", "wrong")
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert real["accuracy"] > 0.9 and real["held_out_accuracy"] > 0.9 and real["frechet_distance"] < 0.1
    assert wrong["accuracy"] < 0.5 and wrong["frechet_distance"] > 10 * real["held_out_frechet_distance"]
    assert "labels" in refused(
        capsys, "evaluate", *words({"images": tmp_path / "unlabelled.npz", "metric": "digits", "quiet": True})
    )
