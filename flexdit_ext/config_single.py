"""FlexPixArtConfig and FlexLatteConfig: text to image, and clips. Their layouts are method.md's, last section."""

from __future__ import annotations

from dataclasses import dataclass

from . import _C
from ._checks import Grid, check_count, check_grid, check_number
from ._layout_config import LayoutConfig
from .schedule import DensitySchedule

_POSITIVE = ("input_size", "patch_size", "in_channels", "out_channels", "hidden_size", "num_heads")
_COUNTS = ("caption_channels", "num_pooling_blocks", "num_sdtm", "num_dense_blocks")
_MOST = 2**31 - 1


@dataclass(frozen=True)
class _SingleConfig(LayoutConfig):
    """What both have: blocks modulated as PixArt-alpha does, from one Linear and a table per block.

    Args:
        input_size: height and width of the latent image or frame that the position embedding was made for; inputs of
            other sizes cover the same positions.
        patch_size: side of a patch; must divide every input's sides.
        in_channels, out_channels: of the latents; twice as many come out where a variance is learned.
        hidden_size: C; a multiple of num_heads and of 4.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over hidden_size.
        caption_channels: width of the text encoder's output; 0: no text.
        max_caption_tokens: of a caption.
        position_scale: divides positions (diffusers' interpolation_scale).
        num_pooling_blocks, num_sdtm, num_dense_blocks: the three segments of the model, bottom to top.
        sdtm_blocks: (generation, sparse, recovery, dense) blocks of a sparse-dense token module.
        schedule: DensitySchedule or its dict; None is the class's default.

    Raises TypeError or ValueError naming the field.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    max_caption_tokens: int = 120
    position_scale: float = 1.0
    num_pooling_blocks: int = 2
    num_sdtm: int = 4
    sdtm_blocks: tuple[int, int, int, int] = (1, 3, 1, 1)
    num_dense_blocks: int = 2
    schedule: DensitySchedule | None = None

    def __post_init__(self):
        for names, least in ((_POSITIVE, 1), (_COUNTS, 0), (("max_caption_tokens",), 1)):
            for name in names:
                check_count(name, getattr(self, name), least, _MOST)
        for name in ("mlp_ratio", "position_scale"):
            if check_number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size is {self.input_size}, must be a multiple of patch_size {self.patch_size}")
        for name, divisor in (("num_heads", self.num_heads), ("4", 4)):
            if self.hidden_size % divisor:
                raise ValueError(f"hidden_size is {self.hidden_size}, must be a multiple of {name}")
        self._check_layout()

    @property
    def base_grid(self) -> Grid:
        """(h, w) of the position embedding's own size."""
        return (self.input_size // self.patch_size,) * 2

    @property
    def dense_grid(self) -> Grid:
        return self.base_grid

    @property
    def density_schedule(self) -> DensitySchedule:
        """The schedule, or the default one on this model's grid."""
        return self.schedule or self.default_schedule(self.dense_grid)

    def default_schedule(self, dense_grid: Grid) -> DensitySchedule:
        """For inputs of that grid: grids for 16 tokens a side, on other sides in proportion, in equal segments of t.

        The paper does not publish its own. On 16 x 16 tokens FlexPixArt's (11, 11), (9, 9), (8, 8), (7, 7) take 38%
        fewer multiply-accumulates than the dense model, as in the paper; on 16 frames of them FlexLatte's (8, 6, 6),
        (6, 6, 6) and twice (4, 6, 6) take 55% fewer, in the paper 56%.
        """
        return DensitySchedule._of(_C.default_schedule(self.core, check_grid("dense_grid", dense_grid)))

    @property
    def core(self) -> _C.Config:
        """The same for the C++ library."""
        core = super().core
        core.caption_channels, core.max_caption_tokens = self.caption_channels, self.max_caption_tokens
        core.num_frames, core.size_conditions = self.num_frames, self.size_conditions
        core.position_scale = self.position_scale
        return core


@dataclass(frozen=True)
class FlexPixArtConfig(_SingleConfig):
    """FlexPixArt, text to image; with dense blocks only PixArt-alpha (arXiv 2310.00426).

    Fields of _SingleConfig, and size_conditions: embed height, width and aspect ratio, as the model of 1024 pixels
    does; then hidden_size must be a multiple of 3.
    """

    size_conditions: bool = False
    _family = "pixart"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.size_conditions, bool):
            raise TypeError(f"size_conditions is {self.size_conditions!r}, must be True or False")
        if self.size_conditions and self.hidden_size % 3:
            raise ValueError(f"hidden_size is {self.hidden_size}, must be a multiple of 3 with size_conditions")
        if not self.caption_channels:
            raise ValueError("caption_channels is 0, FlexPixArt reads captions")

    def axis(self, block: int) -> str:
        """Among which tokens a dense or sparse block attends: all."""
        return "all"

    def has_cross(self, block: int) -> bool:
        """Whether block k of the flattened order reads the caption: all do."""
        return True


@dataclass(frozen=True)
class FlexLatteConfig(_SingleConfig):
    """FlexLatte, clips; with dense blocks only Latte (arXiv 2401.03048): even blocks attend within a frame and read the
    caption, odd ones attend across frames at one position.

    Fields of _SingleConfig, and
        num_frames: of a clip; shorter ones are allowed.
        num_classes: labels 0 .. num_classes - 1; 0: none. Label num_classes is the null class if class_dropout_prob is
            above 0.
        class_dropout_prob: share of labels that train() replaces by the null class.
    """

    caption_channels: int = 0
    num_frames: int = 16
    num_classes: int = 0
    class_dropout_prob: float = 0.0
    _family = "latte"

    def __post_init__(self):
        check_count("num_frames", self.num_frames, 1, 2**15 - 1)
        check_count("num_classes", self.num_classes, 0, _MOST)
        if not 0 <= check_number("class_dropout_prob", self.class_dropout_prob) < 1:
            raise ValueError(f"class_dropout_prob is {self.class_dropout_prob}, must be at least 0 and below 1")
        super().__post_init__()

    @property
    def dense_grid(self) -> Grid:
        return (self.num_frames, *self.base_grid)

    def axis(self, block: int) -> str:
        """Among which tokens block k of the flattened order attends, if it is dense or sparse."""
        return "time" if block % 2 else "space"

    def has_cross(self, block: int) -> bool:
        """Whether block k of the flattened order reads the caption."""
        return bool(self.caption_channels) and block % 2 == 0
