"""FlexDiT for diffusers: a model that DiTPipeline takes in place of its DiTTransformer2DModel. Needs diffusers.

Import this module before DiTPipeline.from_pretrained of a pipeline with a FlexDiT: diffusers loads classes of others'
modules only where the program has imported them.
"""

from __future__ import annotations

import dataclasses

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ._arguments import check_tensor
from .config import FlexDiTConfig
from .model import FlexDiT

__all__ = ["FlexDiTTransformer2DModel"]

_FIELDS = [field.name for field in dataclasses.fields(FlexDiTConfig)]


class FlexDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """FlexDiT behind the interface of diffusers' DiTTransformer2DModel; `.flexdit` is the model itself.

    Arguments are FlexDiTConfig's fields, except that input_size is called sample_size, as pipelines expect it; schedule
    is a DensitySchedule's dict or None. out_channels, which pipelines read, follows from in_channels and learn_sigma
    and is checked if given. Files, dtypes, devices and gradient checkpointing are diffusers'.

    DiTPipeline takes label 1000 for the null class, so guidance (guidance_scale above 1) needs 1000 classes there.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "modulation"]  # noqa: RUF012, diffusers reads the class

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
        num_pooling_blocks: int = 2,
        num_sdtm: int = 4,
        sdtm_blocks: tuple[int, int, int, int] = (1, 3, 1, 1),
        num_dense_blocks: int = 2,
        reinject_position: bool = False,
        timestep_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        schedule: dict | None = None,
    ):
        super().__init__()
        values = locals()
        config = FlexDiTConfig(**{name: values[name] for name in _FIELDS if name in values}, input_size=sample_size)
        if out_channels is not None and out_channels != config.out_channels:
            raise ValueError(f"out_channels is {out_channels}, must be {config.out_channels} or None")
        self.register_to_config(out_channels=config.out_channels)
        self.gradient_checkpointing = False
        self.flexdit = FlexDiT(config)

    @classmethod
    def from_flexdit(cls, model: FlexDiT) -> FlexDiTTransformer2DModel:
        """Around a FlexDiT, whose tensors it shares."""
        if not isinstance(model, FlexDiT):
            raise TypeError(f"model is {type(model).__name__}, must be a FlexDiT")
        values = model.config.to_dict()
        with torch.device("meta"):  # no random weights for the sake of being replaced
            wrapper = cls(sample_size=values.pop("input_size"), **values)
        wrapper.flexdit = model
        return wrapper.train(model.training)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        grid=None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states [B, in_channels, sample_size, sample_size]; timestep one for all or [B]; class_labels [B]; grid
        as FlexDiT.forward's, None for the density schedule. cross_attention_kwargs must be empty: there is none."""
        check_tensor("hidden_states", hidden_states)
        for name, value in (("timestep", timestep), ("class_labels", class_labels)):
            if value is None:
                raise TypeError(f"{name} is None, FlexDiT needs it")
        if cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs is {cross_attention_kwargs}, FlexDiT takes none")
        t = torch.as_tensor(timestep, device=hidden_states.device)
        t = t.expand(hidden_states.shape[0]) if t.numel() == 1 else t
        self.flexdit.activation_checkpointing = self.gradient_checkpointing
        out = self.flexdit(hidden_states, t, class_labels, grid)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
