"""What training has to know of a kind of model: FlexDiT, FlexPixArt, FlexLatte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import blocks, single_blocks
from .._arguments import Grid
from .._checkpoint_single import build_single, class_of
from ..checkpoint import build_model
from ..model import FlexDiT
from ..sampling import sample
from ..sampling_single import sample_conditional
from ..single_model import FlexLatte, FlexPixArt
from ._samples import Captions

BLOCKS = (blocks.Block, single_blocks.Block)  # what FSDP2 shards, and compiles, one by one
CAPTION_DROPOUT = 0.1  # of PixArt-alpha; a model of labels has its own class_dropout_prob


@dataclass(frozen=True)
class Family:
    """A kind of model; this one is FlexDiT, of labels.

    name: in [model]. model: its class. kinds: of data. shape_fields: which fields of the configuration say what a
    sample's shape is; agree: in which ones a teacher has to agree.
    """

    name: str
    model: type[nn.Module]
    kinds: tuple[str, ...]
    shape_fields: tuple[str, ...] = ("model.in_channels", "model.input_size twice")
    agree: tuple[str, ...] = ("input_size", "in_channels", "num_classes")

    # ---- the model

    def build(self, config, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
        """The model with these tensors."""
        return build_model(config, tensors, source=source)

    # ---- its data

    def sample_shape(self, config) -> tuple[int, ...]:
        return (config.in_channels, config.input_size, config.input_size)

    def conditions(self, config) -> tuple[str, ...]:
        """The model's arguments besides x, t and grid."""
        return ("y",)

    def null(self, config, captions: Captions | None) -> dict[str, Tensor]:
        """What stands for no condition, [1, ...] by the model's arguments; those that it does not name are kept."""
        null = {}
        if "y" in self.conditions(config) and config.class_dropout_prob:
            null["y"] = torch.tensor([config.num_classes])
        return null if captions is None else null | captions.without()

    def macs(self, model: nn.Module, grid: Grid | None, tokens: int | None) -> float:
        """Multiply-accumulates of a sample; tokens: of its caption."""
        return model.macs(grid)

    # ---- its pictures

    def sample(self, model: nn.Module, conditions: dict, null: dict, cfg_scale: float, **options) -> Tensor:
        """[B, C, ...] for conditions [B, ...] by the model's arguments; guided by what `null` names, if anything."""
        return sample(model, conditions["y"], cfg_scale=cfg_scale if null else 1.0, **options)


class _SingleFamily(Family):
    """Models whose blocks share one modulation; they take their conditions by name."""

    def build(self, config, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
        return build_single(self.model, config, tensors, None, None, source)

    def conditions(self, config) -> tuple[str, ...]:
        names = ("y",) if config.num_classes else ()
        names += ("caption", "caption_mask") if config.caption_channels else ()
        return names + (("resolution", "aspect_ratio") if config.size_conditions else ())

    def macs(self, model: nn.Module, grid: Grid | None, tokens: int | None) -> float:
        return model.macs(grid, tokens)

    def sample(self, model: nn.Module, conditions: dict, null: dict, cfg_scale: float, **options) -> Tensor:
        guidance = {"cfg_scale": cfg_scale, "unconditional": null} if null else {}
        return sample_conditional(model, conditions, **guidance, **options)


class _ClipFamily(_SingleFamily):
    def sample_shape(self, config) -> tuple[int, ...]:
        return (config.in_channels, config.num_frames, config.input_size, config.input_size)


_SINGLE = ("input_size", "in_channels", "caption_channels", "max_caption_tokens")
FAMILIES = {
    family.name: family
    for family in (
        Family("flexdit", FlexDiT, ("digits", "images", "latents")),
        _SingleFamily("flexpixart", FlexPixArt, ("captions",), agree=(*_SINGLE, "size_conditions")),
        _ClipFamily(
            "flexlatte",
            FlexLatte,
            ("clips",),
            ("model.in_channels", "model.num_frames", "model.input_size twice"),
            (*_SINGLE, "num_frames", "num_classes"),
        ),
    )
}


def family_of(path: str) -> Family:
    """Of the model that save_pretrained wrote; raises FileNotFoundError or ValueError as loading it does."""
    kind = class_of(path)
    return next(family for family in FAMILIES.values() if family.model is kind)
