"""A stand-in for FlexDiT in the tests of losses and samplers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from flexdit_ext.diffusion import linear_betas


class ToyModel(nn.Module):
    """A smooth function of (x, t, y), close to the ideal denoiser of N(0, 1/4) so that trajectories stay of order 1."""

    def __init__(self, in_channels=4, learn_sigma=True, class_dropout_prob=0.1, dtype=torch.float32):
        super().__init__()
        self.config = SimpleNamespace(
            input_size=6,
            in_channels=in_channels,
            num_classes=10,
            learn_sigma=learn_sigma,
            class_dropout_prob=class_dropout_prob,
        )
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.register_buffer("abar", torch.cumprod(1 - linear_betas(), 0).float(), persistent=False)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x, t, y, grid=None):
        self.calls.append(SimpleNamespace(x=x, t=t, y=y, grid=grid, training=self.training))
        abar = self.abar[t.long().clamp(max=999)].to(x.dtype).view(-1, 1, 1, 1)
        t, y = (v.to(x.dtype).view(-1, 1, 1, 1) for v in (t, y))
        ideal = x * (1 - abar).sqrt() / (0.25 * abar + 1 - abar)
        epsilon = ideal + self.dropout(self.scale * torch.sin(2 * x.roll(1, 1) + t / 100 + y))
        if not self.config.learn_sigma:
            return epsilon
        return torch.cat([epsilon, torch.cos(x + t / 200)], dim=1)
