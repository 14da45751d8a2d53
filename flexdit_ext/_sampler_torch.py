"""A FlexDiT's weights for the Sampler, and latents as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _C
from ._arguments import DTYPES
from ._core import execution, require_device
from .model import FlexDiT


def prepare(model: FlexDiT, dtype: torch.dtype | None) -> tuple:
    """SamplingModel, dtype, device, and what makes tensors of its latents."""
    config, state = model.config, model.state_dict()
    require_device("Sampler", model=state["pos_embed"])
    device = state["pos_embed"].device
    dtype = _check_dtype(state["pos_embed"].dtype if dtype is None else dtype, device)
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


def _check_dtype(dtype, device: torch.device) -> torch.dtype:
    known = DTYPES[device.type]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, must be a torch.dtype or None")
    if dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise TypeError(f"dtype is {dtype}, must be one of {names} on {device.type}")
    return dtype
