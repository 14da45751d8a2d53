"""The two models: patches of 2x2 pixels, 8x6x6 tokens, 8 blocks."""

from __future__ import annotations

from common.training import Models
from video.rendering import FRAME_SIZE, NUM_FRAMES, NUM_LABELS

from flexdit_ext import DensitySchedule, FlexLatte, FlexLatteConfig

_COMMON = {
    "input_size": FRAME_SIZE,
    "num_frames": NUM_FRAMES,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "hidden_size": 64,
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
    schedule=DensitySchedule(((4, 4, 4), (4, 3, 3), (3, 3, 3), (2, 3, 3))),
)
MODELS = Models(FlexLatte, DENSE_CONFIG, FLEXLATTE_CONFIG, "dense Latte", "FlexLatte")
