"""The public operations, as torch.library custom ops with gradients: `flexdit_ext.ops.attention(...)` and friends.

Tokens are packed rows [R, C] with a TokenLayout; B is its number of samples. All tensors of a call and the tables of
its layouts are on one device. dtypes, the same for all tensors of a call: float32 and bfloat16, on the CPU also
float64, on a GPU also float16; statistics and sums are kept in float32 (float64 for float64). Every op has a twin of
the same name in flexdit_ext.reference. Shapes and dtypes that do not fit raise ValueError naming the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from ._arguments import check_count, check_floats, check_number, check_timesteps, check_width
from ._core import empty_rows, execution, require_device, rows, workspace
from .layout import TokenLayout, row_map_slices
from .schedule import DensitySchedule

custom_op = torch.library.custom_op


def _check_layouts(**layouts: TokenLayout) -> None:
    for name, layout in layouts.items():
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"{name} is {type(layout).__name__}, must be a TokenLayout")
    first, *rest = layouts.items()
    for name, layout in rest:
        if layout.batch != first[1].batch:
            raise ValueError(f"{name} has {layout.batch} samples, {first[0]} has {first[1].batch}: they must agree")


def _statistics(x: Tensor) -> Tensor:
    return workspace(_C.row_statistics_workspace(x), x)


# Modulated layer norm


@custom_op("flexdit_ext::modulated_layer_norm", mutates_args=())
def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, table: Tensor, eps: float) -> Tensor:
    require_device("modulated_layer_norm", x=x, shift=shift, scale=scale, layout=table)
    x = rows(x)
    y = empty_rows(x, *x.shape)
    _C.modulated_layer_norm(x, rows(shift), rows(scale), table, eps, y, execution(x))
    return y


@_modulated_layer_norm.register_fake
def _(x, shift, scale, table, eps):
    return x.new_empty(x.shape)


@custom_op("flexdit_ext::modulated_layer_norm_backward", mutates_args=())
def _modulated_layer_norm_backward(
    x: Tensor, scale: Tensor, table: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = rows(x)
    grad_x, grad_shift, grad_scale = empty_rows(x, *x.shape), empty_rows(x, *scale.shape), empty_rows(x, *scale.shape)
    _C.modulated_layer_norm_backward(
        x, rows(scale), table, eps, rows(grad), grad_x, grad_shift, grad_scale, _statistics(x), execution(x)
    )
    return grad_x, grad_shift, grad_scale


@_modulated_layer_norm_backward.register_fake
def _(x, scale, table, eps, grad):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save_norm(ctx, inputs, output):
    x, _, scale, table, ctx.eps = inputs
    ctx.save_for_backward(x, scale, table)


def _norm_gradient(ctx, grad):
    x, scale, table = ctx.saved_tensors
    return *_modulated_layer_norm_backward(x, scale, table, ctx.eps, grad), None, None


_modulated_layer_norm.register_autograd(_norm_gradient, setup_context=_save_norm)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, layout: TokenLayout, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift with LN over C without affine. x [R, C]; shift, scale [B, C]. Returns [R, C].

    Source: adaLN of DiT, arXiv 2212.09748.
    """
    _check_layouts(layout=layout)
    width, samples = check_width("modulated_layer_norm", "x", x), layout.batch
    vectors = {"shift": (shift, (samples, width)), "scale": (scale, (samples, width))}
    check_floats("modulated_layer_norm", {"x": (x, (layout.rows, width)), **vectors}, layout=layout)
    return _modulated_layer_norm(x, shift, scale, layout.mapped, check_number("eps", eps, 0))


# Gated residual


@custom_op("flexdit_ext::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor, table: Tensor) -> Tensor:
    require_device("gated_residual", x=x, y=y, gate=gate, layout=table)
    x = rows(x)
    out = empty_rows(x, *x.shape)
    _C.gated_residual(x, rows(y), rows(gate), table, out, execution(x))
    return out


@_gated_residual.register_fake
def _(x, y, gate, table):
    return x.new_empty(x.shape)


@custom_op("flexdit_ext::gated_residual_backward", mutates_args=())
def _gated_residual_backward(y: Tensor, gate: Tensor, table: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    y = rows(y)
    grad_y, grad_gate = empty_rows(y, *y.shape), empty_rows(y, *gate.shape)
    _C.gated_residual_backward(y, rows(gate), table, rows(grad), grad_y, grad_gate, execution(y))
    return grad_y, grad_gate


@_gated_residual_backward.register_fake
def _(y, gate, table, grad):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save_residual(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _residual_gradient(ctx, grad):
    return grad, *_gated_residual_backward(*ctx.saved_tensors, grad), None


_gated_residual.register_autograd(_residual_gradient, setup_context=_save_residual)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, layout: TokenLayout) -> Tensor:
    """x + gate * y. x, y [R, C]; gate [B, C]. Returns [R, C]."""
    _check_layouts(layout=layout)
    width = check_width("gated_residual", "x", x)
    tokens = (layout.rows, width)
    shapes = {"x": (x, tokens), "y": (y, tokens), "gate": (gate, (layout.batch, width))}
    check_floats("gated_residual", shapes, layout=layout)
    return _gated_residual(x, y, gate, layout.mapped)


# Linear layers and the pooled mean, parts of pooled attention and recovery


@custom_op("flexdit_ext::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    require_device("linear", x=x, weight=weight, bias=bias)
    y = empty_rows(x, x.shape[0], weight.shape[0])
    _C.linear(x.contiguous(), weight.contiguous(), bias.contiguous(), y, execution(x))
    return y


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@custom_op("flexdit_ext::linear_backward", mutates_args=())
def _linear_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    grad_x, grad_weight = empty_rows(x, *x.shape), empty_rows(x, *weight.shape)
    grad_bias = empty_rows(x, weight.shape[0])
    scratch = workspace(_C.linear_backward_workspace(weight), x)
    _C.linear_backward(x, weight, grad.contiguous(), grad_x, grad_weight, grad_bias, scratch, execution(x))
    return grad_x, grad_weight, grad_bias


@_linear_backward.register_fake
def _(x, weight, grad):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save_linear(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _linear_gradient(ctx, grad):
    return _linear_backward(*ctx.saved_tensors, grad)


_linear.register_autograd(_linear_gradient, setup_context=_save_linear)


@custom_op("flexdit_ext::modulated_mean", mutates_args=())
def _modulated_mean(x: Tensor, shift: Tensor, scale: Tensor, table: Tensor, eps: float) -> Tensor:
    require_device("pooled_attention", x=x, shift=shift, scale=scale, layout=table)
    x = rows(x)
    mean, scratch = empty_rows(x, *shift.shape), workspace(_C.modulated_mean_workspace(x, table), x)
    _C.modulated_mean(x, rows(shift), rows(scale), table, eps, mean, scratch, execution(x))
    return mean


@_modulated_mean.register_fake
def _(x, shift, scale, table, eps):
    return shift.new_empty(shift.shape)


@custom_op("flexdit_ext::modulated_mean_backward", mutates_args=())
def _modulated_mean_backward(
    x: Tensor, scale: Tensor, table: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = rows(x)
    grad_x, grad_shift, grad_scale = empty_rows(x, *x.shape), empty_rows(x, *scale.shape), empty_rows(x, *scale.shape)
    scratch = workspace(_C.modulated_mean_workspace(x, table), x)
    _C.modulated_mean_backward(
        x, rows(scale), table, eps, rows(grad), grad_x, grad_shift, grad_scale, scratch, execution(x)
    )
    return grad_x, grad_shift, grad_scale


@_modulated_mean_backward.register_fake
def _(x, scale, table, eps, grad):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _mean_gradient(ctx, grad):
    x, scale, table = ctx.saved_tensors
    return *_modulated_mean_backward(x, scale, table, ctx.eps, grad), None, None


_modulated_mean.register_autograd(_mean_gradient, setup_context=_save_norm)


def pooled_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layout: TokenLayout,
    eps: float = 1e-6,
) -> Tensor:
    """W_o mean_n(W_v mod(x)_n + b_v) + b_o: attention with equal weights. x [R, C]; shift, scale [B, C];
    weights [C, C]; biases [C]. Returns [B, C], the vector that all tokens of a sample get.

    The mean is taken before W_v, with which it commutes. Source: arXiv 2412.06028 (Poolingformer).
    """
    _check_layouts(layout=layout)
    width = check_width("pooled_attention", "x", x)
    vector, square = (layout.batch, width), (width, width)
    shapes = {"x": (x, (layout.rows, width)), "shift": (shift, vector), "scale": (scale, vector)}
    shapes |= {"v_weight": (v_weight, square), "v_bias": (v_bias, (width,))}
    shapes |= {"proj_weight": (proj_weight, square), "proj_bias": (proj_bias, (width,))}
    check_floats("pooled_attention", shapes, layout=layout)
    mean = _modulated_mean(x, shift, scale, layout.mapped, check_number("eps", eps, 0))
    return _linear(_linear(mean, v_weight, v_bias), proj_weight, proj_bias)


# Sparse-dense token exchange


@custom_op("flexdit_ext::pool_tokens", mutates_args=())
def _pool_tokens(x: Tensor, position: Tensor | None, table: Tensor, sparse_table: Tensor, sparse_rows: int) -> Tensor:
    require_device("pool_tokens", x=x, position=position, layout=table, sparse_layout=sparse_table)
    out = empty_rows(x, sparse_rows, x.shape[1])
    _C.pool_tokens(rows(x), position, table, sparse_table, out, execution(x))
    return out


@_pool_tokens.register_fake
def _(x, position, table, sparse_table, sparse_rows):
    return x.new_empty(sparse_rows, x.shape[1])


@custom_op("flexdit_ext::pool_tokens_backward", mutates_args=())
def _pool_tokens_backward(table: Tensor, sparse_table: Tensor, grad: Tensor, dense_rows: int) -> Tensor:
    grad_x = empty_rows(grad, dense_rows, grad.shape[1])
    _C.pool_tokens_backward(table, sparse_table, rows(grad), grad_x, execution(grad))
    return grad_x


@_pool_tokens_backward.register_fake
def _(table, sparse_table, grad, dense_rows):
    return grad.new_empty(dense_rows, grad.shape[1])


def _save_pool(ctx, inputs, output):
    ctx.dense_rows = inputs[0].shape[0]
    ctx.save_for_backward(*inputs[2:4])


def _pool_gradient(ctx, grad):
    return _pool_tokens_backward(*ctx.saved_tensors, grad, ctx.dense_rows), None, None, None, None


_pool_tokens.register_autograd(_pool_gradient, setup_context=_save_pool)


def pool_tokens(x: Tensor, layout: TokenLayout, sparse_layout: TokenLayout) -> Tensor:
    """Adaptive average pooling from each sample's dense grid to its sparse grid, windows as PyTorch's
    AdaptiveAvgPool. x [R, C]. Returns [Rs, C]."""
    _check_layouts(layout=layout, sparse_layout=sparse_layout)
    tokens = (layout.rows, check_width("pool_tokens", "x", x))
    check_floats("pool_tokens", {"x": (x, tokens)}, layout=layout, sparse_layout=sparse_layout)
    return _pool_tokens(x, None, layout.mapped, sparse_layout.mapped, sparse_layout.rows)


def pool_tokens_with_position(
    x: Tensor, position: Tensor | None, layout: TokenLayout, sparse_layout: TokenLayout
) -> Tensor:
    """As pool_tokens, of x + position: the fixed table [N, C] of the dense grid, or None. Pooling is linear, so this
    adds the pooled table to the sparse tokens."""
    return _pool_tokens(x, position, layout.mapped, sparse_layout.mapped, sparse_layout.rows)


@custom_op("flexdit_ext::gather_sparse", mutates_args=())
def _gather_sparse(s: Tensor, x: Tensor, table: Tensor, sparse_table: Tensor) -> Tensor:
    require_device("recover_tokens", s=s, x=x, layout=table, sparse_layout=sparse_table)
    x = rows(x)
    out = empty_rows(x, *x.shape)
    _C.gather_sparse(rows(s), x, table, sparse_table, out, execution(x))
    return out


@_gather_sparse.register_fake
def _(s, x, table, sparse_table):
    return x.new_empty(x.shape)


@custom_op("flexdit_ext::gather_sparse_backward", mutates_args=())
def _gather_sparse_backward(table: Tensor, sparse_table: Tensor, grad: Tensor, sparse_rows: int) -> Tensor:
    grad_s = empty_rows(grad, sparse_rows, grad.shape[1])
    _C.gather_sparse_backward(table, sparse_table, rows(grad), grad_s, execution(grad))
    return grad_s


@_gather_sparse_backward.register_fake
def _(table, sparse_table, grad, sparse_rows):
    return grad.new_empty(sparse_rows, grad.shape[1])


def _save_gather(ctx, inputs, output):
    ctx.sparse_rows = inputs[0].shape[0]
    ctx.save_for_backward(*inputs[2:])


def _gather_gradient(ctx, grad):
    return _gather_sparse_backward(*ctx.saved_tensors, grad, ctx.sparse_rows), grad, None, None


_gather_sparse.register_autograd(_gather_gradient, setup_context=_save_gather)


def recover_tokens(
    s: Tensor,
    x: Tensor,
    sparse_weight: Tensor,
    sparse_bias: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    sparse_layout: TokenLayout,
    layout: TokenLayout,
) -> Tensor:
    """W_1 up(s) + b_1 + W_2 x + b_2, up being nearest-neighbour upsampling. s [Rs, C]; x [R, C]; weights [C, C];
    biases [C]. Returns [R, C].

    W_1 is applied to the sparse tokens, with which upsampling commutes. Source: arXiv 2412.06028 (dense token
    recovery).
    """
    _check_layouts(layout=layout, sparse_layout=sparse_layout)
    width = check_width("recover_tokens", "x", x)
    shapes = {"s": (s, (sparse_layout.rows, width)), "x": (x, (layout.rows, width))}
    shapes |= {"sparse_weight": (sparse_weight, (width, width)), "sparse_bias": (sparse_bias, (width,))}
    shapes |= {"dense_weight": (dense_weight, (width, width)), "dense_bias": (dense_bias, (width,))}
    check_floats("recover_tokens", shapes, layout=layout, sparse_layout=sparse_layout)
    sparse = _linear(s, sparse_weight, sparse_bias)
    dense = _linear(x, dense_weight, dense_bias)
    return _gather_sparse(sparse, dense, layout.mapped, sparse_layout.mapped)


# Timestep-dependent token selection


@lru_cache(maxsize=64)
def _core_schedule(begins: tuple[int, ...], sides: tuple[int, ...], num_timesteps: int):
    grids = [sides[i : i + 3] for i in range(0, len(sides), 3)]
    return _C.DensitySchedule(grids, list(begins), num_timesteps)


@custom_op("flexdit_ext::select_tokens", mutates_args=())
def _select_tokens(t: Tensor, begins: Sequence[int], sides: Sequence[int], num_timesteps: int, slices: int) -> Tensor:
    """slices: of the row map."""
    require_device("select_tokens", t=t)
    mapped = torch.empty(1 + slices, t.shape[0] + 1, 4, dtype=torch.int32, device=t.device)
    schedule = _core_schedule(tuple(begins), tuple(sides), num_timesteps)
    _C.select_tokens(t.to(torch.float64).contiguous(), schedule, mapped, execution(t))
    return mapped


@_select_tokens.register_fake
def _(t, begins, sides, num_timesteps, slices):
    return t.new_empty(1 + slices, t.shape[0] + 1, 4, dtype=torch.int32)


def select_tokens(t: Tensor, schedule: DensitySchedule) -> TokenLayout:
    """The layout of sparse tokens that `schedule` gives to timesteps t [B] (integers, or fractions between them), on
    t's device.

    Raises ValueError for a t outside [0, schedule.num_timesteps] or NaN. On a GPU nothing waits for the values of t:
    one outside takes the first or the last segment, and buffers are sized for the largest grid, as under
    torch.compile.
    """
    check_timesteps("t", t)
    if not isinstance(schedule, DensitySchedule):
        raise TypeError(f"schedule is {type(schedule).__name__}, must be a DensitySchedule")
    sides = [side for grid in schedule.grids for side in (1, *grid)[-3:]]
    grids = list(zip(sides[::3], sides[1::3], sides[2::3], strict=True))
    largest, widest = max(f * h * w for f, h, w in grids), max(h * w for _, h, w in grids)
    slices = row_map_slices(largest)
    mapped = _select_tokens(t, list(schedule.begins), sides, schedule.num_timesteps, slices)
    if t.is_cuda or torch.compiler.is_compiling():
        return TokenLayout._of(mapped, t.shape[0] * largest, t.shape[0] * widest, max(sides[::3]))
    rows = int(mapped[0, -1, 0])
    return TokenLayout._of(mapped, rows, rows, None)


# Attention


@custom_op("flexdit_ext::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    table_q: Tensor,
    table_k: Tensor,
    across_frames: bool,
    max_positions: int,
) -> tuple[Tensor, Tensor]:
    require_device("attention", q=q, k=k, v=v, layout_q=table_q, layout_k=table_k)
    out = empty_rows(q, *q.shape)
    lse = torch.empty(q.shape[0], num_heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    how = num_heads, table_q, table_k, across_frames, max_positions
    _C.attention(rows(q), rows(k), rows(v), *how, out, lse, execution(q))
    return out, lse


@_attention.register_fake
def _(q, k, v, num_heads, table_q, table_k, across_frames, max_positions):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], num_heads, dtype=torch.promote_types(q.dtype, torch.float32))


@custom_op("flexdit_ext::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    table_q: Tensor,
    table_k: Tensor,
    across_frames: bool,
    max_positions: int,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [empty_rows(x, *x.shape) for x in (q, k, v)]
    how = num_heads, table_q, table_k, across_frames, max_positions
    _C.attention_backward(rows(q), rows(k), rows(v), *how, out, lse, rows(grad), *grads, execution(q))
    return tuple(grads)


@_attention_backward.register_fake
def _(q, k, v, num_heads, table_q, table_k, across_frames, max_positions, out, lse, grad):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_attention(ctx, inputs, output):
    q, k, v, ctx.num_heads, table_q, table_k, ctx.across_frames, ctx.max_positions = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, table_q, table_k, *output)


def _attention_gradient(ctx, grad, _):
    q, k, v, table_q, table_k, out, lse = ctx.saved_tensors
    how = ctx.num_heads, table_q, table_k, ctx.across_frames, ctx.max_positions
    return *_attention_backward(q, k, v, *how, out, lse, grad), None, None, None, None, None


_attention.register_autograd(_attention_gradient, setup_context=_save_attention)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    layout_q: TokenLayout,
    layout_k: TokenLayout | None = None,
    across_frames: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sample and head, d = C / num_heads. q [Rq, C]; k, v [Rk, C]; layout_k
    defaults to layout_q (self-attention). q, k and v may be columns of a wider tensor. Returns [Rq, C].

    across_frames: self-attention among the tokens at one position of a sample's frames instead, as in Latte
    (arXiv 2401.03048). Within the frames: layout_q.frames().
    """
    if across_frames and layout_k is not None and layout_k is not layout_q:
        raise ValueError("across_frames is True, then layout_k must be None or layout_q: it is self-attention")
    layout_k = layout_q if layout_k is None else layout_k
    _check_layouts(layout_q=layout_q, layout_k=layout_k)
    width = check_width("attention", "q", q)
    keys = (layout_k.rows, width)
    shapes = {"q": (q, (layout_q.rows, width)), "k": (k, keys), "v": (v, keys)}
    check_floats("attention", shapes, layout_q=layout_q, layout_k=layout_k)
    check_count("num_heads", num_heads, 1, width)
    if width % num_heads:
        raise ValueError(f"num_heads is {num_heads}, must divide the {width} columns of q")
    how = num_heads, layout_q.mapped, layout_k.mapped, across_frames, layout_q.positions
    return _attention(q, k, v, *how)[0]
