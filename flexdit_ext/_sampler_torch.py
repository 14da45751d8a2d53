"""A model's weights for the Sampler, and latents as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _C
from ._adapters import merged_state_dict
from ._arguments import check_dtype
from ._conditions import core_schedule
from ._core import execution, require_device
from .model import FlexDiT
from .single_model import SingleFlexDiT


def prepare(model: FlexDiT | SingleFlexDiT, dtype: torch.dtype | None) -> tuple:
    """SamplingModel, dtype, device, and what makes tensors of its latents."""
    if isinstance(model, FlexDiT) and model.segment_adapters is not None:
        raise ValueError("model has an adapter for each density segment: flexdit_ext.lora.merge gives one's weights")
    config, state = model.config, merged_state_dict(model)
    first = state["patch_embed.weight"]
    require_device("Sampler", model=first)
    device = first.device
    dtype = check_dtype(first.dtype if dtype is None else dtype, device)
    names = [name for name, _, _ in _C.model_parameters(config.core)]
    parameters = [state[name].detach().to(dtype).contiguous() for name in names]
    core = _C.SamplingModel(
        config=config.core,
        schedule=core_schedule(config, model.schedule),
        parameters=parameters,
        null_label=config.null_label,
        exec=execution(parameters[0]),
    )

    def latents(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).to(device, dtype)

    return core, dtype, device, latents
