"""Dense DiT to FlexDiT: the paper's initialisation for fine-tuning (arXiv 2412.06028), and other resolutions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from . import _C
from ._arguments import Grid
from ._checkpoint_single import build_single
from ._report import Report
from ._state_dict import SDTM_KINDS, read_config
from .checkpoint import build_model
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .model import FlexDiT, sincos_position_embedding
from .schedule import DensitySchedule

_LAYOUT = ("num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks")
_SAME = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "num_classes", "learn_sigma", "depth")
POSITIONS = ("interpolate", "sincos")


def sparsify(dense_model: torch.nn.Module, config, report: Report | None = None) -> torch.nn.Module:
    """The model of layout `config` from a dense one, by the paper's initialisation for fine-tuning (arXiv 2412.06028).

    Block k of FlexDiT, in order of computation, takes block k of the dense model: pooling blocks its value projection,
    generation and recovery blocks qkv as q and kv. W_1 = 0, b_1 = 0, W_2 = I, b_2 = 0, so recovery starts from the
    dense tokens.

    dense_model: FlexDiT (or reference.FlexDiT) with num_pooling_blocks = num_sdtm = 0 and config.depth dense blocks;
        for a FlexPixArtConfig or a FlexLatteConfig a model of that class.
    Returns a model with copied weights of the same dtype and device, in evaluation mode. Raises ValueError where
    `config` differs in more than layout, schedule, reinject_position, timestep_shift, mlp_norm_eps and the value of
    class_dropout_prob.
    """
    single = isinstance(config, (FlexPixArtConfig, FlexLatteConfig))
    if not single and not isinstance(config, FlexDiTConfig):
        raise TypeError(
            f"config is a {type(config).__name__}, must be a FlexDiTConfig, FlexPixArtConfig or FlexLatteConfig"
        )
    report = Report() if report is None else report
    state_dict = dense_model.state_dict()
    if not report.mapped:
        report.start(state_dict)
    device = state_dict["patch_embed.weight"].device
    if single:
        _check_single(dense_model, config)
        tensors = into_layout(state_dict, config, report)
        return build_single(type(dense_model), config, tensors, None, device, "sparsify: dense_model")
    tensors = sparsify_tensors(state_dict, dense_model.config, config, report)
    return build_model(config, tensors, None, device, "sparsify: dense_model")


def resize(model: FlexDiT, input_size: int, position: str = "interpolate", report: Report | None = None) -> FlexDiT:
    """The model for images of another size: the same weights and another position embedding.

    position: "interpolate" resamples the table (bicubic), so that places keep their meaning: a start for fine-tuning,
        as is usual for vision transformers; "sincos" is DiT's own table of the new grid, which its 512 px models have.
    A schedule of the configuration stays as it is and has to fit; without one the paper's pruning rates count for the
    new grid. Returns a copy in evaluation mode. Raises TypeError or ValueError naming the argument.
    """
    if position not in POSITIONS:
        raise ValueError(f"position is {position!r}, must be one of {', '.join(POSITIONS)}")
    config = dataclasses.replace(model.config, input_size=input_size)
    state_dict = model.state_dict()
    table, old, new = state_dict["pos_embed"], model.config.dense_grid, config.dense_grid
    if position == "sincos":
        resized = sincos_position_embedding(new, config.hidden_size)
    else:
        image = table.T.unflatten(1, old)[None].to(torch.promote_types(table.dtype, torch.float32))
        resized = torch.nn.functional.interpolate(image, new, mode="bicubic", align_corners=False)[0].flatten(1).T
    if report is not None:
        report.notes.append(f"pos_embed: {old[0]}x{old[1]} to {new[0]}x{new[1]} positions, {position}")
    tensors = state_dict | {"pos_embed": resized.to(table)}
    return build_model(config, tensors, None, table.device, "resize: model")


def with_schedule(overrides: dict, grid: Grid | None) -> dict:
    if grid is None:
        return overrides
    if "schedule" in overrides:
        raise ValueError("grid and schedule both given, must be one: grid is the schedule of a single sparse grid")
    return overrides | {"schedule": DensitySchedule([grid])}


def with_position(tensors: dict[str, Tensor], config: FlexDiTConfig, report: Report) -> dict[str, Tensor]:
    """Adds the fixed position embedding where a checkpoint leaves it out."""
    if "pos_embed" in tensors:
        return tensors
    report.initialise("pos_embed", f"sin-cos of {config.dense_grid[0]}x{config.dense_grid[1]}")
    return tensors | {"pos_embed": sincos_position_embedding(config.dense_grid, config.hidden_size)}


def build(
    config, tensors: dict[str, Tensor], dtype, device, source: str, report: Report, ignore_unused: bool
) -> FlexDiT:
    """build_model with the report completed; with ignore_unused, tensors that the model lacks are left out."""
    expected = [name for name, _, _ in _C.model_parameters(config.core)]
    report.missing = [name for name in expected if name not in tensors]
    if ignore_unused:
        unused = [name for name in tensors if name not in set(expected)]
        kept = {name: (name,) for name in tensors if name not in unused}
        report.follow(kept, dict.fromkeys(unused, "the model has no such tensor"))
        tensors = {name: tensors[name] for name in kept}
    return build_model(config, tensors, dtype, device, source)


def from_dense(
    tensors,
    num_heads,
    config,
    grid,
    dtype,
    device,
    overrides,
    source: str,
    report: Report,
    ignore_unused: bool,
    input_size: int | None = None,
) -> FlexDiT:
    """What from_dit and from_diffusers share; `input_size` is for tensors without pos_embed."""
    if config is not None and (overrides or grid is not None):
        given = ", ".join([*overrides, *(["grid"] if grid is not None else [])])
        raise ValueError(f"{source}: both config and {given} given, config says it all")
    layout = {name: overrides.pop(name) for name in _LAYOUT if name in overrides}
    if input_size is not None:
        overrides.setdefault("input_size", input_size)
    if config is not None:
        overrides = {name: getattr(config, name) for name in ("input_size", "num_classes", "class_dropout_prob")}
    dense = read_config(tensors, num_heads, **with_schedule(overrides, grid))
    if config is None:
        config = _with_layout(dense, layout) if layout else dense
    tensors = sparsify_tensors(with_position(tensors, dense, report), dense, config, report)
    return build(config, tensors, dtype, device, f"{source}: state_dict", report, ignore_unused)


def _with_layout(dense: FlexDiTConfig, layout: dict) -> FlexDiTConfig:
    """The dense configuration with another layout; dense blocks, unless given, are what the depth leaves."""
    config = dataclasses.replace(dense, **({"num_dense_blocks": 0} | layout))
    if "num_dense_blocks" in layout:
        return config
    return dataclasses.replace(config, num_dense_blocks=max(0, dense.depth - config.depth))


def sparsify_tensors(tensors: Mapping[str, Tensor], dense, config: FlexDiTConfig, report: Report) -> dict[str, Tensor]:
    """State dict of `config`'s layout from that of the dense model."""
    if dense.num_pooling_blocks or dense.num_sdtm:
        raise ValueError("the dense model has pooling blocks or SDTMs, must have dense blocks only")
    _check_same_width(dense, config)
    return into_layout(tensors, config, report)


def into_layout(tensors: Mapping[str, Tensor], config, report: Report) -> dict[str, Tensor]:
    """Block k of the layout's order takes dense block k; config: any with FlexDiTConfig's layout."""
    blocks = _block_order(config)
    converted, made_of = {}, {}
    for name, tensor in tensors.items():
        match = re.match(r"dense_blocks\.(\d+)\.(.+)", name)
        if match is None:
            parts = [(name, tensor)]
        else:
            prefix, kind = blocks[int(match[1])]
            parts = [(f"{prefix}.{part}", rows) for part, rows in _split_qkv(kind, match[2], tensor)]
        converted |= parts
        made_of |= {part: (name,) for part, _ in parts}
    report.follow(made_of)
    weight = tensors["patch_embed.weight"]
    for prefix, kind in blocks:
        if kind == "recovery":
            zeros = weight.new_zeros(config.hidden_size, config.hidden_size)
            identity = torch.eye(config.hidden_size, dtype=weight.dtype).to(weight)
            for layer, value, how in (("from_sparse", zeros, "0"), ("from_dense", identity, "identity")):
                converted[f"{prefix}.{layer}.weight"], converted[f"{prefix}.{layer}.bias"] = value, zeros[0]
                report.initialise(f"{prefix}.{layer}.weight", how)
                report.initialise(f"{prefix}.{layer}.bias", "0")
    return converted


def _check_same_width(dense, config: FlexDiTConfig) -> None:
    values = {name: (getattr(dense, name), getattr(config, name)) for name in _SAME}
    values["mlp_hidden_size"] = int(dense.hidden_size * dense.mlp_ratio), config.mlp_hidden_size
    values["null class"] = dense.class_dropout_prob > 0, config.class_dropout_prob > 0
    _raise_differences(values)


def _raise_differences(values: Mapping[str, tuple]) -> None:
    """values: name -> (the dense model's, config's)."""
    if wrong := [f"{name} {theirs} and {ours}" for name, (theirs, ours) in values.items() if theirs != ours]:
        raise ValueError(f"the dense model and config differ in {', '.join(wrong)}")


def _check_single(dense_model: torch.nn.Module, config) -> None:
    """Of a FlexPixArt or a FlexLatte."""
    if getattr(dense_model, "config_class", None) is not type(config):
        raise TypeError(f"dense_model is a {type(dense_model).__name__}, which has no {type(config).__name__}")
    dense = dense_model.config
    if dense.num_pooling_blocks or dense.num_sdtm:
        raise ValueError("the dense model has pooling blocks or SDTMs, must have dense blocks only")
    free = {*_LAYOUT, "schedule", "class_dropout_prob"}
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    values = {name: (getattr(dense, name), getattr(config, name)) for name in [*names, "depth"]}
    values["null class"] = dense.class_dropout_prob > 0, config.class_dropout_prob > 0
    _raise_differences(values)


def _block_order(config: FlexDiTConfig) -> list[tuple[str, str]]:
    """(name, kind) of every block in order of computation."""
    order = [(f"pooling_blocks.{i}", "pooling") for i in range(config.num_pooling_blocks)]
    for i in range(config.num_sdtm):
        for kind, count in zip(SDTM_KINDS, config.sdtm_blocks, strict=True):
            order += [(f"sdtm.{i}.{kind}.{j}", kind) for j in range(count)]
    return order + [(f"dense_blocks.{i}", "dense") for i in range(config.num_dense_blocks)]


def _split_qkv(kind: str, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What a block of `kind` makes of a dense block's tensor; qkv is stacked along the first dimension."""
    part, _, ending = name.rpartition(".")
    if part != "attn.qkv" or kind in ("sparse", "dense") or tensor.dim() == 0:
        return [(name, tensor)]
    third = tensor.shape[0] // 3
    if kind == "pooling":
        return [(f"attn.v.{ending}", tensor[2 * third :])]
    return [(f"attn.q.{ending}", tensor[:third]), (f"attn.kv.{ending}", tensor[third:])]
