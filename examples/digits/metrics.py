"""What is measured on images: accuracy of the classifier, and Fréchet distances in its features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from classifier import DigitClassifier
from torch import Tensor

_BOOTSTRAPS = 50


@torch.no_grad()
def features(classifier: DigitClassifier, images: Tensor) -> np.ndarray:
    """Float64 [n, 32]; pixels are clamped to the range of real images."""
    return classifier.features(images.clamp(-1, 1)).double().numpy()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the classifier takes for the digit asked for."""
    return (classifier(images.clamp(-1, 1)).argmax(1) == labels).double().mean().item()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussian fits to the rows (Heusel et al., 1706.08500)."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The root's trace from eigenvalues: unlike sqrtm, this also takes fits of few rows, which are singular.
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real
    root_trace = np.sqrt(eigenvalues.clip(min=0)).sum()
    mean_gap = a.mean(axis=0) - b.mean(axis=0)
    return float(mean_gap @ mean_gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace)


def disjoint_sets_distance(rows: np.ndarray, labels: np.ndarray, seed: int, repeats: int = 20) -> float:
    """Mean distance between two disjoint halves of one real set, every class halved: what sampling noise gives."""
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(repeats):
        order = generator.permutation(len(rows))
        order = order[np.argsort(labels[order], kind="stable")]  # neighbours are random digits of one class
        distances.append(frechet_distance(rows[order[::2]], rows[order[1::2]]))
    return float(np.mean(distances))


def mean_distance(sets: Sequence[np.ndarray], reference: np.ndarray) -> float:
    """Mean over sets of samples. The distance of one set of 500 has a standard error of about 4%; a mean over sets,
    unlike the distance of their union, is still comparable with that of 500 real digits."""
    return float(np.mean([frechet_distance(rows, reference) for rows in sets]))


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
