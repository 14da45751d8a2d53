"""Training by flow matching: a dense model, and from its weights a sparse one, both for the same number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexdit_ext.convert import sparsify
from flexdit_ext.diffusion import flow_loss

# (number of samples, generator) -> samples [n, C, ...] and what the model's forward takes by name: tensors or lists, n
# of each.
Draw = Callable[[int, torch.Generator], tuple[Tensor, Mapping]]


@dataclass(frozen=True)
class Models:
    """The two models of a demo: their class, their configurations, and what the report calls them; initialise: changes
    the dense model's random weights before training."""

    kind: type[nn.Module]
    dense: object
    sparse: object
    dense_name: str
    sparse_name: str
    initialise: Callable[[nn.Module], None] | None = None

    @property
    def key(self) -> str:
        """Of the sparse model, in the report and as its folder; the dense one's is "dense"."""
        return self.sparse_name.lower()

    def new_dense(self) -> nn.Module:
        model = self.kind(self.dense)
        if self.initialise:
            self.initialise(model)
        return model

    def to_sparse(self, dense: nn.Module) -> nn.Module:
        """The sparse model, initialised from the dense one as in the paper."""
        return sparsify(dense, self.sparse)


@dataclass(frozen=True)
class TrainingSettings:
    """steps: in all, of each model; the sparse one takes over the dense model's weights after fork_step of them."""

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

    def __init__(self, model: nn.Module, average: nn.Module, settings: TrainingSettings, first_step: int = 0):
        self.model, self.average, self.settings = model.train(), average.eval().requires_grad_(False), settings
        self.first_step = self.step = first_step
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
        self.losses: list[float] = []

    @classmethod
    def dense(cls, models: Models, settings: TrainingSettings) -> Trainer:
        torch.manual_seed(settings.seed)
        model = models.new_dense()
        return cls(model, copy.deepcopy(model), settings)

    def to_sparse(self, models: Models) -> Trainer:
        """A trainer that goes on from here with the sparse model, made of this dense one."""
        model, average = (models.to_sparse(dense) for dense in (self.model, self.average))
        return Trainer(model, average, self.settings, first_step=self.step)

    def train(self, until: int, draw: Draw, description: str) -> None:
        """Steps up to number `until`, every sample at a timestep, and so on a sparse grid, of its own."""
        # Seeded by the step it starts from: both models see the same batches and noise after the fork.
        generator = torch.Generator().manual_seed(self.settings.seed * 2**20 + self.step)
        torch.manual_seed(generator.initial_seed())  # the model drops labels by torch's global generator
        with tqdm(range(self.step, until), desc=description, unit="step") as bar:
            for self.step in bar:
                self.losses.append(self._train_step(*draw(self.settings.batch_size, generator), generator))
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        self.step = until

    def _train_step(self, x0: Tensor, conditions: Mapping, generator: torch.Generator) -> float:
        count = len(x0)
        # One timestep in each of `count` equal parts of [0, 1]: uniform, with less variance between batches.
        t = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        loss = flow_loss(self._with(conditions), x0, torch.arange(count), t, generator=generator).loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step, self.first_step)
        self.optimizer.step()
        self._update_average()
        return loss.item()

    def _with(self, conditions: Mapping) -> Callable[..., Tensor]:
        """The model for flow_loss, which takes tensors, not texts: y numbers the batch's samples, in their order."""
        return lambda x, t, y, grid: self.model(x, t, **conditions, grid=grid)

    @torch.no_grad()
    def _update_average(self) -> None:
        # Less memory in the first steps, so that the random initial weights are soon forgotten.
        decay = min(self.settings.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
