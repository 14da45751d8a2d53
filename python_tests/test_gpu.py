"""What only a GPU has: streams, graphs, memory that runs out, work that nobody waits for, several devices. Numbers are
tested on the emulator and on a GPU alike, in test_ops.py, test_model.py and test_model_devices.py; mixed devices in
test_devices.py."""

import contextlib
import gc
import threading

import pytest
import torch
from devices import MARKS, short
from helpers import forward_backward, model_inputs, randn, random_model, relative_error, same_tensors, tensors_of
from model_cases import SCHEDULE, T, compare_with_reference, device_inputs, device_model, results
from op_cases import OPS, evaluate, make_tensors, odd_case

from flexdit_ext import DensitySchedule, FlexDiT, ops
from flexdit_ext.__main__ import information
from flexdit_ext._core import CUDA_ARCHITECTURES

pytestmark = MARKS["cuda"]
GPU = torch.device("cuda", 0)
several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def gradients(model, x, t, y, grad):
    """Output and the gradients of x and of the parameters, on the GPU and without waiting for it."""
    x = x.detach().requires_grad_()
    out = model(x, t, y)
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], grad)]


def output_gradient(x):
    return randn(len(x), 2 * x.shape[1], *x.shape[2:], seed=5).to(x)


def same(actual, expected):
    return all(map(torch.equal, actual, expected))


# ---- real sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("batch", [1, 8])
def test_width_of_xl(dtype, batch):
    """XL/2's rows and heads at 256 tokens, one of every block: too much for the emulator."""
    model = device_model(
        GPU, dtype, input_size=32, hidden_size=1152, num_heads=16, sdtm_blocks=(1, 1, 1, 1), schedule=DensitySchedule()
    )
    x, t, y = model_inputs(model.config, batch, dtype)
    compare_with_reference(model, x.to(GPU), t.to(GPU), y.to(GPU), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
def test_backward_repeats_to_the_bit(dtype):
    """No atomics, no order that chance decides."""
    model = device_model(GPU, dtype, input_size=32, hidden_size=384, num_heads=6, schedule=DensitySchedule())
    x, t, y = (value.to(GPU) for value in model_inputs(model.config, 8, dtype))
    first = gradients(model, x, t, y, output_gradient(x))
    for _ in range(5):
        assert same(gradients(model, x, t, y, output_gradient(x)), first)


# ---- streams --------------------------------------------------------------------------------------------------------


def sleep(cycles=200_000_000):
    """Keeps the current stream busy, by default for about a tenth of a second."""
    torch.cuda._sleep(cycles)


def test_work_waits_for_its_own_stream():
    """On another stream than the default one, behind what is queued there: forward and backward."""
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    grad = output_gradient(x)
    expected = gradients(model, x, t, y, grad)
    late_x, late_grad = torch.zeros_like(x), torch.zeros_like(grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sleep()
        late_x.copy_(x)
        late_grad.copy_(grad)
        actual = gradients(model, late_x, t, y, late_grad)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert same(actual, expected)


@pytest.mark.parametrize("key", OPS)
def test_every_op_waits_for_its_own_stream(key):
    op, case = OPS[key], odd_case("cuda", key)
    tensors = make_tensors(op, case, torch.float32, device=GPU)
    rest = op.rest(*case.layouts(GPU), case.heads)
    function = getattr(ops, op.name)
    expected = evaluate(function, tensors, rest, torch.ones_like)
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sleep()
        for target, x in zip(late, tensors, strict=True):
            target.copy_(x)
        actual = evaluate(function, late, rest, torch.ones_like)
    stream.synchronize()
    assert same(actual, expected)


def test_two_streams_with_events():
    """One stream makes what another one consumes; both work on two models at once."""
    models = [device_model(GPU, seed=seed) for seed in range(2)]
    x, t, y = device_inputs(models[0].config, GPU)
    with torch.no_grad():
        first = models[0](x, t, y)
        expected = models[1](first[:, :4].contiguous(), t, y)
    torch.cuda.synchronize()
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    outs = []
    for _ in range(10):
        with torch.cuda.stream(producer), torch.no_grad():
            sleep()
            made = models[0](x, t, y)[:, :4].contiguous()
            ready = torch.cuda.Event()
            ready.record()
        with torch.cuda.stream(consumer), torch.no_grad():
            ready.wait()
            made.record_stream(consumer)
            outs.append(models[1](made, t, y))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_two_python_threads():
    """Each with its own stream and model."""
    models = [device_model(GPU, seed=seed) for seed in range(2)]
    x, t, y = device_inputs(models[0].config, GPU)
    grad = output_gradient(x)
    alone = [gradients(model, x, t, y, grad) for model in models]
    torch.cuda.synchronize()
    good, start = [], threading.Barrier(2)

    def work(i):
        start.wait()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(8):
                result = gradients(models[i], x, t, y, grad)
                stream.synchronize()
                good.append(same(result, alone[i]))

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert good == [True] * 16


# ---- nobody waits ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def synchronisation_forbidden():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grid", [None, (3, 3)], ids=["schedule", "one grid"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_synchronisation(training, grid):
    """With t on the device the host runs ahead, in forward and in backward."""
    model = device_model(GPU, reinject_position=True).train(training)
    x, t, y = device_inputs(model.config, GPU)
    grad = output_gradient(x)
    model(x, t, y, grid).backward(grad)  # tables that are kept are copied to the device once
    torch.cuda.synchronize()
    with synchronisation_forbidden():
        sleep(1_000_000_000)
        out = model(x, t, y, grid)
        out.backward(grad)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the host waited for the device"
    torch.cuda.synchronize()
    assert out.isfinite().all()


def test_no_synchronisation_in_ops():
    for key, op in OPS.items():
        case = odd_case("cuda", key)
        tensors = make_tensors(op, case, torch.float32, device=GPU)
        rest = op.rest(*case.layouts(GPU), case.heads)
        with synchronisation_forbidden():
            evaluate(getattr(ops, op.name), tensors, rest, torch.ones_like)
    t = torch.tensor([3.0, 900.0], device=GPU)
    with synchronisation_forbidden():
        ops.select_tokens(t, DensitySchedule())


def test_t_on_the_cpu():
    """The sparse layout is exact then; labels and images are on the GPU."""
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    actual, expected = results(model, x, t.cpu(), y), results(model, x, t, y)
    exact = results(model, x, t, y, [SCHEDULE.grid(step) for step in T.tolist()])
    assert same_tensors(actual, exact)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor, least=1e-2) <= 5e-6, name
    with pytest.raises(ValueError, match="1001"):
        model(x, t.cpu() * 0 + 1001, y)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def capture(run, warm_ups=3):
    """A CUDA graph of run() and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("grid", [None, (3, 3)], ids=["schedule", "one grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_graph_of_forward(dtype, grid):
    """Replayed with other images, timesteps and labels: the grids follow t inside the graph."""
    model = device_model(GPU, dtype, reinject_position=True)
    x, t, y = device_inputs(model.config, GPU, dtype=dtype)
    with torch.no_grad():
        graph, out = capture(lambda: model(x, t, y, grid))
        for seed in range(3):
            x.copy_(randn(*x.shape, seed=seed))
            t.copy_(torch.tensor([[1000.0, 1.0, 2.0], [301.0, 601.0, 5.0], [0.0, 299.0, 300.0]][seed]))
            y.copy_(torch.tensor([seed, 9, 10]))
            graph.replay()
            assert torch.equal(out, model(x, t, y, grid))


def test_graph_of_forward_and_backward():
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    grad = output_gradient(x)
    graph, captured = capture(lambda: gradients(model, x, t, y, grad))
    x.copy_(randn(*x.shape, seed=3))
    t.copy_(torch.tensor([700.0, 20.0, 450.0]))
    graph.replay()
    assert same(captured, gradients(model, x, t, y, grad))


def test_graph_with_prior_allocations_freed():
    """What the graph needs is its own: memory that others give back and take again does not disturb it."""
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    with torch.no_grad():
        expected = model(x, t, y)
        graph, out = capture(lambda: model(x, t, y))
        torch.cuda.empty_cache()
        hog = [torch.full((1 << 20,), float("nan"), device=GPU) for _ in range(16)]
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, expected) and len(hog) == 16


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler, fresh_compiler):
    """fullgraph: no graph break in forward or backward, t on the device."""
    model = random_model(hidden_size=32, num_heads=2, num_sdtm=1, schedule=SCHEDULE).cuda()
    x, t, y = device_inputs(model.config, GPU)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = results(model, x, t, y)
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = compiled(x, t, y)
    out.backward(randn(*out.shape, seed=77).to(out))
    actual = {"out": out.detach(), "grad x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    for name, tensor in expected.items():
        assert relative_error(actual[name].cpu(), tensor, least=1e-2) <= 1e-5, name


def test_compile_follows_t(fresh_compiler):
    """One graph for every draw of timesteps."""
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for times in ([3.0, 299.5, 1000.0], [999.0, 400.0, 400.0], [0.0, 0.0, 0.0]):
            t.copy_(torch.tensor(times))
            assert relative_error(compiled(x, t, y), model(x, t, y)) <= 1e-5
    assert counter.frame_count == 1


def test_compile_under_autocast(fresh_compiler):
    model = device_model(GPU).train()
    inputs = device_inputs(model.config, GPU)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16):
        out = compiled(*inputs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_out_of_memory_leaves_the_process_usable():
    model = device_model(GPU)
    inputs = device_inputs(model.config, GPU)
    expected = results(model, *inputs)
    x, t, y = (value.to(GPU) for value in model_inputs(model.config, 4096))
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    # Room for a few megabytes more; the 4096 samples' tokens alone are 18 MB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + (4 << 20)) / total, GPU)
    try:
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                model(x, t, y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert same_tensors(results(model, *inputs), expected)
    assert model(x, t, y).isfinite().all()


def test_memory_does_not_grow():
    model = device_model(GPU)
    x, t, y = device_inputs(model.config, GPU)
    allocated = []
    for _ in range(6):
        gradients(model, x, t, y, output_gradient(x))
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated(GPU))
    assert len(set(allocated[1:])) == 1


def test_checkpoint_to_and_from_the_gpu(tmp_path):
    model = device_model(GPU)
    model.save_pretrained(tmp_path)
    inputs = device_inputs(model.config, GPU)
    loaded = FlexDiT.from_pretrained(tmp_path, device="cuda")
    assert next(loaded.parameters()).is_cuda
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))
    on_cpu = FlexDiT.from_pretrained(tmp_path, device="cpu")
    assert same_tensors(on_cpu.state_dict(), {name: tensor.cpu() for name, tensor in model.state_dict().items()})


# ---- devices --------------------------------------------------------------------------------------------------------


@several_gpus
def test_another_gpu_than_the_current_one():
    other = torch.device("cuda", 1)
    model = device_model(GPU)
    expected = results(model, *device_inputs(model.config, GPU))
    assert torch.cuda.current_device() == 0
    moved = device_model(other)
    assert same_tensors(results(moved, *device_inputs(moved.config, other)), expected)
    assert torch.cuda.current_device() == 0
    x, t, y = device_inputs(model.config, GPU)
    with pytest.raises(ValueError, match="x is on cuda:0, the model on cuda:1"):
        moved(x, t, y)


@several_gpus
def test_both_gpus_at_once():
    expected = None
    models = [device_model(torch.device("cuda", i)) for i in range(2)]
    inputs = [device_inputs(model.config, torch.device("cuda", i)) for i, model in enumerate(models)]
    outs = [forward_backward(model, *values) for model, values in zip(models, inputs, strict=True)]
    for result in outs:
        values = {name: tensor.cpu() for name, tensor in tensors_of(result).items()}
        expected = expected or values
        assert same_tensors(values, expected)


def test_information():
    lines = dict(information())
    assert lines["CUDA backend"] == f"built for {CUDA_ARCHITECTURES}"
    assert lines["GPU"] == torch.cuda.get_device_name()
