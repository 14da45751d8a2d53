"""FlexDiT on the CUDA kernels, on the emulator and on a GPU, against reference.py in float64 and against the CPU. The
released model's fixture is in test_model.py, what only a GPU has in test_gpu.py."""

import copy

import pytest
import torch
from devices import CUDA, short
from helpers import RAGGED, forward_backward, randn, reference_of, relative_error, same_tensors
from model_cases import CUDA_VARIANTS, SCHEDULE, T, compare_with_reference, device_inputs, device_model, results

from flexdit_ext import DensitySchedule, TokenLayout, _block_ops, ops
from flexdit_ext.blocks import Block

pytestmark = pytest.mark.parametrize("backend", CUDA, indirect=True)


@pytest.fixture
def gpu_like(backend, monkeypatch):
    """What a GPU's tensors do and the emulator's, which are the host's, do not: layouts that follow t have room for the
    largest grids, and nobody looks at labels and timesteps."""
    if backend != "emulated":
        return
    exact = ops.select_tokens

    def select_tokens(t, schedule):
        largest = max(height * width for height, width in schedule.grids)
        return TokenLayout.of(exact(t, schedule).table, len(t) * largest)

    monkeypatch.setattr(ops, "select_tokens", select_tokens)
    monkeypatch.setattr(_block_ops, "_check_values", lambda *arguments: None)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", CUDA_VARIANTS.values(), ids=CUDA_VARIANTS.keys())
def test_equals_reference(overrides, device, gpu_like):
    model = device_model(device, **({"num_sdtm": 2} | overrides))
    compare_with_reference(model, *device_inputs(model.config, device), RAGGED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("name", ["position again", "DiT"])
def test_equals_reference_in_low_precision(name, dtype, device, gpu_like):
    model = device_model(device, dtype, **CUDA_VARIANTS[name])
    compare_with_reference(model, *device_inputs(model.config, device, dtype=dtype), RAGGED)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(3, 2), None], ids=["one grid", "schedule"])
def test_grids(grid, batch, device, gpu_like):
    """With the schedule t decides on the device, and buffers have spare rows."""
    model = device_model(device, reinject_position=True)
    compare_with_reference(model, *device_inputs(model.config, device, batch), grid)


def test_spare_rows_change_nothing(device, gpu_like):
    """A layout from t on the device, with spare rows, and the exact one of the same grids."""
    model = device_model(device, reinject_position=True)
    x, t, y = device_inputs(model.config, device)
    spare = results(model, x, t, y)
    exact = results(model, x, t, y, [SCHEDULE.grid(step) for step in T.tolist()])
    for name, tensor in exact.items():
        # To the bit on the emulator; cuBLASLt may sum more rows in another order.
        assert relative_error(spare[name], tensor, least=1e-2) <= 5e-6, name


def test_wide_model(device, gpu_like):
    """1152 columns in 16 heads of 72, as XL/2 has them."""
    small = {"input_size": 4, "num_pooling_blocks": 0, "num_dense_blocks": 0, "sdtm_blocks": (1, 0, 1, 0)}
    schedule = DensitySchedule([(2, 1)])
    model = device_model(device, hidden_size=1152, num_heads=16, mlp_ratio=0.25, schedule=schedule, **small)
    compare_with_reference(model, *device_inputs(model.config, device, 1), None)


def test_forward_with_cfg(device, gpu_like):
    model = device_model(device)
    x, _, y = device_inputs(model.config, device, 4)
    t = torch.tensor([20.0, 700.0, 20.0, 700.0])
    with torch.no_grad():
        actual = model.forward_with_cfg(x, t.to(device), y, 2.5)
        twin = reference_of(copy.deepcopy(model).cpu())
        expected = twin.forward_with_cfg(
            x.cpu().double(), t, y.cpu(), 2.5, [SCHEDULE.grid(step) for step in t.tolist()]
        )
    assert relative_error(actual.cpu().double(), expected) <= 2e-5


def test_training_follows_the_cpu(backend, device, monkeypatch):
    """Five steps; the loss and the weights stay where the CPU's are."""

    def train(where):
        model = device_model(where, class_dropout_prob=0.0)
        x, t, y = device_inputs(model.config, where)
        target = randn(3, 8, 12, 12, dtype=torch.float32).to(where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(5):
            loss = (model.train()(x, t, y) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: p.detach().cpu() for name, p in model.named_parameters()}

    losses, weights = train(device)
    monkeypatch.undo()  # from the emulator to the CPU
    expected_losses, expected_weights = train(torch.device("cpu"))
    assert expected_losses[-1] < 0.95 * expected_losses[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(relative_error(weights[name], tensor) <= 1e-5 for name, tensor in expected_weights.items())


def test_labels_out_of_range(device, gpu_like):
    """Nobody waits for labels: one that does not exist makes its own sample NaN, and no other."""
    model = device_model(device)
    x, t, y = device_inputs(model.config, device)
    with torch.no_grad():
        expected = model(x, t, y)
        for label in (-1, 11, 2**40):
            bad = y.clone()
            bad[1] = label
            out = model(x, t, bad)
            assert out[1].isnan().all()
            assert torch.equal(out[0], expected[0]) and torch.equal(out[2], expected[2])


def test_timesteps_out_of_range(device, gpu_like):
    """They take the first or the last segment's grid."""
    model = device_model(device)
    x, _, y = device_inputs(model.config, device)
    t = torch.tensor([-40.0, 400.0, 2000.0], device=device)
    with torch.no_grad():
        out, expected = model(x, t, y), model(x, t, y, [(4, 4), (3, 3), (2, 2)])
    assert relative_error(out, expected) <= 5e-6


# ---- the module -----------------------------------------------------------------------------------------------------

INPUTS = {
    "channels_last": lambda x, t, y: (x.to(memory_format=torch.channels_last), t, y),
    "every second value": lambda x, t, y: tuple(torch.stack([v, v + 1], dim=-1)[..., 0] for v in (x, t, y)),
    "transposed image": lambda x, t, y: (x.mT.contiguous().mT, t, y),
    "narrow labels": lambda x, t, y: (x, t.double(), y.to(torch.int8)),
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS.keys())
def test_inputs_of_other_kinds(change, device, gpu_like):
    model = device_model(device)
    inputs = device_inputs(model.config, device)
    assert same_tensors(results(model, *change(*inputs)), results(model, *inputs))


def test_activation_checkpointing(device, gpu_like):
    model = device_model(device, reinject_position=True)
    inputs = device_inputs(model.config, device)
    plain = results(model, *inputs)
    calls = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    assert same_tensors(results(model, *inputs), plain)
    assert len(calls) == 2 * model.config.depth  # every block ran a second time in backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_autocast(dtype, device, gpu_like):
    """Arithmetic in autocast's dtype, gradients in float32."""
    model = device_model(device)
    x, t, y = device_inputs(model.config, device)

    with torch.autocast(device.type, dtype):
        result = results(model, x, t, y)
    assert result["out"].dtype == dtype
    assert all(tensor.dtype == torch.float32 for name, tensor in result.items() if name != "out")
    half = copy.deepcopy(model).to(dtype)
    assert torch.equal(result["out"], results(half, x.to(dtype), t, y)["out"])


def test_no_gradients(device, gpu_like):
    model = device_model(device)
    inputs = device_inputs(model.config, device)
    expected = model(*inputs)
    with torch.no_grad():
        plain = model(*inputs)
    with torch.inference_mode():
        assert torch.equal(model(*inputs), plain)
    assert expected.requires_grad and not plain.requires_grad
    assert relative_error(plain, expected.detach()) <= 3e-6


def test_empty_batch(device, gpu_like):
    model = device_model(device)
    inputs = [torch.empty(0, 4, 12, 12), torch.empty(0), torch.empty(0, dtype=torch.int64)]
    result = forward_backward(model, *(value.to(device) for value in inputs))
    assert result.out.shape == (0, 8, 12, 12) and result.x.shape == (0, 4, 12, 12)
    assert not any(gradient.any() for gradient in result.parameters.values())


def test_label_dropout(device, gpu_like):
    """train() replaces each label by the null class with the probability given; torch's generator decides."""
    model = device_model(device, num_sdtm=0, num_dense_blocks=0, input_size=2, class_dropout_prob=0.25, schedule=None)
    count = 200
    x = randn(1, 4, 2, 2, dtype=torch.float32).expand(count, -1, -1, -1).to(device)
    t, y = torch.full((count,), 3, device=device), torch.full((count,), 4, device=device)
    with torch.no_grad():
        kept, null = model(x, t, y), model(x, t, torch.full_like(y, 10))
        torch.manual_seed(0)
        out = model.train()(x, t, y)
        torch.manual_seed(0)
        assert torch.equal(model(x, t, y), out)
    dropped = (out == null).flatten(1).all(1)
    assert torch.equal(torch.where(dropped[:, None, None, None], null, kept), out)
    assert abs(int(dropped.sum()) - 50) <= 5 * (count * 0.25 * 0.75) ** 0.5


# ---- what CUDA refuses ----------------------------------------------------------------------------------------------


def test_head_size(device):
    model = device_model(device, hidden_size=24)
    with pytest.raises(ValueError, match="the head size is 12, must be a multiple of 8 from 8 to 128 on CUDA"):
        model(*device_inputs(model.config, device))


def test_hidden_size(device):
    model = device_model(device, hidden_size=1552, num_heads=97, num_pooling_blocks=0, num_sdtm=0)
    with pytest.raises(ValueError, match="rows have 1552 columns, the CUDA backend takes at most 1536"):
        model(*device_inputs(model.config, device))


def test_float64(device):
    model = device_model(device, torch.float64)
    with pytest.raises(ValueError, match="float64, which the CUDA backend does not compute with"):
        model(*device_inputs(model.config, device, dtype=torch.float64))
