"""sample(): seeds, guidance, state, bad input; and the samplers' use out of order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy_model import ToyModel

from flexdit_ext.diffusion import (
    SAMPLERS,
    DDPMSampler,
    DPMSolverPPSampler,
    make_sampler,
)
from flexdit_ext.sampling import derive_seed, sample

SHAPE = (3, 4, 6, 6)


def test_sampler_steps_out_of_order_or_without_noise():
    x = torch.zeros(SHAPE)
    with pytest.raises(RuntimeError, match="step 1 to come just before"):
        DPMSolverPPSampler(5).step(x, 2, x)
    with pytest.raises(ValueError, match="noise"):
        DDPMSampler(5).step(x, 0, x)
    with pytest.raises(ValueError, match="model_output"):
        DDPMSampler(5, variance="learned").step(x, 0, x, x)
    with pytest.raises(ValueError, match="variance"):
        DDPMSampler(5, variance="fixed_large")


# What a run of each kind is given beside the model and the labels.
RUNS = [{"sampler": name, "steps": 6} for name in SAMPLERS] + [{"sampler": "ddim", "steps": "ddim5", "eta": 1.0}]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("run", RUNS)
def test_an_image_does_not_depend_on_its_batch(run, cfg_scale):
    model, y = ToyModel(), torch.tensor([3, 1, 4, 1, 5])
    together = sample(model, y, cfg_scale=cfg_scale, seed=7, **run)
    assert together.shape == (5, 4, 6, 6)
    assert together.isfinite().all()
    assert (together[1] - together[3]).abs().max() > 0.1  # the same label, but another sample
    assert torch.equal(together, sample(model, y, cfg_scale=cfg_scale, seed=7, **run))

    def close(images, expected):
        return (images - expected).abs().max() < 1e-5

    assert close(sample(model, y, cfg_scale=cfg_scale, seed=7, batch_size=2, **run), together)
    for i in (0, 3):
        alone = sample(model, y[i : i + 1], cfg_scale=cfg_scale, seed=7, start_index=i, **run)
        assert close(alone, together[i : i + 1])
    mixed = sample(model, y, cfg_scale=[cfg_scale, 9, 9, cfg_scale, 9], seed=7, **run)
    assert close(mixed[[0, 3]], together[[0, 3]])
    seeds = [7, 100, 2**63, 8, 7]
    listed = sample(model, y, cfg_scale=cfg_scale, seed=seeds, **run)
    for i, seed in enumerate(seeds):
        assert close(listed[i : i + 1], sample(model, y[i : i + 1], cfg_scale=cfg_scale, seed=seed, **run))
    assert close(listed[:1], together[:1])


def test_derived_seeds():
    seeds = {derive_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(2000)}
    assert len(seeds) >= 5998  # distinct within a run; between runs a chance collision is possible, though unlikely
    assert 0 <= min(seeds) <= max(seeds) < 2**32
    assert len({derive_seed(5, index) for index in range(100_000)}) == 100_000


@pytest.mark.parametrize(("in_channels", "learn_sigma", "guidance_channels", "guided"), [
    (4, True, None, 3), (4, True, "all", 4), (4, False, 2, 2), (1, True, None, 1), (1, False, None, 1), (3, True, 3, 3),
])  # fmt: skip
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guidance_formula(sampler, in_channels, learn_sigma, guidance_channels, guided):
    model, y = ToyModel(in_channels, learn_sigma).eval(), torch.tensor([3, 1])
    scales = [4.0, 0.5]
    options = {"steps": 5, "sampler": sampler, "seed": 3, "cfg_scale": scales, "guidance_channels": guidance_channels}
    images = sample(model, y, **options)
    assert torch.equal(model.calls[0].y, torch.tensor([3, 1, 10, 10]))
    assert torch.equal(*model.calls[0].x.chunk(2))

    walker = make_sampler(sampler, 5)
    generators = [torch.Generator().manual_seed(derive_seed(3, i)) for i in range(2)]

    def draw():
        return torch.stack([torch.randn(in_channels, 6, 6, generator=g) for g in generators])

    x, scale = draw(), torch.tensor(scales).view(2, 1, 1, 1)
    with torch.no_grad():
        for i, t in enumerate(walker.timesteps):
            t = torch.full((2,), t)
            output, uncond = model(x, t, y), model(x, t, torch.full((2,), 10))[:, :guided]
            output[:, :guided] = uncond + scale * (output[:, :guided] - uncond)
            x = walker.step(output, i, x, draw() if walker.needs_noise(i) else None)
    assert (images - x).abs().max() < 1e-5


def test_sample_of_the_null_class_is_guidance_zero():
    model = ToyModel()
    images = [
        sample(model, y, steps=5, cfg_scale=scale, guidance_channels="all") for y, scale in (([10], 1.0), ([3], 0.0))
    ]
    assert (images[0] - images[1]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sample_keeps_dtype_and_state(dtype):
    model = ToyModel(dtype=dtype)
    model.train()
    frozen = model.dropout.eval()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    images = sample(model, [1, 2], steps=3, sampler="flow", cfg_scale=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert images.dtype == dtype
    assert not images.requires_grad
    assert model.training
    assert not frozen.training
    assert not any(call.training for call in model.calls)
    assert {call.x.dtype for call in model.calls} == {dtype}
    assert [call.t[0].item() for call in model.calls] == pytest.approx([1000, 2000 / 3, 1000 / 3])


def test_sample_restores_training_after_an_error():
    class Failing(ToyModel):
        def forward(self, x, t, y, grid=None):
            raise RuntimeError("no")

    model = Failing()
    with pytest.raises(RuntimeError, match="no"):
        sample(model, [1])
    assert model.training
    assert model.dropout.training


def test_sample_hands_out_grids():
    model = ToyModel()
    sample(model, [1, 2, 3], steps=1, grid=[(1, 1), (2, 2), (3, 3)], batch_size=2, cfg_scale=2.0)
    sample(model, [1], steps=1, grid=[4, 5])
    assert [call.grid for call in model.calls] == [[(1, 1), (2, 2)] * 2, [(3, 3)] * 2, (4, 5)]


def test_sample_progress(capsys):
    pytest.importorskip("tqdm")
    sample(ToyModel(), [1, 2, 3], steps=4, batch_size=2, progress=True)
    assert "8/8" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"sampler": "euler"}, ValueError, "sampler = 'euler': must be one of 'ddim', 'ddpm', 'dpmpp', 'flow'"),
    ({"sampler": None}, ValueError, "sampler"),
    ({"steps": 0}, ValueError, "steps = 0: must be in 1..1000"),
    ({"steps": 1001}, ValueError, "steps = 1001"),
    ({"steps": 2.5}, TypeError, "steps = 2.5"),
    ({"steps": True}, TypeError, "steps"),
    ({"steps": "ddim300"}, ValueError, "steps = 'ddim300'"),
    ({"steps": "ddim10", "sampler": "flow"}, TypeError, "steps"),
    ({"eta": 1.5}, ValueError, "eta"),
    ({"eta": math.nan}, ValueError, "eta"),
    ({"eta": 0.5, "sampler": "ddpm"}, ValueError, "eta"),
    ({"eta": "a"}, TypeError, "eta"),
    ({"eta": None, "sampler": "flow"}, ValueError, "eta"),
    ({"clip_x0": 1}, TypeError, "clip_x0"),
    ({"cfg_scale": -1.0}, ValueError, "cfg_scale = -1.0"),
    ({"cfg_scale": math.nan}, ValueError, "cfg_scale = nan"),
    ({"cfg_scale": [1.0, 2.0, math.inf]}, ValueError, "cfg_scale = inf"),
    ({"cfg_scale": [1.0, 2.0]}, ValueError, "cfg_scale"),
    ({"cfg_scale": "big"}, TypeError, "cfg_scale"),
    ({"cfg_scale": None}, TypeError, "cfg_scale"),
    ({"cfg_scale": True}, TypeError, "cfg_scale"),
    ({"y": torch.tensor([0, 11, 3])}, ValueError, "y: labels must be in 0..10, got 0..11"),
    ({"y": torch.tensor([0, -1, 3])}, ValueError, "y"),
    ({"y": torch.tensor([0.0, 1.0, 3.0])}, TypeError, "y: must be int64, got torch.float32"),
    ({"y": torch.tensor([True, False, True])}, TypeError, "y"),
    ({"y": torch.tensor([[0, 1, 2]])}, ValueError, "y"),
    ({"y": torch.tensor(1)}, ValueError, "y"),
    ({"y": []}, ValueError, "y"),
    ({"y": 3}, TypeError, "y"),
    ({"y": ["a", "b", "c"]}, TypeError, "y"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 1.0}, TypeError, "seed"),
    ({"seed": [1, 2]}, ValueError, "seed"),
    ({"seed": [1, 2, None]}, TypeError, r"seed\[2\]"),
    ({"start_index": -1}, ValueError, "start_index"),
    ({"batch_size": 0}, ValueError, "batch_size"),
    ({"guidance_channels": 5}, ValueError, "guidance_channels"),
    ({"guidance_channels": 0}, ValueError, "guidance_channels"),
    ({"guidance_channels": "some"}, ValueError, "guidance_channels"),
    ({"guidance_channels": 1.5}, TypeError, "guidance_channels"),
    ({"grid": (0, 2)}, ValueError, "grid"),
    ({"grid": 3}, TypeError, "grid"),
    ({"grid": [(1, 1), (2, 2)]}, ValueError, "grid"),
    ({"grid": [(1, 1), (2, 2), None]}, TypeError, "grid"),
])  # fmt: skip
def test_sample_rejects_bad_input_by_name(change, error, message):
    model = ToyModel()
    with pytest.raises(error, match="^" + message):
        sample(model, **({"y": torch.tensor([0, 1, 2])} | change))
    assert not model.calls


def test_sample_needs_a_null_class_for_guidance_and_a_config():
    model = ToyModel(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"cfg_scale = 2\.0: guidance needs a null class"):
        sample(model, [1], cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"y: labels must be in 0\.\.9"):
        sample(model, [10])
    assert sample(model, [1], steps=2).shape == (1, 4, 6, 6)
    with pytest.raises(TypeError, match=r"model: .* without input_size"):
        sample(nn.Linear(1, 1), [1])
