"""Weights from and to diffusers' PixArtTransformer2DModel and LatteTransformer3DModel, without diffusers itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._checkpoint_single import build_single
from ._convert_diffusers import WEIGHTS_NAME, read_json, transformer_folder
from ._report import Report
from ._shards import parse_size
from ._sparsify import into_layout
from ._state_dict import load_tensors, rename, reverse, translate
from .checkpoint import CONFIG_NAME, find_weights, write_checkpoint
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .single_model import FlexLatte, FlexPixArt, SingleFlexDiT

_BEGINNINGS = (
    ("pos_embed.proj", "patch_embed"),
    ("adaln_single.emb.timestep_embedder.linear_1", "timestep_embed.fc1"),
    ("adaln_single.emb.timestep_embedder.linear_2", "timestep_embed.fc2"),
    ("adaln_single.emb.resolution_embedder.linear_1", "resolution_embed.fc1"),
    ("adaln_single.emb.resolution_embedder.linear_2", "resolution_embed.fc2"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_1", "aspect_ratio_embed.fc1"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_2", "aspect_ratio_embed.fc2"),
    ("adaln_single.linear", "modulation"),
    ("caption_projection.linear_1", "caption_embed.fc1"),
    ("caption_projection.linear_2", "caption_embed.fc2"),
    ("scale_shift_table", "final_layer.modulation_table"),
    ("proj_out", "final_layer.linear"),
    ("blocks.#.scale_shift_table", "dense_blocks.#.modulation_table"),
    ("blocks.#", "dense_blocks.#"),
)
_PARTS = (
    ("attn1.to_out.0", "attn.proj"),
    ("attn2.to_out.0", "cross.proj"),
    ("attn2.to_q", "cross.q"),
    ("attn1.qkv", "attn.qkv"),
    ("attn2.kv", "cross.kv"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
_STACKS = {"attn1.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn2.kv": ("attn2.to_k", "attn2.to_v")}
_FIXED = {  # what both classes must have been built with
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_LAYOUT = ("num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks", "schedule")


def from_pixart(
    model,
    *,
    dtype: torch.dtype | None = None,
    device=None,
    report: Report | None = None,
    max_caption_tokens: int = 120,
    **layout,
) -> FlexPixArt:
    """FlexPixArt with the weights of diffusers' PixArtTransformer2DModel.

    Args:
        model: the module, or the directory of its save_pretrained (or of a pipeline's, with transformer/).
        dtype, device: of the result; by default the checkpoint's dtype, on the CPU.
        report: filled with where every tensor went.
        max_caption_tokens: 120 for PixArt-alpha.
        layout: num_pooling_blocks, num_sdtm, sdtm_blocks, num_dense_blocks, schedule of FlexPixArtConfig. Without any
            the result has dense blocks only and computes what diffusers does; with some, block k of the layout's order
            takes block k, W_1 = 0 and W_2 = I (method.md).

    Returns the model in evaluation mode. Raises TypeError or ValueError naming what does not fit.
    """
    report = Report() if report is None else report
    tensors, theirs = _read(model, "from_pixart", report)
    sample_size = theirs.get("sample_size", 128)
    sizes, scale = theirs.get("use_additional_conditions"), theirs.get("interpolation_scale")
    config = FlexPixArtConfig(
        **_common(theirs, "from_pixart"),
        max_caption_tokens=max_caption_tokens,
        size_conditions=sample_size == 128 if sizes is None else sizes,
        position_scale=float(max(sample_size // 64, 1) if scale is None else scale),
        num_dense_blocks=theirs.get("num_layers", 28),
    )
    return _build(FlexPixArt, config, tensors, layout, dtype, device, "from_pixart", report)


def from_latte(
    model,
    *,
    dtype: torch.dtype | None = None,
    device=None,
    report: Report | None = None,
    max_caption_tokens: int = 120,
    **layout,
) -> FlexLatte:
    """FlexLatte with the weights of diffusers' LatteTransformer3DModel; arguments and errors as from_pixart. Even
    blocks of the flattened order are its spatial ones, odd blocks its temporal ones."""
    report = Report() if report is None else report
    tensors, theirs = _read(model, "from_latte", report)
    common = _common(theirs, "from_latte")
    if theirs.get("cross_attention_dim") is None:  # its blocks do not look at the caption
        common["caption_channels"] = 0
        unread = {n: "no block reads the caption" for n in tensors if n.startswith("caption_projection.")}
        tensors = {n: t for n, t in tensors.items() if n not in unread}
        report.follow({n: (n,) for n in tensors}, unread)
    config = FlexLatteConfig(
        **common,
        max_caption_tokens=max_caption_tokens,
        num_frames=theirs.get("video_length", 16),
        position_scale=float(max(theirs.get("sample_size", 64) // 64, 1)),
        num_dense_blocks=2 * theirs.get("num_layers", 1),
    )
    return _build(FlexLatte, config, tensors, layout, dtype, device, "from_latte", report)


def _read(model, source: str, report: Report) -> tuple[dict[str, Tensor], Mapping]:
    """Tensors, blocks named blocks.k in order of computation and q, k, v stacked, and the configuration."""
    if isinstance(model, torch.nn.Module):
        tensors, theirs = load_tensors(model.state_dict(), source, report), dict(model.config)
    elif isinstance(model, (str, os.PathLike)):
        folder = transformer_folder(Path(model))
        tensors, theirs = (
            load_tensors(find_weights(folder, WEIGHTS_NAME), source, report),
            read_json(folder / CONFIG_NAME),
        )
    else:
        raise TypeError(f"{source}: model is {type(model).__name__}, must be a module or a directory")
    latte = any(name.startswith("temporal_transformer_blocks.") for name in tensors)

    def block(match: re.Match) -> str:
        return f"blocks.{2 * int(match[2]) + bool(match[1]) if latte else match[2]}."

    renamed = {re.sub(r"^(temporal_)?transformer_blocks\.(\d+)\.", block, name): name for name in tensors}
    report.follow({new: (old,) for new, old in renamed.items()})
    return _stack({new: tensors[old] for new, old in renamed.items()}, source, report), theirs


def _stack(tensors: dict[str, Tensor], source: str, report: Report) -> dict[str, Tensor]:
    stacked, made_of = {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"\.(attn1\.to_[qkv]|attn2\.to_[kv])\.", name):
            stacked[name], made_of[name] = tensor, (name,)
    for name in tensors:
        for whole, parts in _STACKS.items():
            if f".{parts[0]}." in name:
                names = [name.replace(parts[0], part) for part in parts]
                if missing := [part for part in names if part not in tensors]:
                    raise ValueError(f"{source}: the state dict has {name} but no {', '.join(missing)}")
                new = name.replace(parts[0], whole)
                stacked[new], made_of[new] = torch.cat([tensors[part] for part in names]), names
    report.follow(made_of)
    return stacked


def _common(theirs: Mapping, source: str) -> dict:
    """Fields of both configurations."""
    for name, wanted in _FIXED.items():
        if theirs.get(name, wanted) != wanted:
            raise ValueError(f"{source}: {name} is {theirs[name]!r}, must be {wanted!r}")
    heads, head_size = theirs.get("num_attention_heads", 16), theirs.get("attention_head_dim", 72)
    cross = theirs.get("cross_attention_dim")
    if cross is not None and cross != heads * head_size:
        raise ValueError(f"{source}: cross_attention_dim is {cross}, must be the hidden size {heads * head_size}")
    in_channels, out_channels = theirs.get("in_channels", 4), theirs.get("out_channels")
    return {
        "input_size": theirs.get("sample_size", 64),
        "patch_size": theirs.get("patch_size", 2),
        "in_channels": in_channels,
        "out_channels": in_channels if out_channels is None else out_channels,
        "hidden_size": heads * head_size,
        "num_heads": heads,
        "caption_channels": theirs.get("caption_channels") or 0,
        "num_pooling_blocks": 0,
        "num_sdtm": 0,
    }


def _build(kind: type, config, tensors, layout: dict, dtype, device, source: str, report: Report):
    if unknown := sorted(set(layout) - set(_LAYOUT)):
        raise TypeError(f"{source}: unknown arguments {unknown}, the layout's are {list(_LAYOUT)}")
    tensors = translate(tensors, lambda name: rename(name, _BEGINNINGS, _PARTS), source, report)
    if layout:
        depth, config = config.depth, dataclasses.replace(config, **({"num_dense_blocks": 0} | layout))
        if "num_dense_blocks" not in layout:
            config = dataclasses.replace(config, num_dense_blocks=max(0, depth - config.depth))
        if config.depth != depth:
            raise ValueError(f"{source}: the layout has {config.depth} blocks, the dense model has {depth}")
    tensors = into_layout(tensors, config, report)
    weight = tensors["patch_embed.weight"]
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    for name, shape in expected.items():  # projections without bias (attention_bias=False)
        if name.endswith(".bias") and re.search(r"\.(attn|cross)\.(qkv|q|kv|v)\.", name) and name not in tensors:
            tensors[name] = weight.new_zeros(shape)
            report.initialise(name, "0")
    report.missing = [name for name in expected if name not in tensors]
    return build_single(kind, config, tensors, dtype, device, source)


# ---- and back -------------------------------------------------------------------------------------------------------


def to_pixart(model: FlexPixArt, report: Report | None = None) -> tuple[dict[str, Tensor], dict]:
    """State dict and configuration of the PixArtTransformer2DModel that computes what a dense FlexPixArt does. Raises
    ValueError for pooling blocks and SDTMs, an MLP that is not four times as wide."""
    config = _check_dense(model, FlexPixArt, "to_pixart")
    scale = config.position_scale
    theirs = _their_config(config, "PixArtTransformer2DModel") | {
        "num_layers": config.depth,
        "use_additional_conditions": config.size_conditions,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "cross_attention_dim": config.hidden_size,
    }
    return _their_tensors(model, lambda k: f"transformer_blocks.{k}", report), theirs


def to_latte(model: FlexLatte, report: Report | None = None) -> tuple[dict[str, Tensor], dict]:
    """State dict and configuration of the LatteTransformer3DModel that computes what a dense FlexLatte does. Raises
    ValueError as to_pixart, and for what diffusers' class does not have: labels, an odd number of blocks, a clip
    without captions, another position_scale."""
    config = _check_dense(model, FlexLatte, "to_latte")
    if config.num_classes:
        raise ValueError(f"to_latte: num_classes is {config.num_classes}, LatteTransformer3DModel has no labels")
    if not config.caption_channels:
        raise ValueError("to_latte: caption_channels is 0, LatteTransformer3DModel always embeds a caption")
    if config.depth % 2:
        raise ValueError(
            f"to_latte: the model has {config.depth} blocks, must be pairs of a spatial and a temporal one"
        )
    if config.position_scale != max(config.input_size // 64, 1):
        raise ValueError(
            f"to_latte: position_scale is {config.position_scale}, diffusers has input_size // 64, at least 1"
        )
    theirs = _their_config(config, "LatteTransformer3DModel") | {
        "num_layers": config.depth // 2,
        "video_length": config.num_frames,
        "cross_attention_dim": config.hidden_size,
    }
    return _their_tensors(model, lambda k: f"{'temporal_' if k % 2 else ''}transformer_blocks.{k // 2}", report), theirs


def save_single_diffusers(
    model: SingleFlexDiT,
    directory: str | os.PathLike,
    *,
    max_shard_size: int | str | None = None,
    report: Report | None = None,
) -> None:
    """Writes the folder that PixArtTransformer2DModel's or LatteTransformer3DModel's from_pretrained reads, whole or
    not at all. Errors as to_pixart and to_latte."""
    most = None if max_shard_size is None else parse_size("max_shard_size", max_shard_size)
    tensors, config = (to_pixart if isinstance(model, FlexPixArt) else to_latte)(model, report)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # rows of one qkv share memory
    write_checkpoint(tensors, Path(directory), json.dumps(config, indent=2) + "\n", most, WEIGHTS_NAME)


def _check_dense(model, kind: type[SingleFlexDiT], source: str):
    if not isinstance(model, kind):
        raise TypeError(f"{source}: model is {type(model).__name__}, must be a {kind.__name__}")
    config = model.config
    if config.num_pooling_blocks or config.num_sdtm:
        raise ValueError(f"{source}: the model has pooling blocks or SDTMs, diffusers' class has dense blocks only")
    if config.mlp_hidden_size != 4 * config.hidden_size:
        raise ValueError(f"{source}: mlp_ratio is {config.mlp_ratio}, must be 4")
    return config


def _their_config(config, name: str) -> dict:
    return _FIXED | {
        "_class_name": name,
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "caption_channels": config.caption_channels,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
    }


def _their_tensors(model, block_name, report: Report | None) -> dict[str, Tensor]:
    report = Report() if report is None else report
    if not report.mapped:
        report.start(model.state_dict())
    tensors, made_of = {}, {}
    for name, tensor in model.state_dict().items():
        new = rename(name, reverse(_BEGINNINGS), reverse(_PARTS))
        new = re.sub(r"^blocks\.(\d+)", lambda match: block_name(int(match[1])), new)
        whole = next((one for one in _STACKS if f".{one}." in new), None)
        names = [new] if whole is None else [new.replace(whole, part) for part in _STACKS[whole]]
        for part, rows in zip(names, tensor.detach().chunk(len(names)), strict=True):
            tensors[part], made_of[part] = rows, (name,)
    report.follow(made_of)
    return tensors
