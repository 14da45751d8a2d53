"""The two models, each with its text encoder: patches of one pixel, 8x8 tokens, 8 blocks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from captions.encoders import T5Encoder, WordEncoder, load_encoder
from common.training import Models
from torch import Tensor, nn

from flexdit_ext import DensitySchedule, FlexPixArt, FlexPixArtConfig, sample_conditional
from flexdit_ext._files import all_or_nothing
from flexdit_ext.convert import sparsify
from flexdit_ext.evaluation.digits import IMAGE_SIZE

SCHEDULE = DensitySchedule(((5, 5), (4, 4), (3, 3), (3, 3)))  # the paper's rates, 0.61 to 0.86, on 8x8 tokens


class CaptionedPixArt(nn.Module):
    """A FlexPixArt that takes captions as text; the WordEncoder learns with it. "" is the caption without guidance."""

    def __init__(self, painter: FlexPixArt, encoder: WordEncoder | T5Encoder):
        super().__init__()
        self.painter, self.encoder = painter, encoder

    @property
    def schedule(self):
        return self.painter.schedule

    def macs(self, grid=None, caption_tokens: int | None = None) -> float:
        """FlexPixArt's; the text encoder, which reads a caption once per image, is not counted."""
        return self.painter.macs(grid, caption_tokens)

    def forward(self, x: Tensor, t: Tensor, captions: Sequence[str], grid=None) -> Tensor:
        """As FlexPixArt's, captions being B texts. Raises as the encoder for words it does not know."""
        caption, mask = self.encoder(captions)
        return self.painter(x, t, caption, mask, grid=grid)

    @torch.no_grad()
    def sample(self, captions: Sequence[str], steps: int, cfg_scale: float, seed: int, start_index: int = 0) -> Tensor:
        """Images [B, 1, 8, 8] by Euler steps; arguments as sample_conditional's."""
        caption, mask = self.encoder([*captions, ""])
        return sample_conditional(
            self.painter,
            {"caption": caption[:-1], "caption_mask": mask[:-1]},
            steps,
            "flow",
            cfg_scale,
            seed,
            unconditional={"caption": caption[-1:], "caption_mask": mask[-1:]},
            start_index=start_index,
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """FlexPixArt's checkpoint and the text encoder, together or not at all."""
        with all_or_nothing(folder) as staging:
            self.painter.save_pretrained(staging)
            self.encoder.save(staging)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> CaptionedPixArt:
        """What save_pretrained wrote. Raises OSError or ValueError naming the file that is missing or does not fit."""
        encoder = load_encoder(Path(folder))
        painter = FlexPixArt.from_pretrained(folder)
        if painter.config.caption_channels != encoder.channels:
            raise ValueError(
                f"{folder}: the text encoder has {encoder.channels} channels, the model reads "
                f"{painter.config.caption_channels}"
            )
        return cls(painter, encoder).eval()


@dataclass(frozen=True)
class CaptionedModels(Models):
    """encoder: makes the dense model's; the FlexPixArt starts with a copy of what that has learned."""

    encoder: Callable[[], WordEncoder | T5Encoder] = field(kw_only=True)

    def new_dense(self) -> CaptionedPixArt:
        return CaptionedPixArt(FlexPixArt(self.dense), self.encoder())

    def to_sparse(self, dense: CaptionedPixArt) -> CaptionedPixArt:
        return CaptionedPixArt(sparsify(dense.painter, self.sparse), copy.deepcopy(dense.encoder))


def make_models(encoder: Callable[[], WordEncoder | T5Encoder]) -> CaptionedModels:
    """The two models for captions that such an encoder reads."""
    example = encoder()
    common = {
        "input_size": IMAGE_SIZE,
        "patch_size": 1,
        "in_channels": 1,
        "out_channels": 1,
        "hidden_size": 64,
        "num_heads": 4,
        "caption_channels": example.channels,
        "max_caption_tokens": example.max_tokens,
    }
    dense = FlexPixArtConfig(**common, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=8)
    sparse = FlexPixArtConfig(
        **common, num_pooling_blocks=1, num_sdtm=1, sdtm_blocks=(1, 2, 1, 1), num_dense_blocks=2, schedule=SCHEDULE
    )
    return CaptionedModels(CaptionedPixArt, dense, sparse, "dense PixArt", "FlexPixArt", encoder=encoder)
