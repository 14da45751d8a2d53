"""LoRA fine-tuning through peft (arXiv 2106.09685), and its variant with one adapter per density segment.

peft's own functions work on a FlexDiT: get_peft_model, inject_adapter_in_model, merge_and_unload, save_pretrained. The
fused blocks compute with W + scaling * B A, so outputs and gradients are those of the merged weights; an adapter saves
the memory of gradients and optimizer, not the time of a weight's gradient. Not served: lora_dropout in training, DoRA
and its kin; both raise ValueError. With segments, torch.compile breaks its graph where t decides who goes where.

    peft_model = peft.get_peft_model(model, LoraConfig(r=16, target_modules=lora.block_linears(model)))
    peft_model = lora.add_segment_adapters(model, LoraConfig(r=16))     # each sample by its timestep

Needs `pip install flexdit_ext[lora]`.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
from torch import Tensor, nn

from ._adapters import by_segment, has_adapters, merged_state_dict, require_adapters
from .blocks import Block
from .checkpoint import build_model
from .model import FlexDiT

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = [
    "MergedSegments",
    "add_segment_adapters",
    "block_linears",
    "load_segment_adapters",
    "merge",
    "merge_segments",
    "save_segment_adapters",
]

_SEGMENTS_NAME = "segments.json"


def block_linears(model: FlexDiT) -> list[str]:
    """Names of all Linear layers in the blocks, modulations included, for LoraConfig's target_modules."""
    _check_model(model)
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, Block)}
    return [
        f"{name}.{inner}"
        for name, block in blocks.items()
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def add_segment_adapters(model: FlexDiT, config: LoraConfig) -> PeftModel:
    """Puts one adapter for each segment of model.schedule into the model, segment_0 at the data end; in place.

    Every sample then goes through the adapter of its timestep's segment, in a ragged batch each through its own. All
    adapters are trainable, the rest is frozen. config: LoraConfig; without target_modules all Linear layers of the
    blocks. Raises ValueError for a model with adapters and for a config with modules_to_save.
    """
    from peft import LoraConfig, get_peft_model

    _check_model(model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a peft.LoraConfig")
    if config.modules_to_save:
        raise ValueError(f"modules_to_save is {config.modules_to_save}, must be None: segments share all else")
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = block_linears(model)
    names = tuple(f"segment_{i}" for i in range(len(model.schedule.grids)))
    peft_model = get_peft_model(model, copy.deepcopy(config), adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, copy.deepcopy(config))
    _activate(peft_model, names, trainable=True)
    return peft_model


def save_segment_adapters(model: PeftModel, directory: str | os.PathLike) -> None:
    """Writes a folder of peft's for each segment, and segments.json; whole or not at all, replacing `directory`."""
    flexdit, directory = _flexdit(model), Path(directory)
    names = flexdit.segment_adapters
    if names is None:
        raise ValueError(
            "model has no adapters for segments, see add_segment_adapters; peft's save_pretrained saves one"
        )
    if directory.exists() and not (directory / _SEGMENTS_NAME).exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is there and holds no segment adapters: it would be replaced")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory.parent) as staging:
        staged = Path(staging) / "new"
        model.save_pretrained(staged, selected_adapters=list(names))
        text = json.dumps({"adapters": names, "schedule": flexdit.schedule.to_dict()}, indent=2) + "\n"
        (staged / _SEGMENTS_NAME).write_text(text, encoding="utf-8")
        if directory.exists():
            os.rename(directory, Path(staging) / "old")
        os.rename(staged, directory)


def load_segment_adapters(model: FlexDiT, directory: str | os.PathLike, trainable: bool = False) -> PeftModel:
    """The counterpart of add_segment_adapters for what save_segment_adapters wrote; `trainable` to go on training.

    Raises FileNotFoundError, or ValueError where the segments or the tensors are not this model's.
    """
    from peft import PeftModel

    _check_model(model)
    directory = Path(directory)
    if not (directory / _SEGMENTS_NAME).exists():
        raise FileNotFoundError(f"{directory} has no {_SEGMENTS_NAME}, must be a folder of save_segment_adapters")
    content = json.loads((directory / _SEGMENTS_NAME).read_text(encoding="utf-8"))
    names, schedule, own = tuple(content["adapters"]), content["schedule"], model.schedule.to_dict()
    for key in ("begins", "num_timesteps"):
        if schedule[key] != own[key]:
            raise ValueError(f"{directory} has adapters for {key} {schedule[key]}, the model's schedule has {own[key]}")
    peft_model = None
    for name in names:
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, directory / name, name, is_trainable=trainable)
        else:
            peft_model.load_adapter(directory / name, name, is_trainable=trainable)
        _check_loaded(peft_model, name, directory / name / "adapter_model.safetensors")
    _activate(peft_model, names, trainable)
    return peft_model


def merge(model: FlexDiT | PeftModel, segment: int | None = None) -> FlexDiT:
    """A FlexDiT of its own, in eval mode, with the active adapters merged into the weights; `model` stays as it is.

    segment: whose adapter, for a model with one for each density segment.
    """
    flexdit = _flexdit(model)
    names, adapter = flexdit.segment_adapters, None
    if (names is None) != (segment is None) or (names is not None and segment not in range(len(names))):
        allowed = "None" if names is None else f"from 0 to {len(names) - 1}"
        raise ValueError(f"segment is {segment}, must be {allowed} for this model")
    if names is not None:
        require_adapters(flexdit, names)
        adapter = names[segment]
    state = merged_state_dict(flexdit, adapter)
    merged = build_model(flexdit.config, state, device=state["pos_embed"].device)
    merged.schedule = flexdit.schedule
    return merged


class MergedSegments(nn.Module):
    """A FlexDiT for each density segment, each sample going through its timestep's: for flexdit_ext.sample.

    As many times the weights' memory as there are segments. Made by merge_segments.
    """

    def __init__(self, models: list[FlexDiT]):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config, self.schedule = models[0].config, models[0].schedule

    def forward(self, x: Tensor, t: Tensor, y: Tensor, grid=None) -> Tensor:
        """As FlexDiT.forward."""

        def run(segment: int, *inputs) -> Tensor:
            return self.models[segment](*inputs)

        return by_segment(run, self.schedule, x, t, y, grid, absent=False)


def merge_segments(model: FlexDiT | PeftModel) -> MergedSegments:
    """Every segment's adapter merged into weights of its own: no adapter costs anything at inference."""
    names = _flexdit(model).segment_adapters
    if names is None:
        raise ValueError("model has no adapters for segments, see add_segment_adapters")
    return MergedSegments([merge(model, segment) for segment in range(len(names))]).eval()


def _activate(peft_model: PeftModel, names: tuple[str, ...], trainable: bool) -> None:
    """All adapters active, so that peft counts and trains all; which one a sample gets, the forward decides."""
    peft_model.base_model.set_adapter(list(names), inference_mode=not trainable)
    peft_model.get_base_model().segment_adapters = names


def _check_model(model) -> None:
    if not isinstance(model, FlexDiT):
        raise TypeError(f"model is a {type(model).__name__}, must be a FlexDiT")
    if has_adapters(model):
        raise ValueError("model has adapters already, must have none")


def _flexdit(model) -> FlexDiT:
    flexdit = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(flexdit, FlexDiT):
        raise TypeError(f"model is a {type(model).__name__}, must be a FlexDiT or peft's model of one")
    return flexdit


def _check_loaded(peft_model: PeftModel, name: str, path: Path) -> None:
    """peft takes a file with other tensors with no more than a warning."""
    from peft import get_peft_model_state_dict

    with safetensors.safe_open(path, "pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(peft_model, adapter_name=name))
    if found != wanted:
        odd = sorted(found ^ wanted)[0]
        raise ValueError(f"{path} and the model disagree about {odd} and {len(found ^ wanted) - 1} other tensors")
