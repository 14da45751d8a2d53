"""The demo from the data to the report."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from common.demo import Demo
from common.report import count_macs
from common.training import Draw, TrainingSettings
from digits.images import save_digit_grid
from digits.metrics import compare_distances
from digits.models import MODELS
from digits.report import judge, to_markdown
from digits.sampling import SamplingSettings, sample_digits
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


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    classifier_steps: int
    training: TrainingSettings
    sampling: SamplingSettings
    judged: bool  # whether the targets count


def draw_from(digits: DigitSplit) -> Draw:
    """Batches of training digits with their labels."""
    images, labels = digits.train_images, digits.train_labels

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = torch.randint(len(labels), (count,), generator=generator)
        return images[batch], {"y": labels[batch]}

    return draw


class DigitsDemo(Demo):
    """One run."""

    def __init__(self, directory: Path, settings: DemoSettings):
        super().__init__(directory, MODELS, OUTPUTS)
        self.settings = settings

    def run(self) -> dict:
        """Writes everything into the folder; returns the content of report.json."""
        settings = self.settings
        digits = load_split(settings.training.seed)
        with self.phase("classifier"):
            classifier = train_classifier(
                digits.train_images, digits.train_labels, settings.classifier_steps, settings.training.seed
            )
        dense, flexdit = (trainer.average for trainer in self.train(draw_from(digits), settings.training))
        with self.phase("sampling"):
            images, rates = sample_digits({"dense": dense, "flexdit": flexdit}, settings.sampling)
        labels = settings.sampling.labels
        save_digit_grid(self.directory / "samples_dense.png", images["dense"][0], labels)
        save_digit_grid(self.directory / "samples.png", images["flexdit"][0], labels)
        with self.phase("measuring"):
            results = self._measure(classifier, digits, images)
        results |= {"macs": count_macs(MODELS, dense, flexdit), "images_per_second": rates}
        results |= self.conditions(settings.training, settings.sampling)
        return self.finish(results, judge if settings.judged else None, to_markdown)

    def _measure(self, classifier: DigitClassifier, digits: DigitSplit, images: dict[str, Tensor]) -> dict:
        labels = self.settings.sampling.labels
        return {
            "accuracy": {name: accuracy(classifier, sets[0], labels) for name, sets in images.items()}
            | {"held_out": accuracy(classifier, digits.held_out_images, digits.held_out_labels)},
        } | compare_distances(classifier, digits, images, MODELS.key, self.settings.training.seed)


def make_settings(steps: int, fork_step: int, seed: int, quick: bool) -> DemoSettings:
    """quick: every line runs, on so few steps and samples that nothing can be learned."""
    training = TrainingSettings(steps, fork_step, seed, batch_size=16 if quick else 64)
    sampling = SamplingSettings(4 if quick else 50, sets=2 if quick else 3, steps=3 if quick else 25, seed=seed)
    return DemoSettings(50 if quick else CLASSIFIER_STEPS, training, sampling, judged=not quick)


def run_demo(arguments: argparse.Namespace) -> bool:
    """arguments: of run.py. True unless a target was missed."""
    settings = make_settings(arguments.steps, arguments.fork_step, arguments.seed, arguments.quick)
    results = DigitsDemo(arguments.out, settings).run()
    return all(results["targets"].values())
