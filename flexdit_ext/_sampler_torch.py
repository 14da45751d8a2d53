"""A FlexDiT's weights for the Sampler, and latents as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _C
from ._adapters import merged_state_dict
from ._arguments import check_dtype
from ._core import execution, require_device
from .model import FlexDiT


def prepare(model: FlexDiT, dtype: torch.dtype | None) -> tuple:
    """SamplingModel, dtype, device, and what makes tensors of its latents."""
    if model.segment_adapters is not None:
        raise ValueError("model has an adapter for each density segment: flexdit_ext.lora.merge gives one's weights")
    config, state = model.config, merged_state_dict(model)
    require_device("Sampler", model=state["pos_embed"])
    device = state["pos_embed"].device
    dtype = check_dtype(state["pos_embed"].dtype if dtype is None else dtype, device)
    names = [name for name, _, _ in _C.model_parameters(config.core)]
    parameters = [state[name].detach().to(dtype).contiguous() for name in names]
    core = _C.SamplingModel(
        config=config.core,
        schedule=model.schedule._core,
        parameters=parameters,
        null_label=config.num_classes if config.class_dropout_prob > 0 else -1,
        exec=execution(parameters[0]),
    )

    def latents(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).to(device, dtype)

    return core, dtype, device, latents
