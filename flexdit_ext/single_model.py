"""FlexPixArt and FlexLatte: text to image, and clips, with controlled token density, as torch.nn.Modules.

Sources: PixArt-alpha (arXiv 2310.00426), Latte (arXiv 2401.03048), FlexDiT (arXiv 2412.06028). Their definition in
plain PyTorch is flexdit_ext.reference_single.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _block_ops, ops
from ._adapters import active_module, effective_parameters
from ._arguments import Grid, check_grid, check_tensor
from ._single_macs import macs
from .blocks import autocast_dtype, cast
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .layout import TokenLayout
from .model import TimestepEmbedding, given_layout, sincos_position_embedding
from .schedule import DensitySchedule
from .single_blocks import Block, Caption, DenseBlock, GenerationBlock, PoolingBlock, RecoveryBlock, Tokens

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def temporal_embedding(frames: int, dim: int) -> Tensor:
    """Latte's 1-D sin-cos table over the frames [F, dim], float32, sines before cosines."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class CaptionEmbedding(nn.Module):
    """fc2(GELU_tanh(fc1(x))) of the text encoder's output."""

    def __init__(self, caption_channels: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_channels, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)


class FinalLayer(nn.Module):
    """LN, shift and scale (modulation_table [2, C] plus the condition), linear to the pixels of a patch."""

    def __init__(self, hidden_size: int, patch_values: int):
        super().__init__()
        self.modulation_table = nn.Parameter(torch.empty(2, hidden_size))
        self.linear = nn.Linear(hidden_size, patch_values)


class SparseDenseTokenModule(nn.Module):
    """Pools dense tokens to a sparse grid, works on the few, and brings them back (SDTM)."""

    def __init__(self, config, blocks: Iterator[int]):
        super().__init__()
        generation, sparse, recovery, dense = config.sdtm_blocks
        self.generation = _blocks(GenerationBlock, config, blocks, generation)
        self.sparse = _blocks(DenseBlock, config, blocks, sparse)
        self.recovery = _blocks(RecoveryBlock, config, blocks, recovery)
        self.dense = _blocks(DenseBlock, config, blocks, dense)


def _blocks(kind: type[Block], config, blocks: Iterator[int], count: int) -> nn.ModuleList:
    """The next `count` blocks of the flattened order."""
    size = config.hidden_size, config.num_heads, config.mlp_hidden_size

    def make(k: int) -> Block:
        return kind(*size, config.has_cross(k), *([config.axis(k)] if kind is DenseBlock else []))

    return nn.ModuleList(make(next(blocks)) for _ in range(count))


class SingleFlexDiT(nn.Module):
    """What FlexPixArt and FlexLatte share; use one of those.

    `activation_checkpointing = True` recomputes every block in backward instead of keeping its activations.
    """

    config_class: type

    def __init__(self, config, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config is {type(config).__name__}, must be a {self.config_class.__name__}")
        self.config = config
        self.schedule = config.density_schedule
        self.activation_checkpointing = False
        hidden, patch, order = config.hidden_size, config.patch_size, iter(range(config.depth))
        self.patch_embed = nn.Conv2d(config.in_channels, hidden, patch, stride=patch)
        self.timestep_embed = TimestepEmbedding(hidden)
        if config.size_conditions:
            self.resolution_embed, self.aspect_ratio_embed = (
                TimestepEmbedding(hidden // 3),
                TimestepEmbedding(hidden // 3),
            )
        if config.num_classes:
            self.label_embed = nn.Embedding(config.num_classes + (config.class_dropout_prob > 0), hidden)
        if config.caption_channels:
            self.caption_embed = CaptionEmbedding(config.caption_channels, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.pooling_blocks = _blocks(PoolingBlock, config, order, config.num_pooling_blocks)
        self.sdtm = nn.ModuleList(SparseDenseTokenModule(config, order) for _ in range(config.num_sdtm))
        self.dense_blocks = _blocks(DenseBlock, config, order, config.num_dense_blocks)
        self.final_layer = FinalLayer(hidden, patch * patch * config.out_channels)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """PixArt-alpha's initialisation: captions are not read and nothing comes out at first; recovery starts with
        W_1 = 0, W_2 = I, so m = x (method.md)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.patch_embed.bias)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or name == "modulation" or "_embed.fc" in name:
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith("cross.proj") or name in ("final_layer.linear",) or name.endswith("from_sparse"):
                nn.init.zeros_(module.weight)
            elif name.endswith("from_dense"):
                nn.init.eye_(module.weight)
            if hasattr(module, "modulation_table"):
                nn.init.normal_(module.modulation_table, std=self.config.hidden_size**-0.5)

    def macs(self, grid: Grid | None = None, caption_tokens: int | None = None) -> float:
        """Multiply-accumulates of one sample's forward pass on the config's dense grid at a sparse grid, as this
        library computes them, attention scores included; with None the mean over all timesteps of the density
        schedule. caption_tokens: of the caption; None is max_caption_tokens."""
        tokens = self.config.max_caption_tokens if caption_tokens is None else caption_tokens
        if not self.config.num_sdtm:
            return macs(self.config, None, tokens)
        if grid is not None:
            return macs(self.config, self.config.check_sparse_grid("grid", check_grid("grid", grid)), tokens)
        return self.schedule.mean(lambda grid: macs(self.config, grid, tokens))

    def save_pretrained(self, directory, *, max_shard_size: int | str | None = None) -> None:
        """Writes config.json and model.safetensors (see checkpoint.save_pretrained) into `directory`, each whole or not
        at all."""
        from ._checkpoint_single import save_single

        save_single(self, directory, max_shard_size)

    @classmethod
    def from_pretrained(cls, path, dtype: torch.dtype | None = None, device=None, **options):
        """Loads what save_pretrained wrote; path, options and errors as in FlexDiT.from_pretrained."""
        from ._checkpoint_single import load_single

        return load_single(cls, path, dtype, device, **options)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _compute(
        self, x, t, y, caption, caption_mask, sizes, grid: Grid | Sequence[Grid] | None, temporal: bool = True
    ) -> Tensor:
        """x [B, in, F, H, W]; arguments checked; temporal: with the blocks across frames. Returns [B, out, F, H, W]."""
        config, patch = self.config, self.config.patch_size
        batch, channels, frames, height, width = x.shape
        dense_grid = (frames, height // patch, width // patch)
        layout = TokenLayout.uniform(batch, dense_grid, x.device)
        dense, sparse = self._tokens(layout), self._sparse(t, grid, dense_grid, x.device)
        dtype = autocast_dtype(x)
        c = self._condition(t.to(x.device), y, sizes)
        modulation = F.linear(F.silu(c), *effective_parameters(self.modulation)).unflatten(1, (6, -1))
        text = None if caption is None else self._caption(caption, caption_mask)
        position = self._position(dense_grid, x)
        x, weight, bias, position = cast([x, *effective_parameters(self.patch_embed), position], dtype)
        image = x.reshape(batch, channels, frames * height, width)
        tokens, _ = _block_ops.patch_embed(image, weight, bias, position, layout.mapped)
        k = 0
        for unit in (*self.pooling_blocks, *self.sdtm, *self.dense_blocks):
            blocks = sum(config.sdtm_blocks) if isinstance(unit, SparseDenseTokenModule) else 1
            if not temporal and config.axis(k) == "time":
                k += blocks
                continue
            if k <= 1 < k + blocks and frames > 1:  # Latte: before the second block
                time = temporal_embedding(frames, config.hidden_size).to(tokens)[:, None]
                tokens = (tokens.view(batch, frames, -1, config.hidden_size) + time).flatten(0, 2)
            if isinstance(unit, SparseDenseTokenModule):
                tokens = self._run_sdtm(unit, tokens, modulation, dense, sparse, text)
            else:
                tokens = self._run(unit, tokens, modulation, dense, text)
            k += blocks
        return self._unpatchify(self._last(tokens, c, layout), batch, dense_grid)

    def _run(self, block: nn.Module, *arguments) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _run_sdtm(self, module, tokens, modulation, dense: Tokens, sparse: Tokens, text) -> Tensor:
        few = ops.pool_tokens(tokens, dense.layout, sparse.layout)
        for block in module.generation:
            few = self._run(block, few, tokens, modulation, sparse, dense, text)
        for block in module.sparse:
            few = self._run(block, few, modulation, sparse, text)
        for block in module.recovery:
            tokens = self._run(block, tokens, few, modulation, dense, sparse, text)
        for block in module.dense:
            tokens = self._run(block, tokens, modulation, dense, text)
        return tokens

    def _tokens(self, layout: TokenLayout) -> Tokens:
        return Tokens(layout)

    def _sparse(self, t: Tensor, grid, dense_grid: Grid, device: torch.device) -> Tokens | None:
        config = self.config
        if not config.num_sdtm:
            return None
        dense = dense_grid[-len(config.dense_grid) :]
        if grid is None:
            return self._tokens(ops.select_tokens(t, self._schedule(dense)).to(device))
        return self._tokens(given_layout(config, len(t), grid, device, dense))

    def _schedule(self, dense: Grid) -> DensitySchedule:
        """The schedule for inputs of this size: the config's own, or the default one for the size."""
        if self.config.schedule is None and dense != self.config.dense_grid:
            return self.config.default_schedule(dense)
        for grid in self.schedule.grids:
            self.config.check_sparse_grid("grid is None, config.schedule", grid, dense)
        return self.schedule

    def _position(self, dense_grid: Grid, x: Tensor) -> Tensor:
        config = self.config
        frames, *grid = dense_grid
        table = sincos_position_embedding(tuple(grid), config.hidden_size, config.base_grid, config.position_scale)
        return table.repeat(frames, 1).to(self.patch_embed.weight.dtype).to(x.device)

    def _condition(self, t: Tensor, y: Tensor | None, sizes) -> Tensor:
        c = self._embed_number(self.timestep_embed, t)
        if y is not None:
            c = c + self.label_embed(y.long())
        if sizes is not None:
            resolution, aspect_ratio = sizes
            sides = self._embed_number(self.resolution_embed, resolution.flatten()).view(len(t), -1)
            c = c + torch.cat([sides, self._embed_number(self.aspect_ratio_embed, aspect_ratio)], dim=1)
        return c

    def _embed_number(self, layer: TimestepEmbedding, number: Tensor) -> Tensor:
        features = _block_ops.timestep_features(number.detach(), layer.fc1.weight.dtype)
        return layer.fc2(F.silu(layer.fc1(features)))

    def _caption(self, caption: Tensor, mask: Tensor | None) -> Caption:
        """Packed rows of the captions' tokens. Where the host must not wait for the mask, all rows, the masked ones
        last, zero and unread."""
        batch, length, _ = caption.shape
        if mask is None:
            rows, layout = caption.flatten(0, 1), TokenLayout.uniform(batch, (1, length), caption.device)
        elif mask.is_cuda or torch.compiler.is_compiling():
            counts = mask.sum(1, dtype=torch.int32)
            ends = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            sides = F.pad(torch.stack([torch.ones_like(counts), torch.ones_like(counts), counts], dim=1), (0, 0, 0, 1))
            order = torch.argsort((~mask).flatten().to(torch.uint8), stable=True)
            rows = caption.flatten(0, 1)[order] * mask.flatten()[order, None]
            layout = TokenLayout.of(torch.cat([ends[:, None], sides], dim=1).contiguous(), batch * length)
        else:
            rows = caption[mask]
            layout = TokenLayout([(1, count) for count in mask.sum(1).tolist()], caption.device)
        embed = active_module(self.caption_embed)
        weights = [*effective_parameters(embed.fc1), *effective_parameters(embed.fc2)]
        rows, *weights = cast([rows, *weights], autocast_dtype(rows))
        return Caption(ops._linear(F.gelu(ops._linear(rows, *weights[:2]), approximate="tanh"), *weights[2:]), layout)

    def _last(self, tokens: Tensor, c: Tensor, layout: TokenLayout) -> Tensor:
        layer = active_module(self.final_layer)
        shift, scale = (layer.modulation_table + c[:, None]).unbind(1)
        shift, scale, weight, bias = cast([shift, scale, *effective_parameters(layer.linear)], autocast_dtype(tokens))
        return ops._linear(ops.modulated_layer_norm(tokens, shift, scale, layout), weight, bias)

    def _unpatchify(self, rows: Tensor, batch: int, dense_grid: Grid) -> Tensor:
        """[R, p * p * out], a row holding (y, x, channel), to [B, out, F, H, W]."""
        patch, out = self.config.patch_size, self.config.out_channels
        frames, height, width = dense_grid
        rows = rows.view(batch, frames, height, width, patch, patch, out).permute(0, 6, 1, 2, 4, 3, 5)
        return rows.reshape(batch, out, frames, height * patch, width * patch)

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check(self, name: str, value, shape: tuple, like: Tensor, kind: str) -> Tensor:
        """A tensor of that shape (None: any), where the model is; kind: "float" (the model's dtype), "int", "bool" or
        "number"."""
        check_tensor(name, value)
        if value.device != like.device and name != "t":
            raise ValueError(f"{name} is on {value.device}, the model on {like.device}: they must agree")
        wrong = len(value.shape) != len(shape) or any(
            b not in (None, a) for a, b in zip(value.shape, shape, strict=True)
        )
        if wrong:
            sides = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [{sides}]")
        wanted = {
            "float": value.is_floating_point() and (value.dtype == like.dtype or autocast_dtype(value) is not None),
            "int": value.dtype in INTEGERS,
            "bool": value.dtype == torch.bool,
            "number": value.dtype != torch.bool and not value.is_complex(),
        }
        if not wanted[kind]:
            allowed = {"float": f"the model's dtype {like.dtype}", "int": "an integer", "bool": "torch.bool"}
            raise TypeError(
                f"{name} is {value.dtype}, must be {allowed.get(kind, 'an integer or floating-point dtype')}"
            )
        return value

    def _check_image(self, name: str, x, dims: tuple) -> Tensor:
        """x [B, in_channels, *dims], the last two divisible by the patch."""
        self._check(name, x, (None, self.config.in_channels, *dims), self.patch_embed.weight, "float")
        if any(side % self.config.patch_size or not side for side in x.shape[-2:]):
            raise ValueError(
                f"{name} has height and width {tuple(x.shape[-2:])}, must be multiples of the patch size "
                f"{self.config.patch_size}"
            )
        return x

    def _check_t(self, t, batch: int) -> Tensor:
        self._check("t", t, (batch,), self.patch_embed.weight, "number")
        most = self.schedule.num_timesteps
        if not t.is_cuda and not torch.compiler.is_compiling() and not ((t >= 0) & (t <= most)).all():
            raise ValueError(f"t is {t.tolist()}, must lie in [0, {most}]")
        return t

    def _check_caption(self, caption, mask, batch: int) -> None:
        config, like = self.config, self.patch_embed.weight
        self._check("caption", caption, (batch, None, config.caption_channels), like, "float")
        length = caption.shape[1]
        if not 1 <= length <= config.max_caption_tokens:
            raise ValueError(
                f"caption has {length} tokens, must have 1 to max_caption_tokens = {config.max_caption_tokens}"
            )
        if mask is None:
            return
        self._check("caption_mask", mask, (batch, length), like, "bool")
        if not mask.is_cuda and not torch.compiler.is_compiling() and not mask.any(1).all():
            empty = int((~mask.any(1)).nonzero()[0])
            raise ValueError(
                f"caption_mask[{empty}] has no token, every caption must have one (the empty text has one)"
            )


class FlexPixArt(SingleFlexDiT):
    """Text to image with dynamic token density; with dense blocks only PixArt-alpha.

    Args:
        config: FlexPixArtConfig.
        dtype, device: of the parameters, as in FlexDiT.
    """

    config_class = FlexPixArtConfig

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        grid: Grid | Sequence[Grid] | None = None,
    ) -> Tensor:
        """Predicts noise (and variance) of latents.

        Args:
            x: [B, in_channels, H, W], the model's dtype; H and W multiples of patch_size.
            t: [B] timesteps in [0, 1000], integers or floating point.
            caption: [B, L, caption_channels], the text encoder's output, the model's dtype, L up to max_caption_tokens.
            caption_mask: [B, L] bool, true where there is a token; every caption has at least one. None: everywhere.
            resolution: [B, 2] height and width in pixels, aspect_ratio: [B] height / width, both with size_conditions.
            grid: sparse grid (h, w) of all samples, or a list of one per sample; None follows the density schedule.

        Returns [B, out_channels, H, W]. Raises TypeError or ValueError naming the argument.
        """
        self._check_image("x", x, (None, None))
        batch, weight = x.shape[0], self.patch_embed.weight
        self._check_t(t, batch)
        self._check_caption(caption, caption_mask, batch)
        sizes = None
        if self.config.size_conditions:
            self._check("resolution", resolution, (batch, 2), weight, "number")
            self._check("aspect_ratio", aspect_ratio, (batch,), weight, "number")
            sizes = resolution, aspect_ratio
        elif resolution is not None or aspect_ratio is not None:
            raise ValueError("resolution and aspect_ratio must be None: the model has no size_conditions")
        return self._compute(x[:, :, None], t, None, caption, caption_mask, sizes, grid)[:, :, 0]


class FlexLatte(SingleFlexDiT):
    """Clips of a class or a caption with dynamic token density; with dense blocks only Latte.

    Args:
        config: FlexLatteConfig.
        dtype, device: of the parameters, as in FlexDiT.
    """

    config_class = FlexLatteConfig

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        grid: Grid | Sequence[Grid] | None = None,
        temporal_attention: bool = True,
    ) -> Tensor:
        """Predicts noise (and variance) of latents.

        Args:
            x: [B, in_channels, F, H, W], the model's dtype; F up to num_frames, H and W multiples of patch_size.
            t: [B] timesteps in [0, 1000], integers or floating point.
            y: [B] labels, integers, if the model has num_classes; in train() dropped with class_dropout_prob.
            caption, caption_mask: as in FlexPixArt, if the model has caption_channels.
            grid: sparse grid (f, h, w) of all samples, or a list of one per sample; None follows the density schedule.
            temporal_attention: False leaves out the blocks that attend across frames, and the frames' positions, as
                diffusers' Latte can; for models of dense blocks only.

        Returns [B, out_channels, F, H, W]. Raises TypeError or ValueError naming the argument.
        """
        config = self.config
        self._check_image("x", x, (None, None, None))
        batch, frames = x.shape[0], x.shape[2]
        if not 1 <= frames <= config.num_frames:
            raise ValueError(f"x has {frames} frames, must have 1 to num_frames = {config.num_frames}")
        self._check_t(t, batch)
        for name, value, has in (("y", y, config.num_classes), ("caption", caption, config.caption_channels)):
            if (value is None) == bool(has):
                raise ValueError(
                    f"{name} is {'missing' if has else 'given'}, the model has {'' if has else 'no '}{name}"
                )
        if caption is not None:
            self._check_caption(caption, caption_mask, batch)
        elif caption_mask is not None:
            raise ValueError("caption_mask is given without a caption")
        if not temporal_attention and (config.num_pooling_blocks or config.num_sdtm):
            raise ValueError("temporal_attention is False, must be True for a model with pooling blocks or SDTMs")
        y = None if y is None else self._labels(y, batch)
        return self._compute(x, t, y, caption, caption_mask, None, grid, temporal_attention)

    def _labels(self, y: Tensor, batch: int) -> Tensor:
        config, rows = self.config, self.label_embed.num_embeddings
        self._check("y", y, (batch,), self.patch_embed.weight, "int")
        if not y.is_cuda and not torch.compiler.is_compiling() and not ((y >= 0) & (y < rows)).all():
            raise ValueError(f"y is {y.tolist()}, must lie in [0, {rows})")
        if not (self.training and config.class_dropout_prob > 0):
            return y
        dropped = torch.rand(y.shape, device=y.device) < config.class_dropout_prob
        return torch.where(dropped, config.num_classes, y)

    def _tokens(self, layout: TokenLayout) -> Tokens:
        return Tokens(layout, layout.frames())
