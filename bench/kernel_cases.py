"""What bench/kernels.py measures: every op with its sizes, the bytes and operations it needs at least, and its rivals.

Bytes count each input once and each output once; a backward pass reads what was saved and the incoming gradient and
writes the gradients. Operations are multiplications and additions of the matrix products. Rivals compute the same on
[B, N, C] with the functions of reference.py, which do not loop over the samples as the twins on packed rows do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexdit_ext import DensitySchedule, TokenLayout, ops, reference

ITEM = 2  # bytes of a bfloat16
LARGE = 256_000_000  # tensors from here on must reach the share of the copy bandwidth that was asked
COPY_SHARE = 0.8
ATTENTION_RATIO = 1.2

Function = Callable[..., Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One op at one size. `inputs` names the tensors of `ours` and of every rival, in order."""

    op: str
    size: str
    inputs: dict[str, Shape]
    out: Shape
    ours: Callable[[str], Function]  # of the device, for the layouts
    rivals: dict[str, Function] = field(default_factory=dict)
    compiled: Function | None = None  # the rival that torch.compile gets
    saved: Sequence[str] = ()  # what backward reads besides the gradient; "out" is the output
    grads: Sequence[str] = ()  # what backward writes; the rest passes the gradient on or needs none
    differentiable: bool = True
    flops: int = 0  # of forward
    backward_flops: int = 0
    memory_bound: bool = True
    target: float | None = None  # share of the copy bandwidth (large tensors) or ratio to the fastest rival
    make: Callable[[str, torch.dtype], list[Tensor]] | None = None

    def bytes(self, backward: bool = False) -> int:
        def size(names: Sequence[str]) -> int:
            return sum(math.prod((self.inputs | {"out": self.out})[name]) for name in names)

        if backward:
            return ITEM * (size(self.saved) + size(["out"]) + size(self.grads))
        return ITEM * (size(list(self.inputs)) + size(["out"]))

    @property
    def largest(self) -> int:
        return ITEM * max(math.prod(shape) for shape in (*self.inputs.values(), self.out))

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Random tensors; weights are scaled so that outputs stay near 1."""
        if self.make:
            return self.make(device, dtype)
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for name, shape in self.inputs.items():
            scale = shape[-1] ** -0.5 if name.endswith("weight") else 1.0
            made.append((torch.randn(shape, device=device, generator=generator) * scale).to(dtype))
        return made


def layouts(device: str, batch: int, *grids: tuple[int, ...]) -> list[TokenLayout]:
    return [TokenLayout.uniform(batch, grid, device) for grid in grids]


def _by_sample(x: Tensor, batch: int) -> Tensor:
    """Packed rows [B * N, C] of equal grids as [B, N, C]."""
    return x.unflatten(0, (batch, -1))


@cache
def nearest(sparse_grid: tuple[int, ...], grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once, so that the rivals are not charged for it."""
    return reference.nearest_index(sparse_grid, grid, device)


def size_name(batch: int, grid: tuple[int, ...], hidden: int) -> str:
    return f"{batch} x {'x'.join(map(str, grid))} x {hidden}"


# Memory-bound ops


def norm_case(batch: int, grid, hidden: int) -> Case:
    rows, vector = (batch * math.prod(grid), hidden), (batch, hidden)

    def rival(x, shift, scale):
        out = reference._modulated_layer_norm(_by_sample(x, batch), shift[:, None], scale[:, None])
        return out.flatten(0, 1)

    def ours(device):
        return partial(ops.modulated_layer_norm, layout=layouts(device, batch, grid)[0])

    return Case(
        "modulated_layer_norm",
        size_name(batch, grid, hidden),
        {"x": rows, "shift": vector, "scale": vector},
        rows,
        ours,
        {"reference, eager": rival},
        rival,
        saved=("x", "scale"),
        grads=("x", "shift", "scale"),
        target=COPY_SHARE,
    )


def residual_case(batch: int, grid, hidden: int) -> Case:
    rows = (batch * math.prod(grid), hidden)

    def rival(x, y, gate):
        return (_by_sample(x, batch) + gate[:, None] * _by_sample(y, batch)).flatten(0, 1)

    def ours(device):
        return partial(ops.gated_residual, layout=layouts(device, batch, grid)[0])

    return Case(
        "gated_residual",
        size_name(batch, grid, hidden),
        {"x": rows, "y": rows, "gate": (batch, hidden)},
        rows,
        ours,
        {"reference, eager": rival},
        rival,
        saved=("y", "gate"),
        grads=("y", "gate"),  # x's gradient is the incoming one
        target=COPY_SHARE,
    )


def mean_case(batch: int, grid, hidden: int) -> Case:
    """The kernel of pooled attention: the mean of the modulated tokens."""
    vector = (batch, hidden)

    def rival(x, shift, scale):
        return reference._modulated_layer_norm(_by_sample(x, batch), shift[:, None], scale[:, None]).mean(1)

    def ours(device):
        table = layouts(device, batch, grid)[0].mapped
        return lambda x, shift, scale: ops._modulated_mean(x, shift, scale, table, 1e-6)

    return Case(
        "modulated mean (pooled_attention)",
        size_name(batch, grid, hidden),
        {"x": (batch * math.prod(grid), hidden), "shift": vector, "scale": vector},
        vector,
        ours,
        {"reference, eager": rival},
        rival,
        saved=("x", "scale"),
        grads=("x", "shift", "scale"),
        target=COPY_SHARE,
    )


def pooled_case(batch: int, grid, hidden: int) -> Case:
    vector, square = (batch, hidden), (hidden, hidden)

    def rival(x, shift, scale, v_weight, v_bias, proj_weight, proj_bias):
        modulated = reference._modulated_layer_norm(_by_sample(x, batch), shift[:, None], scale[:, None])
        return F.linear(F.linear(modulated, v_weight, v_bias).mean(1), proj_weight, proj_bias)

    def ours(device):
        return partial(ops.pooled_attention, layout=layouts(device, batch, grid)[0])

    names = ("x", "shift", "scale", "v_weight", "v_bias", "proj_weight", "proj_bias")
    shapes = ((batch * math.prod(grid), hidden), vector, vector, square, (hidden,), square, (hidden,))
    return Case(
        "pooled_attention",
        size_name(batch, grid, hidden),
        dict(zip(names, shapes)),
        vector,
        ours,
        {"reference, eager": rival},
        rival,
        saved=("x", "scale", "v_weight", "proj_weight"),
        grads=names,
    )


def pool_case(batch: int, grid, sparse_grid, hidden: int) -> Case:
    rows, sparse_rows = ((batch * math.prod(g), hidden) for g in (grid, sparse_grid))

    def rival(x):
        return reference.adaptive_pool(_by_sample(x, batch), grid, sparse_grid).flatten(0, 1)

    def ours(device):
        dense, sparse = layouts(device, batch, grid, sparse_grid)
        return partial(ops.pool_tokens, layout=dense, sparse_layout=sparse)

    return Case(
        f"pool_tokens to {sparse_grid[0]}x{sparse_grid[1]}",
        size_name(batch, grid, hidden),
        {"x": rows},
        sparse_rows,
        ours,
        {"reference, eager": rival},
        rival,
        grads=("x",),
        target=COPY_SHARE,
    )


def gather_case(batch: int, grid, sparse_grid, hidden: int) -> Case:
    """The kernel of recover_tokens besides its linear layers: x + the nearest row of s."""
    rows, sparse_rows = ((batch * math.prod(g), hidden) for g in (grid, sparse_grid))

    def ours(device):
        dense, sparse = layouts(device, batch, grid, sparse_grid)
        return lambda s, x: ops._gather_sparse(s, x, dense.mapped, sparse.mapped)

    def rival(s, x):
        index = nearest(sparse_grid, grid, s.device)
        return (_by_sample(s, batch).index_select(1, index) + _by_sample(x, batch)).flatten(0, 1)

    return Case(
        f"gather from {sparse_grid[0]}x{sparse_grid[1]} (recover_tokens)",
        size_name(batch, grid, hidden),
        {"s": sparse_rows, "x": rows},
        rows,
        ours,
        {"reference, eager": rival},
        rival,
        grads=("s",),  # x's gradient is the incoming one
        target=COPY_SHARE,
    )


def select_in_torch(t: Tensor, begins: Tensor, sides: Tensor) -> Tensor:
    """select_tokens with torch's functions, on t's device: the layout's table, int32 [B + 1, 4]."""
    chosen = sides[torch.bucketize(t, begins, right=True) - 1]  # [B, 3]
    ends = chosen.prod(1).cumsum(0)
    table = t.new_zeros(len(t) + 1, 4, dtype=torch.int32)
    table[1:, 0], table[:-1, 1:] = ends, chosen
    return table


def select_case(batch: int) -> Case:
    schedule = DensitySchedule()

    def ours(device):
        return lambda t: ops.select_tokens(t, schedule).table

    def looped(t):
        grids = reference.select_tokens(t, schedule.begins, schedule.grids)
        return TokenLayout(grids, t.device).table

    @cache
    def tables(device):
        sides = [(1, *grid) for grid in schedule.grids]
        return torch.tensor(schedule.begins, device=device), torch.tensor(sides, device=device)

    def on_device(t):
        return select_in_torch(t, *tables(t.device))

    def make(device, dtype):
        return [torch.randint(0, 1000, (batch,), device=device, generator=torch.Generator(device).manual_seed(0))]

    return Case(
        "select_tokens",
        f"{batch} timesteps",
        {"t": (batch,)},
        (batch + 1, 4),
        ours,
        {"reference, eager": looped, "torch's functions, eager": on_device},
        on_device,
        differentiable=False,
        make=make,
    )


# Compute-bound ops


def recover_case(batch: int, grid, sparse_grid, hidden: int) -> Case:
    rows, sparse_rows = ((batch * math.prod(g), hidden) for g in (grid, sparse_grid))
    square, vector = (hidden, hidden), (hidden,)

    def rival(s, x, sparse_weight, sparse_bias, dense_weight, dense_bias):
        index = nearest(sparse_grid, grid, s.device)
        gathered = _by_sample(s, batch).index_select(1, index)
        dense = F.linear(_by_sample(x, batch), dense_weight, dense_bias)
        return (F.linear(gathered, sparse_weight, sparse_bias) + dense).flatten(0, 1)

    def ours(device):
        dense, sparse = layouts(device, batch, grid, sparse_grid)
        return partial(ops.recover_tokens, sparse_layout=sparse, layout=dense)

    names = ("s", "x", "sparse_weight", "sparse_bias", "dense_weight", "dense_bias")
    flops = 2 * (rows[0] + sparse_rows[0]) * hidden**2
    return Case(
        f"recover_tokens from {sparse_grid[0]}x{sparse_grid[1]}",
        size_name(batch, grid, hidden),
        dict(zip(names, (sparse_rows, rows, square, vector, square, vector))),
        rows,
        ours,
        {"reference, eager": rival},
        rival,
        saved=("s", "x", "sparse_weight", "dense_weight"),
        grads=names,
        flops=flops,
        backward_flops=2 * flops,
        memory_bound=False,
    )


def linear_case(rows: int, inner: int, outer: int) -> Case:
    flops = 2 * rows * inner * outer
    return Case(
        "linear",
        f"{rows} x {inner} to {outer}",
        {"x": (rows, inner), "weight": (outer, inner), "bias": (outer,)},
        (rows, outer),
        lambda device: ops._linear,
        {"F.linear": F.linear},
        F.linear,
        saved=("x", "weight"),
        grads=("x", "weight", "bias"),
        flops=flops,
        backward_flops=2 * flops,
        memory_bound=False,
    )


SDPA = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}


def _sdpa(batch: int, heads: int, backend: SDPBackend | None) -> Function:
    def run(q, k, v):
        q, k, v = (_by_sample(x, batch).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel([backend]):
                out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return run


def attention_case(batch: int, heads: int, head_size: int, grid_q, grid_k, target: float | None = None) -> Case:
    hidden = heads * head_size
    queries, keys = (batch * math.prod(grid) for grid in (grid_q, grid_k))

    def ours(device):
        layout_q, layout_k = layouts(device, batch, grid_q, grid_k)
        return lambda q, k, v: ops.attention(q, k, v, heads, layout_q, layout_k)

    flops = 4 * batch * hidden * math.prod(grid_q) * math.prod(grid_k)
    default = _sdpa(batch, heads, None)
    return Case(
        f"attention, head size {head_size}",
        f"{batch} x {math.prod(grid_q)} queries, {math.prod(grid_k)} keys",
        {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)},
        (queries, hidden),
        ours,
        {name: _sdpa(batch, heads, backend) for name, backend in SDPA.items()},
        default,
        saved=("q", "k", "v", "out"),
        grads=("q", "k", "v"),
        flops=flops,
        backward_flops=flops * 5 // 2,  # scores once more, and four products for the gradients
        memory_bound=False,
        target=target,
    )


def attention_cases(batch: int = 32, heads: int = 16) -> list[Case]:
    """Sizes of XL/2 at 256 and 512; the targets are for head size 72."""
    asked = partial(attention_case, batch, heads, target=ATTENTION_RATIO)
    case = partial(attention_case, batch, heads)
    small, medium, large = (8, 8), (16, 16), (32, 32)
    cases = [asked(72, medium, medium), asked(72, large, large), asked(72, small, medium), asked(72, medium, small)]
    cases += [case(64, medium, medium), case(64, large, large), case(64, small, medium), case(64, medium, small)]
    for side in (6, 12, 16, 20):
        cases += [case(72, (side, side), large), case(72, large, (side, side))]
    return cases


def memory_cases(batch: int, hidden: int = 1152) -> list[Case]:
    dense, sparse = (16, 16), (8, 8)
    return [
        norm_case(batch, dense, hidden),
        residual_case(batch, dense, hidden),
        mean_case(batch, dense, hidden),
        pool_case(batch, dense, sparse, hidden),
        gather_case(batch, dense, sparse, hidden),
        pooled_case(batch, dense, hidden),
    ]


def all_cases() -> list[Case]:
    """Most important first: what has a target, then what XL/2 runs at batch 32, then the small sizes."""
    hidden = 1152
    # 512 x 256 tokens of 1152 are 302 MB; the sparse tokens' own tensors are a quarter of the dense ones'.
    cases = [*memory_cases(512), *attention_cases()[:4], *memory_cases(32), *attention_cases()[4:]]
    for rows in (32 * 256, 32 * 64, 2 * 256, 2 * 64):
        for inner, outer in ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
            cases.append(linear_case(rows, inner, outer))
    cases += [linear_case(32, hidden, 6 * hidden), linear_case(2, hidden, 6 * hidden)]  # modulations
    cases += [recover_case(batch, (16, 16), (8, 8), hidden) for batch in (32, 512, 2)]
    cases += [select_case(32), select_case(1024), *memory_cases(2)]
    return cases


def smoke_cases() -> list[Case]:
    """Every kind of case at tiny sizes."""
    dense, sparse, hidden = (4, 4), (2, 2), 32
    return [
        *(case(2, dense, hidden) for case in (norm_case, residual_case, mean_case, pooled_case)),
        *(case(2, dense, sparse, hidden) for case in (pool_case, gather_case, recover_case)),
        attention_case(2, 2, 16, dense, sparse, target=ATTENTION_RATIO),
        linear_case(6, hidden, 2 * hidden),
        select_case(3),
    ]
