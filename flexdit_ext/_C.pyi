"""
The torch-free core of flexdit_ext; see flexdit_ext for the public interface.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing

__all__: list[str] = [
    "BlockKind",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "DType",
    "DensitySchedule",
    "Execution",
    "ModelFamily",
    "Patches",
    "QueueFull",
    "SamplerStep",
    "SamplingModel",
    "Session",
    "attention",
    "attention_backward",
    "block_backward",
    "block_bytes",
    "block_forward",
    "block_parameters",
    "build_info",
    "condition_backward",
    "condition_forward",
    "condition_workspace",
    "default_schedule",
    "derive_seed",
    "final_layer_backward",
    "final_layer_forward",
    "final_layer_workspace",
    "gated_residual",
    "gated_residual_backward",
    "gather_sparse",
    "gather_sparse_backward",
    "guidance_combine",
    "linear",
    "linear_backward",
    "linear_backward_workspace",
    "model_backward",
    "model_bytes",
    "model_forward",
    "model_macs",
    "model_parameters",
    "modulated_layer_norm",
    "modulated_layer_norm_backward",
    "modulated_mean",
    "modulated_mean_backward",
    "modulated_mean_workspace",
    "normal_noise",
    "patch_embed_backward",
    "patch_embed_forward",
    "patch_embed_workspace",
    "pool_tokens",
    "pool_tokens_backward",
    "pruning_rate_at",
    "register_dtype",
    "row_statistics_workspace",
    "sampler_steps",
    "select_tokens",
    "single_block_backward",
    "single_block_bytes",
    "single_block_forward",
    "single_block_parameters",
    "timestep_embedding",
]

class DType:
    """
    Members:

      float32

      bfloat16

      float16

      float64
    """

    __members__: typing.ClassVar[dict[str, DType]]
    bfloat16: typing.ClassVar[DType]
    float16: typing.ClassVar[DType]
    float32: typing.ClassVar[DType]
    float64: typing.ClassVar[DType]
    @typing.overload
    def __eq__(self, other: DType) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: DType) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Execution:
    @typing.overload
    def __init__(self, threads: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @typing.overload
    def __init__(
        self, device_index: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...

class DensitySchedule:
    __hash__: typing.ClassVar[None] = None
    @staticmethod
    def continuous(
        arg0: typing.SupportsFloat | typing.SupportsIndex,
        arg1: typing.SupportsFloat | typing.SupportsIndex,
        arg2: tuple[int, ...],
        arg3: typing.SupportsInt | typing.SupportsIndex,
    ) -> DensitySchedule: ...
    @staticmethod
    def from_pruning_rates(
        arg0: typing.SupportsFloat | typing.SupportsIndex,
        arg1: typing.SupportsFloat | typing.SupportsIndex,
        arg2: tuple[int, ...],
        arg3: typing.SupportsInt | typing.SupportsIndex,
    ) -> DensitySchedule: ...
    def __eq__(self, arg0: DensitySchedule) -> bool: ...
    @typing.overload
    def __init__(
        self, arg0: collections.abc.Sequence[tuple[int, ...]], arg1: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    @typing.overload
    def __init__(
        self,
        arg0: collections.abc.Sequence[tuple[int, ...]],
        arg1: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        arg2: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def grid(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> tuple[int, ...]: ...
    def pruning_rate(self, arg0: typing.SupportsFloat | typing.SupportsIndex, arg1: tuple[int, ...]) -> float: ...
    def segment(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> int: ...
    @property
    def begins(self) -> list[int]: ...
    @property
    def grids(self) -> list[tuple[int, ...]]: ...
    @property
    def num_timesteps(self) -> int: ...

class BlockKind:
    """
    Members:

      pooling

      dense

      generation

      recovery
    """

    __members__: typing.ClassVar[dict[str, BlockKind]]
    dense: typing.ClassVar[BlockKind]
    generation: typing.ClassVar[BlockKind]
    pooling: typing.ClassVar[BlockKind]
    recovery: typing.ClassVar[BlockKind]
    @typing.overload
    def __eq__(self, other: BlockKind) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: BlockKind) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Patches:
    def __init__(
        self,
        channels: typing.SupportsInt | typing.SupportsIndex,
        patch: typing.SupportsInt | typing.SupportsIndex,
        channels_last: bool,
    ) -> None: ...

class ModelFamily:
    """
    Members:

      dit

      pixart

      latte
    """

    __members__: typing.ClassVar[dict[str, ModelFamily]]
    dit: typing.ClassVar[ModelFamily]
    latte: typing.ClassVar[ModelFamily]
    pixart: typing.ClassVar[ModelFamily]
    @typing.overload
    def __eq__(self, other: ModelFamily) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: ModelFamily) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Config:
    __hash__: typing.ClassVar[None] = None
    family: ModelFamily
    reinject_position: bool
    size_conditions: bool
    def __eq__(self, arg0: Config) -> bool: ...
    def __init__(self) -> None: ...
    @property
    def caption_channels(self) -> int: ...
    @caption_channels.setter
    def caption_channels(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def dense_blocks(self) -> int: ...
    @dense_blocks.setter
    def dense_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def generation_blocks(self) -> int: ...
    @generation_blocks.setter
    def generation_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def hidden(self) -> int: ...
    @hidden.setter
    def hidden(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def in_channels(self) -> int: ...
    @in_channels.setter
    def in_channels(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def input_height(self) -> int: ...
    @input_height.setter
    def input_height(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def input_width(self) -> int: ...
    @input_width.setter
    def input_width(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def label_rows(self) -> int: ...
    @label_rows.setter
    def label_rows(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def max_caption_tokens(self) -> int: ...
    @max_caption_tokens.setter
    def max_caption_tokens(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def mlp_hidden(self) -> int: ...
    @mlp_hidden.setter
    def mlp_hidden(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def mlp_norm_eps(self) -> float: ...
    @mlp_norm_eps.setter
    def mlp_norm_eps(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def num_dense_blocks(self) -> int: ...
    @num_dense_blocks.setter
    def num_dense_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def num_frames(self) -> int: ...
    @num_frames.setter
    def num_frames(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def num_heads(self) -> int: ...
    @num_heads.setter
    def num_heads(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def num_pooling_blocks(self) -> int: ...
    @num_pooling_blocks.setter
    def num_pooling_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def num_sdtm(self) -> int: ...
    @num_sdtm.setter
    def num_sdtm(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def out_channels(self) -> int: ...
    @out_channels.setter
    def out_channels(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def patch_size(self) -> int: ...
    @patch_size.setter
    def patch_size(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def position_scale(self) -> float: ...
    @position_scale.setter
    def position_scale(self, arg0: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    @property
    def recovery_blocks(self) -> int: ...
    @recovery_blocks.setter
    def recovery_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def sparse_blocks(self) -> int: ...
    @sparse_blocks.setter
    def sparse_blocks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def timestep_shift(self) -> int: ...
    @timestep_shift.setter
    def timestep_shift(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class SamplerStep:
    def __init__(
        self,
        timestep: typing.SupportsFloat | typing.SupportsIndex,
        x0_from_x: typing.SupportsFloat | typing.SupportsIndex,
        x0_from_output: typing.SupportsFloat | typing.SupportsIndex,
        x_coef: typing.SupportsFloat | typing.SupportsIndex,
        x0_coef: typing.SupportsFloat | typing.SupportsIndex,
        x0_previous_coef: typing.SupportsFloat | typing.SupportsIndex,
        noise_coef: typing.SupportsFloat | typing.SupportsIndex,
        log_variances: tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex]
        | None,
    ) -> None: ...
    def values(self) -> tuple[float, float, float, float, float, float, float, bool, float, float]: ...

class CheckpointError(ValueError):
    pass

class Checkpoint:
    def __init__(self, path: str, dtype: DType | None) -> None: ...
    @property
    def config(self) -> Config: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def schedule(self) -> DensitySchedule: ...

class SamplingModel:
    @typing.overload
    def __init__(
        self,
        config: Config,
        schedule: DensitySchedule | None,
        parameters: collections.abc.Sequence,
        null_label: typing.SupportsInt | typing.SupportsIndex,
        exec: Execution,
    ) -> None: ...
    @typing.overload
    def __init__(self, checkpoint: Checkpoint, exec: Execution) -> None: ...

class QueueFull(RuntimeError):
    pass

class Session:
    def __init__(
        self,
        model: SamplingModel,
        max_batch: typing.SupportsInt | typing.SupportsIndex,
        queue_capacity: typing.SupportsInt | typing.SupportsIndex,
        guided_channels: typing.SupportsInt | typing.SupportsIndex,
        modulation_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add(
        self,
        label: typing.SupportsInt | typing.SupportsIndex,
        seed: typing.SupportsInt | typing.SupportsIndex,
        steps: collections.abc.Sequence[SamplerStep],
        guidance: typing.SupportsFloat | typing.SupportsIndex,
        interval: tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex],
        size: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex],
        grid: tuple[int, ...] | None,
        clip_x0: bool,
        frames: typing.SupportsInt | typing.SupportsIndex,
        caption: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None,
        null_caption: typing.Annotated[numpy.typing.ArrayLike, numpy.float64] | None,
        resolution: tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex],
        aspect_ratio: typing.SupportsFloat | typing.SupportsIndex,
    ) -> int: ...
    def cancel(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def state(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> str: ...
    def step(self) -> int: ...
    def take(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> typing.Any: ...
    def take_all(self) -> list: ...
    @property
    def active(self) -> int: ...
    @property
    def queued(self) -> int: ...

def attention(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: bool,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: Execution,
) -> None: ...
def attention_backward(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: bool,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: typing.Any,
    arg14: Execution,
) -> None: ...
def block_backward(
    arg0: BlockKind,
    arg1: collections.abc.Sequence,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsFloat | typing.SupportsIndex,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: typing.Any,
    arg14: collections.abc.Sequence,
    arg15: typing.Any,
    arg16: Execution,
) -> None: ...
def block_bytes(
    arg0: BlockKind,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.Any,
) -> tuple[int, int, int, int]: ...
def block_forward(
    arg0: BlockKind,
    arg1: collections.abc.Sequence,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.SupportsFloat | typing.SupportsIndex,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: Execution,
) -> None: ...
def block_parameters(
    arg0: BlockKind, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex
) -> list[str]: ...
def build_info() -> dict: ...
def condition_backward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: collections.abc.Sequence,
    arg5: typing.Any,
    arg6: Execution,
) -> None: ...
def condition_forward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: Execution,
) -> None: ...
def condition_workspace(arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def default_schedule(arg0: Config, arg1: tuple[int, ...]) -> DensitySchedule: ...
def derive_seed(
    arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.SupportsInt | typing.SupportsIndex
) -> int: ...
def final_layer_backward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: Patches,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: collections.abc.Sequence,
    arg10: typing.Any,
    arg11: Execution,
) -> None: ...
def final_layer_forward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: Patches,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: Execution,
) -> None: ...
def final_layer_workspace(
    arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.SupportsInt | typing.SupportsIndex
) -> int: ...
def gated_residual(
    arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: typing.Any, arg5: Execution
) -> None: ...
def gated_residual_backward(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: Execution,
) -> None: ...
def gather_sparse(
    arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: typing.Any, arg5: Execution
) -> None: ...
def gather_sparse_backward(
    arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: Execution
) -> None: ...
def guidance_combine(
    arg0: typing.Any,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: Execution,
) -> None: ...
def linear(arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: Execution) -> None: ...
def linear_backward(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: Execution,
) -> None: ...
def linear_backward_workspace(arg0: typing.Any) -> int: ...
def model_backward(
    arg0: Config,
    arg1: collections.abc.Sequence,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: typing.SupportsInt | typing.SupportsIndex,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: collections.abc.Sequence,
    arg14: typing.Any,
    arg15: Execution,
) -> None: ...
def model_bytes(
    arg0: Config,
    arg1: collections.abc.Sequence,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[int, int, int, int]: ...
def model_forward(
    arg0: Config,
    arg1: collections.abc.Sequence,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: typing.SupportsInt | typing.SupportsIndex,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: Execution,
) -> None: ...
def model_macs(arg0: Config, arg1: tuple[int, ...]) -> int: ...
def model_parameters(arg0: Config) -> list[tuple[str, int, int]]: ...
def modulated_layer_norm(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: typing.Any,
    arg6: Execution,
) -> None: ...
def modulated_layer_norm_backward(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: Execution,
) -> None: ...
def modulated_mean(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: Execution,
) -> None: ...
def modulated_mean_backward(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: Execution,
) -> None: ...
def modulated_mean_workspace(arg0: typing.Any, arg1: typing.Any) -> int: ...
def normal_noise(
    arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def patch_embed_backward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: Patches,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: collections.abc.Sequence,
    arg7: typing.Any,
    arg8: Execution,
) -> None: ...
def patch_embed_forward(
    arg0: collections.abc.Sequence,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: Patches,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: Execution,
) -> None: ...
def patch_embed_workspace(arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def pool_tokens(
    arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: typing.Any, arg5: Execution
) -> None: ...
def pool_tokens_backward(
    arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: Execution
) -> None: ...
def pruning_rate_at(
    arg0: typing.SupportsFloat | typing.SupportsIndex,
    arg1: typing.SupportsFloat | typing.SupportsIndex,
    arg2: typing.SupportsFloat | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
) -> float: ...
def register_dtype(arg0: typing.Any, arg1: DType) -> None: ...
def row_statistics_workspace(arg0: typing.Any) -> int: ...
def sampler_steps(
    sampler: str,
    steps: typing.SupportsInt
    | typing.SupportsIndex
    | collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    eta: typing.SupportsFloat | typing.SupportsIndex,
    learned_variance: bool,
) -> list[SamplerStep]:
    """
    steps: their number, or for ddim and ddpm the timesteps, ascending.
    """

def select_tokens(arg0: typing.Any, arg1: DensitySchedule, arg2: typing.Any, arg3: Execution) -> None: ...
def single_block_backward(
    arg0: BlockKind,
    arg1: collections.abc.Sequence,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: tuple,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: typing.Any,
    arg14: typing.Any,
    arg15: collections.abc.Sequence,
    arg16: typing.Any,
    arg17: Execution,
) -> None: ...
def single_block_bytes(
    arg0: BlockKind,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: bool,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: typing.Any,
) -> tuple[int, int, int, int]: ...
def single_block_forward(
    arg0: BlockKind,
    arg1: collections.abc.Sequence,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: tuple,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: Execution,
) -> None: ...
def single_block_parameters(
    arg0: BlockKind,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: bool,
) -> list[str]: ...
def timestep_embedding(
    arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: typing.Any, arg3: Execution
) -> None: ...
