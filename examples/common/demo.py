"""What every demo does in its own way: two models trained side by side, checkpoints, loss curves, times of phases."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.pictures import save_loss_curves
from common.report import hardware
from common.training import Draw, Models, Trainer, TrainingSettings


class Demo:
    """One run; `seconds` collects the time of each phase.

    outputs: the files that the run will write besides the checkpoints; those of an earlier run are removed, since
    pictures and report must belong together.
    """

    def __init__(self, directory: Path, models: Models, outputs: Sequence[str]):
        self.directory, self.models = directory, models
        self.seconds: dict[str, float] = {}
        for name in outputs:
            (directory / name).unlink(missing_ok=True)

    def train(self, draw: Draw, settings: TrainingSettings) -> tuple[Trainer, Trainer]:
        """The dense model and the sparse one, saved as they become ready, and losses.png."""
        models = self.models
        dense = Trainer.dense(models, settings)
        with self.phase("dense to the fork"):
            dense.train(settings.fork_step, draw, "dense, to the fork")
        sparse = dense.to_sparse(models)
        self._save("dense", dense)
        with self.phase("dense after the fork"):
            dense.train(settings.steps, draw, "dense, after it")
        self._save("dense", dense)
        curves = {models.dense_name: (0, dense.losses)}
        save_loss_curves(self.directory / "losses.png", curves)
        with self.phase(models.sparse_name):
            sparse.train(settings.steps, draw, models.sparse_name)
        self._save(models.key, sparse)
        curves[models.sparse_name] = sparse.first_step, sparse.losses
        save_loss_curves(self.directory / "losses.png", curves)
        return dense, sparse

    def _save(self, name: str, trainer: Trainer) -> None:
        trainer.average.save_pretrained(self.directory / name)

    def conditions(self, training: TrainingSettings, sampling) -> dict:
        """For the report: the machine, the settings (sampling: a dataclass), the times."""
        return {
            "hardware": hardware(),
            "seed": training.seed,
            "training": dataclasses.asdict(training),
            "sampling": dataclasses.asdict(sampling),
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
