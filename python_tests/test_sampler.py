"""The engine behind Sampler gives the Python samplers' images. Requests that come and go: test_session.py."""

import contextlib
import copy
import functools
import math
import pickle
import random
import threading

import pytest
import torch
from devices import CUDA, short
from helpers import VARIANTS, random_model, reference_of, relative_error
from test_sampling import SAMPLE_ERRORS
from torch import nn

import flexdit_ext
from flexdit_ext import _C, DensitySchedule, FlexDiT, Sampler, sample
from flexdit_ext.diffusion import make_sampler

SCHEDULE = DensitySchedule([(4, 4), (3, 3), (2, 2)])
VARIANT_MODELS = VARIANTS | {"noise alone": {"learn_sigma": False}}
Y = [3, 1, 10, 5]  # the null class is among them
SAMPLERS = ("ddim", "ddpm", "dpmpp", "flow", "heun")


@functools.cache
def model_of(variant: str = "plain", dtype: torch.dtype = torch.float32, **overrides) -> FlexDiT:
    return random_model(dtype, **({"schedule": SCHEDULE, "num_sdtm": 1} | VARIANT_MODELS[variant] | overrides))


@functools.cache
def sampler_of(variant: str = "plain", dtype: torch.dtype = torch.float32) -> Sampler:
    return Sampler(model_of(variant, dtype))


class ScheduledReference(nn.Module):
    """reference.py with a density schedule."""

    def __init__(self, model: FlexDiT):
        super().__init__()
        self.reference, self.config, self.schedule = reference_of(model), model.config, model.schedule

    def forward(self, x, t, y, grid=None):
        if grid is None and self.config.num_sdtm:
            grid = [self.schedule.grid(step) for step in t.tolist()]
        return self.reference(x, t, y, grid)


# What a run is given besides the model and the labels.
STEPS = {f"{name}, {steps} steps": {"sampler": name, "steps": steps} for name in SAMPLERS for steps in (1, 2, 7)}
OPTIONS = {
    "eta": {"steps": 5, "eta": 0.6},
    "eta 1, respaced": {"steps": "ddim5", "eta": 1.0},
    "ddim in sections": {"steps": "3,1,2"},
    "ddpm respaced": {"sampler": "ddpm", "steps": "ddim4"},
    "seeds": {"sampler": "ddpm", "steps": 3, "seed": [5, 0, 2**64 - 1, 5]},
    "later images": {"sampler": "ddpm", "steps": 3, "seed": 2**63, "start_index": 1000},
    "one grid": {"steps": 3, "grid": (2, 3)},
    "grids": {"steps": 3, "grid": [(1, 1), (4, 2), (2, 3), (3, 4)]},
    "clipped ddim": {"steps": 4, "eta": 0.5, "clip_x0": True},
    "clipped ddpm": {"sampler": "ddpm", "steps": 4, "clip_x0": True},
    "clipped dpmpp": {"sampler": "dpmpp", "steps": 4, "clip_x0": True},
    "clipped flow": {"sampler": "flow", "steps": 4, "clip_x0": True},
    "clipped heun": {"sampler": "heun", "steps": 4, "clip_x0": True},
    "two at once": {"sampler": "dpmpp", "steps": 4, "batch_size": 2},
    "three at once": {"sampler": "ddpm", "steps": 3, "batch_size": 3},
}
# Where there is a null class.
GUIDED = {f"guided {name}": {"sampler": name, "steps": 4, "cfg_scale": [2.5, 1.0, 0.0, 0.4]} for name in SAMPLERS} | {
    "one scale": {"steps": 4, "cfg_scale": 3.0},
    "all channels": {"sampler": "ddpm", "steps": 4, "cfg_scale": 2.0, "guidance_channels": "all"},
    "one channel": {"steps": 4, "cfg_scale": 2.0, "guidance_channels": 1},
    "interval": {"steps": 6, "cfg_scale": [3.0, 1.0, 2.0, 0.0], "guidance_interval": (150, 800)},
    "interval of heun": {"sampler": "heun", "steps": 5, "cfg_scale": 2.0, "guidance_interval": (300, 600.5)},
    "interval between steps": {"steps": 2, "cfg_scale": 2.0, "guidance_interval": (100, 101)},
    "guided, two at once, grids": {
        "steps": 3, "cfg_scale": [2.0, 1.0, 1.0, 3.0], "batch_size": 3, "grid": [(2, 2), (4, 4), (1, 3), (2, 2)],
    },
}  # fmt: skip
RUNS = STEPS | OPTIONS | GUIDED

# Largest relative errors allowed against the Python samplers with the same model in the same dtype. With AVX-512 a pass
# has the module's bits (see gemm_cpu.cpp) and a step those of samplers.py, so images are equal: all of 300 random
# models, samplers and guidances in float32 and 60 in bfloat16, 2-core AMD machine, torch 2.13, 2026-11-30.
# Elsewhere sums run in another order, and at t = 999 x0 is 157 times what the model says: sample() itself, when its
# model's inputs move by one unit in the last place, gives other images, up to 2e-6 plain and 1.1e-4 clipped, where the
# clamp leaves such an x0 alone. In float64 1.3e-15 and 1.3e-13; clamping what bfloat16 rounds gives another image.
EXACT = _C.build_info()["instruction_set"] in ("avx512", "amx")
BOUNDS = {
    torch.float64: {"plain": 1e-9, "clipped": 1e-9},
    torch.float32: {"plain": 0, "clipped": 0} if EXACT else {"plain": 1e-5, "clipped": 3e-4},
    torch.bfloat16: {"plain": 0, "clipped": 0} if EXACT else {"plain": 0.05},
}


def kind(run) -> str:
    return "clipped" if run.get("clip_x0") else "plain"


def error_of(actual, expected) -> float:
    assert actual.shape == expected.shape and actual.isfinite().all()
    return relative_error(actual.cpu().double(), expected.cpu().double(), least=1e-3)


# ---- against the Python samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, name", [(d, name) for d in BOUNDS for name, run in RUNS.items() if kind(run) in BOUNDS[d]]
)
def test_same_images_as_python(dtype, name):
    run = RUNS[name]
    expected = sample(model_of(dtype=dtype), Y, **({"seed": 9} | run))
    actual = sampler_of(dtype=dtype).sample(Y, **({"seed": 9} | run))
    assert actual.dtype == expected.dtype == dtype
    assert error_of(actual, expected) <= BOUNDS[dtype][kind(run)]


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("clip_x0", [False, True])
def test_same_images_with_three_modules(name, steps, clip_x0):
    """The more blocks and the more guidance, the more rounding for a clamp to pass on."""
    model = model_of(num_sdtm=3, num_pooling_blocks=2)
    run = {"sampler": name, "steps": steps, "cfg_scale": 4.0, "clip_x0": clip_x0}
    assert (
        error_of(Sampler(model).sample([3, 1], **run), sample(model, [3, 1], **run))
        <= (BOUNDS[torch.float32][kind(run)])
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [d for d in BOUNDS if d != torch.float64 and "clipped" in BOUNDS[d]], ids=short)
def test_same_images_of_random_models(dtype, seed):
    """Sizes, depths and grids beside those above."""
    draw = random.Random(seed)
    heads, side = draw.choice([1, 2, 4]), draw.choice([4, 6, 8])
    model = random_model(
        dtype,
        seed,
        hidden_size=heads * draw.choice([8, 12, 20]),
        num_heads=heads,
        input_size=2 * side,
        num_sdtm=1 + seed % 4,
        num_pooling_blocks=draw.randint(0, 3),
        schedule=DensitySchedule([(side - 1, side - 1), (side // 2, side // 2), (1, 2)]),
    )
    run = {"sampler": SAMPLERS[seed % 3], "steps": draw.choice([5, 10]), "cfg_scale": draw.choice([1.5, 4.0, 7.5])}
    run |= {"clip_x0": True, "seed": seed}
    assert error_of(Sampler(model).sample([3, 1], **run), sample(model, [3, 1], **run)) <= BOUNDS[dtype]["clipped"]


@pytest.mark.parametrize("variant", VARIANT_MODELS)
def test_model_variants(variant):
    model, y = model_of(variant), [3, 1, 9]
    guidance = {"cfg_scale": [2.0, 1.0, 0.5]} if model.config.class_dropout_prob > 0 else {}
    for sampler in SAMPLERS:
        run = {"sampler": sampler, "steps": 3, "seed": 4} | guidance
        error = error_of(sampler_of(variant).sample(y, **run), sample(model, y, **run))
        assert error <= BOUNDS[torch.float32]["plain"], sampler  # 5.5e-7


def test_trained_position_embedding_and_schedule_are_the_models():
    model = copy.deepcopy(model_of("position again"))
    with torch.no_grad():
        model.pos_embed.mul_(-0.5)
    model.schedule = DensitySchedule([(1, 2), (5, 3)])
    actual, expected = Sampler(model).sample(Y, 4), sample(model, Y, 4)
    assert error_of(actual, expected) <= 1e-5
    assert error_of(sampler_of("position again").sample(Y, 4), expected) > 1e-2


# ---- on the CUDA kernels --------------------------------------------------------------------------------------------

# Against the Python samplers with reference.py in float64; beside them the worst on the emulator, 2026-11-25.
CUDA_BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}  # 3.1e-6, 2.8e-2, 3.0e-3
CUDA_MODEL = {"hidden_size": 32, "sdtm_blocks": (1, 1, 1, 1)}  # heads of 16, which the kernels take
GUIDED_DDPM = {"sampler": "ddpm", "steps": 3, "cfg_scale": [2.0, 1.0, 0.5]}
GRIDS = {"steps": 2, "eta": 1.0, "grid": [(2, 2), (4, 3), (1, 1)], "batch_size": 2}
INTERVAL = {"sampler": "ddpm", "steps": 3, "cfg_scale": 3.0, "guidance_interval": (400, 1000)}
CUDA_RUNS = [(torch.float32, GUIDED_DDPM | {"sampler": name}) for name in SAMPLERS] + [
    (torch.float32, GRIDS),
    (torch.float32, INTERVAL | {"guidance_channels": "all"}),
    (torch.float32, {"steps": 1}),
    (torch.bfloat16, GUIDED_DDPM),
    (torch.bfloat16, GRIDS),
    (torch.float16, INTERVAL),
]


def cuda_error(device, model, run):
    actual = Sampler(copy.deepcopy(model).to(device)).sample([3, 1, 9], seed=4, **run)
    assert actual.dtype == model.pos_embed.dtype and actual.device.type == device.type
    return error_of(actual, sample(ScheduledReference(model), [3, 1, 9], seed=4, **run))


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype, run", CUDA_RUNS)
def test_cuda_images(dtype, run, device):
    assert cuda_error(device, model_of(dtype=dtype, **CUDA_MODEL), run) <= CUDA_BOUNDS[dtype]


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("variant", ["position again", "DiT", "noise alone", "patch 1, one channel"])
def test_cuda_variants(variant, device):
    model = model_of(variant, **(CUDA_MODEL | VARIANT_MODELS[variant]))
    assert cuda_error(device, model, {"sampler": "heun", "steps": 2}) <= CUDA_BOUNDS[torch.float32]


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 97, 250, 999, 1000])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_are_the_cpp_librarys(name, learned, steps):
    for eta in (0.0, 0.3, 1.0) if name == "ddim" else (0.0,):
        ours, theirs = make_sampler(name, steps, eta).steps, _C.sampler_steps(name, steps, eta, learned)
        assert len(ours) == len(theirs) == (2 * steps - 1 if name == "heun" else steps)
        for step, other in zip(ours, theirs, strict=True):
            timestep, *coefficients, learns, small, large = other.values()
            assert timestep == step.timestep
            assert learns == (learned and name == "ddpm")
            expected = [step.x0_from_x, step.x0_from_output, step.x_coef, step.x0_coef, step.x0_previous_coef]
            expected.append(step.noise_coef)
            if learns:
                coefficients, expected = [*coefficients, small, large], [*expected, *step.log_variances]
            assert coefficients == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_flow_timesteps_are_rounded_once():
    """An integer timestep decides the grid, so it must not be an ulp below."""
    for steps in range(1, 1001):
        table = [step.values()[0] for step in _C.sampler_steps("flow", steps, 0.0, False)]
        assert table == [1000 * k / steps for k in range(steps, 0, -1)]


@pytest.mark.parametrize("arguments, message", [
    (("euler", 5, 0.0, False), 'sampler is "euler", must be one of ddim, ddpm, dpmpp, flow, heun'),
    (("ddim", 0, 0.0, False), "steps is 0"),
    (("heun", 1001, 0.0, False), "steps is 1001"),
    (("ddim", 5, 1.5, False), "eta is 1.5"),
    (("ddim", 5, math.nan, False), "eta is nan"),
    (("flow", 5, 0.5, False), "eta is 0.5"),
])  # fmt: skip
def test_cpp_tables_refuse_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.sampler_steps(*arguments)


# ---- Sampler as an object -------------------------------------------------------------------------------------------

FAST = {"sampler": "ddpm", "steps": 3, "seed": 1, "cfg_scale": 2.0}


def test_weights_are_a_copy():
    model, other = copy.deepcopy(model_of()).train(), sampler_of()
    sampler, before = Sampler(model), torch.get_rng_state()
    expected = sampler.sample(Y, **FAST)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(sampler.sample(Y, **FAST), expected)
    assert torch.equal(other.sample(Y, **FAST), expected)  # train() drops no labels here
    assert torch.equal(torch.get_rng_state(), before) and model.training and not expected.requires_grad


@pytest.mark.parametrize("dtype", BOUNDS, ids=short)
def test_dtype_to_compute_with(dtype):
    sampler = Sampler(model_of(), dtype)
    assert sampler.dtype == dtype and sampler.device == torch.device("cpu") and sampler.config == model_of().config
    images = sampler.sample(Y, **FAST)
    assert images.dtype == dtype
    assert torch.equal(images, Sampler(copy.deepcopy(model_of()).to(dtype)).sample(Y, **FAST))


def test_memory_for_modulations_changes_nothing():
    sampler = Sampler(model_of(), modulation_bytes=1)  # those of one step at a time
    assert error_of(sampler.sample(Y, **FAST), sampler_of().sample(Y, **FAST)) <= 1e-5


def test_deterministic_and_the_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        images = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            images += [Sampler(model_of()).sample(Y, **FAST) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(images[0], other) for other in images[1:])


def test_settings_alternate():
    """A call's memory is kept for the next one, whose batch and guidance may be others."""
    runs = [FAST, FAST | {"guidance_channels": 1}, FAST | {"batch_size": 3}, {"steps": 2, "sampler": "heun"}]
    expected = [Sampler(model_of()).sample(Y, **run) for run in runs]
    sampler = Sampler(model_of())
    for _ in range(2):
        for run, images in zip(runs, expected, strict=True):
            assert torch.equal(sampler.sample(Y, **run), images)
            assert torch.equal(sampler.sample(Y[:1], **run), Sampler(model_of()).sample(Y[:1], **run))


def test_copies_share_the_weights_and_pickling_is_refused():
    sampler = sampler_of()
    for twin in (copy.copy(sampler), copy.deepcopy(sampler), copy.deepcopy({"sampler": sampler})["sampler"]):
        assert twin is not sampler and twin._core is sampler._core and twin._lock is not sampler._lock
        assert torch.equal(twin.sample(Y, **FAST), sampler.sample(Y, **FAST))
    with pytest.raises(TypeError, match="a Sampler cannot be pickled"):
        pickle.dumps(sampler)
    session = sampler.session()
    for fail in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Session can be neither copied nor pickled"):
            fail(session)


def test_two_threads_sample():
    sampler = Sampler(model_of())
    runs = [FAST, {"steps": 4, "seed": 3, "batch_size": 2}]
    expected = [sampler.sample(Y, **run) for run in runs]
    wrong, start = [], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(10):
            if not torch.equal(sampler.sample(Y, **runs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress(capsys):
    pytest.importorskip("tqdm")
    sampler_of().sample([1, 2, 3], steps=3, batch_size=2, sampler="heun", progress=True)
    assert "10/10" in capsys.readouterr().err  # two batches of five passes


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_usable_after_an_interruption(interruption, monkeypatch):
    sampler, calls = Sampler(model_of()), []

    @contextlib.contextmanager
    def interrupted(progress, passes):
        def tick():
            calls.append(passes)
            if len(calls) == 2:
                raise interruption("stop")

        yield tick

    expected = sampler.sample(Y, **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(flexdit_ext.sampler, "progress_bar", interrupted)
        with pytest.raises(interruption, match="stop"):
            sampler.sample(Y, **FAST)
    assert calls == [3, 3]
    assert torch.equal(sampler.sample(Y, **FAST), expected)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, error, message", [
    *SAMPLE_ERRORS,
    ({"batch_size": 2**31}, ValueError, "batch_size = 2147483648"),
    ({"batch_size": 2.0}, TypeError, "batch_size"),
    ({"start_index": 2**63}, ValueError, "start_index"),
    ({"grid": (7, 6)}, ValueError, r"grid has the sparse grid \(7, 6\), at most the dense grid \(6, 6\)"),
    ({"grid": [(1, 1), (2, 2), (6, 7)]}, ValueError, r"grid\[2\]"),
    ({"grid": (2, 2, 2)}, ValueError, "grid"),
    ({"size": (12, 13)}, ValueError, r"size is \(12, 13\), must be \(height, width\): multiples of the patch size 2"),
    ({"size": 12}, TypeError, "size"),
    ({"size": (8, 8), "grid": (5, 4)}, ValueError, r"grid has the sparse grid \(5, 4\), at most the dense.*\(4, 4\)"),
    ({"guidance_interval": (5, 1)}, ValueError, "guidance_interval"),
    ({"guidance_interval": 5}, TypeError, "guidance_interval"),
    ({"guidance_interval": (0, math.inf)}, ValueError, r"guidance_interval\[1\]"),
])  # fmt: skip
def test_sample_refuses_bad_input_by_name(change, error, message):
    with pytest.raises(error, match="^" + message):
        sampler_of().sample(**({"y": torch.tensor([0, 1, 2])} | change))


@pytest.mark.parametrize("change, error, message", [
    ({"model": nn.Linear(2, 2)}, TypeError, "model is Linear, must be a FlexDiT"),
    ({"model": None}, TypeError, "model is NoneType"),
    ({"model": random_model(num_sdtm=1).to("meta")}, ValueError, "Sampler: model is on meta"),
    ({"dtype": torch.float16}, TypeError, "dtype is torch.float16, must be one of float32, bfloat16, float64 on cpu"),
    ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
    ({"dtype": "float32"}, TypeError, "dtype is 'float32'"),
    ({"modulation_bytes": 0}, ValueError, "modulation_bytes is 0"),
    ({"modulation_bytes": 1e6}, TypeError, "modulation_bytes"),
])  # fmt: skip
def test_constructor_refuses_bad_input_by_name(change, error, message):
    with pytest.raises(error, match="^" + message):
        Sampler(**({"model": model_of()} | change))


def test_guidance_needs_a_null_class():
    sampler = sampler_of("noise alone, no null class")
    with pytest.raises(ValueError, match=r"cfg_scale = 2\.0: guidance needs a null class"):
        sampler.sample([1], cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"y: labels must be in 0\.\.9"):
        sampler.sample([10])


def test_a_longer_process_than_the_schedules_is_refused():
    short_schedule = Sampler(model_of(schedule=DensitySchedule([(2, 2)], num_timesteps=500)))
    with pytest.raises(ValueError, match=r"timestep is 999, must lie in \[0, 500\]"):
        short_schedule.sample([1], 5)


def test_grids_of_other_sizes_are_held_to_their_own_dense_grid():
    session = Sampler(model_of()).session()
    side, size = session._config.dense_grid[0], session._config.input_size
    session.add(0, steps=2, size=(2 * size, size), grid=(2 * side, 1))
    for grid in ((2 * side + 1, 1), (1, side + 1)):
        with pytest.raises(ValueError, match="grid has the sparse grid"):
            session.add(0, steps=2, size=(2 * size, size), grid=grid)
