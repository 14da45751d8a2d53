"""Session: requests of any age, sampler, guidance and size in one batch give the images they give alone."""

import contextlib
import copy
import functools
import math
import resource
import threading
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from devices import CUDA, short
from helpers import flexdit_config, random_model, reference_of, relative_error
from hypothesis import strategies as st
from test_sampler import ScheduledReference

from flexdit_ext import _C, DensitySchedule, FlexDiT, QueueFull, Sampler, reference, sample

SCHEDULE = DensitySchedule([(4, 4), (3, 3), (2, 2)])
# A row is rounded in the same way in any company with AVX-512 and AMX only.
COMPANY = 0.0 if _C.build_info()["instruction_set"] in ("avx512", "amx") else 1e-4


@functools.cache
def model() -> FlexDiT:
    return random_model(num_sdtm=1, schedule=SCHEDULE)


@functools.cache
def sampler_of(dtype=torch.float32) -> Sampler:
    return Sampler(model(), dtype)


def run_out(session) -> int:
    """Steps until nobody is left."""
    steps = 0
    while session.step():
        steps += 1
    return steps + 1


def alone(prepared=None, **request):
    session = (prepared or sampler_of()).session(max_batch=1)
    key = session.add(**request)
    run_out(session)
    return session.take(key)


def same(actual, expected) -> bool:
    return torch.equal(actual, expected) if COMPANY == 0 else relative_error(actual, expected, 1e-3) <= COMPANY


# ---- continuous batching --------------------------------------------------------------------------------------------

SOLVERS = [("ddim", 3, 0.0), ("ddim", "ddim4", 0.7), ("ddpm", 3, 0.0), ("dpmpp", 4, 0.0), ("flow", 2, 0.0),
           ("heun", 3, 0.0), ("ddpm", 1, 0.0)]  # fmt: skip


@st.composite
def requests(draw):
    sampler, steps, eta = draw(st.sampled_from(SOLVERS))
    size = draw(st.sampled_from([None, None, (12, 12), (8, 8), (4, 10), (16, 6)]))
    return {
        "label": draw(st.integers(0, 10)),
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "cfg_scale": draw(st.sampled_from([1.0, 1.0, 2.5, 0.0])),
        "seed": draw(st.integers(0, 3)),
        "size": size,
        "grid": draw(st.sampled_from([None, None, (1, 2), (2, 3)])),
        "guidance_interval": draw(st.sampled_from([None, (200, 700)])),
        "clip_x0": draw(st.booleans()),
    }


@functools.cache
def image_of(items):
    return alone(**dict(items))


# What happens before each step: new requests, and whether one that is there is cancelled or results are taken.
EVENTS = st.lists(
    st.tuples(st.lists(requests(), max_size=3), st.sampled_from(["", "", "cancel", "take"]), st.integers(0, 99)),
    min_size=1,
    max_size=7,
)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(events=EVENTS, max_batch=st.integers(1, 5), modulations=st.sampled_from([1, 20_000, 1 << 28]))
def test_every_image_is_the_one_alone(events, max_batch, modulations):
    sampler = copy.copy(sampler_of())
    sampler._modulation_bytes = modulations
    session, expected, taken = sampler.session(max_batch), {}, {}
    for arrivals, event, which in events:
        for request in arrivals:
            expected[session.add(**request)] = request
        if event == "cancel" and expected:
            key = sorted(expected)[which % len(expected)]
            alive = session.state(key) in ("queued", "active")
            assert session.cancel(key) == alive
            if alive:
                assert session.state(key) == "unknown" and session.take(key) is None
                del expected[key]
        if event == "take":
            taken |= session.take()
        left = session.step()
        assert left == session.active + session.queued
        assert session.active <= max_batch
    run_out(session)
    taken |= session.take()
    assert taken.keys() == expected.keys()
    for key, request in expected.items():
        assert same(taken[key], image_of(tuple(request.items()))), request
        assert session.state(key) == "unknown"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_company_in_other_dtypes(dtype):
    requests = [
        {"label": 1, "sampler": "heun", "steps": 3, "cfg_scale": 2.0},
        {"label": 2, "sampler": "ddpm", "steps": 4, "size": (8, 16)},
        {"label": 3, "steps": 2, "grid": (1, 3), "seed": 5},
    ]
    session = sampler_of(dtype).session()
    keys = []
    for request in requests:
        keys.append(session.add(**request))
        session.step()
    run_out(session)
    for key, request in zip(keys, requests, strict=True):
        actual, expected = session.take(key), alone(sampler_of(dtype), **request)
        assert actual.dtype == dtype
        assert relative_error(actual, expected, 1e-3) <= (1e-12 if dtype == torch.float64 else COMPANY)


# The worst difference that company may make, of the largest value. On the emulator none: a row's sums have one order.
# On a GPU cuBLASLt chooses by the number of rows; nothing measured there yet.
CUDA_COMPANY = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", CUDA_COMPANY, ids=short)
def test_company_on_the_cuda_kernels(dtype, backend, device):
    """Every kind of request joins, leaves and is cancelled while others go on."""
    small = {"hidden_size": 32, "sdtm_blocks": (1, 1, 1, 1), "num_sdtm": 1, "schedule": SCHEDULE}  # heads of 16
    prepared = Sampler(random_model(dtype, **small).to(device))
    requests = [
        {"label": 1, "sampler": "heun", "steps": 2, "cfg_scale": 2.0},
        {"label": 2, "sampler": "ddpm", "steps": 4, "size": (8, 16), "clip_x0": True},
        {"label": 3, "steps": 2, "grid": (1, 3), "seed": 5, "eta": 1.0},
        {"label": 4, "sampler": "dpmpp", "steps": 3, "cfg_scale": 0.5, "guidance_interval": (0, 700)},
    ]
    session = prepared.session(max_batch=3)
    cancelled, keys = session.add(0, 9), []
    for request in requests:
        keys.append(session.add(**request))
        session.step()
    assert session.cancel(cancelled)
    run_out(session)
    for key, request in zip(keys, requests, strict=True):
        actual, expected = session.take(key), alone(prepared, **request)
        assert actual.dtype == dtype and actual.device.type == device.type
        if backend == "emulated":
            assert torch.equal(actual, expected), request
        else:
            assert relative_error(actual, expected, 1e-3) <= CUDA_COMPANY[dtype], request


def test_the_image_is_samples():
    session = sampler_of().session()
    key = session.add(3, 5, "ddpm", 2.0, 77, guidance_interval=(100, 900), size=(8, 16))
    assert run_out(session) == 5
    images = sampler_of().sample([3, 2], 5, "ddpm", 2.0, 77, guidance_interval=(100, 900), size=(8, 16))
    assert images.shape == (2, 4, 8, 16) and same(session.take(key), images[0])


def test_thirty_three_compositions_and_back():
    """More plans than are kept, then the first ones again."""
    session, images = sampler_of().session(max_batch=2), []
    for _ in range(2):
        for height in range(1, 7):
            for width in range(1, 7):
                key = session.add(1, 1, grid=(height, width))
                session.step()
                images.append(session.take(key))
    assert all(torch.equal(one, other) for one, other in zip(images[:36], images[36:], strict=True))
    assert not torch.equal(images[0], images[1])


# ---- other sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reinject", [False, True])
@pytest.mark.parametrize("side", [2, 8, 20])
def test_other_sizes_are_a_model_of_that_size(side, reinject):
    """The same weights with that size's position embedding, and the schedule's grids in proportion."""
    small = random_model(torch.float64, num_sdtm=1, schedule=SCHEDULE, reinject_position=reinject)
    grids = [(round_half_up(s * side, 12),) * 2 for s in (4, 3, 2)]
    overrides = {"input_size": side, "schedule": DensitySchedule(grids), "reinject_position": reinject}
    other = FlexDiT(flexdit_config(num_sdtm=1, **overrides), dtype=torch.float64)
    state = {name: tensor for name, tensor in small.state_dict().items() if name != "pos_embed"}
    assert other.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    run = {"steps": 4, "sampler": "heun", "cfg_scale": 2.0, "seed": 1}
    actual = alone(Sampler(small), label=3, size=(side, side), **run)
    assert actual.shape == (4, side, side)
    assert relative_error(actual, sample(other, [3], **run)[0], 1e-3) <= 1e-9


def round_half_up(numerator: int, denominator: int) -> int:
    return max(1, (2 * numerator + denominator) // (2 * denominator))


@pytest.mark.parametrize("size", [(8, 12), (20, 4), (2, 2)])
def test_oblong_sizes_are_the_references(size):
    small = random_model(torch.float64, num_sdtm=1, schedule=SCHEDULE, reinject_position=True)
    dense = tuple(side // 2 for side in size)
    config = SimpleNamespace(**{name: getattr(small.config, name) for name in CONFIG_FIELDS} | {
        "dense_grid": dense, "out_channels": 8, "input_size": size})  # fmt: skip
    twin = reference.FlexDiT(config).double().eval()
    state = {name: tensor for name, tensor in reference_of(small).state_dict().items() if name != "pos_embed"}
    assert twin.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    scheduled = ScheduledReference(small)
    scheduled.reference, scheduled.config = twin, config
    scheduled.schedule = DensitySchedule([tuple(round_half_up(s * n, 6) for n in dense) for s in (4, 3, 2)])
    run = {"steps": 3, "sampler": "ddpm", "cfg_scale": 0.5, "seed": 1}
    actual = alone(Sampler(small), label=3, size=size, **run)
    assert relative_error(actual, sample(scheduled, [3], **run)[0], 1e-3) <= 1e-9


CONFIG_FIELDS = ("patch_size", "in_channels", "hidden_size", "num_heads", "mlp_ratio", "num_classes", "learn_sigma",
                 "class_dropout_prob", "num_pooling_blocks", "num_sdtm", "sdtm_blocks", "num_dense_blocks",
                 "reinject_position", "timestep_shift", "mlp_norm_eps")  # fmt: skip


# ---- queue, states, results -----------------------------------------------------------------------------------------


def test_life_of_a_request():
    session = sampler_of().session(max_batch=1, queue_capacity=2)
    first, second = session.add(1, 2), session.add(2, 1)
    assert first != second and (session.active, session.queued) == (0, 2)
    assert session.state(first) == session.state(second) == "queued"
    assert session.take(first) is None and session.take() == {}
    with pytest.raises(QueueFull, match="the queue is full: 2 requests wait"):
        session.add(3)
    assert issubclass(QueueFull, RuntimeError)
    assert session.step() == 2 and (session.active, session.queued) == (1, 1)
    assert session.state(first) == "active"
    third = session.add(3, 1)  # there is room again
    assert session.step() == 2 and session.state(first) == "finished" and session.active == 0
    assert not session.cancel(first)
    image = session.take(first)
    assert image.shape == (4, 12, 12) and session.take(first) is None and session.state(first) == "unknown"
    assert session.cancel(second) and not session.cancel(second) and session.queued == 1
    assert run_out(session) == 1
    assert list(session.take()) == [third] and session.take() == {}
    assert session.step() == 0
    assert session.state(10**9) == session.state(-1) == "unknown" and not session.cancel(10**9)


def test_cancelled_while_active():
    session = sampler_of().session()
    keys = [session.add(label, 4, "heun", seed=label) for label in range(3)]
    session.step()
    assert session.cancel(keys[1]) and session.state(keys[1]) == "unknown"
    run_out(session)
    assert session.take(keys[1]) is None
    for label in (0, 2):
        assert same(session.take(keys[label]), alone(label=label, steps=4, sampler="heun", seed=label))


def test_results_are_the_callers():
    session = sampler_of().session()
    keys = [session.add(1, 1), session.add(1, 1)]
    run_out(session)
    first = session.take(keys[0]).zero_()
    assert not torch.equal(session.take(keys[1]), first) and not first.requires_grad


# ---- failures -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def address_space(extra: int):
    """No more than `extra` bytes beyond what is in use."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_request_without_room_fails_alone():
    session = sampler_of().session()
    early = session.add(1, 3)
    session.step()
    huge, late = session.add(2, 3, size=(4096, 4096)), session.add(3, 3)
    with address_space(200 << 20):
        session.step()
    assert session.state(huge) == "failed" and session.state(early) == session.state(late) == "active"
    run_out(session)
    assert same(session.take(early), alone(label=1, steps=3)) and same(session.take(late), alone(label=3, steps=3))
    assert not session.cancel(huge)
    with pytest.raises(RuntimeError, match=r"bad_alloc|memory"):
        session.take(huge)
    assert session.state(huge) == "unknown" and session.take(huge) is None

    early = session.add(1, 3)
    session.step()
    again = session.add(2, 3, size=(4096, 4096))  # and nobody after it
    with address_space(200 << 20):
        session.step()
    (error,) = session.take().values()
    assert isinstance(error, RuntimeError) and session.state(again) == "unknown"
    run_out(session)
    assert same(session.take(early), alone(label=1, steps=3))


GOOD = {"label": 1, "steps": 2}
BAD = [
    ({"label": 11}, ValueError, "label = 11: must be at least 0, at most 10"),
    ({"label": -1}, ValueError, "label = -1"),
    ({"label": 1.0}, TypeError, "label = 1.0"),
    ({"label": None}, TypeError, "label"),
    ({"label": True}, TypeError, "label"),
    ({"steps": 0}, ValueError, "steps = 0"),
    ({"steps": 1001}, ValueError, "steps = 1001"),
    ({"steps": 1.5}, TypeError, "steps = 1.5"),
    ({"steps": [1]}, TypeError, "steps"),
    ({"steps": True}, TypeError, "steps"),
    ({"steps": "ddim300"}, ValueError, "steps = 'ddim300'"),
    ({"steps": "3", "sampler": "flow"}, TypeError, "steps"),
    ({"sampler": "euler"}, ValueError, "sampler = 'euler'"),
    ({"sampler": None}, ValueError, "sampler"),
    ({"sampler": []}, ValueError, "sampler"),
    ({"eta": 1.5}, ValueError, "eta"),
    ({"eta": "1"}, TypeError, "eta"),
    ({"eta": 0.5, "sampler": "heun"}, ValueError, "eta"),
    ({"cfg_scale": -1.0}, ValueError, "cfg_scale = -1.0"),
    ({"cfg_scale": math.nan}, ValueError, "cfg_scale = nan"),
    ({"cfg_scale": [1.0, 2.0]}, ValueError, "cfg_scale"),
    ({"cfg_scale": "2"}, TypeError, "cfg_scale"),
    ({"seed": -1}, ValueError, "seed = -1"),
    ({"seed": 2**64}, ValueError, "seed = 18446744073709551616"),
    ({"seed": 0.5}, TypeError, "seed"),
    ({"seed": [1]}, TypeError, "seed"),
    ({"size": (13, 12)}, ValueError, r"size is \(13, 12\), must be \(height, width\): multiples of the patch size 2"),
    ({"size": (12, 16386)}, ValueError, "size"),
    ({"size": (0, 12)}, ValueError, "size"),
    ({"size": 12}, TypeError, "size"),
    ({"size": (12.0, 12)}, TypeError, "size"),
    ({"size": (2, 12, 12)}, ValueError, "size"),
    ({"grid": (7, 6)}, ValueError, r"grid has the sparse grid \(7, 6\), at most the dense grid \(6, 6\)"),
    ({"grid": (5, 1), "size": (8, 8)}, ValueError, r"grid has the sparse grid \(5, 1\), at most the dense.*\(4, 4\)"),
    ({"grid": (0, 1)}, ValueError, "grid"),
    ({"grid": (2, 2, 2)}, ValueError, "grid"),
    ({"grid": [(2, 2)]}, TypeError, "grid"),
    ({"grid": "22"}, TypeError, "grid"),
    ({"guidance_interval": (5, 1)}, ValueError, "guidance_interval"),
    ({"guidance_interval": (1,)}, TypeError, "guidance_interval"),
    ({"guidance_interval": (0, "1")}, TypeError, r"guidance_interval\[1\]"),
    ({"guidance_interval": (math.nan, 1.0)}, ValueError, r"guidance_interval\[0\]"),
    ({"clip_x0": 1}, TypeError, "clip_x0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def session_of_errors():
    return sampler_of().session(max_batch=2, queue_capacity=2)


@pytest.mark.parametrize("change, error, message", BAD)
def test_add_refuses_bad_input_by_name(session_of_errors, change, error, message):
    """And the session stays usable, whatever it refused before."""
    session = session_of_errors
    with pytest.raises(error, match="^" + message):
        session.add(**(GOOD | change))
    assert session.queued == 0
    key = session.add(**GOOD)
    run_out(session)
    assert same(session.take(key), image_of(tuple(GOOD.items())))


@pytest.mark.parametrize("change, error, message", [
    ({"max_batch": 0}, ValueError, "max_batch is 0"),
    ({"max_batch": 2**31}, ValueError, "max_batch"),
    ({"max_batch": 1.0}, TypeError, "max_batch"),
    ({"queue_capacity": 0}, ValueError, "queue_capacity"),
    ({"queue_capacity": None}, TypeError, "queue_capacity"),
    ({"guidance_channels": 0}, ValueError, "guidance_channels = 0: must be at least 1, at most 4"),
    ({"guidance_channels": 5}, ValueError, "guidance_channels"),
    ({"guidance_channels": "most"}, ValueError, "guidance_channels"),
])  # fmt: skip
def test_constructor_refuses_bad_input_by_name(change, error, message):
    with pytest.raises(error, match="^" + message):
        sampler_of().session(**change)


def test_ids_are_ints():
    session = sampler_of().session()
    for call in (session.take, session.cancel, session.state):
        with pytest.raises(TypeError, match="request = 'a': must be an int"):
            call("a")
    with pytest.raises(TypeError, match="request"):
        session.state(None)


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_add_cancel_and_take_while_others_step():
    session, failures, results = sampler_of().session(max_batch=4, queue_capacity=8), [], {}
    start = threading.Barrier(5)

    def client(seed):
        start.wait()
        for i in range(6):
            request = {"label": i % 5, "steps": 1 + i % 3, "seed": seed}
            while True:
                try:
                    key = session.add(**request)
                    break
                except QueueFull:
                    pass
            if i == 4:
                session.cancel(key)
                continue
            while (image := session.take(key)) is None:
                if session.state(key) not in ("queued", "active", "finished"):
                    failures.append(request)
            results[seed, i] = request, image

    def stepper():
        start.wait()
        while clients_left() or session.active + session.queued:
            session.step()

    def clients_left():
        return any(thread.is_alive() for thread in threads[:3])

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    threads += [threading.Thread(target=stepper) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not failures
    assert len(results) == 3 * 5
    for request, image in results.values():
        assert same(image, image_of(tuple(request.items())))


def test_sessions_of_one_sampler_in_two_threads():
    wrong, start = [], threading.Barrier(2)
    requests = [{"label": 1, "steps": 3, "sampler": "ddpm"}, {"label": 4, "steps": 2, "cfg_scale": 2.0, "size": (8, 8)}]
    expected = [alone(**request) for request in requests]

    def work(i):
        start.wait()
        for _ in range(10):
            if not torch.equal(alone(**requests[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
