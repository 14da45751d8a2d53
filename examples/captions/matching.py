"""How far pictures are what their captions say, and how far they would be by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from captions.properties import Thresholds
from captions.wording import PROPERTIES, Description
from torch import Tensor

from flexdit_ext.evaluation.digits import DigitClassifier

# What is judged: single statements, all of a caption's properties, and these with the digit.
JUDGED = ("digit", *PROPERTIES, "properties", "everything")
_PARTS = {name: (name,) for name in ("digit", *PROPERTIES)} | {
    "properties": PROPERTIES,
    "everything": ("digit", *PROPERTIES),
}
_SHUFFLES = 20


@torch.no_grad()
def read(images: Tensor, classifier: DigitClassifier, thresholds: Thresholds) -> list[Description]:
    """Of every image [n, 1, 8, 8] the digit that the classifier sees, and the measured levels."""
    digits = classifier(images.clamp(-1, 1)).argmax(1).tolist()
    levels = thresholds.levels(images)
    return [Description(digit, **{name: levels[name][i] for name in PROPERTIES}) for i, digit in enumerate(digits)]


def states(asked: Description, judged: str) -> bool:
    """Whether the caption states something of `judged`, one of JUDGED."""
    return any(getattr(asked, name) is not None for name in _PARTS[judged])


def fits(seen: Description, asked: Description, judged: str) -> bool:
    """Whether the picture has what the caption states of `judged`."""
    return all(getattr(asked, name) in (None, getattr(seen, name)) for name in _PARTS[judged])


def shares(seen: Sequence[Description], asked: Sequence[Description]) -> dict[str, float]:
    """Judged -> share of the captions that fit their picture, among those that state something of it."""
    pairs = list(zip(seen, asked, strict=True))
    found = {judged: [fits(*pair, judged) for pair in pairs if states(pair[1], judged)] for judged in JUDGED}
    return {judged: float(np.mean(values)) if values else float("nan") for judged, values in found.items()}


def difference(
    seen: Sequence[Description], other: Sequence[Description], asked: Sequence[Description], judged: str
) -> tuple[float, float]:
    """Share of `seen` minus that of `other`, and its standard error; picture i of both was drawn for caption i from the
    same noise."""
    rows = zip(seen, other, asked, strict=True)
    gaps = [
        fits(one, caption, judged) - fits(two, caption, judged) for one, two, caption in rows if states(caption, judged)
    ]
    return float(np.mean(gaps)), float(np.std(gaps) / len(gaps) ** 0.5)


def counts(asked: Sequence[Description]) -> dict[str, int]:
    """Judged -> number of captions that state something of it."""
    return {judged: sum(states(one, judged) for one in asked) for judged in JUDGED}


def shuffled_shares(
    seen: Sequence[Description], asked: Sequence[Description], groups: Sequence[int], seed: int
) -> dict[str, float]:
    """shares() with the captions shuffled among the pictures of the same group, a mean over 20 shuffles."""
    generator, groups = np.random.default_rng(seed), np.asarray(groups)
    found = []
    for _ in range(_SHUFFLES):
        order = np.arange(len(groups))
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            order[members] = generator.permutation(members)
        found.append(shares(seen, [asked[index] for index in order]))
    return {judged: float(np.mean([one[judged] for one in found])) for judged in JUDGED}
