"""Captions of digits: written from a description in varying words, and read back."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from captions.properties import Thresholds
from torch import Tensor

PROPERTIES = ("thickness", "tilt", "width")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# (property, level) -> the words for it, each before the digit ("a bold three") or after it ("a three, bold").
_ADJECTIVES = {
    ("thickness", "thin"): ("thin", "fine"),
    ("thickness", "thick"): ("thick", "bold"),
    ("tilt", "upright"): ("upright", "straight"),
    ("width", "narrow"): ("narrow", "slim"),
    ("width", "wide"): ("wide", "broad"),
}
_LEANING = ("tilted", "leaning")  # "left" or "right", after the digit
_FILLERS = ("a", "an", "digit", "number")
_SAID = 0.7  # the share of a digit's properties that its caption names
_DIGIT_SAID = 0.9


@dataclass(frozen=True)
class Description:
    """What a caption states, None what it leaves open: the digit 0..9, and the levels of properties.LEVELS, of which
    captions have no word for "medium"."""

    digit: int | None = None
    thickness: str | None = None
    tilt: str | None = None
    width: str | None = None

    def stated(self) -> dict[str, str]:
        """Property -> level, of those that are stated."""
        return {name: level for name in PROPERTIES if (level := getattr(self, name)) is not None}


def split_words(caption: str) -> list[str]:
    """In lower case, without punctuation."""
    return [word for word in re.split(r"[\s,.;:!?]+", caption.lower()) if word]


def describe(images: Tensor, labels: Tensor, thresholds: Thresholds, generator: random.Random) -> list[Description]:
    """Of every image what a caption may say, some of it left out at random."""
    levels = thresholds.levels(images)

    def describe_one(index: int, label: int) -> Description:
        said = {
            name: level
            for name in PROPERTIES
            if (level := levels[name][index]) != "medium" and generator.random() < _SAID
        }
        return Description(label if generator.random() < _DIGIT_SAID else None, **said)

    return [describe_one(index, label) for index, label in enumerate(labels.tolist())]


def render(description: Description, generator: random.Random) -> str:
    """A caption in words chosen at random; parse() reads the same description from it."""
    before, after = [], []
    for name, level in description.stated().items():
        if (name, level) in _ADJECTIVES:
            (before if generator.random() < 0.5 else after).append(generator.choice(_ADJECTIVES[name, level]))
        else:
            after.append(f"{generator.choice(_LEANING)} {level}")
    generator.shuffle(before)
    generator.shuffle(after)
    digit = description.digit
    if digit is not None and generator.random() < 0.3:  # "digit 3, thin"
        words = [*before, generator.choice(("digit", "number")), generator.choice((str(digit), DIGITS[digit]))]
        article = bool(before)
    else:
        words, article = [*before, "digit" if digit is None else DIGITS[digit]], True
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" and words[0] != "one" else "a")
    return " ".join(words) + "".join(f"{generator.choice((', ', ' '))}{phrase}" for phrase in after)


def known_words() -> list[str]:
    """Every word that parse() understands."""
    adjectives = [word for words in _ADJECTIVES.values() for word in words]
    return sorted({*_FILLERS, *DIGITS, *map(str, range(10)), *adjectives, *_LEANING, "left", "right"})


def parse(caption: str) -> Description:
    """What the caption states. Raises ValueError for an unknown word, naming it and the known ones, and for a
    contradiction."""
    meanings = {word: meaning for meaning, words in _ADJECTIVES.items() for word in words}
    meanings |= {word: ("tilt", word) for word in ("left", "right")}
    meanings |= {word: ("digit", value) for value in range(10) for word in (str(value), DIGITS[value])}
    check_words(caption, known_words())
    stated: dict = {}
    for word in split_words(caption):
        if word not in meanings:
            continue
        name, value = meanings[word]
        if stated.setdefault(name, value) != value:
            raise ValueError(f"the caption {caption!r} contradicts itself in the {name}: {stated[name]} and {value}")
    return Description(**stated)


def check_words(caption: str, known: Sequence[str]) -> None:
    """Raises ValueError naming the first word that is not known, and the known ones."""
    for word in split_words(caption):
        if word not in known:
            raise ValueError(f"the caption {caption!r} has the unknown word {word!r}; known are {', '.join(known)}")
