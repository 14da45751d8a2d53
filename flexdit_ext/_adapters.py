"""The parameters that a layer computes with, where peft has replaced or wrapped it. Does not import peft.

The fused blocks take weights, not layers, so an adapter enters as W + scaling * B A, with gradients through the sum:
the same function as peft's W x + scaling * B (A x), and exactly what merging leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .schedule import DensitySchedule

_PLAIN = (nn.Linear, nn.Conv2d, nn.Embedding)


def active_module(module: nn.Module, adapter: str | None = None) -> nn.Module:
    """The module itself, or of one in LoraConfig's modules_to_save the copy that is in use."""
    if not _is_kept_copy(module):
        return module
    names = module.active_adapters if adapter is None else [adapter]
    kept = [name for name in names if name in module.modules_to_save]
    return module.original_module if module.disable_adapters or not kept else module.modules_to_save[kept[0]]


def _is_kept_copy(module: nn.Module) -> bool:
    """Whether it is peft's ModulesToSaveWrapper; torch.compile can follow this, not an import."""
    return "modules_to_save" in module._modules and "original_module" in module._modules


def effective_parameters(layer: nn.Module, adapter: str | None = None) -> list[Tensor | None]:
    """Weight and bias that a Linear, Conv2d or Embedding computes with, in the dtype of its own weight.

    adapter: the only one to apply; None applies the layer's active ones, as peft does.

    Raises TypeError for a layer of another kind, ValueError for adapters that are no fixed change of the weight.
    """
    if not isinstance(layer, _PLAIN):
        layer = active_module(layer, adapter)
    if isinstance(layer, _PLAIN):
        return [layer.weight, getattr(layer, "bias", None)]
    if not is_lora(layer):
        raise TypeError(
            f"a layer is a {type(layer).__module__}.{type(layer).__qualname__}, must be a torch.nn layer or peft's "
            "LoRA layer of one: the blocks compute with weights"
        )
    if layer.merged:
        if adapter is not None and layer.merged_adapters != [adapter]:
            raise ValueError(
                f"the adapters {layer.merged_adapters} are merged into a layer that must apply {adapter!r} alone: "
                "call unmerge_adapter first"
            )
        if layer.disable_adapters:
            layer.unmerge()  # as peft's own forward does
        return [layer.base_layer.weight, getattr(layer.base_layer, "bias", None)]
    names = [] if layer.disable_adapters else layer.active_adapters if adapter is None else [adapter]
    return _with_adapters(layer, [name for name in names if name in layer.scaling])


def _with_adapters(layer, names: list[str]) -> list[Tensor | None]:
    weight, bias = layer.base_layer.weight, getattr(layer.base_layer, "bias", None)
    with torch.autocast(weight.device.type, enabled=False):  # what merging gives, not its rounding to 16 bits
        for name in names:
            _check_adapter(layer, name)
            weight = _sum(weight, layer.get_delta_weight(name))
            if layer.lora_bias.get(name):
                bias = _sum(bias, layer.lora_B[name].bias * layer.scaling[name])
    return [weight, bias]


def _sum(base: Tensor, delta: Tensor) -> Tensor:
    """In the wider dtype, rounded once."""
    return (base + delta).to(base.dtype)


def _check_adapter(layer, name: str) -> None:
    if name in layer.lora_variant:
        kind = type(layer.lora_variant[name]).__name__
        raise ValueError(f"the adapter {name!r} is a {kind}, must be plain LoRA (rsLoRA and lora_bias are, too)")
    dropout = getattr(layer.lora_dropout._modules.get(name), "p", 0.0)
    if layer.training and dropout > 0:
        raise ValueError(
            f"lora_dropout of the adapter {name!r} is {dropout}, must be 0: the blocks apply an adapter as a change of "
            "the weight, which dropout of a layer's input is not"
        )


def is_lora(module: nn.Module) -> bool:
    if "base_layer" not in module._modules:
        return False
    from peft.tuners.lora.layer import Conv2d, Embedding, Linear

    return isinstance(module, (Linear, Conv2d, Embedding)) and isinstance(module.base_layer, _PLAIN)


def has_adapters(model: nn.Module) -> bool:
    return any("base_layer" in module._modules or _is_kept_copy(module) for module in model.modules())


def require_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError unless every adapter is in some layer: without that it would silently do nothing."""
    found = {name for module in model.modules() if is_lora(module) for name in module.scaling}
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"the model's segment_adapters name {missing[0]!r}, which no layer has (it has {sorted(found)}): use "
            "flexdit_ext.lora.merge for one segment's weights, not peft's merge_and_unload"
        )


def by_segment(
    run: Callable[..., Tensor], schedule: DensitySchedule, x: Tensor, t: Tensor, y: Tensor, grid, *, absent: bool
) -> Tensor:
    """run(segment, x, t, y, grid) for the samples of each density segment, their outputs in the samples' order.

    absent: also call it for segments without samples. On a GPU t's values come to the host, unless t is there.
    """
    samples: list[list[int]] = [[] for _ in schedule.grids]
    for i, timestep in enumerate(t.tolist()):
        samples[schedule.segment(timestep)].append(i)
    per_sample = isinstance(grid, (tuple, list)) and len(grid) > 0 and isinstance(grid[0], (tuple, list))
    if per_sample and len(grid) != len(x):
        raise ValueError(f"grid lists {len(grid)} grids, must list one for each of the {len(x)} samples")
    outputs, order = [], []
    for segment, chosen in enumerate(samples):
        if chosen or absent or not len(x):
            index = torch.tensor(chosen, dtype=torch.int64)
            here = index.to(x.device)
            grids = [grid[i] for i in chosen] if per_sample else grid
            outputs.append(run(segment, x[here], t[index.to(t.device)], y[here], grids))
            order += chosen
    return torch.cat(outputs)[torch.tensor(order, dtype=torch.int64, device=x.device).argsort()]


@torch.no_grad()
def merged_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """model.state_dict() as if no layer had been replaced, adapters merged into the weights. Raises TypeError for
    layers replaced otherwise."""
    state = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if "base_layer" in module._modules:
            weight, bias = effective_parameters(module, adapter)
            state.update({prefix + "weight": weight} | ({} if bias is None else {prefix + "bias": bias}))
        elif _is_kept_copy(module):
            visit(active_module(module, adapter), prefix)
        else:
            module._save_to_state_dict(state, prefix, keep_vars=False)
            for name, child in module.named_children():
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return {name: tensor.detach() for name, tensor in state.items()}
