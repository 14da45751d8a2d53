"""The model as a torch.nn.Module: autocast, torch.compile, checkpointing, copies, label dropout, kinds of input."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from helpers import model_inputs, randn, random_model, relative_error

from flexdit_ext import DensitySchedule
from flexdit_ext.blocks import Block

# Small but complete: two of everything that repeats, 36 tokens, a schedule whose segments differ.
SMALL = {"num_sdtm": 1, "schedule": DensitySchedule([(5, 5), (3, 4), (2, 2)])}


def small_model(dtype=torch.float32, **overrides):
    return random_model(dtype, **(SMALL | overrides))


def run(call, model, x, *rest):
    """Output, gradient of x, and of every parameter that needs one."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = call(x, *rest)
    out.backward(randn(*out.shape, seed=5).to(out.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad} | gradients


def assert_same(actual, expected):
    """To the bit."""
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different


# ---- inputs ---------------------------------------------------------------------------------------------------------


def strided(x):
    return torch.stack([x, x + 1], dim=-1)[..., 0]


INPUTS = {
    "channels_last": lambda x, t, y: (x.to(memory_format=torch.channels_last), t, y),
    "strided": lambda x, t, y: (strided(x), strided(t), strided(y)),
    "transposed image": lambda x, t, y: (x.mT.contiguous().mT, t, y),
    "int32 t": lambda x, t, y: (x, t.int(), y),
    "float32 t": lambda x, t, y: (x, t.float(), y),
    "float64 t": lambda x, t, y: (x, t.double(), y),
    "int32 y": lambda x, t, y: (x, t, y.int()),
    "uint8 y": lambda x, t, y: (x, t, y.to(torch.uint8)),
    "lists as grids": lambda x, t, y: (x, t, y, [[5, 5], [3, 4], [2, 2]]),
    "tuple of grids": lambda x, t, y: (x, t, y, ((5, 5), (3, 4), (2, 2))),
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS.keys())
def test_inputs_of_other_kinds(change):
    model = small_model()
    x, _, y = model_inputs(model.config, 3)
    t = torch.tensor([3, 500, 1000])  # one in each segment
    assert_same(run(model, model, *change(x, t, y)), run(model, model, x, t, y))


def test_expanded_inputs():
    """One image, timestep and label for the whole batch without copies."""
    model = small_model()
    x, t, y = (value[:1] for value in model_inputs(model.config, 1))
    with torch.no_grad():
        out = model(x.expand(3, -1, -1, -1), t.expand(3), y.expand(3))
        assert torch.equal(out, model(x, t, y).expand_as(out))


def test_fractional_timesteps():
    model = small_model(torch.float64)
    x, _, y = model_inputs(model.config, 2, torch.float64)
    with torch.no_grad():
        whole, between = model(x, torch.tensor([400, 400]), y), model(x, torch.tensor([400.5, 400.0]), y)
    assert torch.equal(whole[1], between[1]) and not torch.equal(whole[0], between[0])


def test_output_gradient_that_is_not_contiguous():
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    x.requires_grad_()
    grad = randn(2, 8, 12, 12, dtype=torch.float32)
    expected = torch.autograd.grad(model(x, t, y), x, grad)[0]
    for other in (grad.to(memory_format=torch.channels_last), strided(grad)):
        assert torch.equal(torch.autograd.grad(model(x, t, y), x, other)[0], expected)
    constant = torch.autograd.grad(model(x, t, y).sum(), x)[0]  # sum's gradient is an expanded scalar
    assert torch.equal(constant, torch.autograd.grad(model(x, t, y), x, torch.ones_like(grad))[0])


# ---- modes ----------------------------------------------------------------------------------------------------------


def test_modes_without_gradients():
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    expected = model(x, t, y)
    with torch.no_grad():
        plain = model(x, t, y)
    with torch.inference_mode():
        inference = model(x, t, y)
    assert expected.requires_grad and not plain.requires_grad and inference.is_inference()
    assert torch.equal(plain, inference)
    # Backward needs GELU's input, so a forward that keeps it computes GELU apart from its linear layer.
    assert relative_error(plain.double(), expected.detach().double()) <= 3e-6  # worst 2.2e-7


def test_another_default_device():
    """What the library allocates for itself is on the CPU, whatever torch.device says; in a thread of its own, whose
    workspace has never been used."""
    model = random_model(torch.float32)
    inputs = model_inputs(model.config, 2)
    grids = [None, (3, 3), [(3, 3), (2, 1)]]

    def run():
        with torch.device("meta"):
            return [model(*inputs, grid) for grid in grids]

    expected = [model(*inputs, grid) for grid in grids]
    with ThreadPoolExecutor(1) as pool:
        actual = pool.submit(run).result()
    assert all(map(torch.equal, actual, expected))


def test_autocast():
    model = small_model()
    x, t, y = model_inputs(model.config, 3)
    single = run(model, model, x, t, y)

    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*arguments)

    result = run(call, model, x, t, y)
    assert result["out"].dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for name, tensor in result.items() if name != "out")
    # autocast is bfloat16 arithmetic, neither float32 nor something else:
    half = run(copy.deepcopy(model).bfloat16(), model, x.bfloat16(), t, y)["out"]
    assert torch.equal(result["out"], half)
    for name, tensor in single.items():
        assert relative_error(result[name].float(), tensor, least=1e-2) <= 0.1, name  # worst 3.2e-2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(x.bfloat16(), t, y).dtype == torch.bfloat16  # inputs of either dtype


def test_autocast_disabled_inside():
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False), torch.no_grad():
        assert model(x, t, y).dtype == torch.float32


def test_label_dropout():
    """train() replaces labels with probability class_dropout_prob, each sample on its own; eval() never."""
    model = small_model(
        input_size=2, hidden_size=8, num_sdtm=0, num_dense_blocks=0, class_dropout_prob=0.25, schedule=None
    )
    count = 2000
    x = randn(1, 4, 2, 2, dtype=torch.float32).expand(count, -1, -1, -1)
    t, y = torch.full((count,), 3), torch.full((count,), 4)
    with torch.no_grad():
        kept, null = model(x, t, y), model(x, t, torch.full_like(y, 10))
        assert torch.equal(model(x, t, y), kept)
        torch.manual_seed(0)
        out = model.train()(x, t, y)
        torch.manual_seed(0)
        assert torch.equal(model(x, t, y), out)  # torch's generator decides
        assert not torch.equal(model(x, t, y), out)
    was_dropped = (out == null).flatten(1).all(1)
    assert torch.equal(torch.where(was_dropped[:, None, None, None], null, kept), out)
    assert abs(int(was_dropped.sum()) - 500) <= 5 * (count * 0.25 * 0.75) ** 0.5  # five standard deviations
    assert torch.equal(y, torch.full((count,), 4))  # the caller's labels stay


def test_no_label_dropout_without_a_null_class():
    model = small_model(class_dropout_prob=0.0).train()
    x, t, y = model_inputs(model.config, 4)
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model.eval()(x, t, y))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_label_dropout_of_narrow_labels(dtype):
    """The null class need not fit the labels' dtype: labels 0 .. 99 as bytes, null class 1000."""
    model = small_model(num_classes=1000, class_dropout_prob=0.5).train()
    x, t, y = model_inputs(model.config, 8)
    y = (y % 100).to(dtype)
    with torch.no_grad():
        torch.manual_seed(0)
        out = model(x, t, y)
        torch.manual_seed(0)
        assert torch.equal(out, model(x, t, y.long()))


# ---- copies ---------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to float64 and back": lambda model: copy.deepcopy(model).double().float(),
    "state dict": lambda model: load_into(small_model(), model.state_dict()),
}


def load_into(model, state_dict):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_copies(make):
    model = small_model()
    inputs = model_inputs(model.config, 2)
    expected = run(model, model, *inputs)
    twin = make(model)
    assert twin.config == model.config and twin.schedule == model.schedule
    assert_same(run(twin, twin, *inputs), expected)
    with torch.no_grad():  # its own memory
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(run(model, model, *inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_dtype(dtype):
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    with torch.no_grad():
        expected = model(x, t, y)
        out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype and model.pos_embed.dtype == dtype
    assert relative_error(out.double(), expected.double()) <= (1e-5 if dtype == torch.float64 else 0.03)


def test_functional_call():
    model, other = small_model(seed=0), small_model(seed=1)
    inputs = model_inputs(model.config, 2)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(model, parameters, inputs)
    assert torch.equal(out, other(*inputs))
    out.sum().backward()
    other(*inputs).sum().backward()
    assert all(torch.equal(parameters[name].grad, p.grad) for name, p in other.named_parameters())
    assert all(p.grad is None for p in model.parameters())


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation_checkpointing(dtype):
    model = small_model(dtype, reinject_position=True)
    x, t, y = model_inputs(model.config, 3, dtype)
    plain = run(model, model, x, t, y)
    calls = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    assert_same(run(model, model, x, t, y), plain)
    assert len(calls) == 2 * model.config.depth  # every block ran a second time in backward
    calls.clear()
    with torch.no_grad():
        model(x, t, y)
    assert len(calls) == model.config.depth


FROZEN = {
    "one module": lambda name: name.startswith("sdtm"),
    "all but one block": lambda name: not name.startswith("dense_blocks"),
    "all but the ends": lambda name: not name.startswith(("patch_embed", "final_layer", "label_embed")),
    "all biases": lambda name: name.endswith("bias"),
    "all weights": lambda name: name.endswith("weight"),
    "modulations": lambda name: "modulation" in name,
    "recovery's W_1": lambda name: "from_sparse" in name,
    "everything": lambda name: True,
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters(frozen):
    model = small_model()
    inputs = model_inputs(model.config, 2)
    expected = run(model, model, *inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
        parameter.grad = None
    actual = run(model, model, *inputs)
    assert_same(actual, {name: g for name, g in expected.items() if name in ("out", "x") or not frozen(name)})


def test_parameters_alone_need_gradients():
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    expected = run(model, model, x, t, y)
    model.zero_grad()
    out = model(x, t, y)
    out.backward(randn(*out.shape, seed=5).to(out.dtype))
    assert x.grad is None
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_gradients_accumulate():
    model = small_model()
    x, t, y = model_inputs(model.config, 4)
    parts = []
    for part in (slice(0, 2), slice(2, 4)):
        parts.append(run(model, model, x[part], t[part], y[part]))
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        out = model(x[part], t[part], y[part])
        out.backward(randn(*out.shape, seed=5).to(out.dtype))
    assert all(torch.equal(p.grad, parts[0][name] + parts[1][name]) for name, p in model.named_parameters())


def test_two_graphs_at_once():
    """Contexts belong to their graph: backward in another order than forward."""
    model = small_model()
    inputs = [model_inputs(model.config, 2, seed=seed) for seed in range(2)]
    expected = [run(model, model, *values) for values in inputs]
    outs = [model(*values) for values in inputs]
    for out, want in zip(outs, expected, strict=True):
        model.zero_grad()
        out.backward(randn(*out.shape, seed=5).to(out.dtype), retain_graph=True)
        assert all(torch.equal(p.grad, want[name]) for name, p in model.named_parameters())
    model.zero_grad()  # and a second time through a kept graph
    outs[0].backward(randn(*out.shape, seed=5).to(out.dtype))
    assert all(torch.equal(p.grad, expected[0][name]) for name, p in model.named_parameters())


def test_weights_changed_before_backward():
    """Autograd notices an in-place change of what backward reads."""
    model = small_model()
    out = model(*model_inputs(model.config, 2))
    with torch.no_grad():
        model.dense_blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_training_lowers_a_loss():
    torch.manual_seed(0)
    model = small_model().train()
    x, t, y = model_inputs(model.config, 4)
    target = randn(4, 8, 12, 12, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- torch.compile --------------------------------------------------------------------------------------------------

GRIDS = {"schedule": None, "one grid": (3, 3), "one per sample": [(3, 3), (5, 2), (6, 6)]}


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_compile(grid):
    """fullgraph: no graph break anywhere, forward or backward."""
    model = small_model(reinject_position=True)
    inputs = (*model_inputs(model.config, 3), grid)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, model, *inputs), run(model, model, *inputs))


def test_compile_without_gradients():
    model = small_model()
    inputs = model_inputs(model.config, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), model(*inputs))


def test_compile_follows_the_batch_size_and_t():
    """One dynamic graph serves every batch size and every draw of timesteps."""
    model = small_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 7):
        x, t, y = model_inputs(model.config, batch, seed=batch)
        assert_same(run(compiled, model, x, t, y), run(model, model, x, t, y))
    assert counter.frame_count == 1


def test_compile_with_inductor():
    model = small_model()
    inputs = model_inputs(model.config, 3)
    compiled = torch.compile(model, fullgraph=True)
    actual, expected = run(compiled, model, *inputs), run(model, model, *inputs)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor, least=1e-2) <= 1e-6, name  # worst 0


def test_compile_under_autocast_and_in_training():
    model = small_model().train()
    inputs = model_inputs(model.config, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(*inputs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compile_with_checkpointing():
    model = small_model()
    inputs = model_inputs(model.config, 2)
    expected = run(model, model, *inputs)
    model.activation_checkpointing = True
    assert_same(run(torch.compile(model, fullgraph=True, backend="aot_eager"), model, *inputs), expected)


def test_compiled_model_still_checks_values():
    model = small_model()
    x, t, y = model_inputs(model.config, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, t, y)
    with pytest.raises(ValueError, match="t is 1001"):
        compiled(x, t * 0 + 1001, y)
    with pytest.raises(ValueError, match=r"y\[0\] is 99"):
        compiled(x, t, y * 0 + 99)
