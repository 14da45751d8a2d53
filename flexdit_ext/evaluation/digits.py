"""The digits metric: scikit-learn's 1,797 handwritten digits, 8x8 pixels (a part of UCI's Optical Recognition of
Handwritten Digits), and a small classifier of them, the judge of samples and the source of Fréchet features. Everything
is read from the installed package, nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sampling import progress_bar
from .metrics import Statistics, frechet_distance

NUM_CLASSES = 10
IMAGE_SIZE = 8
NUM_HELD_OUT = 500  # as many as the demo samples: a Fréchet distance depends on the number of images
NUM_FEATURES = 32
CLASSIFIER_STEPS = 600


class DigitSplit(NamedTuple):
    """Images [n, 1, 8, 8] float32 in [-1, 1], labels [n] int64."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_images() -> tuple[Tensor, Tensor]:
    """All images [1797, 1, 8, 8] float32 in [-1, 1] and labels [1797] int64. Raises ImportError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn, or flexdit_ext[demo]") from error
    digits = load_digits()  # values are 0..16
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(digits.target).long()


def load_split(seed: int) -> DigitSplit:
    """Every class is held out in proportion; the same seed gives the same split. Raises ImportError."""
    images, labels = load_images()
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        range(len(labels)), test_size=NUM_HELD_OUT, stratify=labels.numpy(), random_state=seed
    )
    return DigitSplit(images[train], labels[train], images[held_out], labels[held_out])


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


def train_classifier(
    images: Tensor, labels: Tensor, steps: int, seed: int, batch_size: int = 64, progress: bool = True
) -> DigitClassifier:
    """Cross-entropy, AdamW, one-cycle learning rate; returned in eval mode. Sets torch's seed."""
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    with progress_bar(progress, steps, "classifier") as tick:
        for _ in range(steps):
            batch = torch.randint(len(labels), (batch_size,), generator=generator)
            loss = F.cross_entropy(model(shift_randomly(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tick()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(classifier: DigitClassifier, images: Tensor) -> np.ndarray:
    """Float64 [n, 32]; pixels are clamped to the range of real images."""
    return classifier.features(images.clamp(-1, 1)).double().numpy()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the classifier takes for the digit asked for."""
    return (classifier(images.clamp(-1, 1)).argmax(1) == labels).double().mean().item()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features, [n, 32] and [m, 32]."""
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def measure(pixels: np.ndarray, labels: np.ndarray, seed: int = 0, progress: bool = False) -> dict:
    """accuracy (the share of images that the classifier takes for their label) and frechet_distance to the training
    digits, and both for held-out real digits beside them.

    pixels: uint8 [n, 8, 8, 3], of which the first channel counts; labels: [n] in 0..9. seed: of split and classifier.
    """
    if pixels.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images have shape {pixels.shape}, the digits metric takes [n, 8, 8, 3]")
    if labels is None or len(labels) != len(pixels):
        raise ValueError("the digits metric needs the images' labels, arr_1")
    images = torch.from_numpy(pixels[..., 0].astype(np.float32))[:, None] / 127.5 - 1
    split = load_split(seed)
    with torch.random.fork_rng(devices=[]):
        classifier = train_classifier(split.train_images, split.train_labels, CLASSIFIER_STEPS, seed, progress=progress)
    real = features(classifier, split.train_images)
    return {
        "accuracy": accuracy(classifier, images, torch.as_tensor(labels)),
        "frechet_distance": distance(features(classifier, images), real),
        "held_out_accuracy": accuracy(classifier, split.held_out_images, split.held_out_labels),
        "held_out_frechet_distance": distance(features(classifier, split.held_out_images), real),
    }
