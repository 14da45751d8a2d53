"""evaluation.metrics against closed forms, brute force and scipy."""

import numpy as np
import pytest

from flexdit_ext.evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall


def test_frechet_distance_of_diagonal_gaussians():
    a = Statistics(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 0.0]))
    b = Statistics(np.array([1.5, 2.0, 1.0]), np.diag([9.0, 0.25, 0.0]))
    # |m_a - m_b|^2 + sum (s_a - s_b)^2
    assert frechet_distance(a, b) == pytest.approx(0.25 + 4 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [400, 12])  # the second fit is singular
def test_frechet_distance_is_scipys(rows):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, 20)) @ rng.normal(size=(20, 20)) + rng.normal(size=20) for _ in range(2))
    a, b = Statistics.of(x), Statistics.of(y)
    jitter = 0 if rows > 20 else 1e-9 * np.eye(20)  # sqrtm's own trouble with singular products
    root = linalg.sqrtm((a.covariance + jitter) @ (b.covariance + jitter)).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10 if rows > 20 else 1e-3)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_samples_approaches_the_gaussians():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200_000, 2)), rng.normal(size=(200_000, 2)) * [2, 1] + [0, 3]
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(1 + 9, rel=0.01)


def test_inception_score_of_known_distributions():
    certain = np.eye(10)[np.arange(100) % 10]
    assert inception_score(certain, splits=5) == pytest.approx((10, 0))
    assert inception_score(np.full((40, 7), 1 / 7), splits=4) == pytest.approx((1, 0))
    # KL of (3/4, 1/4) from (1/2, 1/2)
    even = np.array([[0.75, 0.25], [0.25, 0.75]] * 10)
    expected = np.exp(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert inception_score(even, splits=2) == pytest.approx((expected, 0))


def test_inception_score_is_split_in_order():
    mean, deviation = inception_score(np.concatenate([np.eye(4), np.full((4, 4), 0.25)]), splits=2)
    assert (mean, deviation) == pytest.approx((2.5, 1.5))
    # Salimans et al.'s edges, i * n // splits: rows 0, 1 and 2, 3 and 4
    uneven = np.eye(2)[[0, 0, 1, 0, 1]]
    assert inception_score(uneven, splits=3) == pytest.approx((5 / 3, np.std([1, 2, 2])))


def brute_force(real, sampled, k):
    def share(points, centers):
        inside = 0
        for p in points:
            for i, c in enumerate(centers):
                others = sorted(np.linalg.norm(c - other) for j, other in enumerate(centers) if j != i)
                if np.linalg.norm(p - c) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(sampled, real), share(real, sampled)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k, monkeypatch):
    monkeypatch.setattr("flexdit_ext.evaluation.metrics._ROWS", 7)  # several blocks of rows
    rng = np.random.default_rng(2)
    real, sampled = rng.normal(size=(30, 3)), rng.normal(size=(20, 3)) + 0.8
    assert precision_recall(real, sampled, k) == pytest.approx(brute_force(real, sampled, k), abs=0)
    assert 0 < precision_recall(real, sampled, k)[0] < 1


def test_precision_and_recall_of_a_lost_mode():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 100
    both = np.concatenate([one, other])
    assert precision_recall(both, one) == (1, 0.5)
    assert precision_recall(one, both) == (0.5, 1)
    assert precision_recall(one, other) == (0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Statistics.of(np.zeros((1, 3))), "n at least 2"),
        (lambda: Statistics.of(np.full((5, 3), np.nan)), "not finite"),
        (lambda: frechet_distance(*(Statistics(np.zeros(d), np.eye(d)) for d in (2, 3))), "2 and 3 dimensions"),
        (lambda: inception_score(np.zeros((5, 2)), 1), "sum to 1"),
        (lambda: inception_score(np.eye(3), 4), "splits is 4"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "neighbours is 3"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 3))), "2 and 3 dimensions"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
