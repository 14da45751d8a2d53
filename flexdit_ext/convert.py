"""Weights from and to other libraries: changsn/SparseDiT, facebookresearch/DiT, diffusers; dense DiT to FlexDiT.

What the tensors' names and shapes tell (layout, widths, patch, channels, classes, input size) is read from them;
keyword arguments, FlexDiTConfig's fields, override. The number of heads is in no shape and has to be given.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._arguments import Grid
from ._state_dict import (
    DIFFUSERS,
    DIFFUSERS_PARTS,
    DIT,
    PARTS,
    SDTM_KINDS,
    SPARSEDIT,
    flatten_position,
    read_config,
    rename,
    reverse,
    translate,
)
from .checkpoint import build_model, load_state_dict_file, select_state_dict
from .config import FlexDiTConfig
from .model import FlexDiT, sincos_position_embedding
from .schedule import DensitySchedule

_LAYOUT = ("num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks")


def _load(source, what: str) -> dict[str, Tensor]:
    """Named tensors from a state dict, a training checkpoint or a file, without DataParallel's and compile's prefix."""
    tensors = load_state_dict_file(source) if isinstance(source, (str, os.PathLike)) else select_state_dict(source)
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise ValueError(f"{what}: the state dict is empty")
    return tensors


def _with_schedule(overrides: dict, grid: Grid | None) -> dict:
    if grid is None:
        return overrides
    if "schedule" in overrides:
        raise ValueError("grid and schedule both given, must be one: grid is the schedule of a single sparse grid")
    return overrides | {"schedule": DensitySchedule([grid])}


# ---- changsn/SparseDiT ----------------------------------------------------------------------------------------------


def released_to_flexdit(name: str) -> str | None:
    """Our state_dict name of a tensor of changsn/SparseDiT; None for a name that its model does not have."""
    return rename(name, SPARSEDIT, PARTS)


def flexdit_to_released(name: str) -> str | None:
    """The inverse of released_to_flexdit; None for a name that FlexDiT does not have."""
    return rename(name, reverse(SPARSEDIT), reverse(PARTS))


def from_sparsedit(
    state_dict, num_heads: int, *, grid: Grid | None = None, dtype: torch.dtype | None = None, device=None, **overrides
) -> FlexDiT:
    """FlexDiT with the weights of a changsn/SparseDiT model, the code released with arXiv 2412.06028.

    Args:
        state_dict: its state dict (floating point; q, k and v stacked), a training checkpoint holding it under "ema" or
            "model", or the path of a file (see checkpoint.load_state_dict_file).
        num_heads: attention heads.
        grid: the sparse grid (h, w) that the released model was built with (`semantic_size`) at every timestep; the
            schedule of the paper without it. `schedule=DensitySchedule(...)` gives any other.
        dtype, device: of the result; by default the checkpoint's dtype, on the CPU.
        overrides: FlexDiTConfig's fields, where they differ from what the tensors tell (see read_config).

    Returns the model in evaluation mode. Raises ValueError naming what does not fit. With several recovery blocks in a
    module the released code recovers from tokens that are dense already; FlexDiT does not, and warns.
    """
    tensors = translate(_load(state_dict, "from_sparsedit"), released_to_flexdit, "SparseDiT")
    tensors = flatten_position(tensors)
    config = read_config(tensors, num_heads, **_with_schedule(overrides, grid))
    _warn_of_recovery(config)
    return build_model(config, _with_position(tensors, config), dtype, device, "from_sparsedit: state_dict")


def to_sparsedit(
    model_or_named_tensors: torch.nn.Module | Mapping[str, Tensor], config: FlexDiTConfig | None = None
) -> dict[str, Tensor]:
    """State dict for changsn/SparseDiT from a FlexDiT, or the same names for any {our name: tensor}, say gradients.

    Tensors are detached, not copied; pos_embed [N, C] becomes [1, N, C]. config: checked for what the released code
    cannot express; a model's own by default. Raises ValueError for other names and for reinject_position.
    """
    tensors = model_or_named_tensors
    if isinstance(tensors, torch.nn.Module):
        config, tensors = config or tensors.config, tensors.state_dict()
    if config is not None and config.reinject_position:
        raise ValueError("config.reinject_position is True, the released code cannot do that")
    if config is not None:
        _warn_of_recovery(config)
    named = {name: tensor.detach() for name, tensor in tensors.items()}
    named = translate(named, flexdit_to_released, "FlexDiT")
    if "pos_embed" in named and named["pos_embed"].dim() == 2:
        named["pos_embed"] = named["pos_embed"][None]
    return named


def _warn_of_recovery(config: FlexDiTConfig) -> None:
    if config.num_sdtm and config.sdtm_blocks[2] > 1:
        warnings.warn(
            f"sdtm_blocks is {config.sdtm_blocks}: SparseDiT and FlexDiT compute several recovery blocks differently",
            stacklevel=3,
        )


def _with_position(tensors: dict[str, Tensor], config: FlexDiTConfig) -> dict[str, Tensor]:
    """Adds the fixed position embedding where a checkpoint leaves it out."""
    if "pos_embed" in tensors:
        return tensors
    return tensors | {"pos_embed": sincos_position_embedding(config.dense_grid, config.hidden_size)}


# ---- dense DiT ------------------------------------------------------------------------------------------------------


def from_dit(
    state_dict,
    num_heads: int,
    config: FlexDiTConfig | None = None,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    device=None,
    **overrides,
) -> FlexDiT:
    """FlexDiT with the weights of a facebookresearch/DiT model (arXiv 2212.09748).

    Without a layout the result has dense blocks only and computes exactly what DiT does. With one, given by `config` or
    by its fields (num_pooling_blocks, num_sdtm, sdtm_blocks, num_dense_blocks), it is initialised as `sparsify` does.
    The other arguments, the result and the errors are those of from_sparsedit.
    """
    tensors = translate(_load(state_dict, "from_dit"), lambda name: rename(name, DIT, PARTS), "DiT")
    return _from_dense(flatten_position(tensors), num_heads, config, grid, dtype, device, overrides, "from_dit")


def sparsify(dense_model: torch.nn.Module, config: FlexDiTConfig) -> FlexDiT:
    """FlexDiT of layout `config` from a dense one, by the paper's initialisation for fine-tuning (arXiv 2412.06028).

    Block k of FlexDiT, in order of computation, takes block k of the dense model: pooling blocks its value projection,
    generation and recovery blocks qkv as q and kv. W_1 = 0, b_1 = 0, W_2 = I, b_2 = 0, so recovery starts from the
    dense tokens.

    dense_model: FlexDiT (or reference.FlexDiT) with num_pooling_blocks = num_sdtm = 0 and config.depth dense blocks.
    Returns a model with copied weights of the same dtype and device, in evaluation mode. Raises ValueError where
    `config` differs in more than layout, schedule, reinject_position and the value of class_dropout_prob.
    """
    if not isinstance(config, FlexDiTConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a FlexDiTConfig")
    state_dict = dense_model.state_dict()
    device = state_dict["patch_embed.weight"].device
    return build_model(config, _sparsify(state_dict, dense_model.config, config), None, device, "sparsify: dense_model")


def _from_dense(
    tensors, num_heads, config, grid, dtype, device, overrides, source: str, input_size: int | None = None
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
    dense = read_config(tensors, num_heads, **_with_schedule(overrides, grid))
    if config is None:
        config = _with_layout(dense, layout) if layout else dense
    tensors = _sparsify(_with_position(tensors, dense), dense, config)
    return build_model(config, tensors, dtype, device, f"{source}: state_dict")


def _with_layout(dense: FlexDiTConfig, layout: dict) -> FlexDiTConfig:
    """The dense configuration with another layout; dense blocks, unless given, are what the depth leaves."""
    config = dataclasses.replace(dense, **({"num_dense_blocks": 0} | layout))
    if "num_dense_blocks" in layout:
        return config
    return dataclasses.replace(config, num_dense_blocks=max(0, dense.depth - config.depth))


def _sparsify(tensors: Mapping[str, Tensor], dense, config: FlexDiTConfig) -> dict[str, Tensor]:
    """State dict of `config`'s layout from that of the dense model."""
    if dense.num_pooling_blocks or dense.num_sdtm:
        raise ValueError("the dense model has pooling blocks or SDTMs, must have dense blocks only")
    _check_same_width(dense, config)
    blocks = _block_order(config)
    converted = {}
    for name, tensor in tensors.items():
        match = re.match(r"dense_blocks\.(\d+)\.(.+)", name)
        if match is None:
            converted[name] = tensor
        else:
            prefix, kind = blocks[int(match[1])]
            converted |= {f"{prefix}.{part}": rows for part, rows in _split_qkv(kind, match[2], tensor)}
    weight = tensors["patch_embed.weight"]
    for prefix, kind in blocks:
        if kind == "recovery":
            zeros = weight.new_zeros(config.hidden_size, config.hidden_size)
            converted[f"{prefix}.from_sparse.weight"] = zeros
            converted[f"{prefix}.from_dense.weight"] = torch.eye(config.hidden_size, dtype=weight.dtype).to(weight)
            converted[f"{prefix}.from_sparse.bias"] = converted[f"{prefix}.from_dense.bias"] = zeros[0]
    return converted


def _check_same_width(dense, config: FlexDiTConfig) -> None:
    names = (
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "num_heads",
        "num_classes",
        "learn_sigma",
        "depth",
    )
    values = {name: (getattr(dense, name), getattr(config, name)) for name in names}
    values["mlp_hidden_size"] = int(dense.hidden_size * dense.mlp_ratio), config.mlp_hidden_size
    values["null class"] = dense.class_dropout_prob > 0, config.class_dropout_prob > 0
    if wrong := [f"{name} {theirs} and {ours}" for name, (theirs, ours) in values.items() if theirs != ours]:
        raise ValueError(f"the dense model and config differ in {', '.join(wrong)}")


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


# ---- diffusers ------------------------------------------------------------------------------------------------------


def from_diffusers(
    model,
    num_heads: int | None = None,
    config: FlexDiTConfig | None = None,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    device=None,
    **overrides,
) -> FlexDiT:
    """FlexDiT with the weights of diffusers' DiTTransformer2DModel.

    model: the module, the directory of its save_pretrained (or of a DiTPipeline's, with transformer/), or its state
    dict, which needs num_heads and input_size. The rest is as in from_dit.

    FlexDiT is DiT as trained by its authors. Two things in diffusers (0.42) are not, and no choice of weights can make
    up for them, so outputs agree only nearly: its timestep frequencies are 10000^(-i/127) instead of 10000^(-i/128),
    and the norm before the MLP has eps 1e-5 (norm_eps) instead of 1e-6. The published checkpoints (facebook/DiT-XL-2-*)
    were trained with DiT's values and are exact here; fine-tune a model that was trained in diffusers.
    Raises ValueError for a model whose blocks have embeddings of their own that differ: DiT has one for all.
    """
    tensors, theirs = _read_diffusers(model)
    if theirs.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise ValueError(f"from_diffusers: activation_fn is {theirs['activation_fn']!r}, must be 'gelu-approximate'")
    num_heads = theirs.get("num_attention_heads") if num_heads is None else num_heads
    tensors = _stack_qkv(_share_embeddings(tensors))
    tensors = translate(tensors, lambda name: rename(name, DIFFUSERS, DIFFUSERS_PARTS), "DiTTransformer2DModel")
    args = (config, grid, dtype, device, overrides, "from_diffusers")
    # diffusers does not store the position embedding, from which the input size is read elsewhere.
    return _from_dense(tensors, num_heads, *args, input_size=theirs.get("sample_size"))


def _read_diffusers(model) -> tuple[dict[str, Tensor], Mapping]:
    """State dict and configuration (empty if unknown)."""
    if isinstance(model, torch.nn.Module):
        return _load(model.state_dict(), "from_diffusers"), getattr(model, "config", {})
    if isinstance(model, Mapping):
        return _load(model, "from_diffusers"), {}
    directory = Path(model)
    directory = directory / "transformer" if (directory / "transformer").is_dir() else directory
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    weights = next((directory / name for name in names if (directory / name).exists()), directory / names[0])
    tensors = _load(weights, "from_diffusers")
    try:
        return tensors, dict(json.loads((directory / "config.json").read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'} is not a JSON object: {error}") from error


def _share_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the copies of block 0's timestep and label embedding that every block carries."""
    kept = {}
    for name, tensor in tensors.items():
        match = re.match(r"transformer_blocks\.(\d+)(\.norm1\.emb\..*)", name)
        if match is None or match[1] == "0":
            kept[name] = tensor
            continue
        first = tensors.get(f"transformer_blocks.0{match[2]}")
        if first is None or first.dtype != tensor.dtype or not torch.equal(first, tensor):
            raise ValueError(f"from_diffusers: {name} differs from block 0's, DiT has one embedding for all blocks")
    return kept


def _stack_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """to_q, to_k, to_v to our qkv."""
    stacked = {}
    for name, tensor in tensors.items():
        if not re.search(r"\.attn1\.to_[qkv]\.", name):
            stacked[name] = tensor
        elif ".to_q." in name:
            parts = [name.replace(".to_q.", f".to_{part}.") for part in "qkv"]
            if missing := [part for part in parts if part not in tensors]:
                raise ValueError(f"from_diffusers: the state dict has {name} but no {', '.join(missing)}")
            if any(tensors[part].shape != tensor.shape for part in parts) or tensor.dim() == 0:
                raise ValueError(f"from_diffusers: {', '.join(parts)} differ in shape")
            stacked[name.replace("attn1.to_q", "attn.qkv")] = torch.cat([tensors[part] for part in parts])
    return stacked
