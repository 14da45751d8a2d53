"""The demo from the data to the report."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from common.demo import Demo
from common.report import count_macs
from common.training import Draw, TrainingSettings
from torch import Tensor
from video.judges import Judges, train_judges
from video.models import MODELS
from video.pictures import save_animations, save_strip
from video.rendering import NUM_LABELS, NUM_MOTIONS, draw_clips, draw_paths, render
from video.report import judge, to_markdown
from video.sampling import SamplingSettings, sample_clips

from flexdit_ext.evaluation.digits import DigitSplit, load_split

OUTPUTS = (
    "report.json", "report.md", "losses.png", "samples.gif", "samples.webp", "samples_dense.gif", "samples_dense.webp",
    "frames.png", "frames_dense.png",
)  # fmt: skip


@dataclass(frozen=True)
class DemoSettings:
    judge_steps: int
    training: TrainingSettings
    sampling: SamplingSettings
    judged: bool  # whether the targets count


def draw_from(digits: DigitSplit) -> Draw:
    """Batches of clips of the training digits, rendered as they are needed, with their labels."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clips, labels = draw_clips(digits.train_images, digits.train_labels, count, generator)
        return clips, {"y": labels}

    return draw


def held_out_clips(digits: DigitSplit, seed: int) -> tuple[Tensor, Tensor]:
    """One clip of every held-out digit, the motions in turn, with their labels."""
    motions = torch.arange(len(digits.held_out_labels)) % NUM_MOTIONS
    paths = draw_paths(motions, torch.Generator().manual_seed(seed))
    return render(digits.held_out_images, paths), digits.held_out_labels * NUM_MOTIONS + motions


class VideoDemo(Demo):
    """One run."""

    def __init__(self, directory: Path, settings: DemoSettings):
        super().__init__(directory, MODELS, OUTPUTS)
        self.settings = settings

    def run(self) -> dict:
        """Writes everything into the folder; returns the content of report.json."""
        settings = self.settings
        digits = load_split(settings.training.seed)
        with self.phase("classifiers"):
            judges = train_judges(
                digits.train_images, digits.train_labels, settings.judge_steps, settings.training.seed
            )
        dense, flexlatte = (trainer.average for trainer in self.train(draw_from(digits), settings.training))
        with self.phase("sampling"):
            clips, rates = sample_clips({"dense": dense, "flexlatte": flexlatte}, settings.sampling)
        self._save_pictures(clips)
        with self.phase("measuring"):
            results = self._measure(judges, digits, clips)
        results |= {"macs": count_macs(MODELS, dense, flexlatte), "clips_per_second": rates}
        results |= self.conditions(settings.training, settings.sampling)
        return self.finish(results, judge if settings.judged else None, to_markdown)

    def _save_pictures(self, clips: dict[str, Tensor]) -> None:
        labels = self.settings.sampling.labels
        for name, suffix in (("flexlatte", ""), ("dense", "_dense")):
            animations = [self.directory / f"samples{suffix}.{ending}" for ending in ("gif", "webp")]
            save_animations(animations, clips[name], labels)
            save_strip(self.directory / f"frames{suffix}.png", clips[name], labels)

    def _measure(self, judges: Judges, digits: DigitSplit, clips: dict[str, Tensor]) -> dict:
        sampling = self.settings.sampling
        accuracy = {name: judges.accuracies(sampled, sampling.labels) for name, sampled in clips.items()}
        accuracy["held_out"] = judges.accuracies(*held_out_clips(digits, self.settings.training.seed))
        return {
            "accuracy": accuracy,
            "counts": {
                "samples": len(sampling.labels),
                "per_class": sampling.samples_per_class,
                "classes": NUM_LABELS,
                "held_out": len(digits.held_out_labels),
                "train": len(digits.train_labels),
            },
        }


def make_settings(steps: int, fork_step: int, seed: int, quick: bool) -> DemoSettings:
    """quick: every line runs, on so few steps and samples that nothing can be learned."""
    training = TrainingSettings(steps, fork_step, seed, batch_size=8 if quick else 16)
    sampling = SamplingSettings(1 if quick else 6, steps=2 if quick else 25, seed=seed)
    return DemoSettings(10 if quick else 500, training, sampling, judged=not quick)


def run_demo(arguments: argparse.Namespace) -> bool:
    """arguments: of run.py. True unless a target was missed."""
    settings = make_settings(arguments.steps, arguments.fork_step, arguments.seed, arguments.quick)
    results = VideoDemo(arguments.out, settings).run()
    return all(results["targets"].values())
