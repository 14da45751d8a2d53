"""FlexPixArt and FlexLatte in plain PyTorch: the definition that the fast models are tested against.

Both modulate their blocks as PixArt-alpha does (arXiv 2310.00426, "adaLN-single"): one Linear of the timestep's
embedding serves all blocks, and every block adds a table of its own. Text enters by a cross-attention in the blocks,
between attention and MLP, without norm and without gate. FlexLatte (Latte: arXiv 2401.03048) works on clips: its blocks
attend within a frame and across frames in turn. The layouts are method.md's, last section; letters as in reference.py,
with F frames, L caption tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reference import (
    CrossAttention,
    Grid,
    Mlp,
    PooledAttention,
    SelfAttention,
    TimestepEmbedding,
    _modulated_layer_norm,
    adaptive_pool,
    nearest_index,
)


def scaled_position_embedding(grid: Grid, base: Grid, scale: float, dim: int) -> Tensor:
    """PixArt's 2-D sin-cos table, float32 [h * w, dim]: DiT's, at the positions i * base / side / scale, so that an
    image of another size than the base's covers the same positions. The columns' half first, each half [sin | cos]."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(side: int, base_side: int) -> Tensor:
        positions = torch.arange(side, dtype=torch.float64) / (side / base_side) / scale
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    (height, width), (base_height, base_width) = grid, base
    columns = encode(width, base_width)[None].expand(height, -1, -1)
    rows = encode(height, base_height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def temporal_embedding(frames: int, dim: int) -> Tensor:
    """Latte's 1-D sin-cos table over the frames, float32 [F, dim], [sin | cos]."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class AxisAttention(SelfAttention):
    """Self-attention among the tokens of a frame ("space"), among those of one position over the frames ("time"), or
    among all ("all")."""

    def __init__(self, dim: int, num_heads: int, axis: str):
        super().__init__(dim, num_heads)
        self.axis = axis

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x [B, N, C] on grid (f, h, w) or (h, w)."""
        if self.axis == "all" or len(grid) == 2:
            return super().forward(x)
        frames = x.unflatten(1, (grid[0], -1))  # [B, f, h * w, C]
        if self.axis == "space":
            return super().forward(frames.flatten(0, 1)).view_as(x)
        out = super().forward(frames.transpose(1, 2).flatten(0, 1))  # [B * h * w, f, C]
        return out.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)


class CaptionAttention(CrossAttention):
    """Tokens x [B, N, C] read the caption [B, L, C]; mask [B, L], true where there is a token, or None."""

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor | None) -> Tensor:
        heads = (self.q(x), *self.kv(caption).chunk(2, dim=-1))
        q, k, v = (tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tokens in heads)
        mask = None if mask is None else mask[:, None, None, :]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block with PixArt's modulation: x += gate1 attn(mod1(x)); x += cross(x, caption); x += gate2 MLP(mod2(x))."""

    def __init__(self, dim: int, mlp_dim: int, attn: nn.Module, cross: CaptionAttention | None):
        super().__init__()
        self.modulation_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = attn
        if cross is not None:
            self.cross = cross
        self.mlp = Mlp(dim, mlp_dim)

    def modulate(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """modulation [B, 6, C] -> shift1, scale1, gate1, shift2, scale2, gate2, each [B, 1, C]."""
        return (self.modulation_table + modulation).chunk(6, dim=1)

    def rest(self, x: Tensor, modulation: Sequence[Tensor], text: tuple | None) -> Tensor:
        """Cross-attention, if the block has one, and MLP."""
        shift, scale, gate = modulation
        if text is not None and hasattr(self, "cross"):
            x = x + self.cross(x, *text)
        return x + gate * self.mlp(_modulated_layer_norm(x, shift, scale))


class DenseBlock(Block):
    def forward(self, x: Tensor, modulation: Tensor, text: tuple | None, grid: Grid) -> Tensor:
        shift, scale, gate, *rest = self.modulate(modulation)
        x = x + gate * self.attn(_modulated_layer_norm(x, shift, scale), grid)
        return self.rest(x, rest, text)


class PoolingBlock(Block):
    def forward(self, x: Tensor, modulation: Tensor, text: tuple | None) -> Tensor:
        shift, scale, gate, *rest = self.modulate(modulation)
        x = x + gate * self.attn(_modulated_layer_norm(x, shift, scale))
        return self.rest(x, rest, text)


class GenerationBlock(Block):
    def forward(self, s: Tensor, x: Tensor, modulation: Tensor, text: tuple | None) -> Tensor:
        shift, scale, gate, *rest = self.modulate(modulation)
        s = s + gate * self.attn(_modulated_layer_norm(s, shift, scale), _modulated_layer_norm(x, shift, scale))
        return self.rest(s, rest, text)


class RecoveryBlock(Block):
    def __init__(self, dim: int, mlp_dim: int, attn: nn.Module, cross: CaptionAttention | None):
        super().__init__(dim, mlp_dim, attn, cross)
        self.from_sparse = nn.Linear(dim, dim)  # W_1, b_1
        self.from_dense = nn.Linear(dim, dim)  # W_2, b_2

    def forward(self, x: Tensor, s: Tensor, modulation: Tensor, text: tuple | None, index: Tensor) -> Tensor:
        shift, scale, gate, *rest = self.modulate(modulation)
        x = self.from_sparse(s.index_select(1, index)) + self.from_dense(x)
        x = x + gate * self.attn(_modulated_layer_norm(x, shift, scale), _modulated_layer_norm(s, shift, scale))
        return self.rest(x, rest, text)


class SparseDenseTokenModule(nn.Module):
    """SDTM of these blocks; a generation and a recovery block attend over the whole clip."""

    def __init__(self, generation, sparse, recovery, dense):
        super().__init__()
        self.generation, self.sparse = nn.ModuleList(generation), nn.ModuleList(sparse)
        self.recovery, self.dense = nn.ModuleList(recovery), nn.ModuleList(dense)

    def forward(self, x: Tensor, modulation: Tensor, text: tuple | None, grid: Grid, sparse_grid: Grid) -> Tensor:
        s = adaptive_pool(x, grid, sparse_grid)
        for block in self.generation:
            s = block(s, x, modulation, text)
        for block in self.sparse:
            s = block(s, modulation, text, sparse_grid)
        index = nearest_index(sparse_grid, grid, x.device)
        for block in self.recovery:
            x = block(x, s, modulation, text, index)
        for block in self.dense:
            x = block(x, modulation, text, grid)
        return x


class FinalLayer(nn.Module):
    """LN, shift and scale from the timestep's embedding and a table, Linear to a patch's values."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.modulation_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = (self.modulation_table + condition[:, None]).chunk(2, dim=1)
        return self.linear(_modulated_layer_norm(x, shift, scale))


class _SingleFlexDiT(nn.Module):
    """What FlexPixArt and FlexLatte share. config: an object with FlexPixArtConfig's or FlexLatteConfig's attributes.

    Block k of the flattened order, pooling blocks first, has config.axis(k)'s attention if it is a dense or a sparse
    block, and a cross-attention to the caption if config.has_cross(k).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, patch, kinds = config.hidden_size, config.patch_size, iter(range(config.depth))

        def block(kind: type[Block], attention) -> Block:
            k = next(kinds)
            cross = CaptionAttention(dim, config.num_heads) if config.has_cross(k) else None
            return kind(dim, config.mlp_hidden_size, attention(k), cross)

        def dense(count: int) -> list[Block]:
            return [
                block(DenseBlock, lambda k: AxisAttention(dim, config.num_heads, config.axis(k))) for _ in range(count)
            ]

        def crossing(kind: type[Block], count: int) -> list[Block]:
            return [block(kind, lambda _: CrossAttention(dim, config.num_heads)) for _ in range(count)]

        def module(generation: int, sparse: int, recovery: int, last: int) -> SparseDenseTokenModule:
            return SparseDenseTokenModule(
                crossing(GenerationBlock, generation), dense(sparse), crossing(RecoveryBlock, recovery), dense(last)
            )

        self.patch_embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.timestep_embed = TimestepEmbedding(dim)
        if config.size_conditions:
            self.resolution_embed, self.aspect_ratio_embed = TimestepEmbedding(dim // 3), TimestepEmbedding(dim // 3)
        if config.num_classes:
            self.label_embed = nn.Embedding(config.num_classes + (config.class_dropout_prob > 0), dim)
        if config.caption_channels:
            self.caption_embed = Mlp(config.caption_channels, dim)
            self.caption_embed.fc2 = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.pooling_blocks = nn.ModuleList(
            block(PoolingBlock, lambda _: PooledAttention(dim)) for _ in range(config.num_pooling_blocks)
        )
        self.sdtm = nn.ModuleList(module(*config.sdtm_blocks) for _ in range(config.num_sdtm))
        self.dense_blocks = nn.ModuleList(dense(config.num_dense_blocks))
        self.final_layer = FinalLayer(dim, patch * patch * config.out_channels)

    def condition(self, t: Tensor, y: Tensor | None, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """[B, C]: timestep, plus label, plus [height | width | aspect ratio]; resolution [B, 2], aspect_ratio [B]."""
        c = self.timestep_embed(t)
        if self.config.num_classes:
            c = c + self.label_embed(y)
        if self.config.size_conditions:
            sizes = self.resolution_embed(resolution.flatten()).view(len(t), -1)
            c = c + torch.cat([sizes, self.aspect_ratio_embed(aspect_ratio)], dim=1)
        return c

    def run(self, x: Tensor, c: Tensor, text: tuple | None, grid: Grid, sparse_grid: Grid | None) -> Tensor:
        """Tokens [B, N, C] through all blocks and the last layer -> [B, N, p * p * out]."""
        config, modulation = self.config, self.modulation(F.silu(c)).unflatten(1, (6, -1))
        if text is not None:
            caption, mask = text
            text = self.caption_embed(caption), mask
        k = 0
        for unit in (*self.pooling_blocks, *self.sdtm, *self.dense_blocks):
            blocks = sum(config.sdtm_blocks) if isinstance(unit, SparseDenseTokenModule) else 1
            if k <= 1 < k + blocks and len(grid) == 3 and grid[0] > 1:  # Latte: before the second block
                table = temporal_embedding(grid[0], config.hidden_size).to(x)
                x = x + table.repeat_interleave(grid[1] * grid[2], 0)
            if isinstance(unit, PoolingBlock):
                x = unit(x, modulation, text)
            elif isinstance(unit, DenseBlock):
                x = unit(x, modulation, text, grid)
            else:
                x = unit(x, modulation, text, grid, sparse_grid)
            k += blocks
        return self.final_layer(x, c)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, h * w, p * p * out], a row holding (row, column, channel), -> [B, out, h * p, w * p]."""
        patch = self.config.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def position(self, height: int, width: int) -> Tensor:
        config = self.config
        return scaled_position_embedding((height, width), config.base_grid, config.position_scale, config.hidden_size)


class FlexPixArt(_SingleFlexDiT):
    """Text to image; with dense blocks only it is PixArt-alpha."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """x [B, in, H, W]; t [B]; caption [B, L, caption_channels]; caption_mask [B, L] bool; resolution [B, 2]
        (height, width) and aspect_ratio [B] with size_conditions; grid: the sparse grid. Returns [B, out, H, W]."""
        height, width = (side // self.config.patch_size for side in x.shape[-2:])
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.position(height, width).to(x)
        c = self.condition(t, None, resolution, aspect_ratio)
        out = self.run(tokens, c, (caption, caption_mask), (height, width), grid)
        return self.unpatchify(out, height, width)


class FlexLatte(_SingleFlexDiT):
    """Clips, of a class, of a caption or of neither; with dense blocks only it is Latte."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        caption: Tensor | None = None,
        caption_mask: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """x [B, in, F, H, W]; t [B]; y [B] with num_classes; caption [B, L, caption_channels] and caption_mask [B, L]
        with caption_channels; grid: the sparse grid (f, h, w). Returns [B, out, F, H, W]."""
        batch, _, frames, *sides = x.shape
        height, width = (side // self.config.patch_size for side in sides)
        tokens = self.patch_embed(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = (tokens + self.position(height, width).to(x)).unflatten(0, (batch, frames)).flatten(1, 2)
        text = None if caption is None else (caption, caption_mask)
        out = self.run(tokens, self.condition(t, y, None, None), text, (frames, height, width), grid)
        return (
            self.unpatchify(out.unflatten(1, (frames, -1)).flatten(0, 1), height, width)
            .unflatten(0, (batch, frames))
            .transpose(1, 2)
        )
