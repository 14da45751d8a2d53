"""What a run tells: the numbers of its steps, log.jsonl, tensorboard, the progress bar."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .._clips import write_clip
from .._files import all_or_nothing, png, write_file
from .config import LogSettings
from .pictures import FRAMES_PER_SECOND, Pictures

LOG_NAME = "log.jsonl"
# Dense bfloat16 TFLOP/s as NVIDIA's data sheets give them.
_PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


def peak_tflops(settings: LogSettings, device: torch.device, precision: str) -> float | None:
    """Of one device, None where it is not known."""
    if settings.peak_tflops:
        return settings.peak_tflops
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


class Window:
    """Sums since the last line of the log. They are part of a checkpoint, so that a run that went on logs what one
    without a break does; rates count the seconds of training alone and start anew."""

    def __init__(self, buckets: int, state: dict | None = None):
        state = state or {}
        self.count = state.get("count", 0)
        self.steps = state.get("steps", 0)
        self.loss = state.get("loss", 0.0)
        self.norm = state.get("norm", 0.0)
        self.macs = state.get("macs", 0.0)
        self.bucket_loss = np.array(state.get("bucket_loss", [0.0] * buckets))
        self.bucket_count = np.array(state.get("bucket_count", [0] * buckets))
        if len(self.bucket_loss) != buckets:  # log.buckets has changed
            self.bucket_loss, self.bucket_count = np.zeros(buckets), np.zeros(buckets, dtype=int)
        self.timed_count, self.timed_macs, self.seconds = 0, 0.0, 0.0
        self._start = time.perf_counter()

    def state(self) -> dict:
        values = {name: getattr(self, name) for name in ("count", "steps", "loss", "norm", "macs")}
        return values | {"bucket_loss": self.bucket_loss.tolist(), "bucket_count": self.bucket_count.tolist()}

    def add(self, losses: np.ndarray, fractions: np.ndarray, norm: float, macs: float) -> None:
        """A step: per sample its loss and t / 1000, and MACs of the forward passes."""
        buckets = len(self.bucket_loss)
        index = np.minimum((fractions * buckets).astype(int), buckets - 1)
        self.bucket_loss += np.bincount(index, losses, buckets)
        self.bucket_count += np.bincount(index, minlength=buckets)
        self.loss += float(losses.sum())
        self.norm += norm
        self.macs += macs
        self.count += len(losses)
        self.steps += 1
        self.timed_count += len(losses)
        self.timed_macs += macs

    def pause(self) -> None:
        """What follows is not training."""
        self.seconds += time.perf_counter() - self._start

    def go_on(self) -> None:
        self._start = time.perf_counter()

    def images_per_second(self) -> float:
        return self.timed_count / max(self.seconds + time.perf_counter() - self._start, 1e-9)

    def line(self, step: int, learning_rate: float, peak: float | None) -> dict:
        """The line of the log; `peak` FLOP/s of all devices. A backward pass costs two forward passes."""
        rate = self.images_per_second()
        by_timestep = [
            loss / count if count else None
            for loss, count in zip(self.bucket_loss.tolist(), self.bucket_count.tolist())
        ]
        values = {
            "step": step,
            "loss": self.loss / self.count,
            "loss_by_timestep": by_timestep,
            "gradient_norm": self.norm / self.steps,
            "learning_rate": learning_rate,
            "macs_per_image": self.macs / self.count,
            "images_per_second": rate,
        }
        if peak:
            values["mfu"] = 6 * self.timed_macs / max(self.timed_count, 1) * rate / peak
        return values


class RunLog:
    """log.jsonl, tensorboard and the bar of the main process. A full disk costs lines, with a warning, not the run."""

    def __init__(self, folder: Path, settings: LogSettings, first_step: int, steps: int):
        self.path = folder / LOG_NAME
        _truncate(self.path, first_step)
        self._writer = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(initial=first_step, total=steps, unit="step", disable=None)
        self._warned = False

    def write(self, line: dict) -> None:
        with self._forgiving():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self._writer is not None:
                self._write_scalars(line)
        rates = {"loss": f"{line['loss']:.4f}", "images/s": f"{line['images_per_second']:.1f}"}
        if "mfu" in line:
            rates["MFU"] = f"{line['mfu']:.1%}"
        self.bar.set_postfix(rates)

    def samples(self, step: int, pictures: Pictures) -> None:
        """A sample grid into samples/step-*.png and tensorboard, of clips also into step-*.webp."""
        with self._forgiving():
            with all_or_nothing(self.path.parent / "samples") as folder:
                write_file(folder / f"step-{step:08d}.png", png(pictures.still))
                if pictures.frames is not None:
                    write_clip(folder / f"step-{step:08d}.webp", pictures.frames, FRAMES_PER_SECOND, f"step {step}")
            if self._writer is not None:
                self._writer.add_image("samples", pictures.still, step, dataformats="HWC")
                self._writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self._writer is not None:
            with self._forgiving():
                self._writer.close()

    def _write_scalars(self, line: dict) -> None:
        step = line["step"]
        for name, value in line.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, step)
        buckets = line["loss_by_timestep"]
        for i, value in enumerate(buckets):
            if value is not None:
                self._writer.add_scalar(f"loss_by_timestep/{i / len(buckets):.2f}", value, step)
        self._writer.flush()

    def _forgiving(self):
        return _Forgiving(self)


class _Forgiving:
    """Turns the first OSError into a warning and the others into nothing."""

    def __init__(self, log: RunLog):
        self.log = log

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self.log._warned:
            warnings.warn(f"the log cannot be written: {error}; training goes on", stacklevel=3)
            self.log._warned = True
        return True


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a killed process has not finished is left out."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            line["step"], line["loss"]
        except (ValueError, TypeError, KeyError):
            if text.strip():
                warnings.warn(f"{path}, line {number} is damaged and left out", stacklevel=2)
            continue
        lines.append(line)
    return lines


def _truncate(path: Path, step: int) -> None:
    """Drops what a killed run has logged after the checkpoint it goes on from."""
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line["step"] <= step]
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(staged, path)
