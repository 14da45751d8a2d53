"""What sets of images are measured by, as formulas on their features: numpy float64, no network in here."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

_ROWS = 1024  # of a distance matrix at once


class Statistics(NamedTuple):
    """A Gaussian fit of features: mean [d], covariance [d, d], float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """features: [n, d], n at least 2."""
        features = _rows("features", features, least=2)
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the square of the Fréchet distance of two Gaussians: FID, and
    sFID on spatial features.

    Sources: Heusel et al., arXiv 1706.08500; Nash et al., arXiv 2103.03841 (spatial features). The root's trace is that
    of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), which also takes the singular fits of few images.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features have {a.mean.size} and {b.mean.size} dimensions, they must agree")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    gap = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(gap @ gap + trace)


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)): its mean and standard deviation over `splits` consecutive parts.

    probabilities: [n, classes], rows that sum to 1. Source: Salimans et al., arXiv 1606.03498.
    """
    probabilities = _rows("probabilities", probabilities)
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits is {splits}, must be from 1 to the {len(probabilities)} images")
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise ValueError("probabilities must not be negative and sum to 1 in every row")
    scores = []
    edges = [i * len(probabilities) // splits for i in range(splits + 1)]
    for first, last in itertools.pairwise(edges):
        part = probabilities[first:last]
        marginal = part.mean(axis=0)
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)  # 0 log 0 = 0
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, sampled: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Share of sampled images within the real ones' manifold, and of real ones within the sampled ones'. A set's
    manifold is the union of balls around its points that reach to their k-th nearest neighbour in the set.

    real, sampled: [n, d] and [m, d]. Source: Kynkäänniemi et al., arXiv 1904.06991, k = 3.
    """
    sets = [torch.from_numpy(_rows(name, x)) for name, x in (("real", real), ("sampled", sampled))]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"the features have {sets[0].shape[1]} and {sets[1].shape[1]} dimensions, they must agree")
    least = min(len(points) for points in sets)
    if not 1 <= neighbours < least:
        raise ValueError(f"neighbours is {neighbours}, must be at least 1 and below the {least} images of a set")
    real_points, sampled_points = sets
    return (
        _share_within(sampled_points, real_points, _radii(real_points, neighbours)),
        _share_within(real_points, sampled_points, _radii(sampled_points, neighbours)),
    )


def _radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance of each point to its k-th nearest neighbour."""
    radii = []
    for start in range(0, len(points), _ROWS):
        rows = points[start : start + _ROWS]
        distances = torch.cdist(rows, points)
        own = torch.arange(len(rows))
        distances[own, own + start] = torch.inf  # itself is no neighbour, a copy of it is
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_within(points: torch.Tensor, centers: torch.Tensor, radii: torch.Tensor) -> float:
    within = [(torch.cdist(rows, centers) <= radii).any(dim=1) for rows in points.split(_ROWS)]
    return torch.cat(within).double().mean().item()


def _rows(name: str, values: np.ndarray, least: int = 1) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) < least:
        raise ValueError(f"{name} has shape {values.shape}, must be [n, d] with n at least {least}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    return values
