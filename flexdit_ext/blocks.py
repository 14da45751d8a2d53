"""The blocks of FlexDiT as modules. Each computes in one C++ call, forward and backward; their Linear layers hold the
parameters under the names that DiT's users know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _C, _block_ops
from ._adapters import active_module, effective_parameters
from .layout import TokenLayout


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on the tensor's device, or None."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(tensors: list[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
    """Floating tensors in autocast's dtype, with gradients through the cast."""
    return tensors if dtype is None else [None if x is None else x.to(dtype) for x in tensors]


def require_device(device: torch.device, parameters: list[Tensor], **tensors: Tensor | None) -> None:
    """All tensors of a call where the tokens are; torch would not notice one on the meta device."""
    for name, tensor in (*tensors.items(), *((f"parameters[{i}]", p) for i, p in enumerate(parameters))):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the tokens on {device}: they must agree")


class Mlp(nn.Module):
    """fc2(GELU_tanh(fc1(x))), computed inside the block."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)


class PooledAttention(nn.Module):
    """Value and output projection of attention with equal weights."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.v = nn.Linear(hidden_size, hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class SelfAttention(nn.Module):
    """Projections of self-attention; rows of qkv are queries, keys, values."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class CrossAttention(nn.Module):
    """Projections of cross-attention; rows of kv are keys, values."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)


class Block(nn.Module):
    """A block of FlexDiT; subclasses say which kind. Source of the definitions: arXiv 2412.06028."""

    kind: int  # _C.BlockKind as a plain int, which torch.compile can read

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_hidden_size: int, attention: nn.Module, **merging: nn.Linear
    ):
        super().__init__()
        self.num_heads = num_heads
        self.mlp_norm_eps = "1e-06"  # FlexDiT sets its own; as text, because torch.compile makes floats inputs
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        for name, layer in merging.items():  # here, so that the state_dict has the C++ library's order
            self.add_module(name, layer)
        self.attn = attention
        self.mlp = Mlp(hidden_size, mlp_hidden_size)

    def linears(self) -> list[nn.Linear]:
        """In the C++ library's order, _C.block_parameters."""
        attention, mlp = active_module(self.attn), active_module(self.mlp)
        return [self.modulation, *attention.children(), mlp.fc1, mlp.fc2]

    def compute(
        self,
        x: Tensor,
        condition: Tensor,
        layout: TokenLayout,
        other: Tensor | None = None,
        other_layout: TokenLayout | None = None,
        position: Tensor | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """adapter: of peft, the only one to apply; None applies the active ones."""
        parameters = [p for layer in self.linears() for p in effective_parameters(layer, adapter)]
        other_table = None if other_layout is None else other_layout.mapped
        named = {"condition": condition, "other": other, "layout": layout.mapped, "other_layout": other_table}
        require_device(x.device, parameters, **named, position=position)
        dtype = autocast_dtype(x)
        x, condition, other, position = cast([x, condition, other, position], dtype)
        parameters = cast(parameters, dtype)
        inputs = [x, condition, *parameters] if other is None else [x, condition, other, *parameters]
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        return _block_ops.block(
            self.kind,
            parameters,
            self.num_heads,
            x,
            other,
            condition,
            position,
            layout.mapped,
            other_table,
            float(self.mlp_norm_eps),
            save,
        )[0]


class PoolingBlock(Block):
    """x += gate1 (W_o mean_n(W_v mod1(x)_n + b_v) + b_o); x += gate2 MLP(mod2(x))."""

    kind = int(_C.BlockKind.pooling)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, PooledAttention(hidden_size))

    def forward(self, x: Tensor, condition: Tensor, layout: TokenLayout, adapter: str | None = None) -> Tensor:
        """x [R, C]; condition [B, C]; adapter as in compute. Returns [R, C]."""
        return self.compute(x, condition, layout, adapter=adapter)


class DenseBlock(Block):
    """DiT's block, on dense or on sparse tokens: x += gate1 Attn(mod1(x)); x += gate2 MLP(mod2(x))."""

    kind = int(_C.BlockKind.dense)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, SelfAttention(hidden_size))

    def forward(self, x: Tensor, condition: Tensor, layout: TokenLayout, adapter: str | None = None) -> Tensor:
        """x [R, C]; condition [B, C]; adapter as in compute. Returns [R, C]."""
        return self.compute(x, condition, layout, adapter=adapter)


class GenerationBlock(Block):
    """Sparse tokens from dense ones: s += gate1 Attn(q = mod1(s), kv = mod1(x)); s += gate2 MLP(mod2(s))."""

    kind = int(_C.BlockKind.generation)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int):
        super().__init__(hidden_size, num_heads, mlp_hidden_size, CrossAttention(hidden_size))

    def forward(
        self,
        s: Tensor,
        x: Tensor,
        condition: Tensor,
        sparse_layout: TokenLayout,
        layout: TokenLayout,
        adapter: str | None = None,
    ) -> Tensor:
        """s [Rs, C]; x [R, C]; condition [B, C]; adapter as in compute. Returns [Rs, C]."""
        return self.compute(s, condition, sparse_layout, x, layout, adapter=adapter)


class RecoveryBlock(Block):
    """Dense tokens from sparse ones: m = W_1 up(s) + b_1 + W_2 x + b_2 (+ position);
    x = m + gate1 Attn(q = mod1(m), kv = mod1(s)); x += gate2 MLP(mod2(x))."""

    kind = int(_C.BlockKind.recovery)

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int):
        merging = {name: nn.Linear(hidden_size, hidden_size) for name in ("from_sparse", "from_dense")}
        super().__init__(hidden_size, num_heads, mlp_hidden_size, CrossAttention(hidden_size), **merging)

    def linears(self) -> list[nn.Linear]:
        modulation, *rest = super().linears()
        return [modulation, self.from_sparse, self.from_dense, *rest]

    def forward(
        self,
        x: Tensor,
        s: Tensor,
        condition: Tensor,
        layout: TokenLayout,
        sparse_layout: TokenLayout,
        position: Tensor | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """x [R, C]; s [Rs, C]; condition [B, C]; position [N, C] or None; adapter as in compute. Returns [R, C]."""
        return self.compute(x, condition, layout, s, sparse_layout, position, adapter)


class SparseDenseTokenModule(nn.Module):
    """Pools dense tokens to a sparse grid, works on the few, and brings them back (SDTM)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int, blocks: tuple[int, int, int, int]):
        super().__init__()
        size = (hidden_size, num_heads, mlp_hidden_size)
        self.generation = nn.ModuleList(GenerationBlock(*size) for _ in range(blocks[0]))
        self.sparse = nn.ModuleList(DenseBlock(*size) for _ in range(blocks[1]))
        self.recovery = nn.ModuleList(RecoveryBlock(*size) for _ in range(blocks[2]))
        self.dense = nn.ModuleList(DenseBlock(*size) for _ in range(blocks[3]))
