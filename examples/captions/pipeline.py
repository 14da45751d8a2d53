"""The demo from the data to the report."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from captions.data import Captions
from captions.encoders import T5Encoder, WordEncoder
from captions.matching import counts, difference, fits, read, shares, shuffled_shares
from captions.models import CaptionedPixArt, make_models
from captions.pictures import save_captioned
from captions.report import judge, to_markdown
from common.demo import Demo
from common.report import count_macs
from common.sampling import sample_in_turn
from common.training import TrainingSettings
from digits.metrics import compare_distances
from torch import Tensor

from flexdit_ext.evaluation.digits import (
    CLASSIFIER_STEPS,
    DigitClassifier,
    DigitSplit,
    accuracy,
    load_split,
    train_classifier,
)

OUTPUTS = ("report.json", "report.md", "samples.png", "samples_dense.png", "losses.png")
_PICTURED = 48


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """sets: how many pictures are drawn for what each held-out digit's caption states; captions: as many of these, None
    is all."""

    sets: int
    steps: int
    seed: int
    captions: int | None = None
    cfg_scale: float = 2.0
    batch_size: int = 100


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    classifier_steps: int
    training: TrainingSettings
    sampling: SamplingSettings
    judged: bool  # whether the targets count
    text_encoder: Path | None = None  # of T5; None: words, learned


def sample_captions(
    models: Mapping[str, CaptionedPixArt], captions: Sequence[str], settings: SamplingSettings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images [n, 1, 8, 8] and images per second of every model, the text encoder's time included."""

    def draw(model: CaptionedPixArt, batch: Sequence[str], before: int) -> Tensor:
        return model.sample(batch, settings.steps, settings.cfg_scale, settings.seed, before)

    starts = range(0, len(captions), settings.batch_size)
    return sample_in_turn(models, [captions[start : start + settings.batch_size] for start in starts], draw)


class CaptionsDemo(Demo):
    """One run."""

    def __init__(self, directory: Path, settings: DemoSettings):
        self.settings, seed = settings, settings.training.seed
        self.digits: DigitSplit = load_split(seed)
        self.captions = Captions.of(self.digits, seed)
        super().__init__(directory, make_models(self._encoder(settings.text_encoder)), OUTPUTS)

    def _encoder(self, folder: Path | None) -> Callable[[], WordEncoder | T5Encoder]:
        if folder is None:
            return lambda: WordEncoder.for_captions(self.captions.train)
        encoder = T5Encoder(folder)
        return lambda: encoder

    def run(self) -> dict:
        """Writes everything into the folder; returns the content of report.json."""
        settings, digits, key = self.settings, self.digits, self.models.key
        with self.phase("classifier"):
            classifier = train_classifier(
                digits.train_images, digits.train_labels, settings.classifier_steps, settings.training.seed
            )
        trainers = self.train(self.captions.draw_from(digits.train_images), settings.training)
        models = dict(zip(("dense", key), (trainer.average for trainer in trainers), strict=True))
        sets = [captions[: settings.sampling.captions] for captions in self.captions.sets(settings.sampling.sets)]
        with self.phase("sampling"):
            images, rates = sample_captions(models, [one for captions in sets for one in captions], settings.sampling)
        images = {name: rows.unflatten(0, (len(sets), -1)) for name, rows in images.items()}
        with self.phase("measuring"):
            results = self._measure(classifier, images)
        for name, path in (("dense", "samples_dense.png"), (key, "samples.png")):
            self._save_picture(self.directory / path, images[name][0, :_PICTURED], sets[0], classifier)
        tokens = sum(models[key].encoder(sets[0])[1].sum(1).tolist()) / len(sets[0])
        results["macs"] = count_macs(self.models, *models.values(), caption_tokens=round(tokens))
        results |= {"caption_tokens": tokens, "images_per_second": rates}
        results |= self.conditions(settings.training, settings.sampling)
        results |= {"text_encoder": "T5" if settings.text_encoder else "words"}
        return self.finish(results, judge if settings.judged else None, to_markdown)

    def _save_picture(self, path: Path, images: Tensor, captions: Sequence[str], classifier: DigitClassifier) -> None:
        seen = read(images, classifier, self.captions.thresholds)
        fit = [fits(*pair, "everything") for pair in zip(seen, self.captions.asked)]
        save_captioned(path, images, captions, fit)

    def _measure(self, classifier: DigitClassifier, images: Mapping[str, Tensor]) -> dict:
        """Shares of fitting captions and distances; images: model -> [sets, n, 1, 8, 8]."""
        digits, captions, seed, key = self.digits, self.captions, self.settings.training.seed, self.models.key
        sets, count = images[key].shape[:2]
        asked, labels = captions.asked[:count] * sets, digits.held_out_labels[:count].tolist() * sets
        seen = {name: read(rows.flatten(0, 1), classifier, captions.thresholds) for name, rows in images.items()}
        real = read(digits.held_out_images, classifier, captions.thresholds)
        fitting = {name: shares(one, asked) for name, one in seen.items()} | {
            "held_out": shares(real, captions.asked),
            "shuffled": shuffled_shares(seen[key], asked, [0] * len(asked), seed),
            "shuffled_within_digit": shuffled_shares(seen[key], asked, labels, seed),
        }
        return {
            "fitting": fitting,
            "stated": counts(asked),
            "properties_difference": difference(seen[key], seen["dense"], asked, "properties"),
            "accuracy": {"held_out": accuracy(classifier, digits.held_out_images, digits.held_out_labels)},
            "thresholds": captions.thresholds.limits,
        } | compare_distances(classifier, digits, images, key, seed)


def make_settings(arguments: argparse.Namespace) -> DemoSettings:
    """--quick: every line runs, on so few steps and samples that nothing can be learned."""
    quick, seed = arguments.quick, arguments.seed
    training = TrainingSettings(arguments.steps, arguments.fork_step, seed, batch_size=16 if quick else 64)
    sampling = SamplingSettings(2, 3 if quick else 25, seed, captions=40 if quick else None)
    return DemoSettings(50 if quick else CLASSIFIER_STEPS, training, sampling, not quick, arguments.text_encoder)


def run_demo(arguments: argparse.Namespace) -> bool:
    """arguments: of run.py. True unless a target was missed."""
    results = CaptionsDemo(arguments.out, make_settings(arguments)).run()
    return all(results["targets"].values())
