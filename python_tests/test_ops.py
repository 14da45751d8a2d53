"""flexdit_ext.ops, forward and backward, against the ops of the same names in reference.py, evaluated in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import randn, random_model, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from flexdit_ext import DensitySchedule, TokenLayout, ops, reference


class Case(NamedTuple):
    grids: list
    sparse_grids: list
    hidden: int
    heads: int


# Head sizes 24, 64, 72 and odd ones; vectors that end inside a register; from one token to more than a cache's worth.
CASES = {
    "one token, head size 72": Case([(1, 1)], [(1, 1)], 72, 1),
    "one sample, head size 24": Case([(4, 4)], [(2, 2)], 48, 2),
    "odd, overlapping, head size 25": Case([(7, 5), (7, 5)], [(3, 4), (5, 2)], 100, 4),
    "same grid, head size 7": Case([(4, 3)], [(4, 3)], 21, 3),
    "ragged, head size 64": Case([(16, 16), (5, 9), (1, 6)], [(10, 7), (5, 1), (1, 4)], 64, 1),
    "video, head size 9": Case([(4, 6, 6), (3, 5, 4)], [(2, 3, 4), (3, 2, 3)], 72, 8),
    "images and video, head size 3": Case([(3, 4), (2, 3, 3)], [(2, 2), (1, 2, 2)], 48, 16),
    "1030 tokens": Case([(103, 10), (1, 1)], [(9, 2), (1, 1)], 144, 2),
    "hidden size 1152": Case([(3, 4), (2, 2)], [(2, 3), (2, 1)], 1152, 16),
    "head size 100": Case([(5, 5)], [(3, 3)], 100, 1),
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
    "attention to dense": Op("attention", ("SC", "RC", "RC"), lambda dense, sparse, heads: (heads, sparse, dense)),
    "attention to sparse": Op("attention", ("RC", "SC", "SC"), lambda dense, sparse, heads: (heads, dense, sparse)),
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Bounds of the relative error (largest difference over largest value, of the output and each gradient), and beside them
# the worst measured over all cases and strides: 2-core AMD machine with AVX-512, torch 2.13, 2026-11-22.
BOUNDS = {  # float64, float32, bfloat16
    "modulated_layer_norm": (1e-13, 3e-6, 8e-3),  # 2.2e-15, 9.4e-7, 3.5e-3
    "gated_residual": (1e-13, 3e-6, 8e-3),  # 1.3e-15, 7.1e-7, 3.7e-3
    "pooled_attention": (1e-13, 5e-6, 1.5e-2),  # 3.4e-15, 1.3e-6, 6.1e-3
    "pool_tokens": (1e-14, 5e-7, 8e-3),  # 2.1e-16, 1.0e-7, 3.7e-3
    "recover_tokens": (1e-13, 5e-6, 1.5e-2),  # 2.9e-15, 1.6e-6, 5.8e-3
    "attention": (1e-13, 5e-6, 1e-2),  # 1.9e-15, 7.0e-7, 3.8e-3
    "attention to dense": (1e-13, 5e-6, 1e-2),  # 1.6e-15, 1.6e-6, 3.7e-3
    "attention to sparse": (1e-13, 5e-6, 1e-2),  # 1.6e-15, 1.4e-6, 4.2e-3
}

memory_formats = {
    "packed": lambda x: x,
    "columns of a wider tensor": lambda x: torch.cat([x * 3, x, x - 1], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second row": lambda x: torch.stack([x, x + 9], dim=1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, x + 9], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
}


def make_tensors(
    op: Op, case: Case, dtype: torch.dtype, offset: float = 0.0, factor: float = 1.0
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
        tensors.append(x.to(dtype))
    return tensors


def evaluate(function, tensors, rest, grad):
    """Output and gradients of all tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, *rest)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad(out))]


def compare(key: str, case: Case, dtype: torch.dtype, place=lambda x: x, **values) -> float:
    """Worst relative error of the output and of every gradient."""
    op = OPS[key]
    tensors = make_tensors(op, case, dtype, **values)

    def grad(out):
        return place(randn(*out.shape, seed=99).to(dtype))

    def grad64(out):
        return grad(out).double()

    layouts = TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads
    actual = evaluate(getattr(ops, op.name), [place(x) for x in tensors], op.rest(*layouts), grad)
    assert all(x.dtype == dtype for x in actual)
    rest = op.rest(case.grids, case.sparse_grids, case.heads)
    expected = evaluate(getattr(reference, op.name), [x.double() for x in tensors], rest, grad64)
    return max(relative_error(a.double(), b) for a, b in zip(actual, expected, strict=True))


def bound(key: str, dtype: torch.dtype) -> float:
    return BOUNDS[key][DTYPES.index(dtype)]


each_op = pytest.mark.parametrize("key", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@each_dtype
@each_op
def test_equals_reference(key, dtype, case):
    assert compare(key, case, dtype) <= bound(key, dtype)


@pytest.mark.parametrize("place", memory_formats.values(), ids=memory_formats.keys())
@each_dtype
@each_op
def test_strided_tensors(key, dtype, place):
    """Slices of larger buffers, gradients of the output among them."""
    assert compare(key, CASES["odd, overlapping, head size 25"], dtype, place) <= bound(key, dtype)


@each_dtype
def test_layer_norm_of_an_offset(dtype):
    """Rows of mean 1000: the variance must not drown in the mean's square."""
    for key in ("modulated_layer_norm", "pooled_attention"):
        for case in (CASES["hidden size 1152"], CASES["ragged, head size 64"], CASES["same grid, head size 7"]):
            # Worst 1.9e-13, 1.1e-4 (F.layer_norm in float32: 7.5e-5), 6.0e-3.
            limit = dict(zip(DTYPES, (1e-12, 3e-4, 1.5e-2), strict=True))[dtype]
            assert compare(key, case, dtype, offset=1e3) <= limit


@each_dtype
def test_softmax_of_large_scores(dtype):
    """Scores of thousands, where exp without the maximum overflows; one float32 score is off by its own rounding."""
    for key in ("attention", "attention to sparse"):
        # Worst 4.4e-13, 1.0e-4, 1.8e-2.
        limit = dict(zip(DTYPES, (2e-12, 5e-4, 5e-2), strict=True))[dtype]
        assert compare(key, CASES["odd, overlapping, head size 25"], dtype, factor=30.0) <= limit


@each_op
def test_expanded_rows(key):
    """All rows the same memory: strides of zero."""
    op, case = OPS[key], CASES["odd, overlapping, head size 25"]
    rest = op.rest(TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads)
    tensors = [x[:1].expand(x.shape) if x.dim() > 1 else x for x in make_tensors(op, case, torch.float32)]
    actual = evaluate(getattr(ops, op.name), tensors, rest, lambda out: out[:1].detach().expand(out.shape))
    copies = [x.contiguous() for x in tensors]
    expected = evaluate(
        getattr(ops, op.name), copies, rest, lambda out: out[:1].detach().expand(out.shape).contiguous()
    )
    assert all(map(torch.equal, actual, expected))


def test_attention_reads_columns_of_qkv():
    """q, k, v of one [R, 3C] buffer, with the gradient of the buffer."""
    grids = [(3, 5), (2, 2)]
    qkv = randn(19, 3 * 48, dtype=torch.float32).requires_grad_()
    grad = randn(19, 48, seed=1, dtype=torch.float32)
    out = ops.attention(*qkv.chunk(3, dim=1), 2, TokenLayout(grids))
    (actual,) = torch.autograd.grad(out, qkv, grad)
    double = qkv.detach().double().requires_grad_()
    expected = reference.attention(*double.chunk(3, dim=1), 2, grids, grids)
    (expected_grad,) = torch.autograd.grad(expected, double, grad.double())
    assert relative_error(out.detach().double(), expected.detach()) <= bound("attention", torch.float32)
    assert relative_error(actual.double(), expected_grad) <= bound("attention", torch.float32)


@each_op
def test_one_gradient_at_a_time(key):
    """The gradient of a tensor does not depend on which others need one."""
    op, case = OPS[key], CASES["odd, overlapping, head size 25"]
    tensors = make_tensors(op, case, torch.float32)
    rest = op.rest(TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads)
    function = getattr(ops, op.name)
    every = evaluate(function, tensors, rest, torch.ones_like)[1:]
    for i, expected in enumerate(every):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        out = function(*leaves, *rest)
        out.backward(torch.ones_like(out))
        assert torch.equal(leaves[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


@each_op
def test_spare_rows(key):
    """torch.compile's fixed sizes leave rows behind the tokens: zero in outputs and gradients. Where an op hands rows
    through to a gradient or a linear layer, they must come in as zero; elsewhere they are not even read."""
    op, case, spare = OPS[key], CASES["odd, overlapping, head size 25"], 5
    filling = 0.0 if key in ("gated_residual", "recover_tokens") else math.nan

    def widened(layout):
        return TokenLayout.of(layout.table, layout.rows + spare)

    def with_garbage(x):
        return torch.cat([x, torch.full((spare, x.shape[1]), filling, dtype=x.dtype)])

    tensors = make_tensors(op, case, torch.float32)
    layouts = TokenLayout(case.grids), TokenLayout(case.sparse_grids)
    function, rows = getattr(ops, op.name), ("RC", "SC")
    expected = evaluate(function, tensors, op.rest(*layouts, case.heads), lambda out: randn(*out.shape).to(out.dtype))
    wide = [with_garbage(x) if shape in rows else x for x, shape in zip(tensors, op.shapes, strict=True)]
    out_has_rows = key != "pooled_attention"

    def grad(out):
        used = randn(*expected[0].shape).to(out.dtype)
        return with_garbage(used) if out_has_rows else used

    actual = evaluate(function, wide, op.rest(*map(widened, layouts), case.heads), grad)
    has_rows = [out_has_rows, *(shape in rows for shape in op.shapes)]
    for name, a, b, spares in zip(("out", *op.shapes), actual, expected, has_rows, strict=True):
        assert torch.equal(a[: len(b)], b), f"{name}: spare rows leak into the result"
        assert not spares or (len(a) == len(b) + spare and not a[len(b) :].any()), f"{name}: spare rows are not zero"


@each_op
def test_gradcheck(key):
    op, case = OPS[key], Case([(3, 2), (1, 2)], [(2, 2), (1, 1)], 8, 2)
    tensors = [x.requires_grad_() for x in make_tensors(op, case, torch.float64)]
    rest = op.rest(TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads)
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, op.name)(*x, *rest), tensors, atol=1e-7, rtol=1e-5)


@each_op
def test_no_second_derivative(key):
    """There is none, and saying so beats a silent zero."""
    op, case = OPS[key], CASES["one sample, head size 24"]
    tensors = [x.requires_grad_() for x in make_tensors(op, case, torch.float64)]
    out = getattr(ops, op.name)(*tensors, *op.rest(TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads))
    if key == "pool_tokens":
        pytest.skip("linear, its backward does not depend on the input")
    with pytest.raises(RuntimeError):
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


@each_op
def test_empty_batch(key):
    """Nothing in, nothing out; in a thread of its own, whose workspace has never been used."""
    from concurrent.futures import ThreadPoolExecutor

    op, empty = OPS[key], Case([], [], 24, 2)
    tensors = make_tensors(op, empty, torch.float32)
    rest = op.rest(TokenLayout([]), TokenLayout([]), 2)
    with ThreadPoolExecutor(1) as pool:
        out, *grads = pool.submit(evaluate, getattr(ops, op.name), tensors, rest, torch.ones_like).result()
    assert out.shape == (0, 24)
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    assert not any(g.any() for g in grads)


# ---- select_tokens --------------------------------------------------------------------------------------------------

SCHEDULES = {
    "paper": DensitySchedule(),
    "continuous": DensitySchedule.continuous(0.3, 0.9, (16, 16)),
    "video": DensitySchedule([(4, 8, 8), (2, 3, 5), (7, 7)], 100, [0, 3, 99]),
    "one segment": DensitySchedule([(5, 3)], 10),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_select_tokens(schedule):
    whole = torch.arange(schedule.num_timesteps + 1)
    begins = torch.tensor(schedule.begins, dtype=torch.float64)
    near = torch.cat([begins, begins[1:].nextafter(begins[1:] - 1), begins + 0.5]).clamp(max=schedule.num_timesteps)
    for t in (whole, whole.int(), whole.double(), whole.float(), near):
        expected = reference.select_tokens(t, schedule.begins, schedule.grids)
        layout = ops.select_tokens(t, schedule)
        assert layout.grids == expected == [schedule.grid(step) for step in t.tolist()]
        assert torch.equal(layout.table, TokenLayout(expected).table) and layout.rows == layout.total


# ---- what torch.library asks of a custom op -------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps one call of every custom op of this library; of the block op one for each kind."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "flexdit_ext":
            kind = args[0] if isinstance(args[0], int) else ""
            self.calls.setdefault(f"{function.name().removeprefix('flexdit_ext::')}{kind}", (function, args))
        return out


REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flexdit_ext::"))
CALLS = [
    name.removeprefix("flexdit_ext::") + kind
    for name in REGISTERED
    for kind in ("0123" if name in ("flexdit_ext::block", "flexdit_ext::block_backward") else ("",))
]


@pytest.fixture(scope="module")
def calls():
    with Recorder() as recorder:
        for op in OPS.values():
            case = Case([(3, 2), (1, 2)], [(2, 2), (1, 1)], 8, 2)
            rest = op.rest(TokenLayout(case.grids), TokenLayout(case.sparse_grids), case.heads)
            evaluate(getattr(ops, op.name), make_tensors(op, case, torch.float32), rest, torch.ones_like)
        model = random_model(input_size=4, hidden_size=8, schedule=DensitySchedule([(2, 2), (1, 1)]))
        x = randn(2, 4, 4, 4, dtype=torch.float32).requires_grad_()
        model(x, torch.tensor([3, 700]), torch.tensor([1, 2])).sum().backward()
    return recorder.calls


def fresh(argument, requires_grad):
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone().requires_grad_(requires_grad and argument.requires_grad)
    return [fresh(x, requires_grad) for x in argument] if isinstance(argument, list) else argument


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(calls, call):
    function, args = calls[call]  # every op that is registered has been called
    forward = "backward" not in call
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if function.name() == "flexdit_ext::block":
        utils.pop()  # it makes the hidden size symbolic, which the block's fake looks up; torch.compile never does
    torch.library.opcheck(function, tuple(fresh(x, forward) for x in args), test_utils=utils)
