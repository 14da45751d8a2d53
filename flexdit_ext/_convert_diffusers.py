"""Weights from and to diffusers' DiTTransformer2DModel. diffusers itself is not needed."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._arguments import Grid
from ._report import Report
from ._shards import INDEX_SUFFIX, parse_size
from ._sparsify import from_dense
from ._state_dict import DIFFUSERS, DIFFUSERS_PARTS, load_tensors, rename, reverse, translate
from .checkpoint import CONFIG_NAME, find_weights, write_checkpoint
from .config import FlexDiTConfig
from .model import FlexDiT, sincos_position_embedding

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_EMBEDDING = "norm1.emb."
_SHIFT, _NORM_EPS = 1, 1e-5  # of DiTTransformer2DModel, whose configuration has the second only


def from_diffusers(
    model,
    num_heads: int | None = None,
    config: FlexDiTConfig | None = None,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    device=None,
    report: Report | None = None,
    ignore_unused: bool = False,
    **overrides,
) -> FlexDiT:
    """FlexDiT with the weights of diffusers' DiTTransformer2DModel.

    model: the module, the directory of its save_pretrained (or of a DiTPipeline's, with transformer/; one file or
    several), or its state dict, which needs num_heads and input_size. The rest is as in from_dit.

    Without `config` the result computes what diffusers (0.42) computes, which is not what DiT does: its timestep
    frequencies are 10000^(-i / 127) instead of 10000^(-i / 128) (timestep_shift 1), and the norm before the MLP has eps
    1e-5 (mlp_norm_eps) instead of 1e-6. The published checkpoints (facebook/DiT-XL-2-*) were trained with DiT's values:
    timestep_shift=0, mlp_norm_eps=1e-6 give the model that its authors trained.
    Raises ValueError for a model whose blocks have embeddings of their own that differ: DiT has one for all.
    """
    report = Report() if report is None else report
    tensors, theirs = _read(model, report)
    if theirs.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise ValueError(f"from_diffusers: activation_fn is {theirs['activation_fn']!r}, must be 'gelu-approximate'")
    num_heads = theirs.get("num_attention_heads") if num_heads is None else num_heads
    tensors = _stack_qkv(_share_embeddings(tensors, report), report)
    names = lambda name: rename(name, DIFFUSERS, DIFFUSERS_PARTS)  # noqa: E731
    tensors = translate(tensors, names, "DiTTransformer2DModel", report, ignore_unused)
    if config is None:
        overrides = {"timestep_shift": _shift_of(model), "mlp_norm_eps": theirs.get("norm_eps", _NORM_EPS)} | overrides
    args = (config, grid, dtype, device, overrides, "from_diffusers", report, ignore_unused)
    # diffusers does not store the position embedding, from which the input size is read elsewhere.
    return from_dense(tensors, num_heads, *args, input_size=theirs.get("sample_size"))


def _shift_of(model) -> int:
    """A module says which frequencies it has; its files do not, and the class always makes the same ones."""
    if isinstance(model, torch.nn.Module):
        shifts = {m.downscale_freq_shift for m in model.modules() if hasattr(m, "downscale_freq_shift")}
        if len(shifts) == 1:
            return int(shifts.pop())
    return _SHIFT


def _read(model, report: Report) -> tuple[dict[str, Tensor], Mapping]:
    """State dict and configuration (empty if unknown)."""
    if isinstance(model, torch.nn.Module):
        return load_tensors(model.state_dict(), "from_diffusers", report), getattr(model, "config", {})
    if isinstance(model, Mapping):
        return load_tensors(model, "from_diffusers", report), {}
    directory = transformer_folder(Path(model))
    pickled = directory / "diffusion_pytorch_model.bin"
    weights = find_weights(directory, WEIGHTS_NAME)
    weights = pickled if pickled.exists() and not weights.exists() else weights
    return load_tensors(weights, "from_diffusers", report), read_json(directory / CONFIG_NAME)


def transformer_folder(directory: Path) -> Path:
    """A pipeline's folder holds its transformer in one of its own."""
    return directory / "transformer" if (directory / "transformer").is_dir() else directory


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def _share_embeddings(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Drops the copies of block 0's timestep and label embedding that every block carries."""
    kept, copies = {}, {}
    for name, tensor in tensors.items():
        match = re.match(r"transformer_blocks\.(\d+)(\.norm1\.emb\..*)", name)
        if match is None or match[1] == "0":
            kept[name] = tensor
            continue
        first = tensors.get(f"transformer_blocks.0{match[2]}")
        if first is None or first.dtype != tensor.dtype or not torch.equal(first, tensor):
            raise ValueError(f"from_diffusers: {name} differs from block 0's, DiT has one embedding for all blocks")
        copies[name] = "the same as block 0's"
    report.follow({name: (name,) for name in kept}, copies)
    return kept


def _stack_qkv(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """to_q, to_k, to_v to our qkv."""
    stacked, made_of = {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"\.attn1\.to_[qkv]\.", name):
            stacked[name], made_of[name] = tensor, (name,)
        elif ".to_q." in name:
            parts = [name.replace(".to_q.", f".to_{part}.") for part in "qkv"]
            if missing := [part for part in parts if part not in tensors]:
                raise ValueError(f"from_diffusers: the state dict has {name} but no {', '.join(missing)}")
            if any(tensors[part].shape != tensor.shape for part in parts) or tensor.dim() == 0:
                raise ValueError(f"from_diffusers: {', '.join(parts)} differ in shape")
            new = name.replace("attn1.to_q", "attn.qkv")
            stacked[new], made_of[new] = torch.cat([tensors[part] for part in parts]), parts
    report.follow(made_of)
    return stacked


def to_diffusers(model: FlexDiT, report: Report | None = None) -> tuple[dict[str, Tensor], dict]:
    """State dict and configuration of the DiTTransformer2DModel that computes what a dense FlexDiT does.

    Every block gets the timestep and label embedding, and pos_embed is left to diffusers, as in its own checkpoints.
    Raises ValueError for what diffusers cannot express: pooling blocks and SDTMs (flexdit_ext.diffusers has a class for
    them), an MLP that is not four times as wide, one label, a position embedding other than the sin-cos table.
    With timestep_shift 0 diffusers computes other timestep features than the model was made for, and so nearly the same
    output: the same happens to facebook's published DiTs. A warning says so.
    """
    config = model.config
    _check_expressible(model)
    if config.timestep_shift != _SHIFT:
        warnings.warn(
            "timestep_shift is 0, diffusers' DiT computes as with 1: its output will be near this model's, not equal",
            stacklevel=2,
        )
    theirs = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.mlp_norm_eps,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes - (config.class_dropout_prob == 0),  # its null class is the last row
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
    }
    report = Report() if report is None else report
    tensors, made_of = {}, {}
    for name, tensor in model.state_dict().items():
        for new, part in _their_tensors(name, tensor, config.depth):
            tensors[new], made_of[new] = part, (name,)
    if not report.mapped:
        report.start(model.state_dict())
    report.follow(made_of, {"pos_embed": "diffusers computes it"} if "pos_embed" in report.mapped else None)
    return tensors, theirs


def _check_expressible(model: FlexDiT) -> None:
    config = model.config
    if config.num_pooling_blocks or config.num_sdtm:
        raise ValueError(
            "to_diffusers: the model has pooling blocks or SDTMs, DiTTransformer2DModel has dense blocks only "
            "(flexdit_ext.diffusers.FlexDiTTransformer2DModel has all)"
        )
    if config.mlp_hidden_size != 4 * config.hidden_size:
        raise ValueError(f"to_diffusers: mlp_ratio is {config.mlp_ratio}, must be 4")
    if config.num_classes - (config.class_dropout_prob == 0) < 1:
        raise ValueError("to_diffusers: the model has one label in all, diffusers needs two")
    fixed = sincos_position_embedding(config.dense_grid, config.hidden_size).to(model.pos_embed)
    if not torch.allclose(model.pos_embed, fixed, rtol=0, atol=1e-5):
        raise ValueError("to_diffusers: pos_embed is not the sin-cos table that diffusers computes")


def _their_tensors(name: str, tensor: Tensor, depth: int) -> list[tuple[str, Tensor]]:
    """What becomes of one of our tensors."""
    if name == "pos_embed":
        return []
    if match := re.match(r"dense_blocks\.(\d+)\.attn\.qkv\.(.+)", name):
        prefix = f"transformer_blocks.{match[1]}.attn1"
        return [
            (f"{prefix}.to_{part}.{match[2]}", rows.contiguous()) for part, rows in zip("qkv", tensor.detach().chunk(3))
        ]
    new = rename(name, reverse(DIFFUSERS), reverse(DIFFUSERS_PARTS))
    if new is None:
        raise ValueError(f"to_diffusers: the model has a tensor {name}, which FlexDiT does not have")
    if _EMBEDDING not in new:
        return [(new, tensor.detach())]
    ending = new.partition(_EMBEDDING)[2]
    return [(f"transformer_blocks.{i}.{_EMBEDDING}{ending}", tensor.detach()) for i in range(depth)]


def save_diffusers(
    model: FlexDiT,
    directory: str | os.PathLike,
    *,
    max_shard_size: int | str | None = None,
    report: Report | None = None,
) -> None:
    """Writes the folder that DiTTransformer2DModel.from_pretrained reads, whole or not at all."""
    most = None if max_shard_size is None else parse_size("max_shard_size", max_shard_size)
    tensors, config = to_diffusers(model, report)
    # The blocks' embeddings share memory, which safetensors does not write.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    write_checkpoint(tensors, Path(directory), json.dumps(config, indent=2) + "\n", most, WEIGHTS_NAME)


def is_diffusers_folder(path: Path) -> bool:
    folder = transformer_folder(path)
    names = (WEIGHTS_NAME, WEIGHTS_NAME.removesuffix(".safetensors") + INDEX_SUFFIX, "diffusion_pytorch_model.bin")
    return any((folder / name).exists() for name in names)
