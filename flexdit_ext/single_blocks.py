"""Blocks in the style of PixArt-alpha and Latte as modules: a shared modulation plus a table, captions, frames. Each
computes in one C++ call, forward and backward. Sources: arXiv 2310.00426, 2401.03048, 2412.06028."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import _C
from ._adapters import active_module, effective_parameters
from ._single_ops import single_block
from .blocks import CrossAttention, Mlp, PooledAttention, SelfAttention, autocast_dtype, cast, require_device
from .layout import TokenLayout


@dataclass(frozen=True)
class Tokens:
    """Where tokens lie: their layout, and that of their frames, for blocks that attend within one."""

    layout: TokenLayout
    frames: TokenLayout | None = None


@dataclass(frozen=True)
class Caption:
    """Embedded captions, packed rows [Rc, C]."""

    rows: Tensor
    layout: TokenLayout


class Block(nn.Module):
    """x += gate1 attn(mod1(x)); x += cross(x, caption) if it has `cross`; x += gate2 MLP(mod2(x)); the modulation is
    modulation_table [6, C] plus what all blocks share. Subclasses say which attention."""

    kind: int  # _C.BlockKind as a plain int, which torch.compile can read
    axis = "all"

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_hidden_size: int, attention: nn.Module, cross: bool, **merging
    ):
        super().__init__()
        self.num_heads = num_heads
        self.modulation_table = nn.Parameter(torch.empty(6, hidden_size))
        for name, layer in merging.items():
            self.add_module(name, layer)
        self.attn = attention
        self.cross = CrossAttention(hidden_size) if cross else None
        self.mlp = Mlp(hidden_size, mlp_hidden_size)

    def linears(self) -> list[nn.Linear]:
        """In the C++ library's order, _C.single_block_parameters."""
        attention, mlp = active_module(self.attn), active_module(self.mlp)
        cross = [] if self.cross is None else active_module(self.cross).children()
        return [*attention.children(), *cross, mlp.fc1, mlp.fc2]

    def compute(
        self,
        x: Tensor,
        modulation: Tensor,
        tokens: Tokens,
        caption: Caption | None,
        other: Tensor | None = None,
        other_layout: TokenLayout | None = None,
    ) -> Tensor:
        """x [R, C]; modulation [B, 6, C]; other [Ro, C]. Returns [R, C]."""
        parameters = [parameter for layer in self.linears() for parameter in effective_parameters(layer)]
        caption = None if self.cross is None else caption
        text, text_table = (None, None) if caption is None else (caption.rows, caption.layout.table)
        layout, other_table = tokens.layout, None if other_layout is None else other_layout.mapped
        attention_table = tokens.frames.table if self.axis == "space" and tokens.frames is not None else None
        require_device(x.device, [*parameters, self.modulation_table], modulation=modulation, other=other, caption=text)
        dtype = autocast_dtype(x)
        own = (self.modulation_table + modulation).flatten(1)
        x, own, other, text = cast([x, own, other, text], dtype)
        parameters = cast(parameters, dtype)
        inputs = [one for one in (x, own, other, text, *parameters) if one is not None]
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        return single_block(
            self.kind,
            parameters,
            self.num_heads,
            x,
            other,
            own,
            text,
            layout.mapped,
            other_table,
            attention_table,
            text_table,
            self.axis == "time",
            layout.positions,
            save,
        )[0]


class PoolingBlock(Block):
    """Pooled attention: the mean over a sample's tokens, of a clip's over all frames."""

    kind = int(_C.BlockKind.pooling)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, cross: bool):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, PooledAttention(hidden_size), cross)

    def forward(self, x: Tensor, modulation: Tensor, tokens: Tokens, caption: Caption | None) -> Tensor:
        """x [R, C]; modulation [B, 6, C]. Returns [R, C]."""
        return self.compute(x, modulation, tokens, caption)


class DenseBlock(Block):
    """Self-attention, on dense or on sparse tokens: among all of a sample ("all"), of a frame ("space"), or at one
    position of the frames ("time")."""

    kind = int(_C.BlockKind.dense)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, cross: bool, axis: str):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, SelfAttention(hidden_size), cross)
        self.axis = axis

    def forward(self, x: Tensor, modulation: Tensor, tokens: Tokens, caption: Caption | None) -> Tensor:
        """x [R, C]; modulation [B, 6, C]. Returns [R, C]."""
        return self.compute(x, modulation, tokens, caption)


class GenerationBlock(Block):
    """Sparse tokens read dense ones."""

    kind = int(_C.BlockKind.generation)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, cross: bool):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, CrossAttention(hidden_size), cross)

    def forward(
        self, s: Tensor, x: Tensor, modulation: Tensor, sparse: Tokens, dense: Tokens, caption: Caption | None
    ) -> Tensor:
        """s [Rs, C]; x [R, C]; modulation [B, 6, C]. Returns [Rs, C]."""
        return self.compute(s, modulation, sparse, caption, x, dense.layout)


class RecoveryBlock(Block):
    """Dense tokens from sparse ones: m = W_1 up(s) + b_1 + W_2 x + b_2, which then reads s."""

    kind = int(_C.BlockKind.recovery)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, cross: bool):
        merging = {name: nn.Linear(hidden_size, hidden_size) for name in ("from_sparse", "from_dense")}
        super().__init__(hidden_size, num_heads, mlp_hidden_size, CrossAttention(hidden_size), cross, **merging)

    def linears(self) -> list[nn.Linear]:
        return [self.from_sparse, self.from_dense, *super().linears()]

    def forward(
        self, x: Tensor, s: Tensor, modulation: Tensor, dense: Tokens, sparse: Tokens, caption: Caption | None
    ) -> Tensor:
        """x [R, C]; s [Rs, C]; modulation [B, 6, C]. Returns [R, C]."""
        return self.compute(x, modulation, dense, caption, s, sparse.layout)
