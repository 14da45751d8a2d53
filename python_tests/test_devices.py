"""What the host does for tensors on a GPU, tested without one: torch's fake tensors have devices but no memory (and no
gradients, which need torch's CUDA build). And what the library says when tensors are where it cannot compute."""

import contextlib

import pytest
import torch
from devices import emulated_core, on, short
from helpers import model_inputs, random_model
from model_cases import HEADS, SCHEDULE
from op_cases import CASES, OPS, make_tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import flexdit_ext.__main__
from flexdit_ext import _C, TokenLayout, _core, ops

GPU = torch.device("cuda", 0)


@pytest.fixture(params=["fake", on("cuda", "real")])
def gpu(request):
    """Tensors on GPU, faked where there is none."""
    with torch.no_grad(), FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield GPU


def place(module, device):
    """module.to(device), which fake tensors cannot; the values do not matter here."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device), False)
        for name, b in part._buffers.items():
            part._buffers[name] = torch.zeros(b.shape, dtype=b.dtype, device=device)
    return module


def gpu_model(dtype=torch.float32, **overrides):
    with unset_fake_temporarily():
        model = random_model(dtype, **(HEADS | {"num_sdtm": 1, "schedule": SCHEDULE} | overrides))
    return place(model, GPU)


def gpu_inputs(model, dtype=torch.float32):
    return [tensor.to(GPU) for tensor in model_inputs(model.config, 3, dtype)]


# ---- all on the GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("grid", [None, (3, 3), [(4, 4), (2, 3), (1, 1)]], ids=["schedule", "one grid", "ragged"])
def test_model(gpu, grid, dtype):
    """Nothing that the host makes lies elsewhere: fake tensors refuse to mix devices."""
    model = gpu_model(dtype, reinject_position=True).train()
    x, t, y = gpu_inputs(model, dtype)
    out = model(x, t, y, grid)
    assert (out.device, out.dtype, out.shape) == (gpu, dtype, (3, 8, 12, 12))


@pytest.mark.parametrize("key", OPS)
def test_op(gpu, key):
    op, case = OPS[key], CASES["one sample, head size 24"]
    tensors = make_tensors(op, case, torch.float16, device=gpu)
    out = getattr(ops, op.name)(*tensors, *op.rest(*case.layouts(gpu), case.heads))
    assert out.device == gpu and out.dtype == torch.float16


def test_layouts_with_spare_rows(gpu):
    """The host does not know t, so there is room for the largest grid."""
    layout = ops.select_tokens(torch.empty(5, device=gpu), SCHEDULE)
    assert layout.rows == 5 * 16 and layout.batch == 5 and layout.table.device == gpu


def test_fake_tables_are_not_kept():
    """Tables of uniform layouts are; a fake one would break whoever asks next."""
    with FakeTensorMode():
        assert type(TokenLayout.uniform(7, (3, 5)).table) is not torch.Tensor
    table = TokenLayout.uniform(7, (3, 5)).table
    assert type(table) is torch.Tensor and table is TokenLayout.uniform(7, (3, 5)).table
    with FakeTensorMode():
        assert type(TokenLayout.uniform(7, (3, 5)).table) is not torch.Tensor


def test_layout_devices(gpu):
    layouts = [TokenLayout([(2, 3)], "cuda"), TokenLayout.uniform(2, (2, 3), gpu), TokenLayout([(2, 3)]).to("cuda:0")]
    assert all(layout.table.device == gpu for layout in layouts)
    assert layouts[0].to("cpu").table.device.type == "cpu"


# ---- some elsewhere -------------------------------------------------------------------------------------------------


def test_inputs_elsewhere(gpu):
    model = gpu_model()
    x, t, y = gpu_inputs(model)
    for name, arguments in {"x": (x.cpu(), t, y), "y": (x, t, y.cpu())}.items():
        with pytest.raises(ValueError, match=f"{name} is on cpu, the model on cuda:0: they must agree"):
            model(*arguments)
    place(model, "cpu")
    for name, arguments in {"x": (x, t, y), "t": (x.cpu(), t, y.cpu())}.items():
        with pytest.raises(ValueError, match=f"{name} is on cuda:0, the model on cpu: they must agree"):
            model(*arguments)


@pytest.mark.parametrize(
    "part", ["sdtm.0.recovery.0.from_sparse", "dense_blocks.0.mlp.fc2", "final_layer.linear", "timestep_embed.fc2"]
)
def test_parameters_elsewhere(gpu, part):
    model = gpu_model()
    inputs = gpu_inputs(model)
    place(model.get_submodule(part), "cpu")
    with pytest.raises(ValueError, match=r"parameters\[\d+\] is on cpu, the tokens on cuda:0: they must agree"):
        model(*inputs)


@pytest.mark.parametrize("key", OPS)
def test_op_tensors_elsewhere(gpu, key):
    op, case = OPS[key], CASES["one sample, head size 24"]
    tensors, function = make_tensors(op, case, torch.float32, device=gpu), getattr(ops, op.name)
    with pytest.raises(ValueError, match=rf"{op.name}: layout(_q)?\.table is on cpu, \w on cuda:0: they must agree"):
        function(*tensors, *op.rest(*case.layouts(), case.heads))
    rest = op.rest(*case.layouts(gpu), case.heads)
    for i in range(1, len(tensors)):
        mixed = [x.cpu() if i == j else x for j, x in enumerate(tensors)]
        with pytest.raises(ValueError, match=rf"{op.name}: \w+ is on cpu, \w on cuda:0: they must agree"):
            function(*mixed, *rest)


def test_block_tensors_elsewhere(gpu):
    """Blocks are modules that a caller may use alone."""
    model = gpu_model()
    x, s, c = (torch.empty(rows, 32, device=gpu) for rows in (36, 9, 1))
    layout, sparse = TokenLayout([(6, 6)], gpu), TokenLayout([(3, 3)], gpu)
    recovery = model.sdtm[0].recovery[0]
    assert recovery(x, s, c, layout, sparse).shape == x.shape
    for name, arguments in {
        "other": (x, s.cpu(), c, layout, sparse),
        "condition": (x, s, c.cpu(), layout, sparse),
        "layout": (x, s, c, layout.to("cpu"), sparse),
        "other_layout": (x, s, c, layout, sparse.to("cpu")),
        "position": (x, s, c, layout, sparse, x.cpu()),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is on cpu, the tokens on cuda:0: they must agree"):
            recovery(*arguments)


# ---- where this build does not compute ------------------------------------------------------------------------------


def test_a_build_without_cuda(monkeypatch):
    """GPU tensors and a build for the CPU: the message says what to do. The custom ops' own bodies call this check."""
    monkeypatch.setattr(_core, "CUDA_ARCHITECTURES", None)
    with FakeTensorMode():
        q, k, gate = (torch.empty(rows, 8, device=GPU) for rows in (3, 3, 1))
    message = r"attention: q is on cuda:0, but this build of flexdit_ext has no CUDA backend: install it where nvcc is"
    with pytest.raises(ValueError, match=message):
        _core.require_device("attention", q=q, k=k)
    with torch.no_grad(), FakeTensorMode():
        layout = TokenLayout([(3, 1)], GPU)
        for body, arguments in {
            ops._attention: (q, k, k, 1, layout.table, layout.table, False, 0),
            ops._gated_residual: (q, k, gate, layout.table),
            ops._select_tokens: (torch.empty(2, device=GPU), [0], [1, 3, 3], 1000, 3),
            ops._linear: (q, k, torch.empty(3, device=GPU)),
        }.items():
            with pytest.raises(ValueError, match=r"is on cuda:0, but this build of flexdit_ext has no CUDA backend"):
                body._init_fn(*arguments)  # what runs on a GPU; fake tensors run the fake


@pytest.mark.skipif(_core.CUDA_ARCHITECTURES is not None, reason="this build has the CUDA backend")
def test_the_core_without_cuda():
    """C++ says so, too: nothing computes on the CPU what was meant for a GPU."""
    x, layout = torch.zeros(6, 8), TokenLayout([(2, 3)])
    with pytest.raises(ValueError, match="this build of flexdit has no CUDA backend: build it where nvcc is found"):
        _C.gated_residual(x, x, x[:1], layout.table, torch.empty_like(x), _C.Execution(device_index=0, stream=0))


@pytest.mark.parametrize("device", ["meta", "xla"])
def test_devices_of_other_kinds(device):
    with FakeTensorMode():
        x, vector = torch.empty(6, 8, device=device), torch.empty(1, 8, device=device)
        t = torch.empty(2, device=device)
    with pytest.raises(ValueError, match=f"x is on {device}.*, flexdit_ext computes on the CPU and on CUDA devices"):
        ops.modulated_layer_norm(x, vector, vector, TokenLayout([(2, 3)]))
    with pytest.raises(ValueError, match=f"t is on {device}.*, flexdit_ext computes on the CPU and on CUDA devices"):
        ops.select_tokens(t, SCHEDULE)


@pytest.mark.parametrize("device, error", [("nowhere", ValueError), ("cuda:x", ValueError), (3.5, TypeError)])
def test_layouts_on_no_device(device, error):
    for call in (
        lambda: TokenLayout([(2, 3)], device),
        lambda: TokenLayout.uniform(2, (2, 3), device),
        lambda: TokenLayout([(2, 3)]).to(device),
    ):
        with pytest.raises(error, match=f"device is {device!r}, must be a torch.device or a name such as 'cuda:0'"):
            call()


# ---- flexdit info ---------------------------------------------------------------------------------------------------


def information(monkeypatch, core):
    monkeypatch.setattr(flexdit_ext.__main__, "_C", core)
    return dict(flexdit_ext.__main__.information())


def test_information_names_the_backend(monkeypatch, capsys):
    architectures = _core.CUDA_ARCHITECTURES
    expected = f"built for {architectures}" if architectures else "not built"
    assert information(monkeypatch, _C)["CUDA backend"] == expected
    assert flexdit_ext.__main__.main(["info"]) == 0
    assert f"CUDA backend   {expected}\n" in capsys.readouterr().out


@pytest.mark.skipif(emulated_core() is None, reason="the emulated module is not built: make pytest builds it")
def test_information_of_the_emulated_module(monkeypatch):
    assert information(monkeypatch, emulated_core())["CUDA backend"] == "built for the emulator"
