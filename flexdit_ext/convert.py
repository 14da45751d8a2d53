"""Weights from and to other libraries: changsn/SparseDiT, facebookresearch/DiT, diffusers; dense DiT to FlexDiT.

What the tensors' names and shapes tell (layout, widths, patch, channels, classes, input size) is read from them;
keyword arguments, FlexDiTConfig's fields, override. The number of heads is in no shape and has to be given.
Every converter fills a Report, if one is given: what was mapped, initialised, missing, unused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._arguments import Grid
from ._convert_diffusers import (
    from_diffusers,
    is_diffusers_folder,
    read_json,
    save_diffusers,
    to_diffusers,
    transformer_folder,
)
from ._convert_single import from_latte, from_pixart, to_latte, to_pixart
from ._report import Report
from ._sparsify import build, from_dense, resize, sparsify, with_position, with_schedule
from ._state_dict import (
    DIT,
    PARTS,
    SPARSEDIT,
    flatten_position,
    load_tensors,
    read_config,
    rename,
    reverse,
    translate,
)
from ._wrapped import WRAPPERS
from .checkpoint import CONFIG_NAME, load_state_dict_file
from .config import FlexDiTConfig
from .model import FlexDiT

__all__ = [
    "Report",
    "detect",
    "flexdit_to_released",
    "from_diffusers",
    "from_dit",
    "from_latte",
    "from_pixart",
    "from_sparsedit",
    "read_config",
    "released_to_flexdit",
    "resize",
    "save_diffusers",
    "sparsify",
    "to_diffusers",
    "to_dit",
    "to_latte",
    "to_pixart",
    "to_sparsedit",
]

# ---- changsn/SparseDiT ----------------------------------------------------------------------------------------------


def released_to_flexdit(name: str) -> str | None:
    """Our state_dict name of a tensor of changsn/SparseDiT; None for a name that its model does not have."""
    return rename(name, SPARSEDIT, PARTS)


def flexdit_to_released(name: str) -> str | None:
    """The inverse of released_to_flexdit; None for a name that FlexDiT does not have."""
    return rename(name, reverse(SPARSEDIT), reverse(PARTS))


def from_sparsedit(
    state_dict,
    num_heads: int,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    device=None,
    key: str | None = None,
    report: Report | None = None,
    ignore_unused: bool = False,
    **overrides,
) -> FlexDiT:
    """FlexDiT with the weights of a changsn/SparseDiT model, the code released with arXiv 2412.06028.

    Args:
        state_dict: its state dict (floating point; q, k and v stacked), a training checkpoint holding it under "ema" or
            "model", or the path of a file (see checkpoint.load_state_dict_file).
        num_heads: attention heads.
        grid: the sparse grid (h, w) that the released model was built with (`semantic_size`) at every timestep; the
            schedule of the paper without it. `schedule=DensitySchedule(...)` gives any other.
        dtype, device: of the result; by default the checkpoint's dtype, on the CPU.
        key: which state dict of a training checkpoint; None is "ema" before "model" before "state_dict".
        report: filled with where every tensor went.
        ignore_unused: leave out tensors that the model does not have instead of raising.
        overrides: FlexDiTConfig's fields, where they differ from what the tensors tell (see read_config).

    Returns the model in evaluation mode. Raises ValueError naming what does not fit. With several recovery blocks in a
    module the released code recovers from tokens that are dense already; FlexDiT does not, and warns.
    """
    report = Report() if report is None else report
    tensors = load_tensors(state_dict, "from_sparsedit", report, key)
    tensors = flatten_position(translate(tensors, released_to_flexdit, "SparseDiT", report, ignore_unused))
    config = read_config(tensors, num_heads, **with_schedule(overrides, grid))
    _warn_of_recovery(config)
    tensors = with_position(tensors, config, report)
    return build(config, tensors, dtype, device, "from_sparsedit: state_dict", report, ignore_unused)


def to_sparsedit(
    model_or_named_tensors: torch.nn.Module | Mapping[str, Tensor],
    config: FlexDiTConfig | None = None,
    report: Report | None = None,
) -> dict[str, Tensor]:
    """State dict for changsn/SparseDiT from a FlexDiT, or the same names for any {our name: tensor}, say gradients.

    Tensors are detached, not copied; pos_embed [N, C] becomes [1, N, C]. config: checked for what the released code
    cannot express; a model's own by default. Raises ValueError for other names, for reinject_position and for
    diffusers' constants (timestep_shift, mlp_norm_eps).
    """
    tensors = model_or_named_tensors
    if isinstance(tensors, torch.nn.Module):
        config, tensors = config or tensors.config, tensors.state_dict()
    if config is not None:
        _check_constants(config, "the released code")
        _warn_of_recovery(config)
    return _renamed(tensors, flexdit_to_released, report)


def _renamed(tensors: Mapping[str, Tensor], new_name, report: Report | None) -> dict[str, Tensor]:
    report = Report() if report is None else report
    if not report.mapped:
        report.start(tensors)
    named = translate({name: tensor.detach() for name, tensor in tensors.items()}, new_name, "FlexDiT", report)
    if "pos_embed" in named and named["pos_embed"].dim() == 2:
        named["pos_embed"] = named["pos_embed"][None]
    return named


def _check_constants(config: FlexDiTConfig, who: str) -> None:
    if config.reinject_position:
        raise ValueError(f"config.reinject_position is True, {who} cannot do that")
    if config.timestep_shift != 0:
        raise ValueError(f"config.timestep_shift is {config.timestep_shift}, {who} has 0")
    if config.mlp_norm_eps != 1e-6:
        raise ValueError(f"config.mlp_norm_eps is {config.mlp_norm_eps}, {who} has 1e-6")


def _warn_of_recovery(config: FlexDiTConfig) -> None:
    if config.num_sdtm and config.sdtm_blocks[2] > 1:
        warnings.warn(
            f"sdtm_blocks is {config.sdtm_blocks}: SparseDiT and FlexDiT compute several recovery blocks differently",
            stacklevel=3,
        )


# ---- dense DiT ------------------------------------------------------------------------------------------------------


def from_dit(
    state_dict,
    num_heads: int,
    config: FlexDiTConfig | None = None,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    device=None,
    key: str | None = None,
    report: Report | None = None,
    ignore_unused: bool = False,
    **overrides,
) -> FlexDiT:
    """FlexDiT with the weights of a facebookresearch/DiT model (arXiv 2212.09748), fast-DiT's included.

    Without a layout the result has dense blocks only and computes exactly what DiT does. With one, given by `config` or
    by its fields (num_pooling_blocks, num_sdtm, sdtm_blocks, num_dense_blocks), it is initialised as `sparsify` does.
    The other arguments, the result and the errors are those of from_sparsedit.
    """
    report = Report() if report is None else report
    tensors = load_tensors(state_dict, "from_dit", report, key)
    tensors = translate(tensors, lambda name: rename(name, DIT, PARTS), "DiT", report, ignore_unused)
    args = (config, grid, dtype, device, overrides, "from_dit", report, ignore_unused)
    return from_dense(flatten_position(tensors), num_heads, *args)


def to_dit(model: torch.nn.Module, report: Report | None = None) -> dict[str, Tensor]:
    """State dict for facebookresearch/DiT from a FlexDiT with dense blocks only; tensors are detached, not copied.

    Raises ValueError for what DiT cannot express: other blocks, reinject_position, diffusers' constants.
    """
    config = model.config
    if config.num_pooling_blocks or config.num_sdtm:
        raise ValueError("to_dit: the model has pooling blocks or SDTMs, DiT has dense blocks only")
    _check_constants(config, "DiT")
    return _renamed(model.state_dict(), lambda name: rename(name, reverse(DIT), reverse(PARTS)), report)


# ---- any checkpoint -------------------------------------------------------------------------------------------------

_DIFFUSERS_CLASSES = {
    "DiTTransformer2DModel": "diffusers",
    "Transformer2DModel": "diffusers",  # in the published checkpoints, also PixArt's
    "PixArtTransformer2DModel": "pixart",
    "LatteTransformer3DModel": "latte",
}
_MARKS = {
    "flexdit": "patch_embed.weight",
    "diffusers": "pos_embed.proj.weight",
    "sparsedit": "dumbbell_blocks.0.",
    "dit": "x_embedder.proj.weight",
}


def detect(path: str | os.PathLike) -> str:
    """What wrote a checkpoint: "flexdit" (FlexPixArt and FlexLatte, too), "flexdit-diffusers" (flexdit_ext.diffusers),
    "dit", "diffusers" (its DiT), "pixart", "latte" (diffusers' as well) or "sparsedit". A SparseDiT without SDTMs is
    named by its pooling blocks, and without those is taken for a DiT.

    Raises ValueError if it is none of them, FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir() and is_diffusers_folder(path):
        config = read_json(transformer_folder(path) / CONFIG_NAME)
        name = config.get("_class_name")
        if name in WRAPPERS:
            return "flexdit-diffusers"
        if name not in _DIFFUSERS_CLASSES:
            raise ValueError(f"{path} is of the class {name}, must be one of {', '.join(_DIFFUSERS_CLASSES)}")
        return (
            "pixart"
            if config.get("norm_type") == "ada_norm_single" and name == "Transformer2DModel"
            else (_DIFFUSERS_CLASSES[name])
        )
    if path.is_dir():
        return "flexdit"
    names = {name.removeprefix("_orig_mod.").removeprefix("module.") for name in load_state_dict_file(path)}
    if any(name.startswith(("poolingformer_blocks.", "normal_blocks.")) for name in names):
        return "sparsedit"
    for kind, mark in _MARKS.items():
        if any(name.startswith(mark) for name in names):
            return kind
    raise ValueError(f"{path} holds no tensor of FlexDiT, DiT, diffusers' DiT or SparseDiT, such as {min(names)}")
