"""Weights from and to other libraries: changsn/SparseDiT, facebookresearch/DiT, diffusers; dense DiT to FlexDiT.

What the tensors' names and shapes tell (layout, widths, patch, channels, classes, input size) is read from them;
keyword arguments, FlexDiTConfig's fields, override. The number of heads is in no shape and has to be given.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import build_model, load_state_dict_file, select_state_dict
from .config import FlexDiTConfig
from .model import FlexDiT, sincos_position_embedding
from .schedule import DensitySchedule, Grid

# (name there, name here), # standing for a number; first the beginnings of a name, then parts of the rest.
_EMBEDDINGS = (
    ("pos_embed", "pos_embed"),
    ("x_embedder.proj", "patch_embed"),
    ("t_embedder.mlp.0", "timestep_embed.fc1"),
    ("t_embedder.mlp.2", "timestep_embed.fc2"),
    ("y_embedder.embedding_table", "label_embed"),
    ("final_layer", "final_layer"),
)
_DIT = (*_EMBEDDINGS, ("blocks.#", "dense_blocks.#"))
_SPARSEDIT = (
    *_EMBEDDINGS,
    ("poolingformer_blocks.#", "pooling_blocks.#"),
    ("dumbbell_blocks.#.token_merge_blocks.#", "sdtm.#.generation.#"),
    ("dumbbell_blocks.#.semantic_blocks.#", "sdtm.#.sparse.#"),
    ("dumbbell_blocks.#.token_recover_blocks.#", "sdtm.#.recovery.#"),
    ("dumbbell_blocks.#.normal_blocks.#", "sdtm.#.dense.#"),
    ("normal_blocks.#", "dense_blocks.#"),
)
_DIFFUSERS = (
    ("pos_embed.proj", "patch_embed"),
    ("pos_embed.pos_embed", "pos_embed"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "timestep_embed.fc1"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_2", "timestep_embed.fc2"),
    ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table", "label_embed"),
    ("transformer_blocks.#", "dense_blocks.#"),
    ("proj_out_1", "final_layer.modulation"),
    ("proj_out_2", "final_layer.linear"),
)
_PARTS = (
    ("adaLN_modulation.1", "modulation"),
    ("merged_layer1", "from_sparse"),
    ("merged_layer2", "from_dense"),
)
_DIFFUSERS_PARTS = (
    ("norm1.linear", "modulation"),
    ("attn1.to_out.0", "attn.proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
_LAYOUT = ("num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks")
_SDTM_KINDS = ("generation", "sparse", "recovery", "dense")

# ---- names ----------------------------------------------------------------------------------------------------------


def _rename(name: str, beginnings: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str | None:
    for old, new in beginnings:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            rest = name[match.end() :]
            for old_part, new_part in parts:
                rest = rest.replace(f".{old_part}.", f".{new_part}.")
            return new.replace("#", "{}").format(*match.groups()) + rest
    return None


def _reversed(table: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(new, old) for old, new in table]


def released_to_flexdit(name: str) -> str | None:
    """Our state_dict name of a tensor of changsn/SparseDiT; None for a name that its model does not have."""
    return _rename(name, _SPARSEDIT, _PARTS)


def flexdit_to_released(name: str) -> str | None:
    """The inverse of released_to_flexdit; None for a name that FlexDiT does not have."""
    return _rename(name, _reversed(_SPARSEDIT), _reversed(_PARTS))


def _translate(tensors: Mapping[str, Tensor], rename: Callable[[str], str | None], source: str) -> dict[str, Tensor]:
    names = {name: rename(name) for name in tensors}
    if unknown := [name for name, new in names.items() if new is None]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"{source} does not have such tensors: {', '.join(unknown[:5])}{more}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _load(source, what: str) -> dict[str, Tensor]:
    """Named tensors from a state dict, a training checkpoint or a file, without DataParallel's and compile's prefix."""
    tensors = load_state_dict_file(source) if isinstance(source, (str, os.PathLike)) else select_state_dict(source)
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise ValueError(f"{what}: the state dict is empty")
    return tensors


def _flatten_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """pos_embed [1, N, C], as the other libraries keep it, to [N, C]."""
    position = tensors.get("pos_embed")
    if position is not None and position.dim() == 3 and position.shape[0] == 1:
        return tensors | {"pos_embed": position[0]}
    return tensors


# ---- the configuration that tensors tell ----------------------------------------------------------------------------


def read_config(state_dict: Mapping[str, Tensor], num_heads: int, **overrides) -> FlexDiTConfig:
    """FlexDiTConfig of a state dict with our names; `overrides` are its fields and win over what the shapes tell.

    The last row of the label embedding is taken for the null class (class_dropout_prob 0.1), unless num_classes says
    that all rows are classes. Without pos_embed, input_size has to be given. Raises ValueError.
    """
    needed = ("patch_embed.weight", "label_embed.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"state_dict has no {', '.join(missing)}, from which the configuration is read")
    dims = {"patch_embed.weight": 4, "label_embed.weight": 2, "final_layer.linear.weight": 2, "pos_embed": 2}
    for name, dim in dims.items():
        if name in state_dict and state_dict[name].dim() != dim:
            raise ValueError(f"{name} has the shape {list(state_dict[name].shape)}, must have {dim} dimensions")
    hidden, in_channels, patch, _ = state_dict["patch_embed.weight"].shape
    values = {
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(state_dict, hidden),
        "learn_sigma": state_dict["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch * patch,
        **_input_size(state_dict, patch),
        **_layout(state_dict),
        **_classes(state_dict["label_embed.weight"].shape[0], overrides),
    }
    values |= overrides
    if "input_size" not in values:
        raise ValueError("input_size has to be given: the state dict has no pos_embed to read it from")
    return FlexDiTConfig(**values)


def _mlp_ratio(state_dict: Mapping[str, Tensor], hidden: int) -> float:
    mlp = next((tensor for name, tensor in state_dict.items() if name.endswith(".mlp.fc1.weight")), None)
    if mlp is None or mlp.dim() != 2 or hidden == 0:
        return 4.0  # build_model names what is missing or misshaped
    ratio = mlp.shape[0] / hidden
    # FlexDiTConfig rounds hidden_size * mlp_ratio down.
    return ratio if int(hidden * ratio) == mlp.shape[0] else math.nextafter(ratio, math.inf)


def _input_size(state_dict: Mapping[str, Tensor], patch: int) -> dict[str, int]:
    if "pos_embed" not in state_dict:
        return {}
    tokens = state_dict["pos_embed"].shape[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"pos_embed has {tokens} positions, must be a square number")
    return {"input_size": side * patch}


def _classes(rows: int, overrides: Mapping) -> dict[str, int | float]:
    with_null = overrides.get("class_dropout_prob", 0.1) > 0 and overrides.get("num_classes", rows - 1) == rows - 1
    return {"num_classes": rows - with_null, "class_dropout_prob": 0.1 if with_null else 0.0}


def _layout(state_dict: Mapping[str, Tensor]) -> dict[str, int | tuple[int, ...]]:
    modules = _count(state_dict, "sdtm")
    blocks = [tuple(_count(state_dict, f"sdtm.{i}.{kind}") for kind in _SDTM_KINDS) for i in range(modules)]
    for i, one in enumerate(blocks):
        if one != blocks[0]:
            raise ValueError(
                f"sdtm.{i} has {one} (generation, sparse, recovery, dense) blocks, sdtm.0 has {blocks[0]}: must agree"
            )
    layout = {
        "num_pooling_blocks": _count(state_dict, "pooling_blocks"),
        "num_sdtm": modules,
        "num_dense_blocks": _count(state_dict, "dense_blocks"),
    }
    return layout | ({"sdtm_blocks": blocks[0]} if blocks else {})


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix`, which must be 0, 1, 2, ... without a gap."""
    found = {int(match[1]) for name in state_dict if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    if found and max(found) != len(found) - 1:
        gap = min(set(range(len(found))) - found)
        raise ValueError(f"state_dict has {prefix}.{max(found)} but no {prefix}.{gap}")
    return len(found)


def _with_schedule(overrides: dict, grid: Grid | None) -> dict:
    if grid is None:
        return overrides
    if "schedule" in overrides:
        raise ValueError("grid and schedule both given, must be one: grid is the schedule of a single sparse grid")
    return overrides | {"schedule": DensitySchedule([grid])}


# ---- changsn/SparseDiT ----------------------------------------------------------------------------------------------


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
    tensors = _translate(_load(state_dict, "from_sparsedit"), released_to_flexdit, "SparseDiT")
    tensors = _flatten_position(tensors)
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
    named = _translate(named, flexdit_to_released, "FlexDiT")
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
    tensors = _translate(_load(state_dict, "from_dit"), lambda name: _rename(name, _DIT, _PARTS), "DiT")
    return _from_dense(_flatten_position(tensors), num_heads, config, grid, dtype, device, overrides, "from_dit")


def sparsify(dense_model: torch.nn.Module, config: FlexDiTConfig) -> FlexDiT:
    """FlexDiT of layout `config` from a dense one, by the paper's initialisation for fine-tuning (arXiv 2412.06028).

    Block k of FlexDiT, in order of computation, takes block k of the dense model: pooling blocks its value projection,
    generation and recovery blocks qkv as q and kv. W_1 = 0, b_1 = 0, W_2 = I, b_2 = 0, so recovery starts from the dense
    tokens. dense_model: FlexDiT (or reference.FlexDiT) with num_pooling_blocks = num_sdtm = 0. Returns a model with
    copied weights of the same dtype and device, in evaluation mode. Raises ValueError where `config` differs in
    anything but the layout, the schedule, reinject_position and class_dropout_prob's value.
    """
    state_dict = dense_model.state_dict()
    device = state_dict["patch_embed.weight"].device
    return build_model(config, _sparsify(state_dict, dense_model.config, config), None, device, "sparsify: dense_model")


def _from_dense(tensors, num_heads, config, grid, dtype, device, overrides, source: str) -> FlexDiT:
    layout = {name: overrides.pop(name) for name in _LAYOUT if name in overrides}
    dense = read_config(tensors, num_heads, **_with_schedule(overrides, grid))
    tensors = _with_position(tensors, dense)
    if config is None:
        config = dataclasses.replace(dense, num_dense_blocks=0, **layout) if layout else dense
    elif layout or overrides or grid is not None:
        given = sorted([*layout, *overrides, *(["grid"] if grid is not None else [])])
        raise ValueError(f"{source}: config already says what {', '.join(given)} would, give one of them")
    return build_model(config, _sparsify(tensors, dense, config), dtype, device, f"{source}: state_dict")


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
        for kind, count in zip(_SDTM_KINDS, config.sdtm_blocks, strict=True):
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
    if num_heads is None:
        raise ValueError("from_diffusers: num_heads has to be given, a state dict does not tell it")
    tensors = _stack_qkv(_share_embeddings(tensors))
    tensors = _translate(tensors, lambda name: _rename(name, _DIFFUSERS, _DIFFUSERS_PARTS), "DiTTransformer2DModel")
    tensors = _flatten_position(tensors)
    if "sample_size" in theirs and "pos_embed" not in tensors:  # diffusers computes the embedding anew at each start
        side = overrides.get("input_size", theirs["sample_size"]) // theirs.get("patch_size", 2)
        tensors["pos_embed"] = sincos_position_embedding((side, side), tensors["patch_embed.weight"].shape[0])
    return _from_dense(tensors, num_heads, config, grid, dtype, device, overrides, "from_diffusers")


def _read_diffusers(model) -> tuple[dict[str, Tensor], Mapping]:
    """State dict and configuration (empty if unknown)."""
    if isinstance(model, torch.nn.Module):
        return _load(model.state_dict(), "from_diffusers"), model.config
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
        if first is None or not torch.equal(first, tensor):
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
            stacked[name.replace("attn1.to_q", "attn.qkv")] = torch.cat([tensors[part] for part in parts])
    return stacked
