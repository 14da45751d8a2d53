"""The custom op of a whole block in PixArt's style: the modulation comes in, and tokens may read a caption or attend
within or across frames. Internal: flexdit_ext.pixart and flexdit_ext.latte are the interface."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from ._block_ops import _fill, _gradients, _weights
from ._core import empty_rows, execution, require_device, workspace

custom_op = torch.library.custom_op


def _count(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[0]


def _bytes(kind, parameters, num_heads, x, other, modulation, caption) -> tuple[int, int, int, int]:
    sizes = x.shape[1], parameters[-2].shape[1], num_heads, modulation.shape[0], x.shape[0], _count(other)
    return _C.single_block_bytes(_C.BlockKind(kind), *sizes, caption is not None, _count(caption), x)


@lru_cache(maxsize=256)
def _context_rates(kind: int, hidden: int, mlp_hidden: int, num_heads: int, caption: bool, dtype: torch.dtype) -> tuple:
    """Context bytes per sample and per row of x, of other and of the caption; pieces of 64 are aligned, so these are
    exact."""

    def context_bytes(batch, rows, other_rows, caption_rows):
        like = torch.empty(0, dtype=dtype, device="cpu")
        counts = batch, rows, other_rows, caption, caption_rows
        return _C.single_block_bytes(_C.BlockKind(kind), hidden, mlp_hidden, num_heads, *counts, like)[0]

    return tuple(context_bytes(*(64 * (i == j) for j in range(4))) // 64 for i in range(4))


def _empty_context(kind, parameters, num_heads, x, other, modulation, caption, save) -> Tensor:
    """Large enough for backward; linear in the numbers of rows, so that torch.compile keeps them free."""
    if not save:
        return x.new_empty(0, dtype=torch.uint8)
    sizes = int(x.shape[1]), int(parameters[-2].shape[1])  # a model's, so never symbolic in its graphs
    rates = _context_rates(kind, *sizes, num_heads, caption is not None, x.dtype)
    counts = modulation.shape[0], x.shape[0], _count(other), _count(caption)
    size = sum(rate * count for rate, count in zip(rates, counts, strict=True))
    return x.new_empty(size + 64 * 20, dtype=torch.uint8)  # alignment of the context's pieces, fewer than 20


@custom_op("flexdit_ext::single_block", mutates_args=())
def single_block(
    kind: int,
    parameters: Sequence[Tensor],
    num_heads: int,
    x: Tensor,
    other: Tensor | None,
    modulation: Tensor,
    caption: Tensor | None,
    table: Tensor,
    other_table: Tensor | None,
    attention_table: Tensor | None,
    caption_table: Tensor | None,
    across_frames: bool,
    max_positions: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the block's tokens [R, C] and the context for backward (empty unless `save`). modulation [B, 6 C]."""
    require_device(
        "block",
        parameters,
        x=x,
        other=other,
        modulation=modulation,
        caption=caption,
        layout=table,
        other_layout=other_table,
        attention_layout=attention_table,
        caption_layout=caption_table,
    )
    x, modulation = x.contiguous(), modulation.contiguous()
    other, caption = (None if one is None else one.contiguous() for one in (other, caption))
    _, inference, training, _ = _bytes(kind, parameters, num_heads, x, other, modulation, caption)
    out = empty_rows(x, *x.shape)
    context = _empty_context(kind, parameters, num_heads, x, other, modulation, caption, save)
    _C.single_block_forward(
        _C.BlockKind(kind),
        _weights(parameters),
        num_heads,
        x,
        other,
        modulation,
        table,
        other_table,
        (attention_table, across_frames, max_positions, caption, caption_table),
        out,
        context if save else None,
        workspace(training if save else inference, x),
        execution(x),
    )
    return out, context


@single_block.register_fake
def _(kind, parameters, num_heads, x, other, modulation, caption, *rest):
    save = rest[-1]
    return x.new_empty(x.shape), _empty_context(kind, parameters, num_heads, x, other, modulation, caption, save)


@custom_op("flexdit_ext::single_block_backward", mutates_args=())
def single_block_backward(
    kind: int,
    parameters: Sequence[Tensor],
    num_heads: int,
    x: Tensor,
    other: Tensor | None,
    modulation: Tensor,
    caption: Tensor | None,
    table: Tensor,
    other_table: Tensor | None,
    attention_table: Tensor | None,
    caption_table: Tensor | None,
    across_frames: bool,
    max_positions: int,
    context: Tensor,
    grad_out: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, modulation, other and caption (if there are any) and the parameters that are `needed`."""
    x, modulation = x.contiguous(), modulation.contiguous()
    other, caption = (None if one is None else one.contiguous() for one in (other, caption))
    grad_x, grad_modulation = empty_rows(x, *x.shape), empty_rows(x, *modulation.shape)
    grad_other, grad_caption = (None if one is None else empty_rows(x, *one.shape) for one in (other, caption))
    gradients = _gradients(parameters, needed)
    _C.single_block_backward(
        _C.BlockKind(kind),
        _weights(parameters),
        num_heads,
        x,
        other,
        modulation,
        table,
        other_table,
        (attention_table, across_frames, max_positions, caption, caption_table),
        context,
        grad_out.contiguous(),
        grad_x,
        grad_other,
        grad_modulation,
        grad_caption,
        gradients,
        workspace(_bytes(kind, parameters, num_heads, x, other, modulation, caption)[3], x),
        execution(x),
    )
    return [g for g in (grad_x, grad_modulation, grad_other, grad_caption, *gradients) if g is not None]


@single_block_backward.register_fake
def _(kind, parameters, num_heads, x, other, modulation, caption, *rest):
    inputs = [tensor for tensor in (x, modulation, other, caption) if tensor is not None]
    inputs += [p for p, need in zip(parameters, rest[-1], strict=True) if need]
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in inputs]


def _save(ctx, inputs, output):
    ctx.kind, parameters, ctx.num_heads, *tensors, ctx.across_frames, ctx.max_positions, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1], *parameters)


def _gradient(ctx, grad_out, _):
    saved = list(ctx.saved_tensors)
    *tensors, context = saved[:9]
    parameters, needed = saved[9:], list(ctx.needs_input_grad[1])
    grads = single_block_backward(
        ctx.kind, parameters, ctx.num_heads, *tensors, ctx.across_frames, ctx.max_positions, context, grad_out, needed
    )
    grad_x, grad_modulation, *rest = grads
    grad_other, grad_caption = (None if one is None else rest.pop(0) for one in (tensors[1], tensors[3]))
    return None, _fill(needed, rest), None, grad_x, grad_other, grad_modulation, grad_caption, *[None] * 7


single_block.register_autograd(_gradient, setup_context=_save)
