"""Evaluation: sets of images drawn by many processes (drawing), features of them (features), and the metrics."""

from .archive import Archive
from .drawing import balanced_labels, draw_set
from .features import Features, compare, extract, load_extractor
from .metrics import Statistics, frechet_distance, inception_score, precision_recall
from .ranks import Ranks

__all__ = [
    "Archive",
    "Features",
    "Ranks",
    "Statistics",
    "balanced_labels",
    "compare",
    "draw_set",
    "extract",
    "frechet_distance",
    "inception_score",
    "load_extractor",
    "precision_recall",
]
