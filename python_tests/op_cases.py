"""The public ops with inputs for them, and how far each may be from the op of the same name in reference.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from devices import dtypes_of
from helpers import randn, relative_error

from flexdit_ext import TokenLayout, ops, reference


class Case(NamedTuple):
    grids: tuple
    sparse_grids: tuple
    hidden: int
    heads: int

    def layouts(self, device="cpu") -> tuple[TokenLayout, TokenLayout]:
        return TokenLayout(self.grids, device), TokenLayout(self.sparse_grids, device)


# Head sizes 8 to 128 and odd ones; vectors that end inside a register; from one token to more than a cache's worth.
CASES = {
    "one token, head size 72": Case(((1, 1),), ((1, 1),), 72, 1),
    "one sample, head size 24": Case(((4, 4),), ((2, 2),), 48, 2),
    "odd, overlapping, head size 25": Case(((7, 5), (7, 5)), ((3, 4), (5, 2)), 100, 4),
    "odd, overlapping, head size 40": Case(((7, 5), (7, 5)), ((3, 4), (5, 2)), 80, 2),
    "same grid, head size 7": Case(((4, 3),), ((4, 3),), 21, 3),
    "ragged, head size 64": Case(((16, 16), (5, 9), (1, 6)), ((10, 7), (5, 1), (1, 4)), 64, 1),
    "video, head size 9": Case(((4, 6, 6), (3, 5, 4)), ((2, 3, 4), (3, 2, 3)), 72, 8),
    "images and video, head size 3": Case(((3, 4), (2, 3, 3)), ((2, 2), (1, 2, 2)), 48, 16),
    "images and video, head size 16": Case(((3, 4), (2, 3, 3)), ((2, 2), (1, 2, 2)), 48, 3),
    "clips, head size 8": Case(((20, 2, 3), (1, 2, 2), (33, 1, 1)), ((3, 2, 2), (1, 2, 2), (5, 1, 1)), 16, 2),
    "1030 tokens": Case(((103, 10), (1, 1)), ((9, 2), (1, 1)), 144, 2),
    "4096 tokens, head size 8": Case(((64, 64),), ((5, 6),), 8, 1),
    "hidden size 1152": Case(((3, 4), (2, 2)), ((2, 3), (2, 1)), 1152, 16),
    "head size 100": Case(((5, 5),), ((3, 3),), 100, 1),
    "head size 128": Case(((5, 5), (13, 13)), ((3, 3), (6, 7)), 128, 1),
}


class Op(NamedTuple):
    """An op's tensors by their shapes (R dense rows, S sparse rows, B samples, C channels) and what follows them, from
    (dense, sparse, heads); dense and sparse are TokenLayouts for the op and lists of grids for its twin."""

    name: str
    shapes: tuple[str, ...]
    rest: Callable


PROJECTIONS = ("CC", "C", "CC", "C")
OPS = {
    "modulated_layer_norm": Op("modulated_layer_norm", ("RC", "BC", "BC"), lambda dense, sparse, heads: (dense,)),
    "gated_residual": Op("gated_residual", ("RC", "RC", "BC"), lambda dense, sparse, heads: (dense,)),
    "pooled_attention": Op("pooled_attention", ("RC", "BC", "BC", *PROJECTIONS), lambda dense, sparse, heads: (dense,)),
    "pool_tokens": Op("pool_tokens", ("RC",), lambda dense, sparse, heads: (dense, sparse)),
    "recover_tokens": Op("recover_tokens", ("SC", "RC", *PROJECTIONS), lambda dense, sparse, heads: (sparse, dense)),
    "attention": Op("attention", ("RC", "RC", "RC"), lambda dense, sparse, heads: (heads, dense, dense)),
    "attention across frames": Op("attention", ("RC", "RC", "RC"), lambda d, s, heads: (heads, d, d, True)),
    "attention to dense": Op("attention", ("SC", "RC", "RC"), lambda dense, sparse, heads: (heads, sparse, dense)),
    "attention to sparse": Op("attention", ("RC", "SC", "SC"), lambda dense, sparse, heads: (heads, dense, sparse)),
}

# Bounds of the relative error (largest difference over largest value, of the output and each gradient), and beside them
# the worst measured over all cases and strides: 2-core AMD machine with AVX-512, torch 2.13, 2026-11-25. The CUDA
# kernels were measured on the emulator, which rounds as a GPU does but for the order of cuBLASLt's sums and for exp2.
BOUNDS = {  # on the CPU float64, float32, bfloat16; on CUDA float32, bfloat16, float16
    "modulated_layer_norm": (1e-13, 8e-6, 8e-3, 2e-6, 8e-3, 1e-3),  # 3.4e-15, 2.4e-6, 3.5e-3; 2.4e-7, 3.5e-3, 4.3e-4
    "gated_residual": (1e-13, 3e-6, 8e-3, 2e-6, 8e-3, 1e-3),  # 2.2e-15, 1.0e-6, 3.7e-3; 4.7e-7, 3.7e-3, 4.1e-4
    "pooled_attention": (1e-13, 5e-6, 1.5e-2, 5e-6, 1.5e-2, 2e-3),  # 3.4e-15, 1.3e-6, 6.1e-3; 1.6e-6, 6.1e-3, 8.5e-4
    "pool_tokens": (1e-14, 5e-7, 8e-3, 5e-7, 8e-3, 1e-3),  # 2.1e-16, 1.0e-7, 3.7e-3; 1.4e-7, 3.7e-3, 4.5e-4
    "recover_tokens": (1e-13, 5e-6, 1.5e-2, 5e-6, 1.5e-2, 2e-3),  # 3.4e-15, 1.6e-6, 4.8e-3; 1.8e-6, 4.8e-3, 5.6e-4
    "attention": (1e-13, 5e-6, 1e-2, 6e-6, 1.2e-2, 1.5e-3),  # 1.9e-15, 1.4e-6, 3.8e-3; 2.0e-6, 5.5e-3, 5.6e-4
    "attention across frames": (1e-13, 5e-6, 1e-2, 6e-6, 1.2e-2, 1.5e-3),
    "attention to dense": (1e-13, 5e-6, 1e-2, 5e-6, 1.2e-2, 1.5e-3),  # 1.6e-15, 1.6e-6, 3.7e-3; 9.1e-7, 5.0e-3, 6.0e-4
    "attention to sparse": (1e-13, 6e-6, 1e-2, 5e-6, 1.2e-2, 1.5e-3),  # 2.4e-15, 2.1e-6, 4.6e-3; 1.6e-6, 4.7e-3, 7.5e-4
}


def bound(key: str, backend: str, dtype: torch.dtype) -> float:
    on_cpu, on_cuda = BOUNDS[key][:3], BOUNDS[key][3:]
    return (on_cpu if backend == "cpu" else on_cuda)[dtypes_of(backend).index(dtype)]


def takes(backend: str, key: str, case: Case) -> bool:
    """CUDA's attention takes head sizes that are multiples of 8 up to 128; all else takes what the CPU takes. Attention
    among a thousand tokens takes the emulator half a minute."""
    if backend == "cpu" or not key.startswith("attention"):
        return True
    head_size, tokens = case.hidden // case.heads, max(reference.token_counts(case.grids))
    too_slow = backend == "emulated" and key == "attention" and tokens > 1000
    return head_size % 8 == 0 and head_size <= 128 and not too_slow


def odd_case(backend: str, key: str) -> Case:
    """A small ragged batch whose windows overlap, with as odd a head size as the device takes."""
    first = CASES["odd, overlapping, head size 25"]
    return first if takes(backend, key, first) else CASES["odd, overlapping, head size 40"]


def make_tensors(
    op: Op, case: Case, dtype: torch.dtype, offset: float = 0.0, factor: float = 1.0, device="cpu"
) -> list[torch.Tensor]:
    sizes = {
        "R": sum(reference.token_counts(case.grids)),
        "S": sum(reference.token_counts(case.sparse_grids)),
        "B": len(case.grids),
        "C": case.hidden,
    }
    tensors = []
    for i, shape in enumerate(op.shapes):
        x = randn(*(sizes[letter] for letter in shape), seed=i)
        # Weights keep the size of what they are applied to.
        x = x * case.hidden**-0.5 if shape == "CC" else x * factor + offset if shape in ("RC", "SC") else x
        tensors.append(x.to(dtype).to(device))
    return tensors


def evaluate(function, tensors, rest, grad):
    """Output and gradients of all tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, *rest)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad(out))]


def output_gradient(out, dtype):
    return randn(*out.shape, seed=99).to(dtype)


@functools.lru_cache(maxsize=64)
def expected(key: str, case: Case, dtype: torch.dtype, **values) -> list[torch.Tensor]:
    """The reference's output and gradients in float64, of tensors rounded to dtype."""
    op = OPS[key]
    tensors = [x.double() for x in make_tensors(op, case, dtype, **values)]
    rest = op.rest(case.grids, case.sparse_grids, case.heads)
    return evaluate(getattr(reference, op.name), tensors, rest, lambda out: output_gradient(out, dtype).double())


def compare(key: str, case: Case, dtype: torch.dtype, device, place=lambda x: x, **values) -> float:
    """Worst relative error of the output and of every gradient."""
    op = OPS[key]
    tensors = [place(x) for x in make_tensors(op, case, dtype, device=device, **values)]
    rest = op.rest(*case.layouts(device), case.heads)
    actual = evaluate(
        getattr(ops, op.name), tensors, rest, lambda out: place(output_gradient(out, dtype).to(out.device))
    )
    assert all(x.dtype == dtype and x.device.type == torch.device(device).type for x in actual)
    pairs = zip(actual, expected(key, case, dtype, **values), strict=True)
    return max(relative_error(a.cpu().double(), b) for a, b in pairs)
