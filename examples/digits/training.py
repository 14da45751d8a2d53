"""Training by flow matching: a dense DiT, and from its weights a FlexDiT, both for the same number of steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig
from flexdit_ext.convert import sparsify
from flexdit_ext.diffusion import flow_loss
from flexdit_ext.evaluation.digits import IMAGE_SIZE, NUM_CLASSES

# Patches of one pixel: 8x8 tokens. Both models are 8 blocks deep.
_COMMON = {
    "input_size": IMAGE_SIZE,
    "patch_size": 1,
    "in_channels": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "num_classes": NUM_CLASSES,
    "learn_sigma": False,
    "class_dropout_prob": 0.1,
}
DENSE_CONFIG = FlexDiTConfig(**_COMMON, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=8)
FLEXDIT_CONFIG = FlexDiTConfig(
    **_COMMON,
    num_pooling_blocks=1,
    num_sdtm=1,
    sdtm_blocks=(1, 2, 1, 1),
    num_dense_blocks=2,
    schedule=DensitySchedule(((5, 5), (4, 4), (3, 3), (3, 3))),  # the paper's rates, 0.61 to 0.86, on 8x8 tokens
)


@dataclass(frozen=True)
class TrainingSettings:
    """steps: in all, of each model; the FlexDiT takes over the dense model's weights after fork_step of them."""

    steps: int
    fork_step: int
    seed: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_share: float = 0.4  # the learning rate falls to 0 in this last share of the steps
    ema_decay: float = 0.99
    max_gradient_norm: float = 1.0

    def learning_rate_at(self, step: int, first_step: int) -> float:
        """Warm-up from `first_step`, constant, linear decay to 0."""
        warmup = (step + 1 - first_step) / self.warmup_steps
        decay = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, warmup, decay)


class Trainer:
    """A model, its optimizer and the moving average of its weights; samples are drawn from the average."""

    def __init__(self, model: FlexDiT, average: FlexDiT, settings: TrainingSettings, first_step: int = 0):
        self.model, self.average, self.settings = model.train(), average.eval().requires_grad_(False), settings
        self.first_step = self.step = first_step
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
        self.losses: list[float] = []

    @classmethod
    def dense(cls, settings: TrainingSettings) -> Trainer:
        torch.manual_seed(settings.seed)
        model = FlexDiT(DENSE_CONFIG)
        return cls(model, copy.deepcopy(model), settings)

    def to_flexdit(self) -> Trainer:
        """A trainer that goes on from here with a FlexDiT, initialised from this dense model as in the paper."""
        model, average = (sparsify(dense, FLEXDIT_CONFIG) for dense in (self.model, self.average))
        return Trainer(model, average, self.settings, first_step=self.step)

    def train(self, until: int, images: Tensor, labels: Tensor, description: str) -> None:
        """Steps up to number `until`, every sample at a timestep, and so on a sparse grid, of its own."""
        # Seeded by the step it starts from: both models see the same batches and noise after the fork.
        generator = torch.Generator().manual_seed(self.settings.seed * 2**20 + self.step)
        torch.manual_seed(generator.initial_seed())  # the model drops labels by torch's global generator
        with tqdm(range(self.step, until), desc=description, unit="step") as bar:
            for self.step in bar:
                batch = torch.randint(len(labels), (self.settings.batch_size,), generator=generator)
                self.losses.append(self._train_step(images[batch], labels[batch], generator))
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        self.step = until

    def _train_step(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> float:
        count = len(labels)
        # One timestep in each of `count` equal parts of [0, 1]: uniform, with less variance between batches.
        t = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        loss = flow_loss(self.model, images, labels, t, generator=generator).loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step, self.first_step)
        self.optimizer.step()
        self._update_average()
        return loss.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        # Less memory in the first steps, so that the random initial weights are soon forgotten.
        decay = min(self.settings.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
