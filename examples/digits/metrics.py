"""What is measured on images: accuracy of the classifier, and Fréchet distances in its features."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from classifier import DigitClassifier
from torch import Tensor


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
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real  # rounding leaves tiny imaginary parts
    mean_gap = a.mean(axis=0) - b.mean(axis=0)
    return float(mean_gap @ mean_gap + np.trace(covariance_a + covariance_b - 2 * root))


def two_halves_distance(rows: np.ndarray, seed: int, repeats: int = 20) -> float:
    """Mean distance between two disjoint random halves of one real set: what sampling noise alone gives."""
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(repeats):
        order = generator.permutation(len(rows))
        distances.append(frechet_distance(rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]))
    return float(np.mean(distances))
