"""Two small classifiers that judge clips: one sees the digit in a single frame, the other the motion of all frames."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from video.rendering import FRAME_SIZE, NUM_FRAMES, NUM_MOTIONS, draw_clips, split_labels

from flexdit_ext.evaluation.digits import NUM_CLASSES

_CHUNK = 200  # clips


class Judge(nn.Sequential):
    """Images [n, channels, 12, 12] -> logits [n, classes]."""

    def __init__(self, channels: int, classes: int):
        super().__init__(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * (FRAME_SIZE // 4) ** 2, classes),
        )  # fmt: skip


class Judges(NamedTuple):
    """digit: of frames [n, 1, 12, 12]; motion: of clips, their frames as channels [n, frames, 12, 12]."""

    digit: Judge
    motion: Judge

    @torch.no_grad()
    def accuracies(self, clips: Tensor, labels: Tensor) -> dict[str, float]:
        """Shares of the clips [n, 1, frames, 12, 12]: "digit" counts the frames in which the digit asked for is seen,
        "motion" the clips whose motion is, "clip" the clips with the motion and, in every frame, the digit."""
        digits, motions = split_labels(labels)
        digit, motion = [], []
        for part in clips[:, 0].clamp(-1, 1).split(_CHUNK):
            digit.append(self.digit(part.flatten(0, 1)[:, None]).argmax(1).view(len(part), -1))
            motion.append(self.motion(part).argmax(1))
        right_digit, right_motion = torch.cat(digit) == digits[:, None], torch.cat(motion) == motions
        rights = {"digit": right_digit, "motion": right_motion, "clip": right_digit.all(1) & right_motion}
        return {name: right.double().mean().item() for name, right in rights.items()}


def train_judges(images: Tensor, digits: Tensor, steps: int, seed: int, batch_size: int = 32) -> Judges:
    """Cross-entropy, AdamW, one-cycle learning rate, on clips of `images` [m, 1, 8, 8] rendered as they are needed.
    Returned in eval mode. Sets torch's seed."""
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    judges = Judges(Judge(1, NUM_CLASSES), Judge(NUM_FRAMES, NUM_MOTIONS))
    parameters = [*judges.digit.parameters(), *judges.motion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    for _ in tqdm(range(steps), desc="classifiers", unit="step"):
        clips, labels = draw_clips(images, digits, batch_size, generator)
        frames, (digit, motion) = clips[:, 0], split_labels(labels)
        seen = judges.digit(frames.flatten(0, 1)[:, None])
        loss = F.cross_entropy(seen, digit.repeat_interleave(NUM_FRAMES)) + F.cross_entropy(
            judges.motion(frames), motion
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Judges(*(judge.eval().requires_grad_(False) for judge in judges))
