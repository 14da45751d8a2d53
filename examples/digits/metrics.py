"""What the report says about sets of features: distances, and how far they are noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from flexdit_ext.evaluation.digits import DigitClassifier, DigitSplit, distance, features

_BOOTSTRAPS = 50


def disjoint_sets_distance(rows: np.ndarray, labels: np.ndarray, seed: int, repeats: int = 20) -> float:
    """Mean distance between two disjoint halves of one real set, every class halved: what sampling noise gives."""
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(repeats):
        order = generator.permutation(len(rows))
        order = order[np.argsort(labels[order], kind="stable")]  # neighbours are random digits of one class
        distances.append(distance(rows[order[::2]], rows[order[1::2]]))
    return float(np.mean(distances))


def mean_distance(sets: Sequence[np.ndarray], reference: np.ndarray) -> float:
    """Mean over sets of samples. The distance of one set of 500 has a standard error of about 4%; a mean over sets,
    unlike the distance of their union, is still comparable with that of 500 real digits."""
    return float(np.mean([distance(rows, reference) for rows in sets]))


def ratio_standard_error(
    numerator: Sequence[np.ndarray], denominator: Sequence[np.ndarray], reference: np.ndarray, seed: int
) -> float:
    """Bootstrap standard error of the ratio of two mean_distance to `reference`.

    Row i of both came from the same noise and label, so both are resampled together.
    """
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(_BOOTSTRAPS):
        draws = [generator.integers(len(rows), size=len(rows)) for rows in numerator]
        above, below = (
            mean_distance([rows[draw] for rows, draw in zip(sets, draws, strict=True)], reference)
            for sets in (numerator, denominator)
        )
        ratios.append(above / below)
    return float(np.std(ratios))


def compare_distances(
    classifier: DigitClassifier, digits: DigitSplit, images: Mapping[str, Tensor], key: str, seed: int
) -> dict:
    """For the report: "frechet_distance" and "counts" of the samples of two models, "dense" and `key`.

    images: model -> [sets, n, 1, 8, 8], made from the same noise and conditions, of the classes in proportion.
    """
    real, held_out = (features(classifier, pixels) for pixels in (digits.train_images, digits.held_out_images))
    sampled = {name: [features(classifier, pixels) for pixels in sets] for name, sets in images.items()}
    distances = {name: mean_distance(sets, real) for name, sets in sampled.items()}
    distances |= {
        "by_set": {name: [distance(rows, real) for rows in sets] for name, sets in sampled.items()},
        "held_out": distance(held_out, real),
        "train_halves": disjoint_sets_distance(real, digits.train_labels.numpy(), seed),
        "ratio": distances[key] / distances["dense"],
        "ratio_standard_error": ratio_standard_error(sampled[key], sampled["dense"], real, seed),
    }
    sets, samples = images[key].shape[:2]
    counts = {"samples": samples, "sets": sets, "held_out": len(held_out), "train": len(real)}
    return {"frechet_distance": distances, "counts": counts}
