"""The two models: patches of one pixel, 8x8 tokens, 8 blocks."""

from __future__ import annotations

from common.training import Models

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig
from flexdit_ext.evaluation.digits import IMAGE_SIZE, NUM_CLASSES

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
MODELS = Models(FlexDiT, DENSE_CONFIG, FLEXDIT_CONFIG, "dense DiT", "FlexDiT")
