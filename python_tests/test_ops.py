"""flexdit_ext.ops, forward and backward, against the ops of the same names in reference.py, evaluated in float64, on
the CPU, on the emulator and on a GPU. What torch.library asks of them is in test_op_registration.py."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import CUDA, MARKS, dtypes_of, each_dtype, on, short
from helpers import randn, relative_error
from op_cases import CASES, OPS, Case, bound, compare, evaluate, make_tensors, odd_case, takes

from flexdit_ext import DensitySchedule, TokenLayout, ops, reference

MEMORY_FORMATS = {
    "packed": lambda x: x,
    "columns of a wider tensor": lambda x: torch.cat([x * 3, x, x - 1], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "columns that are not aligned": lambda x: torch.cat([x - 1, x, x], dim=-1)[..., 1 : x.shape[-1] + 1].copy_(x),
    "every second row": lambda x: torch.stack([x, x + 9], dim=1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x, x + 9], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
}
each_op = pytest.mark.parametrize("key", OPS)


@pytest.mark.parametrize(
    "key, name, backend, dtype",
    [
        on(backend, key, name, backend, dtype, id=f"{key}-{name}-{backend}-{short(dtype)}")
        for key in OPS
        for name, case in CASES.items()
        for backend in MARKS
        if takes(backend, key, case)
        for dtype in dtypes_of(backend)
    ],
    indirect=["backend"],
)
def test_equals_reference(key, name, backend, device, dtype):
    assert compare(key, CASES[name], dtype, device) <= bound(key, backend, dtype)


@pytest.mark.parametrize("place", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS.keys())
@each_dtype
@each_op
def test_strided_tensors(key, backend, device, dtype, place):
    """Slices of larger buffers, gradients of the output among them."""
    assert compare(key, odd_case(backend, key), dtype, device, place) <= bound(key, backend, dtype)


@each_dtype
def test_layer_norm_of_an_offset(device, dtype):
    """Rows of mean 1000: the variance must not drown in the mean's square."""
    for key in ("modulated_layer_norm", "pooled_attention"):
        for name in ("hidden size 1152", "ragged, head size 64", "same grid, head size 7"):
            assert compare(key, CASES[name], dtype, device, offset=1e3) <= OFFSET[dtype]


# Worst of both backends 1.7e-13, 1.1e-4 (F.layer_norm in float32: 7.5e-5), 5.2e-3, 7.0e-4.
OFFSET = {torch.float64: 1e-12, torch.float32: 3e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@each_dtype
def test_softmax_of_large_scores(device, dtype):
    """Scores of thousands, where exp without the maximum overflows; one float32 score is off by its own rounding."""
    for name in ("hidden size 1152", "ragged, head size 64"):  # not so small that all rows have one score alone
        assert compare("attention", CASES[name], dtype, device, factor=30.0) <= LARGE_SCORES[dtype]


# Worst of both backends 1.2e-12, 1.7e-4, 1.7e-2, 2.5e-3.
LARGE_SCORES = {torch.float64: 5e-12, torch.float32: 5e-4, torch.bfloat16: 5e-2, torch.float16: 8e-3}


@each_op
def test_expanded_rows(key, backend, device):
    """All rows the same memory: strides of zero."""
    op, case = OPS[key], odd_case(backend, key)
    rest = op.rest(*case.layouts(device), case.heads)
    tensors = make_tensors(op, case, torch.float32, device=device)
    tensors = [x[:1].expand(x.shape) if x.dim() > 1 else x for x in tensors]
    actual = evaluate(getattr(ops, op.name), tensors, rest, lambda out: out[:1].detach().expand(out.shape))
    copies = [x.contiguous() for x in tensors]
    expected = evaluate(
        getattr(ops, op.name), copies, rest, lambda out: out[:1].detach().expand(out.shape).contiguous()
    )
    assert all(map(torch.equal, actual, expected))


def test_attention_reads_columns_of_qkv(backend, device):
    """q, k, v of one [R, 3C] buffer, with the gradient of the buffer."""
    grids = [(3, 5), (2, 2)]
    qkv = randn(19, 3 * 48, dtype=torch.float32).to(device).requires_grad_()
    grad = randn(19, 48, seed=1, dtype=torch.float32).to(device)
    out = ops.attention(*qkv.chunk(3, dim=1), 2, TokenLayout(grids, device))
    (actual,) = torch.autograd.grad(out, qkv, grad)
    double = qkv.detach().cpu().double().requires_grad_()
    expected = reference.attention(*double.chunk(3, dim=1), 2, grids, grids)
    (expected_grad,) = torch.autograd.grad(expected, double, grad.cpu().double())
    limit = bound("attention", backend, torch.float32)
    assert relative_error(out.detach().cpu().double(), expected.detach()) <= limit
    assert relative_error(actual.cpu().double(), expected_grad) <= limit


@each_op
def test_one_gradient_at_a_time(key, backend, device):
    """The gradient of a tensor does not depend on which others need one."""
    op, case = OPS[key], odd_case(backend, key)
    tensors = make_tensors(op, case, torch.float32, device=device)
    rest = op.rest(*case.layouts(device), case.heads)
    function = getattr(ops, op.name)
    every = evaluate(function, tensors, rest, torch.ones_like)[1:]
    for i, expected in enumerate(every):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        out = function(*leaves, *rest)
        out.backward(torch.ones_like(out))
        assert torch.equal(leaves[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(leaves) if j != i)


@each_op
def test_spare_rows(key, backend, device):
    """Fixed sizes, torch.compile's and those of a GPU, leave rows behind the tokens: zero in outputs and gradients.
    Where an op hands rows through to a gradient or a linear layer, they must come in as zero; elsewhere they are not
    even read."""
    op, case, spare = OPS[key], odd_case(backend, key), 5
    filling = 0.0 if key in ("gated_residual", "recover_tokens") else math.nan

    def widened(layout):
        return TokenLayout.of(layout.table, layout.rows + spare)

    def with_garbage(x):
        return torch.cat([x, torch.full((spare, x.shape[1]), filling, dtype=x.dtype, device=x.device)])

    tensors = make_tensors(op, case, torch.float32, device=device)
    layouts = case.layouts(device)
    function, rows = getattr(ops, op.name), ("RC", "SC")
    expected = evaluate(function, tensors, op.rest(*layouts, case.heads), lambda out: randn(*out.shape).to(out))
    wide = [with_garbage(x) if shape in rows else x for x, shape in zip(tensors, op.shapes, strict=True)]
    out_has_rows = key != "pooled_attention"

    def grad(out):
        used = randn(*expected[0].shape).to(out)
        return with_garbage(used) if out_has_rows else used

    actual = evaluate(function, wide, op.rest(*map(widened, layouts), case.heads), grad)
    has_rows = [out_has_rows, *(shape in rows for shape in op.shapes)]
    # To the bit, but cuBLASLt may sum more rows in another order.
    limit = 2e-6 if backend == "cuda" and key == "recover_tokens" else 0
    for name, a, b, spares in zip(("out", *op.shapes), actual, expected, has_rows, strict=True):
        assert relative_error(a[: len(b)], b) <= limit, f"{name}: spare rows leak into the result"
        assert not spares or (len(a) == len(b) + spare and not a[len(b) :].any()), f"{name}: spare rows are not zero"


@each_op
def test_empty_batch(key, device):
    """Nothing in, nothing out; in a thread of its own, whose workspace has never been used."""
    op, empty = OPS[key], Case((), (), 24, 1)
    tensors = make_tensors(op, empty, torch.float32, device=device)
    rest = op.rest(*empty.layouts(device), empty.heads)
    with ThreadPoolExecutor(1) as pool:
        out, *grads = pool.submit(evaluate, getattr(ops, op.name), tensors, rest, torch.ones_like).result()
    assert out.shape == (0, 24)
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    assert not any(g.any() for g in grads)


# ---- what a backend refuses -----------------------------------------------------------------------------------------


def call(key, case, dtype, device):
    op = OPS[key]
    return getattr(ops, op.name)(
        *make_tensors(op, case, dtype, device=device), *op.rest(*case.layouts(device), case.heads)
    )


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("head_size", [4, 25, 100, 136])
def test_head_sizes_that_cuda_refuses(device, head_size):
    for key in ("attention", "attention to dense", "attention to sparse"):
        with pytest.raises(ValueError, match=rf"attention: the head size is {head_size}, must be a multiple of 8 from"):
            call(key, Case(((3, 2),), ((2, 2),), 2 * head_size, 2), torch.float32, device)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@each_op
def test_rows_that_cuda_refuses(key, device):
    case = Case(((3, 2),), ((2, 2),), 1544, 193)
    if key.startswith("attention"):  # of 8 columns each
        assert call(key, case, torch.float32, device).isfinite().all()
        return
    with pytest.raises(ValueError, match="rows have 1544 columns, the CUDA backend takes at most 1536"):
        call(key, case, torch.float32, device)
    widest = call(key, Case(((3, 2),), ((2, 2),), 1536, 192), torch.float32, device)
    assert widest.isfinite().all()


@each_op
def test_dtypes_that_a_backend_refuses(key, backend, device):
    refused = torch.float16 if backend == "cpu" else torch.float64
    with pytest.raises(TypeError, match=f"{OPS[key].name}: . is torch.{short(refused)}, must be one of float32, bfl"):
        call(key, CASES["one sample, head size 24"], refused, device)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
def test_schedules_that_cuda_refuses(device):
    """More segments than a kernel's parameters hold."""
    t = torch.tensor([3.0], device=device)
    assert ops.select_tokens(t, DensitySchedule([(3, 3)] * 64)).table.tolist() == [[0, 1, 3, 3], [9, 0, 0, 0]]
    with pytest.raises(ValueError, match="schedule has 65 segments, the CUDA backend takes at most 64"):
        ops.select_tokens(t, DensitySchedule([(3, 3)] * 65))


# ---- select_tokens --------------------------------------------------------------------------------------------------

SCHEDULES = {
    "paper": DensitySchedule(),
    "continuous": DensitySchedule.continuous(0.3, 0.9, (16, 16)),
    "video": DensitySchedule([(4, 8, 8), (2, 3, 5), (7, 7)], 100, [0, 3, 99]),
    "one segment": DensitySchedule([(5, 3)], 10),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_select_tokens(schedule, backend, device):
    whole = torch.arange(schedule.num_timesteps + 1)
    begins = torch.tensor(schedule.begins, dtype=torch.float64)
    near = torch.cat([begins, begins[1:].nextafter(begins[1:] - 1), begins + 0.5]).clamp(max=schedule.num_timesteps)
    for t in (whole, whole.int(), whole.double(), whole.float(), near, whole[:0]):
        expected = reference.select_tokens(t, schedule.begins, schedule.grids)
        layout = ops.select_tokens(t.to(device), schedule)
        assert layout.table.device.type == device.type
        assert layout.grids == expected == [schedule.grid(step) for step in t.tolist()]
        assert torch.equal(layout.table.cpu(), TokenLayout(expected).table)
        assert torch.equal(layout.mapped[0], layout.table)
        samples = torch.arange(len(t)).repeat_interleave(torch.tensor([math.prod(grid) for grid in expected]).long())
        row_map = layout.mapped[1:].flatten().cpu()
        assert torch.equal(row_map[: len(samples)], samples.int())
        assert row_map[len(samples) :].eq(max(len(t) - 1, 0)).all()
        largest = len(t) * max(math.prod(grid) for grid in schedule.grids)
        assert len(row_map) >= largest
        assert layout.rows == (largest if backend == "cuda" else layout.total)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
def test_select_tokens_out_of_range(device):
    """On a GPU nothing waits for the values of t: the first or the last segment."""
    schedule = DensitySchedule([(4, 4), (3, 3), (2, 2)], begins=[0, 300, 600])
    t = torch.tensor([-5.0, 1e9, math.nan, -math.inf, math.inf], device=device)
    assert ops.select_tokens(t, schedule).grids == [(4, 4), (2, 2), (4, 4), (4, 4), (2, 2)]
