"""A small convolutional classifier of real digits: the judge of the samples and the source of Fréchet features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dataset import NUM_CLASSES
from torch import Tensor, nn
from tqdm import tqdm

NUM_FEATURES = 32


class DigitClassifier(nn.Module):
    """Images [n, 1, 8, 8] -> logits [n, 10]; features() is the last hidden layer."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )  # fmt: skip
        # tanh keeps the features bounded: one odd sample cannot dominate the Gaussian fit.
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 16, NUM_FEATURES), nn.Tanh())
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.hidden(self.convolutions(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves the batch by -1, 0 or 1 pixels in each direction; what enters is background."""
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), value=-1.0)[..., dy : dy + images.shape[2], dx : dx + images.shape[3]]


def train_classifier(images: Tensor, labels: Tensor, steps: int, seed: int, batch_size: int = 64) -> DigitClassifier:
    """Cross-entropy, AdamW, one-cycle learning rate; returned in eval mode."""
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        batch = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(shift_randomly(images[batch], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
