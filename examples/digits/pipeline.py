"""The demo from the data to the report."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from images import save_digit_grid, save_loss_curves
from metrics import disjoint_sets_distance, mean_distance, ratio_standard_error
from report import count_macs, hardware, judge, write_report
from sampling import SamplingSettings, sample_in_turn
from torch import Tensor
from training import Trainer, TrainingSettings

from flexdit_ext.evaluation.digits import (
    CLASSIFIER_STEPS,
    DigitClassifier,
    DigitSplit,
    accuracy,
    distance,
    features,
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


class Demo:
    """One run; `seconds` collects the time of each phase."""

    def __init__(self, directory: Path, settings: DemoSettings):
        self.directory, self.settings = directory, settings
        self.seconds: dict[str, float] = {}
        for name in OUTPUTS:  # of an earlier run: pictures and report must belong together
            (directory / name).unlink(missing_ok=True)

    def run(self) -> dict:
        """Writes everything into the folder; returns the content of report.json."""
        settings = self.settings
        digits = load_split(settings.training.seed)
        with self._phase("classifier"):
            classifier = train_classifier(
                digits.train_images, digits.train_labels, settings.classifier_steps, settings.training.seed
            )
        dense, flexdit = self._train(digits)
        models = {"dense": dense.average, "flexdit": flexdit.average}
        with self._phase("sampling"):
            images, rates = sample_in_turn(models, settings.sampling)
        labels = settings.sampling.labels
        save_digit_grid(self.directory / "samples_dense.png", images["dense"][0], labels)
        save_digit_grid(self.directory / "samples.png", images["flexdit"][0], labels)
        with self._phase("measuring"):
            results = self._measure(classifier, digits, images)
        results |= {"macs": count_macs(**models), "images_per_second": rates} | self._conditions()
        results["targets"] = judge(results) if settings.judged else {}
        print("\n" + write_report(self.directory, results))
        return results

    def _train(self, digits: DigitSplit) -> tuple[Trainer, Trainer]:
        data, settings = (digits.train_images, digits.train_labels), self.settings.training
        dense = Trainer.dense(settings)
        with self._phase("dense to the fork"):
            dense.train(settings.fork_step, *data, "dense, to the fork")
        flexdit = dense.to_flexdit()
        self._save("dense", dense)
        with self._phase("dense after the fork"):
            dense.train(settings.steps, *data, "dense, after it")
        self._save("dense", dense)
        self._save_curves(dense, None)
        with self._phase("FlexDiT"):
            flexdit.train(settings.steps, *data, "FlexDiT")
        self._save("flexdit", flexdit)
        self._save_curves(dense, flexdit)
        return dense, flexdit

    def _save(self, name: str, trainer: Trainer) -> None:
        trainer.average.save_pretrained(self.directory / name)

    def _save_curves(self, dense: Trainer, flexdit: Trainer | None) -> None:
        curves = {"dense DiT": (0, dense.losses)}
        if flexdit is not None:
            curves["FlexDiT"] = (flexdit.first_step, flexdit.losses)
        save_loss_curves(self.directory / "losses.png", curves)

    def _measure(self, classifier: DigitClassifier, digits: DigitSplit, images: dict[str, Tensor]) -> dict:
        seed, labels = self.settings.training.seed, self.settings.sampling.labels
        real = features(classifier, digits.train_images)
        held_out = features(classifier, digits.held_out_images)
        sampled = {name: [features(classifier, pixels) for pixels in sets] for name, sets in images.items()}
        distances = {name: mean_distance(sets, real) for name, sets in sampled.items()}
        return {
            "accuracy": {name: accuracy(classifier, sets[0], labels) for name, sets in images.items()}
            | {"held_out": accuracy(classifier, digits.held_out_images, digits.held_out_labels)},
            "frechet_distance": distances
            | {
                "by_set": {name: [distance(rows, real) for rows in sets] for name, sets in sampled.items()},
                "held_out": distance(held_out, real),
                "train_halves": disjoint_sets_distance(real, digits.train_labels.numpy(), seed),
                "ratio": distances["flexdit"] / distances["dense"],
                "ratio_standard_error": ratio_standard_error(sampled["flexdit"], sampled["dense"], real, seed),
            },
            "counts": {
                "samples": len(labels),
                "sets": len(sampled["dense"]),
                "held_out": len(held_out),
                "train": len(real),
            },
        }

    def _conditions(self) -> dict:
        return {
            "hardware": hardware(),
            "seed": self.settings.training.seed,
            "training": dataclasses.asdict(self.settings.training),
            "sampling": dataclasses.asdict(self.settings.sampling),
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
        }

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def make_settings(steps: int, fork_step: int, seed: int, quick: bool) -> DemoSettings:
    """quick: every line runs, on so few steps and samples that nothing can be learned."""
    training = TrainingSettings(steps, fork_step, seed, batch_size=16 if quick else 64)
    sampling = SamplingSettings(4 if quick else 50, sets=2 if quick else 3, steps=3 if quick else 25, seed=seed)
    return DemoSettings(50 if quick else CLASSIFIER_STEPS, training, sampling, judged=not quick)


def run_demo(arguments: argparse.Namespace) -> bool:
    """arguments: of run.py. True unless a target was missed."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = make_settings(arguments.steps, arguments.fork_step, arguments.seed, arguments.quick)
    results = Demo(arguments.out, settings).run()
    return all(results["targets"].values())
