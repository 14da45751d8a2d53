"""`flexdit convert SRC DST --to ...`: checkpoints from and to FlexDiT, DiT, diffusers (PixArt, Latte) and SparseDiT."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from . import convert
from ._checkpoint_single import load_any
from ._convert_diffusers import save_diffusers
from ._convert_single import save_single_diffusers
from ._report import Report
from ._shards import parse_size
from ._sparsify import POSITIONS
from ._wrapped import load_wrapped
from .checkpoint import load_state_dict_file
from .config import FlexDiTConfig
from .model import FlexDiT
from .single_model import SingleFlexDiT

TARGETS = ("flexdit", "dit", "diffusers", "sparsedit")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT's S, B, L and XL
LAYOUT_FIELDS = ("num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks")
_DIT_CONSTANTS = {"timestep_shift": 0, "mlp_norm_eps": 1e-6}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint from or to DiT, diffusers, SparseDiT",
        description="Converts a checkpoint and prints which tensors were mapped, initialised, missing and unused.",
    )
    parser.add_argument("source", help="a folder, .safetensors, .pt or .safetensors.index.json")
    parser.add_argument("target", help="a folder (flexdit, diffusers) or a .pt or .safetensors file (dit, sparsedit)")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--from", dest="origin", choices=TARGETS, help="what wrote the source; found out by default")
    parser.add_argument(
        "--layout",
        help='of a dense source\'s FlexDiT: a preset such as "XL/2", or pooling blocks, SDTMs and dense blocks as '
        '"2/4x1,3,1,1/2"',
    )
    parser.add_argument("--num-heads", type=int, help="by default DiT's for hidden sizes 384, 768, 1024 and 1152")
    parser.add_argument("--num-classes", type=int, help="by default all labels but the last, the null class")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--input-size", type=int, help="resize the position embedding to latents of this side")
    size.add_argument("--image-size", type=int, help="the same for images: eight pixels are one latent")
    parser.add_argument(
        "--position", choices=POSITIONS, default="interpolate", help="how to resize it; sincos is DiT's own table"
    )
    parser.add_argument("--key", help='which state dict of a training checkpoint: by default "ema", then "model"')
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--max-shard-size", help='several files of at most such a size, as "5GB"; for folders')
    parser.add_argument(
        "--dit-constants",
        action="store_true",
        help="of a diffusers model that DiT's authors trained (facebook/DiT-*): compute as they did, with DiT's "
        "timestep frequencies and epsilon instead of diffusers'",
    )
    parser.add_argument("--ignore-unused", action="store_true", help="leave out tensors that the model does not have")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    report = Report()
    try:
        convert_checkpoint(arguments, report)
    except (OSError, TypeError, ValueError) as error:
        for line in [f"missing: {name}" for name in report.missing] + [f"error: {error}"]:
            print(line, file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    print(f"written: {arguments.target}")
    return 0


def convert_checkpoint(arguments: argparse.Namespace, report: Report) -> None:
    _check_target(arguments)
    model = _load(arguments, report)
    if arguments.image_size is not None and arguments.image_size % 8:
        raise ValueError(f"--image-size is {arguments.image_size}, must be a multiple of 8")
    size = arguments.input_size if arguments.image_size is None else arguments.image_size // 8
    if size is not None and size != model.config.input_size:
        model = convert.resize(model, size, arguments.position, report)
    if arguments.layout is not None:
        model = _with_layout(model, arguments.layout, report)
    if arguments.dtype is not None:
        model = model.to(_DTYPES[arguments.dtype])
    _write(model, arguments, report)


def _check_target(arguments) -> None:
    """What would fail in the end fails before the work."""
    if arguments.to in ("flexdit", "diffusers"):
        if Path(arguments.target).is_file():
            raise ValueError(f"{arguments.target} is a file, --to {arguments.to} writes a folder")
        if arguments.max_shard_size is not None:
            parse_size("--max-shard-size", arguments.max_shard_size)
        return
    if Path(arguments.target).suffix not in (".pt", ".safetensors") or Path(arguments.target).is_dir():
        raise ValueError(f"{arguments.target} must be a .pt or .safetensors file for --to {arguments.to}")
    if arguments.max_shard_size is not None:
        raise ValueError(f"--max-shard-size is for folders, --to {arguments.to} writes one file")


def _load(arguments, report: Report) -> FlexDiT | SingleFlexDiT:
    kind = arguments.origin or convert.detect(arguments.source)
    if kind == "diffusers" and Path(arguments.source).is_dir():
        kind = convert.detect(arguments.source)  # of which class
    if kind in ("pixart", "latte"):
        _check_options(arguments, kind)
        return (convert.from_pixart if kind == "pixart" else convert.from_latte)(arguments.source, report=report)
    options = {"report": report, "ignore_unused": arguments.ignore_unused}
    if arguments.num_classes is not None:
        options["num_classes"] = arguments.num_classes
    if arguments.dit_constants and kind != "diffusers":
        raise ValueError(f"--dit-constants is for a source written by diffusers, {arguments.source} is a {kind}")
    if kind in ("flexdit", "flexdit-diffusers"):
        model = load_any(arguments.source) if kind == "flexdit" else load_wrapped(arguments.source)
        if isinstance(model, SingleFlexDiT):
            _check_options(arguments, type(model).__name__)
        report.start(model.state_dict())
        return model
    if kind == "diffusers":
        constants = _DIT_CONSTANTS if arguments.dit_constants else {}
        return convert.from_diffusers(arguments.source, arguments.num_heads, **options, **constants)
    heads = _heads(arguments, report)
    reader = convert.from_sparsedit if kind == "sparsedit" else convert.from_dit
    return reader(arguments.source, heads, key=arguments.key, **options)


def _check_options(arguments, kind: str) -> None:
    """Those for FlexDiT alone."""
    names = ("num_heads", "num_classes", "input_size", "image_size", "key", "dit_constants", "ignore_unused")
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} is for DiTs, {arguments.source} is a {kind}")
    if arguments.to in ("dit", "sparsedit"):
        raise ValueError(f"--to is {arguments.to}, must be flexdit or diffusers: {arguments.source} is a {kind}")


def _heads(arguments, report: Report) -> int:
    """What no shape tells."""
    if arguments.num_heads is not None:
        return arguments.num_heads
    tensors = load_state_dict_file(arguments.source, arguments.key)
    bias = next((tensor for name, tensor in tensors.items() if name.endswith("x_embedder.proj.bias")), None)
    hidden = 0 if bias is None else bias.numel()
    if hidden not in _HEADS:
        raise ValueError(f"--num-heads has to be given: no DiT has a hidden size of {hidden}")
    report.notes.append(f"{_HEADS[hidden]} heads, as the DiT of hidden size {hidden} has")
    return _HEADS[hidden]


def _with_layout(model: FlexDiT | SingleFlexDiT, layout: str, report: Report) -> FlexDiT | SingleFlexDiT:
    values = parse_layout(layout)
    config = dataclasses.replace(model.config, **{name: values[name] for name in LAYOUT_FIELDS})
    for name in ("hidden_size", "num_heads", "patch_size"):
        if name in values and values[name] != getattr(model.config, name):
            raise ValueError(f"--layout {layout} has {name} {values[name]}, the source {getattr(model.config, name)}")
    if config == model.config:
        return model
    if model.config.num_pooling_blocks or model.config.num_sdtm:
        raise ValueError(
            f"--layout is {layout}, but the source is a FlexDiT of another layout: only a dense one converts"
        )
    return convert.sparsify(model, config, report)


def parse_layout(layout: str) -> dict:
    """The fields that a preset or "pooling/SDTMs x generation,sparse,recovery,dense/dense" says."""
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+),(\d+),(\d+),(\d+)/(\d+)", layout.replace(" ", ""))
    if match:
        pooling, modules, *blocks, dense = map(int, match.groups())
        return dict(zip(LAYOUT_FIELDS, (pooling, modules, tuple(blocks), dense), strict=True))
    try:
        preset = FlexDiTConfig.preset(layout)
    except ValueError as error:
        raise ValueError(f'--layout is {layout!r}, must be a preset or such as "2/4x1,3,1,1/2": {error}') from None
    return {name: getattr(preset, name) for name in (*LAYOUT_FIELDS, "hidden_size", "num_heads", "patch_size")}


def _write(model: FlexDiT | SingleFlexDiT, arguments, report: Report) -> None:
    target, shard = Path(arguments.target), {"max_shard_size": arguments.max_shard_size}
    if arguments.to == "flexdit":
        model.save_pretrained(target, **shard)
    elif arguments.to == "dit":
        _write_file(convert.to_dit(model, report), target)
    elif arguments.to == "sparsedit":
        _write_file(convert.to_sparsedit(model, report=report), target)
    elif model.config.num_pooling_blocks or model.config.num_sdtm:
        wrapper = _wrap(model)
        wrapper.save_pretrained(target, **{name: value for name, value in shard.items() if value is not None})
        report.notes.append(f"written as flexdit_ext.diffusers.{type(wrapper).__name__}: diffusers' own class is dense")
    else:
        save = save_diffusers if isinstance(model, FlexDiT) else save_single_diffusers
        save(model, target, **shard, report=report)


def _wrap(model: FlexDiT | SingleFlexDiT):
    from . import diffusers

    return {
        "FlexDiT": diffusers.FlexDiTTransformer2DModel.from_flexdit,
        "FlexPixArt": diffusers.FlexPixArtTransformer2DModel.from_flexpixart,
        "FlexLatte": diffusers.FlexLatteTransformer3DModel.from_flexlatte,
    }[type(model).__name__](model)


def _write_file(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Under a temporary name first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as staging:
        staged = Path(staging) / target.name
        if target.suffix == ".pt":
            torch.save(tensors, staged)
        else:
            safetensors.torch.save_file(tensors, staged, {"format": "pt"})
        os.replace(staged, target)
