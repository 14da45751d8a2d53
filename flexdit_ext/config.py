"""FlexDiTConfig: what a model is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import _C
from ._checks import Grid
from ._layout_config import LayoutConfig
from .schedule import DensitySchedule

_POSITIVE = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "num_classes")
_COUNTS = ("num_pooling_blocks", "num_sdtm", "num_dense_blocks")

# hidden_size, num_heads, pooling blocks, SDTMs, (generation, sparse, recovery, dense), dense blocks.
# XL/2 and B/2: method.md, Layouts. S/2 and L/2 follow the same proportions at DiT's widths and depths.
_PRESETS = {
    "S": (384, 6, 1, 2, (1, 2, 1, 1), 1),
    "B": (768, 12, 1, 2, (1, 2, 1, 1), 1),
    "L": (1024, 16, 2, 3, (1, 3, 1, 1), 4),
    "XL": (1152, 16, 2, 4, (1, 3, 1, 1), 2),
}


@dataclass(frozen=True)
class FlexDiTConfig(LayoutConfig):
    """Configuration of FlexDiT.

    Args:
        input_size: height and width of the (latent) image.
        patch_size: side of a patch; must divide input_size.
        in_channels: channels of the image.
        hidden_size: C; a multiple of num_heads and of 4 (the position embedding's sin-cos pairs).
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over hidden_size.
        num_classes: labels 0 .. num_classes - 1; label num_classes is the null class if class_dropout_prob > 0.
        learn_sigma: predict 2 * in_channels channels, noise and variance.
        class_dropout_prob: share of labels that train() replaces by the null class.
        num_pooling_blocks, num_sdtm, num_dense_blocks: the three segments of the model, bottom to top.
        sdtm_blocks: (generation, sparse, recovery, dense) blocks of a sparse-dense token module.
        reinject_position: add the position embedding again where tokens change between sparse and dense.
        timestep_shift: timesteps enter with frequencies 10000^(-i / (128 - timestep_shift)): 0 as in DiT, 1 in a model
            that diffusers has trained.
        mlp_norm_eps: of the layer norms before the MLPs; diffusers' DiT has 1e-5.
        schedule: DensitySchedule or its dict; None means the paper's pruning rates 0.61 to 0.86.

    With num_pooling_blocks = num_sdtm = 0 the model is exactly DiT. Raises TypeError or ValueError naming the field.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    class_dropout_prob: float = 0.1
    num_pooling_blocks: int = 2
    num_sdtm: int = 4
    sdtm_blocks: tuple[int, int, int, int] = (1, 3, 1, 1)
    num_dense_blocks: int = 2
    reinject_position: bool = False
    timestep_shift: int = 0
    mlp_norm_eps: float = 1e-6
    schedule: DensitySchedule | None = None

    def __post_init__(self):
        self._check_numbers()
        self._check_layout()

    def _check_numbers(self):
        for names, least in ((_POSITIVE, 1), (_COUNTS, 0)):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{name} is {value!r}, must be an int")
                if value < least:
                    raise ValueError(f"{name} is {value}, must be at least {least}")
        for name in ("learn_sigma", "reinject_position"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, must be True or False")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size is {self.input_size}, must be a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size is {self.hidden_size}, must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}, must be a multiple of 4")
        if isinstance(self.class_dropout_prob, bool) or not isinstance(self.class_dropout_prob, (int, float)):
            raise TypeError(f"class_dropout_prob is {self.class_dropout_prob!r}, must be a number")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob is {self.class_dropout_prob}, must be at least 0 and below 1")
        if type(self.timestep_shift) is not int:
            raise TypeError(f"timestep_shift is {self.timestep_shift!r}, must be an int")
        if self.timestep_shift not in (0, 1):
            raise ValueError(f"timestep_shift is {self.timestep_shift}, must be 0 (DiT) or 1 (diffusers)")
        if isinstance(self.mlp_norm_eps, bool) or not isinstance(self.mlp_norm_eps, (int, float)):
            raise TypeError(f"mlp_norm_eps is {self.mlp_norm_eps!r}, must be a number")
        if not 0 < self.mlp_norm_eps < 1:
            raise ValueError(f"mlp_norm_eps is {self.mlp_norm_eps}, must be above 0 and below 1")
        if isinstance(self.mlp_ratio, bool) or not isinstance(self.mlp_ratio, (int, float)):
            raise TypeError(f"mlp_ratio is {self.mlp_ratio!r}, must be a number")
        if not 0 < self.mlp_ratio < math.inf or self.mlp_hidden_size < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}, must be finite and give at least one unit")

    @property
    def dense_grid(self) -> Grid:
        side = self.input_size // self.patch_size
        return (side, side)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def density_schedule(self) -> DensitySchedule:
        """The schedule, or the paper's pruning rates 0.61 to 0.86 on this model's grid."""
        return self.schedule or DensitySchedule.from_pruning_rates(0.61, 0.86, self.dense_grid)

    @property
    def core(self) -> _C.Config:
        """The same for the C++ library."""
        core = super().core
        core.reinject_position = self.reinject_position
        core.timestep_shift, core.mlp_norm_eps = self.timestep_shift, self.mlp_norm_eps
        return core

    @classmethod
    def preset(cls, name: str, image_size: int = 256, **overrides) -> FlexDiTConfig:
        """The paper's layouts: name "S/2", "B/2", "L/2" or "XL/2", image_size 256 or 512 pixels (8 per latent)."""
        size, _, patch = name.partition("/") if isinstance(name, str) else ("", "", "")
        if size not in _PRESETS or patch != "2":
            raise ValueError(f"preset is {name!r}, must be one of {', '.join(f'{key}/2' for key in _PRESETS)}")
        if image_size not in (256, 512):
            raise ValueError(f"image_size is {image_size!r}, must be 256 or 512")
        hidden, heads, pooling, modules, blocks, dense = _PRESETS[size]
        values = {
            "input_size": image_size // 8,
            "hidden_size": hidden,
            "num_heads": heads,
            "num_pooling_blocks": pooling,
            "num_sdtm": modules,
            "sdtm_blocks": blocks,
            "num_dense_blocks": dense,
        }
        return cls(**(values | overrides))
