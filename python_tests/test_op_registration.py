"""What torch.library and autograd ask of the public ops and of those inside the model: schemas, fakes, derivatives."""

import pytest
import torch
from devices import DEVICES
from helpers import randn, random_model
from op_cases import CASES, OPS, Case, evaluate, make_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from flexdit_ext import DensitySchedule, FlexLatte, FlexLatteConfig, _block_ops, ops

each_op = pytest.mark.parametrize("key", OPS)


@each_op
def test_gradcheck(key):
    op, case = OPS[key], Case(((3, 2), (1, 2)), ((2, 2), (1, 1)), 8, 2)
    tensors = [x.requires_grad_() for x in make_tensors(op, case, torch.float64)]
    rest = op.rest(*case.layouts(), case.heads)
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, op.name)(*x, *rest), tensors, atol=1e-7, rtol=1e-5)


def test_gradcheck_of_guidance():
    x = randn(4, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _block_ops.guidance_combine(x, 2, 2.5), [x])


@each_op
def test_no_second_derivative(key):
    """There is none, and saying so beats a silent zero."""
    op, case = OPS[key], CASES["one sample, head size 24"]
    tensors = [x.requires_grad_() for x in make_tensors(op, case, torch.float64)]
    out = getattr(ops, op.name)(*tensors, *op.rest(*case.layouts(), case.heads))
    if key == "pool_tokens":
        pytest.skip("linear, its backward does not depend on the input")
    with pytest.raises(RuntimeError):
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


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
    for kind in ("0123" if name.removesuffix("_backward").endswith("block") else ("",))
]


@pytest.fixture(scope="module", params=[DEVICES[0], DEVICES[2]])
def calls(request):
    device = request.param
    with Recorder() as recorder:
        for op in OPS.values():
            case = Case(((3, 2), (1, 2)), ((2, 2), (1, 1)), 16, 2)
            tensors = make_tensors(op, case, torch.float32, device=device)
            evaluate(getattr(ops, op.name), tensors, op.rest(*case.layouts(device), case.heads), torch.ones_like)
        schedule = DensitySchedule([(2, 2), (1, 1)])
        model = random_model(input_size=4, hidden_size=16, num_heads=2, schedule=schedule).to(device)
        x = randn(2, 4, 4, 4, dtype=torch.float32).to(device).requires_grad_()
        t, y = torch.tensor([3, 700], device=device), torch.tensor([1, 2], device=device)
        model(x, t, y).sum().backward()
        model.forward_with_cfg(x, t, y, 2.0)
        sizes = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "num_pooling_blocks": 1, "num_sdtm": 1}
        config = FlexLatteConfig(**sizes, num_frames=2, caption_channels=3, schedule=DensitySchedule([(1, 2, 1)]))
        clips = FlexLatte(config, device=device)
        clips(torch.stack([x, x], dim=2), t, caption=randn(2, 3, 3, dtype=torch.float32).to(device)).sum().backward()
    return recorder.calls


def fresh(argument, requires_grad):
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone().requires_grad_(requires_grad and argument.requires_grad)
    return [fresh(x, requires_grad) for x in argument] if isinstance(argument, list) else argument


@pytest.fixture
def filled_memory():
    """Where torch.empty leaves bytes unwritten it fills them: gaps between the pieces of a block's context are in its
    output, which opcheck compares."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(calls, call, filled_memory):
    function, args = calls[call]  # every op that is registered has been called
    forward = "backward" not in call
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(function, tuple(fresh(x, forward) for x in args), test_utils=utils)
