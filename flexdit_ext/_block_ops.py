"""Custom ops of whole blocks and of the model's two ends: one autograd node each, forward and backward in C++.

Internal: flexdit_ext.model is the interface. Parameters travel as lists in the order of the C++ library
(_C.block_parameters; csrc/include/flexdit/block.h for the ends). Tensors are made contiguous: oneDNN sums strided
float32 rows in another order, and a sample's result must not depend on how its batch came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from ._core import empty_rows, execution, require_device, workspace

custom_op = torch.library.custom_op

TIMESTEP_FEATURES = 256


def _weights(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p if p.is_contiguous() else p.contiguous() for p in parameters]


def _gradients(parameters: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """A buffer for every gradient that is needed."""
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
        for p, need in zip(parameters, needed, strict=True)
    ]


def _fill(needed: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in their places, None where none was needed."""
    remaining = iter(gradients)
    return [next(remaining) if need else None for need in needed]


# Blocks


@custom_op("flexdit_ext::block", mutates_args=())
def block(
    kind: int,
    parameters: Sequence[Tensor],
    num_heads: int,
    x: Tensor,
    other: Tensor | None,
    condition: Tensor,
    position: Tensor | None,
    table: Tensor,
    other_table: Tensor | None,
    mlp_norm_eps: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the block's tokens and the context for backward (empty unless `save`)."""
    require_device(
        "block",
        parameters,
        x=x,
        other=other,
        condition=condition,
        position=position,
        layout=table,
        other_layout=other_table,
    )
    x, condition = x.contiguous(), condition.contiguous()
    other = None if other is None else other.contiguous()
    _, inference, training, _ = _bytes(kind, parameters, num_heads, x, other, condition)
    out = empty_rows(x, *x.shape)
    context = _empty_context(kind, parameters, num_heads, x, other, condition, save)
    _C.block_forward(
        _C.BlockKind(kind),
        _weights(parameters),
        num_heads,
        x,
        other,
        condition,
        position,
        table,
        other_table,
        mlp_norm_eps,
        out,
        context if save else None,
        workspace(training if save else inference, x),
        execution(x),
    )
    return out, context


def _bytes(kind, parameters, num_heads, x, other, condition):
    mlp_hidden = parameters[-2].shape[1]
    other_rows = 0 if other is None else other.shape[0]
    return _C.block_bytes(
        _C.BlockKind(kind), x.shape[1], mlp_hidden, num_heads, condition.shape[0], x.shape[0], other_rows, x
    )


@lru_cache(maxsize=256)
def _context_rates(kind: int, hidden: int, mlp_hidden: int, num_heads: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Context bytes per row of x, per row of other, per sample; pieces of 64 rows are aligned, so these are exact."""

    def context_bytes(batch, rows, other_rows):
        like = torch.empty(0, dtype=dtype, device="cpu")
        kind_ = _C.BlockKind(kind)
        return _C.block_bytes(kind_, hidden, mlp_hidden, num_heads, batch, rows, other_rows, like)[0]

    return context_bytes(0, 64, 0) // 64, context_bytes(0, 0, 64) // 64, context_bytes(64, 0, 0) // 64


def _empty_context(kind, parameters, num_heads, x, other, condition, save) -> Tensor:
    """A context large enough for backward; linear in the numbers of rows, so that torch.compile keeps them free."""
    if not save:
        return x.new_empty(0, dtype=torch.uint8)
    sizes = int(x.shape[1]), int(parameters[-2].shape[1])  # a model's, so never symbolic in its graphs
    per_row, per_other, per_sample = _context_rates(kind, *sizes, num_heads, x.dtype)
    other_rows = 0 if other is None else other.shape[0]
    alignment = 64 * 16  # of the context's pieces, fewer than 16
    size = per_row * x.shape[0] + per_other * other_rows + per_sample * condition.shape[0] + alignment
    return x.new_empty(size, dtype=torch.uint8)


@block.register_fake
def _(kind, parameters, num_heads, x, other, condition, position, table, other_table, mlp_norm_eps, save):
    return x.new_empty(x.shape), _empty_context(kind, parameters, num_heads, x, other, condition, save)


@custom_op("flexdit_ext::block_backward", mutates_args=())
def block_backward(
    kind: int,
    parameters: Sequence[Tensor],
    num_heads: int,
    x: Tensor,
    other: Tensor | None,
    condition: Tensor,
    table: Tensor,
    other_table: Tensor | None,
    mlp_norm_eps: float,
    context: Tensor,
    grad_out: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, condition, other (if there is one) and the parameters that are `needed`."""
    x, condition = x.contiguous(), condition.contiguous()
    other = None if other is None else other.contiguous()
    grad_x, grad_condition = empty_rows(x, *x.shape), empty_rows(x, *condition.shape)
    grad_other = None if other is None else empty_rows(x, *other.shape)
    gradients = _gradients(parameters, needed)
    _C.block_backward(
        _C.BlockKind(kind),
        _weights(parameters),
        num_heads,
        x,
        other,
        condition,
        table,
        other_table,
        mlp_norm_eps,
        context,
        grad_out.contiguous(),
        grad_x,
        grad_other,
        grad_condition,
        gradients,
        workspace(_bytes(kind, parameters, num_heads, x, other, condition)[3], x),
        execution(x),
    )
    return [g for g in (grad_x, grad_condition, grad_other, *gradients) if g is not None]


@block_backward.register_fake
def _(kind, parameters, num_heads, x, other, condition, table, other_table, mlp_norm_eps, context, grad_out, needed):
    inputs = [x, condition] if other is None else [x, condition, other]
    inputs += [p for p, need in zip(parameters, needed, strict=True) if need]
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in inputs]


def _save_block(ctx, inputs, output):
    ctx.kind, parameters, ctx.num_heads, x, other, condition, _, table, other_table, ctx.mlp_norm_eps, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, other, condition, table, other_table, output[1], *parameters)


def _block_gradient(ctx, grad_out, _):
    x, other, condition, table, other_table, context, *parameters = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[1])
    tokens = (x, other, condition, table, other_table)
    gradients = block_backward(
        ctx.kind, parameters, ctx.num_heads, *tokens, ctx.mlp_norm_eps, context, grad_out, needed
    )
    grad_x, grad_condition, *rest = gradients
    grad_other = None if other is None else rest.pop(0)
    return None, _fill(needed, rest), None, grad_x, grad_other, grad_condition, None, None, None, None, None


block.register_autograd(_block_gradient, setup_context=_save_block)


# Condition: timestep and label embedding


@custom_op("flexdit_ext::timestep_features", mutates_args=())
def timestep_features(t: Tensor, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """[cos(t w), sin(t w)] [B, 256] with w_i = 10000^(-i / (128 - shift)), in float32 whatever the model's dtype, as
    pretrained DiTs were trained. Source: DiT's TimestepEmbedder, arXiv 2212.09748.

    Computed by the library, so that the module and the sampling engine have the same ones to the bit on every
    processor; reference.timestep_frequencies is the definition. There is no derivative: callers detach t."""
    require_device("timestep_features", t=t)
    t = t.double().contiguous()
    features = torch.empty(t.shape[0], TIMESTEP_FEATURES, dtype=dtype, device=t.device)
    _C.timestep_embedding(t, shift, features, execution(features))
    return features


@timestep_features.register_fake
def _(t, dtype, shift=0):
    return t.new_empty(t.shape[0], TIMESTEP_FEATURES, dtype=dtype)


def _check_values(t: Tensor, y: Tensor, num_timesteps: int, num_labels: int) -> None:
    bad = ~((t >= 0) & (t <= num_timesteps))  # NaN is bad, too
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"t[{i}] is {t[i].item()}, must lie in [0, {num_timesteps}]")
    y = y.long()  # narrow integers cannot be compared with num_labels
    bad = (y < 0) | (y >= num_labels)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"y[{i}] is {int(y[i])}, must lie in [0, {num_labels})")


def _labels(y: Tensor, dropped: Tensor | None, num_labels: int) -> Tensor:
    """int64 labels, the null class, the last one, where they are dropped."""
    return y.long().contiguous() if dropped is None else torch.where(dropped, num_labels - 1, y.long())


@custom_op("flexdit_ext::condition", mutates_args=())
def condition(
    t: Tensor,
    y: Tensor,
    dropped: Tensor | None,
    parameters: Sequence[Tensor],
    num_timesteps: int,
    timestep_shift: int,
) -> Tensor:
    """t_emb + y_emb [B, C], the null class's y_emb where `dropped`. Raises ValueError for values of t and y out of
    range, dropped or not; on a GPU a label out of range gives NaN instead."""
    require_device("condition", parameters, t=t, y=y)
    if not t.is_cuda:  # there the host does not wait for values
        _check_values(t, y, num_timesteps, parameters[4].shape[0])
    features = timestep_features(t, parameters[0].dtype, timestep_shift)
    out = empty_rows(features, t.shape[0], parameters[0].shape[0])
    scratch = workspace(_C.condition_workspace(features, out.shape[1]), features)
    labels = _labels(y, dropped, parameters[4].shape[0])
    _C.condition_forward(_weights(parameters), features, labels, out, scratch, execution(features))
    return out


@condition.register_fake
def _(t, y, dropped, parameters, num_timesteps, timestep_shift):
    return parameters[0].new_empty(t.shape[0], parameters[0].shape[0])


@custom_op("flexdit_ext::condition_backward", mutates_args=())
def condition_backward(
    t: Tensor,
    y: Tensor,
    dropped: Tensor | None,
    parameters: Sequence[Tensor],
    timestep_shift: int,
    grad_out: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    features = timestep_features(t, parameters[0].dtype, timestep_shift)
    gradients = _gradients(parameters, needed)
    scratch = workspace(_C.condition_workspace(features, grad_out.shape[1]), features)
    labels = _labels(y, dropped, parameters[4].shape[0])
    _C.condition_backward(
        _weights(parameters), features, labels, grad_out.contiguous(), gradients, scratch, execution(features)
    )
    return [g for g in gradients if g is not None]


@condition_backward.register_fake
def _(t, y, dropped, parameters, timestep_shift, grad_out, needed):
    return [torch.empty_like(p) for p, need in zip(parameters, needed, strict=True) if need]


def _save_condition(ctx, inputs, output):
    t, y, dropped, parameters, _, ctx.timestep_shift = inputs
    ctx.save_for_backward(t, y, dropped, *parameters)


def _condition_gradient(ctx, grad_out):
    t, y, dropped, *parameters = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[3])
    gradients = condition_backward(t, y, dropped, parameters, ctx.timestep_shift, grad_out, needed)
    return None, None, None, _fill(needed, gradients), None, None


condition.register_autograd(_condition_gradient, setup_context=_save_condition)


# Patch embedding


def _patches(image: Tensor, patch: int, channels_last: bool) -> _C.Patches:
    return _C.Patches(image.shape[1], patch, channels_last)


def _num_patches(image: Tensor, patch: int) -> int:
    return image.shape[0] * (image.shape[2] // patch) * (image.shape[3] // patch)


@custom_op("flexdit_ext::patch_embed", mutates_args=())
def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, in, H, W] to tokens [R, C] with position, and the patches [R, in * p * p] for backward."""
    require_device("patch_embed", [weight, bias], x=x, position=position, layout=table)
    patch = weight.shape[2]
    count = _num_patches(x, patch)
    patches, out = empty_rows(x, count, weight.shape[1:].numel()), empty_rows(x, count, weight.shape[0])
    parameters = _weights([weight, bias])
    x = x.contiguous()
    _C.patch_embed_forward(
        parameters, x, patches, _patches(x, patch, False), position.contiguous(), table, out, execution(x)
    )
    return out, patches


@patch_embed.register_fake
def _(x, weight, bias, position, table):
    count = _num_patches(x, weight.shape[2])
    return x.new_empty(count, weight.shape[0]), x.new_empty(count, weight.shape[1:].numel())


@custom_op("flexdit_ext::patch_embed_backward", mutates_args=())
def patch_embed_backward(
    like: Tensor, weight: Tensor, bias: Tensor, table: Tensor, patches: Tensor, grad_out: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x (shaped as `like`), weight and bias, those that are `needed`."""
    grad_x, *gradients = _gradients([like, weight, bias], needed)
    scratch = workspace(_C.patch_embed_workspace(patches, weight.shape[0]), patches)
    image = _patches(like, weight.shape[2], False)
    _C.patch_embed_backward(
        _weights([weight, bias]),
        patches,
        image,
        table,
        grad_out.contiguous(),
        grad_x,
        gradients,
        scratch,
        execution(grad_out),
    )
    return [g for g in (grad_x, *gradients) if g is not None]


@patch_embed_backward.register_fake
def _(like, weight, bias, table, patches, grad_out, needed):
    inputs = zip([like, weight, bias], needed, strict=True)
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p, need in inputs if need]


def _save_patch_embed(ctx, inputs, output):
    x, weight, bias, _, table = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, table, output[1])


def _patch_embed_gradient(ctx, grad_out, _):
    needed = list(ctx.needs_input_grad[:3])
    return *_fill(needed, patch_embed_backward(*ctx.saved_tensors, grad_out, needed)), None, None


patch_embed.register_autograd(_patch_embed_gradient, setup_context=_save_patch_embed)


# Final layer


@custom_op("flexdit_ext::final_layer", mutates_args=())
def final_layer(
    parameters: Sequence[Tensor], x: Tensor, condition: Tensor, table: Tensor, channels: int, side: int, patch: int
) -> Tensor:
    """Tokens [R, C] to images [B, channels, side, side]."""
    require_device("final_layer", parameters, x=x, condition=condition, layout=table)
    x, condition = x.contiguous(), condition.contiguous()
    out = empty_rows(x, condition.shape[0], channels, side, side)
    patches = empty_rows(x, x.shape[0], parameters[2].shape[0])
    scratch = workspace(_C.final_layer_workspace(x, condition.shape[0], patches.shape[1]), x)
    _C.final_layer_forward(
        _weights(parameters), x, condition, table, patches, _patches(out, patch, True), out, scratch, execution(x)
    )
    return out


@final_layer.register_fake
def _(parameters, x, condition, table, channels, side, patch):
    return x.new_empty(condition.shape[0], channels, side, side)


@custom_op("flexdit_ext::final_layer_backward", mutates_args=())
def final_layer_backward(
    parameters: Sequence[Tensor],
    x: Tensor,
    condition: Tensor,
    table: Tensor,
    patch: int,
    grad_out: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, condition and the parameters that are `needed`."""
    x, condition, grad_out = x.contiguous(), condition.contiguous(), grad_out.contiguous()
    grad_x, grad_condition = empty_rows(x, *x.shape), empty_rows(x, *condition.shape)
    gradients = _gradients(parameters, needed)
    patches = empty_rows(x, x.shape[0], parameters[2].shape[0])
    scratch = workspace(_C.final_layer_workspace(x, condition.shape[0], patches.shape[1]), x)
    _C.final_layer_backward(
        _weights(parameters),
        x,
        condition,
        table,
        patches,
        _patches(grad_out, patch, True),
        grad_out,
        grad_x,
        grad_condition,
        gradients,
        scratch,
        execution(x),
    )
    return [g for g in (grad_x, grad_condition, *gradients) if g is not None]


@final_layer_backward.register_fake
def _(parameters, x, condition, table, patch, grad_out, needed):
    inputs = [x, condition, *(p for p, need in zip(parameters, needed, strict=True) if need)]
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in inputs]


def _save_final(ctx, inputs, output):
    parameters, x, condition, table, _, _, ctx.patch = inputs
    ctx.save_for_backward(x, condition, table, *parameters)


def _final_gradient(ctx, grad_out):
    x, condition, table, *parameters = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[0])
    grad_x, grad_condition, *rest = final_layer_backward(parameters, x, condition, table, ctx.patch, grad_out, needed)
    return _fill(needed, rest), grad_x, grad_condition, None, None, None, None


final_layer.register_autograd(_final_gradient, setup_context=_save_final)


# Classifier-free guidance


@custom_op("flexdit_ext::guidance_combine", mutates_args=())
def guidance_combine(x: Tensor, guided: int, scale: float) -> Tensor:
    """x [2 B, C, H, W], conditional then unconditional: both halves' first `guided` channels become
    uncond + scale (cond - uncond)."""
    require_device("guidance_combine", x=x)
    out = x.clone(memory_format=torch.contiguous_format)
    _C.guidance_combine(out, x.shape[1], guided, scale, execution(x))
    return out


@guidance_combine.register_fake
def _(x, guided, scale):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_guidance(ctx, inputs, output):
    _, ctx.guided, ctx.scale = inputs


def _guidance_gradient(ctx, grad):
    both = sum(grad[:, : ctx.guided].chunk(2))
    mixed = torch.cat([ctx.scale * both, (1 - ctx.scale) * both])
    return torch.cat([mixed, grad[:, ctx.guided :]], dim=1), None, None


guidance_combine.register_autograd(_guidance_gradient, setup_context=_save_guidance)
