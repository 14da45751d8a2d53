"""The two models: patches of 3x3 pixels, 8x4x4 tokens, 8 blocks."""

from __future__ import annotations

import torch
from common.training import Models
from video.rendering import FRAME_SIZE, NUM_FRAMES, NUM_LABELS, NUM_MOTIONS

from flexdit_ext import DensitySchedule, FlexLatte, FlexLatteConfig
from flexdit_ext.evaluation.digits import NUM_CLASSES

_WIDTH, _LABEL_SCALE = 64, 0.5
_COMMON = {
    "input_size": FRAME_SIZE,
    "num_frames": NUM_FRAMES,
    "patch_size": 3,
    "in_channels": 1,
    "out_channels": 1,
    "hidden_size": _WIDTH,
    "num_heads": 2,
    "num_classes": NUM_LABELS,
    "class_dropout_prob": 0.1,
}
DENSE_CONFIG = FlexLatteConfig(**_COMMON, num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=8)
FLEXLATTE_CONFIG = FlexLatteConfig(
    **_COMMON,
    num_pooling_blocks=1,
    num_sdtm=1,
    sdtm_blocks=(1, 3, 1, 1),
    num_dense_blocks=1,
    schedule=DensitySchedule(((4, 3, 3), (4, 2, 2), (3, 2, 2), (2, 2, 2))),
)


@torch.no_grad()
def start_labels(model: FlexLatte) -> None:
    """A label's vector starts as a random one of its digit plus one of its motion: what is learned of a digit in one
    motion then helps in the others. From unrelated vectors the 60 classes take many times as many clips."""
    digits, motions = torch.randn(NUM_CLASSES, 1, _WIDTH), torch.randn(1, NUM_MOTIONS, _WIDTH)
    model.label_embed.weight[:NUM_LABELS] = _LABEL_SCALE * (digits + motions).flatten(0, 1)


MODELS = Models(FlexLatte, DENSE_CONFIG, FLEXLATTE_CONFIG, "dense Latte", "FlexLatte", start_labels)
