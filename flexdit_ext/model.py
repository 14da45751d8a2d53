"""FlexDiT: the diffusion transformer with controlled token density, as a torch.nn.Module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _C, _block_ops, ops
from ._adapters import active_module, by_segment, effective_parameters, require_adapters
from ._arguments import Grid, check_grid, check_number, check_tensor
from .blocks import Block, DenseBlock, PoolingBlock, SparseDenseTokenModule, autocast_dtype, cast, require_device
from .config import FlexDiTConfig
from .layout import TokenLayout


def sincos_position_embedding(grid: Grid, dim: int, base: Grid | None = None, scale: float = 1.0) -> Tensor:
    """The fixed 2-D sin-cos position embedding [h * w, dim], float32: the first half encodes x, the second y, each as
    sines and cosines of w_i = 10000^(-i / (dim / 4)). Source: DiT (after MAE), arXiv 2212.09748.

    The positions of a grid of another size than `base` are stretched to base's, and all are divided by `scale`, as in
    PixArt-alpha (arXiv 2310.00426)."""
    height, width = grid[-2:]
    base_height, base_width = grid[-2:] if base is None else base
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(side: int, base_side: int) -> Tensor:
        positions = torch.arange(side, dtype=torch.float64) / (side / base_side) / scale
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    x = encode(width, base_width).repeat(height, 1)
    y = encode(height, base_height).repeat_interleave(width, 0)
    return torch.cat([x, y], dim=1).float()


def given_layout(config, batch: int, grid, device: torch.device, dense: Grid | None = None) -> TokenLayout:
    """The layout of sparse tokens by the argument `grid`: one for all samples, or a list of one per sample, each within
    `dense` (None: the config's dense grid)."""

    def checked(name: str, one) -> Grid:
        return config.check_sparse_grid(name, check_grid(name, one), dense)

    if isinstance(grid, (tuple, list)) and (isinstance(grid[0], (tuple, list)) if grid else batch == 0):
        if len(grid) != batch:
            raise ValueError(f"grid lists {len(grid)} grids, must list one for each of the {batch} samples")
        return TokenLayout([checked(f"grid[{i}]", one) for i, one in enumerate(grid)], device)
    return TokenLayout.uniform(batch, checked("grid", grid), device)


class TimestepEmbedding(nn.Module):
    """fc2(SiLU(fc1(features(t)))), computed together with the label embedding."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(_block_ops.TIMESTEP_FEATURES, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)


class FinalLayer(nn.Module):
    """LN, shift and scale, linear to the pixels of a patch."""

    def __init__(self, hidden_size: int, patch_values: int):
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)


class FlexDiT(nn.Module):
    """Diffusion transformer with dynamic token density (arXiv 2412.06028, also SparseDiT).

    Args:
        config: FlexDiTConfig.
        dtype, device: of the parameters; float32 or bfloat16, on the CPU also float64, on a GPU also float16.

    `activation_checkpointing = True` recomputes every block in backward instead of keeping its activations.
    """

    def __init__(self, config: FlexDiTConfig, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        if not isinstance(config, FlexDiTConfig):
            raise TypeError(f"config is {type(config).__name__}, must be a FlexDiTConfig")
        self.config = config
        self.schedule = config.density_schedule
        self.activation_checkpointing = False
        self.segment_adapters: tuple[str, ...] | None = None  # of peft, one for each density segment: flexdit_ext.lora
        hidden, patch = config.hidden_size, config.patch_size
        size = (hidden, config.num_heads, config.mlp_hidden_size)
        position = sincos_position_embedding(config.dense_grid, hidden)
        self.register_buffer("pos_embed", position.to(torch.get_default_dtype()))  # as the parameters are
        self.patch_embed = nn.Conv2d(config.in_channels, hidden, patch, stride=patch)
        self.timestep_embed = TimestepEmbedding(hidden)
        self.label_embed = nn.Embedding(config.num_classes + (config.class_dropout_prob > 0), hidden)
        self.pooling_blocks = nn.ModuleList(PoolingBlock(*size) for _ in range(config.num_pooling_blocks))
        self.sdtm = nn.ModuleList(SparseDenseTokenModule(*size, config.sdtm_blocks) for _ in range(config.num_sdtm))
        self.dense_blocks = nn.ModuleList(DenseBlock(*size) for _ in range(config.num_dense_blocks))
        self.final_layer = FinalLayer(hidden, patch * patch * config.out_channels)
        for block in self.modules():
            if isinstance(block, Block):
                block.mlp_norm_eps = str(config.mlp_norm_eps)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT's initialisation: modulations and the output start at zero, so every block starts as the identity;
        recovery starts with W_1 = 0, W_2 = I, so m = x (method.md)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.patch_embed.bias)
        for weight in (self.label_embed.weight, self.timestep_embed.fc1.weight, self.timestep_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        for name, module in self.named_modules():
            if name.endswith((".modulation", "final_layer.linear")):
                nn.init.zeros_(module.weight)
        for sdtm in self.sdtm:
            for block in sdtm.recovery:
                nn.init.zeros_(block.from_sparse.weight)
                nn.init.eye_(block.from_dense.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, grid: Grid | Sequence[Grid] | None = None) -> Tensor:
        """Predicts noise (and variance) of latents.

        Args:
            x: [B, in_channels, input_size, input_size], the model's dtype.
            t: [B] timesteps in [0, 1000], integers or floating point. With x on a GPU t may stay on the CPU: then the
                sparse layout is exact, while one that follows t on the GPU has spare rows (ops.select_tokens).
            y: [B] labels, integers; num_classes is the null class.
            grid: sparse grid (h, w) of all samples, or a list of one per sample; None follows the density schedule
                at each sample's timestep.

        Returns [B, out_channels, input_size, input_size]. In train() labels are dropped with class_dropout_prob.
        Raises TypeError or ValueError naming the argument.
        """
        self._check_inputs(x, t, y)
        if self.segment_adapters is None:
            return self._forward(x, t, y, grid)
        return self._forward_segments(x, t, y, grid)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor, grid, adapter: str | None = None) -> Tensor:
        config = self.config
        sparse_layout = self._sparse_layout(x.shape[0], t, grid, x.device)
        layout = TokenLayout.uniform(x.shape[0], config.dense_grid, x.device)
        t = t.to(x.device)
        dropped = None
        if self.training and config.class_dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < config.class_dropout_prob
        dtype = autocast_dtype(x)
        layer = active_module(self.final_layer, adapter)
        final_parameters = [
            p for linear in (layer.modulation, layer.linear) for p in effective_parameters(linear, adapter)
        ]
        condition_parameters = self._condition_parameters(adapter)
        require_device(x.device, [*condition_parameters, self.pos_embed, *final_parameters])
        condition = _block_ops.condition(
            t,
            y,
            dropped,
            cast(condition_parameters, dtype),
            self.schedule.num_timesteps,
            config.timestep_shift,
        )
        x, weight, bias, position = cast([x, *effective_parameters(self.patch_embed, adapter), self.pos_embed], dtype)
        tokens, _ = _block_ops.patch_embed(x, weight, bias, position, layout.mapped)
        for block in self.pooling_blocks:
            tokens = self._run(block, tokens, condition, layout, adapter)
        position = position if config.reinject_position else None
        for module in self.sdtm:
            tokens = self._run_sdtm(module, tokens, condition, layout, sparse_layout, position, adapter)
        for block in self.dense_blocks:
            tokens = self._run(block, tokens, condition, layout, adapter)
        return _block_ops.final_layer(
            cast(final_parameters, dtype),
            tokens,
            condition,
            layout.mapped,
            config.out_channels,
            config.input_size,
            config.patch_size,
        )

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, grid: Grid | Sequence[Grid] | None = None
    ) -> Tensor:
        """Classifier-free guidance as DiT does it: the second half of the batch repeats the first half's latents under
        other labels (the null class), and min(3, in_channels) channels are guided: uncond + scale (cond - uncond).

        Shapes as forward, with B even.
        """
        self._check_inputs(x, t, y)
        if x.shape[0] % 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be [B, in_channels, H, W] with an even B")
        check_number("cfg_scale", cfg_scale)
        half = x[: x.shape[0] // 2]
        out = self.forward(torch.cat([half, half]), t, y, grid)
        return _block_ops.guidance_combine(out, min(3, self.config.in_channels), float(cfg_scale))

    def macs(self, grid: Grid | None = None) -> float:
        """Multiply-accumulates of one sample's forward pass at a sparse grid, as this library computes them, attention
        scores included; with None the mean over all timesteps of the density schedule."""
        if self.config.num_sdtm == 0:
            return _C.model_macs(self.config.core, (1, 1))
        if grid is not None:
            grid = self.config.check_sparse_grid("grid", check_grid("grid", grid))
            return _C.model_macs(self.config.core, grid)
        return self.schedule.mean(lambda grid: _C.model_macs(self.config.core, grid))

    def save_pretrained(self, directory, *, max_shard_size: int | str | None = None) -> None:
        """Writes config.json and model.safetensors (see checkpoint.save_pretrained) into `directory`, each whole or not
        at all."""
        from .checkpoint import save_pretrained

        save_pretrained(self, directory, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, path, dtype: torch.dtype | None = None, device=None, **options) -> FlexDiT:
        """Loads what save_pretrained wrote, from the folder, from the safetensors file alone, or from the Hugging Face
        Hub by its id "owner/name"; options as in checkpoint.load_pretrained: device_map, revision, cache_dir, token,
        local_files_only."""
        from .checkpoint import load_pretrained

        return load_pretrained(path, dtype=dtype, device=device, **options)

    def _run(self, block: nn.Module, *arguments) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _run_sdtm(self, module, tokens, condition, layout, sparse_layout, position, adapter) -> Tensor:
        sparse = ops.pool_tokens_with_position(tokens, position, layout, sparse_layout)
        for block in module.generation:
            sparse = self._run(block, sparse, tokens, condition, sparse_layout, layout, adapter)
        for block in module.sparse:
            sparse = self._run(block, sparse, condition, sparse_layout, adapter)
        for block in module.recovery:
            tokens = self._run(block, tokens, sparse, condition, layout, sparse_layout, position, adapter)
        for block in module.dense:
            tokens = self._run(block, tokens, condition, layout, adapter)
        return tokens

    def _condition_parameters(self, adapter: str | None) -> list[Tensor]:
        timestep = active_module(self.timestep_embed, adapter)
        linears = [p for layer in (timestep.fc1, timestep.fc2) for p in effective_parameters(layer, adapter)]
        return [*linears, effective_parameters(self.label_embed, adapter)[0]]

    def _forward_segments(self, x: Tensor, t: Tensor, y: Tensor, grid) -> Tensor:
        """One pass for each density segment's samples, with that segment's adapter (flexdit_ext.lora)."""
        require_adapters(self, self.segment_adapters)
        # A segment without samples takes part in training: every rank calls every block equally often, as FSDP needs,
        # and every adapter has a gradient, as DDP needs.
        absent = torch.is_grad_enabled() or (torch.distributed.is_available() and torch.distributed.is_initialized())

        def run(segment: int, x: Tensor, t: Tensor, y: Tensor, grid) -> Tensor:
            return self._forward(x, t, y, grid, self.segment_adapters[segment])

        return by_segment(run, self.schedule, x, t, y, grid, absent=absent)

    def _sparse_layout(self, batch: int, t: Tensor, grid, device: torch.device) -> TokenLayout | None:
        if grid is None:
            return ops.select_tokens(t, self.schedule).to(device) if self.config.num_sdtm else None
        return given_layout(self.config, batch, grid, device)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Everything that shapes and dtypes tell; values of t and y are checked where they are read."""
        config, weight = self.config, self.patch_embed.weight
        for name, tensor in (("x", x), ("t", t), ("y", y)):
            check_tensor(name, tensor)
            if tensor.device != weight.device and not (name == "t" and tensor.device.type == "cpu"):
                raise ValueError(f"{name} is on {tensor.device}, the model on {weight.device}: they must agree")
        if x.dim() != 4 or x.shape[1:] != (config.in_channels, config.input_size, config.input_size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, must be [B, {config.in_channels}, {config.input_size}, "
                f"{config.input_size}]"
            )
        if not x.is_floating_point() or (x.dtype != weight.dtype and autocast_dtype(x) is None):
            raise TypeError(f"x is {x.dtype}, must have the model's dtype {weight.dtype}")
        for name, tensor in (("t", t), ("y", y)):
            if tensor.shape != x.shape[:1]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be [{x.shape[0]}], one for each sample")
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t is {t.dtype}, must be an integer or floating-point dtype")
        if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"y is {y.dtype}, must be an integer dtype")
