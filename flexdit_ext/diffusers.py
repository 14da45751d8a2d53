"""FlexDiT, FlexPixArt and FlexLatte for diffusers: models that DiTPipeline, PixArtAlphaPipeline and LattePipeline take
in place of their own. Needs diffusers.

Import this module before from_pretrained of a pipeline with such a model: diffusers loads classes of others' modules
only where the program has imported them.
"""

from __future__ import annotations

import dataclasses

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ._arguments import check_tensor
from ._wrapped import RENAMED
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .model import FlexDiT
from .single_model import FlexLatte, FlexPixArt

__all__ = ["FlexDiTTransformer2DModel", "FlexLatteTransformer3DModel", "FlexPixArtTransformer2DModel"]


def _config(kind: type, values: dict):
    """kind's configuration of __init__'s arguments."""
    names = RENAMED[kind.__name__.removesuffix("Config")]
    fields = {field.name: names.get(field.name, field.name) for field in dataclasses.fields(kind)}
    return kind(**{ours: values[theirs] for ours, theirs in fields.items()})


class _Wrapper(ModelMixin, ConfigMixin):
    """A model of this library as `.flexdit`, a configuration and files as diffusers has them."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "modulation"]  # noqa: RUF012, diffusers reads the class

    @classmethod
    def _around(cls, model, kind: type):
        if not isinstance(model, kind):
            raise TypeError(f"model is {type(model).__name__}, must be a {kind.__name__}")
        names = RENAMED[kind.__name__]
        with torch.device("meta"):  # no random weights for the sake of being replaced
            wrapper = cls(**{names.get(name, name): value for name, value in model.config.to_dict().items()})
        wrapper.flexdit = model
        return wrapper.train(model.training)

    def _run(self, hidden_states: Tensor, timestep, return_dict: bool, *arguments, **options):
        """The model's output in diffusers' form; one timestep counts for all samples."""
        t = torch.as_tensor(timestep, device=hidden_states.device)
        t = t.expand(hidden_states.shape[0]) if t.numel() == 1 else t
        self.flexdit.activation_checkpointing = self.gradient_checkpointing
        out = self.flexdit(hidden_states, t, *arguments, **options)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _check_given(**arguments) -> None:
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{name} is None, the model needs it")


def _check_nothing(**arguments) -> None:
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, dict) and not value):
            raise ValueError(f"{name} is {type(value).__name__}, must be None: the model has no such thing")


def _tokens_of(mask: Tensor | None) -> Tensor | None:
    """bool [B, L] of a mask of zeros and ones of any dtype."""
    if mask is None:
        return None
    if check_tensor("encoder_attention_mask", mask).dim() != 2:
        raise ValueError(
            f"encoder_attention_mask has shape {tuple(mask.shape)}, must be [B, L], 1 where there is a token"
        )
    if mask.dtype != torch.bool and not mask.is_cuda and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("encoder_attention_mask has values other than 0 and 1")
    return mask.bool()


class FlexDiTTransformer2DModel(_Wrapper):
    """FlexDiT behind the interface of diffusers' DiTTransformer2DModel; `.flexdit` is the model itself.

    Arguments are FlexDiTConfig's fields, except that input_size is called sample_size, as pipelines expect it; schedule
    is a DensitySchedule's dict or None. out_channels, which pipelines read, follows from in_channels and learn_sigma
    and is checked if given. Files, dtypes, devices and gradient checkpointing are diffusers'.

    DiTPipeline takes label 1000 for the null class, so guidance (guidance_scale above 1) needs 1000 classes there.
    """

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
        config = _config(FlexDiTConfig, locals())
        if out_channels is not None and out_channels != config.out_channels:
            raise ValueError(f"out_channels is {out_channels}, must be {config.out_channels} or None")
        self.register_to_config(out_channels=config.out_channels)
        self.gradient_checkpointing = False
        self.flexdit = FlexDiT(config)

    @classmethod
    def from_flexdit(cls, model: FlexDiT) -> FlexDiTTransformer2DModel:
        """Around a FlexDiT, whose tensors it shares."""
        return cls._around(model, FlexDiT)

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
        _check_given(timestep=timestep, class_labels=class_labels)
        _check_nothing(cross_attention_kwargs=cross_attention_kwargs)
        return self._run(hidden_states, timestep, return_dict, class_labels, grid)


class FlexPixArtTransformer2DModel(_Wrapper):
    """FlexPixArt behind the interface of diffusers' PixArtTransformer2DModel; `.flexdit` is the model itself.

    Arguments are FlexPixArtConfig's fields, except that input_size is called sample_size and size_conditions
    use_additional_conditions; schedule is a DensitySchedule's dict or None.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        hidden_size: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        max_caption_tokens: int = 120,
        position_scale: float = 1.0,
        num_pooling_blocks: int = 2,
        num_sdtm: int = 4,
        sdtm_blocks: tuple[int, int, int, int] = (1, 3, 1, 1),
        num_dense_blocks: int = 2,
        schedule: dict | None = None,
        use_additional_conditions: bool = False,
    ):
        super().__init__()
        config = _config(FlexPixArtConfig, locals())
        self.gradient_checkpointing = False
        self.flexdit = FlexPixArt(config)

    @classmethod
    def from_flexpixart(cls, model: FlexPixArt) -> FlexPixArtTransformer2DModel:
        """Around a FlexPixArt, whose tensors it shares."""
        return cls._around(model, FlexPixArt)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | int | float | None = None,
        added_cond_kwargs: dict | None = None,
        cross_attention_kwargs: dict | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        grid=None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states [B, in_channels, H, W]; encoder_hidden_states [B, L, caption_channels]; timestep one for all or
        [B]; added_cond_kwargs with resolution [B, 2] and aspect_ratio [B, 1], read with use_additional_conditions;
        encoder_attention_mask [B, L], 1 where there is a token; grid as FlexPixArt.forward's. The others must be None.
        """
        check_tensor("hidden_states", hidden_states)
        _check_given(timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        _check_nothing(cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask)
        sizes = {}
        if self.flexdit.config.size_conditions:
            given = added_cond_kwargs or {}
            sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
            _check_given(**{f"added_cond_kwargs' {name}": value for name, value in sizes.items()})
            sizes["aspect_ratio"] = check_tensor("aspect_ratio", sizes["aspect_ratio"]).flatten()
        mask = _tokens_of(encoder_attention_mask)
        return self._run(hidden_states, timestep, return_dict, encoder_hidden_states, mask, **sizes, grid=grid)


class FlexLatteTransformer3DModel(_Wrapper):
    """FlexLatte behind the interface of diffusers' LatteTransformer3DModel; `.flexdit` is the model itself.

    Arguments are FlexLatteConfig's fields, except that input_size is called sample_size and num_frames video_length;
    schedule is a DensitySchedule's dict or None. LattePipeline gives captions, not labels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        hidden_size: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 0,
        max_caption_tokens: int = 120,
        position_scale: float = 1.0,
        num_pooling_blocks: int = 2,
        num_sdtm: int = 4,
        sdtm_blocks: tuple[int, int, int, int] = (1, 3, 1, 1),
        num_dense_blocks: int = 2,
        schedule: dict | None = None,
        video_length: int = 16,
        num_classes: int = 0,
        class_dropout_prob: float = 0.0,
    ):
        super().__init__()
        config = _config(FlexLatteConfig, locals())
        self.gradient_checkpointing = False
        self.flexdit = FlexLatte(config)

    @classmethod
    def from_flexlatte(cls, model: FlexLatte) -> FlexLatteTransformer3DModel:
        """Around a FlexLatte, whose tensors it shares."""
        return cls._around(model, FlexLatte)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
        class_labels: Tensor | None = None,
        grid=None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states [B, in_channels, F, H, W]; timestep one for all or [B]; encoder_hidden_states [B, L,
        caption_channels] and encoder_attention_mask [B, L], 1 where there is a token; class_labels [B];
        enable_temporal_attentions as FlexLatte.forward's temporal_attention, and grid as there."""
        check_tensor("hidden_states", hidden_states)
        _check_given(timestep=timestep)
        mask = _tokens_of(encoder_attention_mask)
        options = {"grid": grid, "temporal_attention": enable_temporal_attentions}
        return self._run(hidden_states, timestep, return_dict, class_labels, encoder_hidden_states, mask, **options)
