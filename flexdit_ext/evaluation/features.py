"""Features of images from a network that the user gives, and the metrics of two sets of them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..sampling import progress_bar
from .archive import Archive
from .metrics import Statistics, frechet_distance, inception_score, precision_recall

Extractor = Callable[[Tensor], Mapping[str, Tensor]]
LIBRARIES = ("torch-fidelity", "clean-fid")
_OUTPUTS = ("features", "spatial", "probabilities")


def load_extractor(spec: str, device: torch.device, weights: str | os.PathLike | None = None) -> Extractor:
    """What maps images, uint8 [n, 3, H, W] on the device, to a dict of tensors: features [n, d] (FID, precision,
    recall), and where it has them spatial [n, ...] (sFID) and probabilities [n, classes] (inception score).

    spec: "module:function", a function that does that, or returns features alone; "FILE", a torch.jit file of such a
        function (NVIDIA's inception-2015-12-05.pt, too, which has return_features); "torch-fidelity" or "clean-fid",
        their Inception, which they download unless `weights` is its file.

    Raises ImportError for what is not installed, FileNotFoundError, ValueError.
    """
    if weights is not None and (spec not in LIBRARIES or not Path(weights).is_file()):
        raise ValueError(f"weights is {weights}, must be a file, for {' and '.join(LIBRARIES)} alone")
    if spec == "torch-fidelity":
        return _torch_fidelity(device, weights)
    if spec == "clean-fid":
        return _clean_fid(device, weights)
    if Path(spec).is_file():
        return _jit(Path(spec), device)
    module, _, name = spec.partition(":")
    if not module or not name:
        allowed = f'"module:function", a torch.jit file, {", ".join(LIBRARIES)}'
        raise ValueError(f"features is {spec!r}, which is no file; must be one of {allowed}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ImportError(f"features is {spec!r}, but {module} has no {name}") from None
    if not callable(function):
        raise ValueError(f"features is {spec!r}, which is a {type(function).__name__}, must be a function")
    return function


def _jit(path: Path, device: torch.device) -> Extractor:
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a torch.jit file: {str(error).splitlines()[0]}") from error
    if "return_features" not in [argument.name for argument in network.forward.schema.arguments]:
        return network

    def inception(images: Tensor) -> dict[str, Tensor]:
        features = network(images, return_features=True)
        return {"features": features, "probabilities": network(images, no_output_bias=True)}

    return inception


def _library(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--features {package} needs {package}: pip install {package} ({error})") from error


def _torch_fidelity(device: torch.device, weights) -> Extractor:
    """Spatial features as ADM takes them: 7 channels of the 1x1 branch of Inception's "mixed_6"."""
    inception = _library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity").FeatureExtractorInceptionV3
    path = None if weights is None else os.fspath(weights)
    network = inception("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    network, kept = network.to(device).eval(), {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: kept.update(spatial=call[-1][:, :7]))

    def extract(images: Tensor) -> dict[str, Tensor]:
        features, logits = network(images)
        return {"features": features, "probabilities": logits.double().softmax(dim=1), "spatial": kept.pop("spatial")}

    return extract


def _clean_fid(device: torch.device, weights) -> Extractor:
    """Images resized one by one with antialiasing, arXiv 2104.11222."""
    resize = _library("cleanfid.resize", "clean-fid").build_resizer("clean")
    if weights is None:
        library = _library("cleanfid.features", "clean-fid")
        network = library.build_feature_extractor("clean", device=device, use_dataparallel=False)
    else:
        layers = torch.jit.load(weights, map_location=device).eval().layers

        def network(images: Tensor) -> Tensor:
            return layers((images - 128) / 128).flatten(1)

    def extract(images: Tensor) -> dict[str, Tensor]:
        resized = [resize(image).transpose(2, 0, 1) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return {"features": network(torch.from_numpy(np.stack(resized)).to(device))}

    return extract


@dataclass
class Features:
    """Of a set of images: features [n, d], spatial [n, d'] or None, probabilities [n, classes] or None; float32."""

    features: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None


@torch.no_grad()
def extract(
    extractor: Extractor, images: Archive, device: torch.device, batch_size: int = 64, progress: bool = False
) -> Features:
    """Raises TypeError or ValueError saying what the extractor gave and what it must give."""
    parts: dict[str, list[np.ndarray]] = {}
    with progress_bar(progress, len(images), f"features of {images.path.name}", "image") as tick:
        for batch in images.batches(batch_size):
            pixels = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).contiguous().to(device)
            for name, tensor in _checked(extractor(pixels), len(batch)).items():
                parts.setdefault(name, []).append(tensor.flatten(1).float().cpu().numpy())
            for _ in batch:
                tick()
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if short := [name for name, rows in joined.items() if len(rows) != len(images)]:
        raise ValueError(f"the feature extractor gave {short[0]} for some images only")
    return Features(**joined)


def _checked(outputs, count: int) -> Mapping[str, Tensor]:
    if isinstance(outputs, Tensor):
        outputs = {"features": outputs}
    if not isinstance(outputs, Mapping) or "features" not in outputs or set(outputs) - set(_OUTPUTS):
        found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(f"the feature extractor gave {found}, must give a tensor or a dict of {', '.join(_OUTPUTS)}")
    for name, tensor in outputs.items():
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or len(tensor) != count:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"the feature extractor gave {name} {shape}, must be [{count}, ...] for {count} images")
    return outputs


def compare(sampled: Features, reference: Features | None, statistics: Mapping[str, Statistics]) -> dict:
    """fid, sfid, inception_score, precision and recall, those that can be had; left_out says why the others cannot.

    reference: of the reference's images, for precision and recall, and its Gaussian fits where `statistics` has none.
    """
    results: dict = {}
    left_out: dict[str, str] = {}
    for name, kind in (("fid", "features"), ("sfid", "spatial")):
        rows, real = getattr(sampled, kind), None if reference is None else getattr(reference, kind)
        if rows is None:
            left_out[name] = f"the feature extractor gives no {kind}"
        elif kind in statistics or real is not None:
            fit = statistics[kind] if kind in statistics else Statistics.of(real)
            results[name] = frechet_distance(Statistics.of(rows), fit)
        else:
            left_out[name] = f"there are no reference images, nor statistics of their {kind}"
    if sampled.probabilities is None:
        left_out["inception_score"] = "the feature extractor gives no probabilities"
    else:
        splits = min(10, len(sampled.probabilities))
        results["inception_score"], results["inception_score_deviation"] = inception_score(
            sampled.probabilities, splits
        )
    if reference is None:
        left_out["precision"] = left_out["recall"] = "there are no reference images"
    else:
        results["precision"], results["recall"] = precision_recall(reference.features, sampled.features)
    return results | {"left_out": left_out}
