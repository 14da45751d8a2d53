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
from flexdit_ext.sampling import derive_seed, normal_noise, sample

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
    assert min(seeds) >= 0 and 2**63 < max(seeds) < 2**64
    assert len({derive_seed(5, index) for index in range(100_000)}) == 100_000


GOLDEN_SEEDS = (0x48218226FF3CD4BF, 0x46C23F25C710D2F)
GOLDEN_NOISE = [-0.1081065312, 0.5782386661, 0.3127120733, -1.5685698986]


# ---- noise ----------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 from the paper (SC 2011), section 3.3: plain integers, nothing shared with csrc/ops/philox.h."""
    for _ in range(10):
        high, low = zip(*(divmod(m * c, 2**32) for m, c in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2]))))
        counter = (high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0])
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def expected_noise(seed, draw, count):
    values = []
    for block in range((count + 3) // 4):
        words = philox((block, 0, draw, 0), (seed % 2**32, seed >> 32))
        for radius, angle in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log((radius + 1) / 2**32))
            values += [radius * math.cos(2 * math.pi * angle / 2**32), radius * math.sin(2 * math.pi * angle / 2**32)]
    return values[:count]


def test_noise_is_philox_and_box_muller():
    # Known answers of Random123's kat_vectors.
    assert philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    for seed, draw, count in ((0, 0, 600), (2**64 - 1, 2**32 - 1, 7), (0x123456789ABCDEF, 5, 1)):
        actual = normal_noise([seed], draw, (count,), torch.float64)[0]
        assert actual.tolist() == pytest.approx(expected_noise(seed, draw, count), rel=1e-12, abs=1e-14)
        assert torch.equal(normal_noise([seed], draw, (count,))[0], actual.float())


def test_noise_stays_what_it_was():
    """A seed's image must be the same in the next version."""
    assert derive_seed(0, 0) == GOLDEN_SEEDS[0] and derive_seed(7, 1000) == GOLDEN_SEEDS[1]
    assert normal_noise([GOLDEN_SEEDS[0]], 0, (2, 2)).flatten().tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)


def test_noise_is_normal():
    noise = normal_noise(range(64), 3, (4096,), torch.float64).flatten()
    n = noise.numel()
    for moment, (expected, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945)], start=1):
        assert abs((noise**moment).mean() - expected) < 4.5 * math.sqrt(variance / n), moment
    uniform = torch.special.ndtr(noise.sort().values)
    steps = torch.arange(n, dtype=torch.float64)
    assert torch.maximum(uniform - steps / n, (steps + 1) / n - uniform).max() < 1.95 / math.sqrt(n)  # Kolmogorov
    assert noise.abs().max() > 4


def test_streams_draws_and_neighbours_are_independent():
    limit = 5 / math.sqrt(4096)
    rows = torch.cat([normal_noise([derive_seed(s, i) for s in (0, 1) for i in range(8)], draw, (4096,), torch.float64)
                      for draw in (0, 1, 2)])  # fmt: skip
    for powers in (rows, rows.square() - 1):
        correlation = torch.corrcoef(powers) - torch.eye(len(rows))
        assert correlation.abs().max() < limit
        for lag in (1, 2, 3, 4, 36, 1024):
            assert (powers[:, lag:] * powers[:, :-lag]).mean().abs() < 2 * 5 / math.sqrt(powers[:, lag:].numel())


def test_noise_does_not_depend_on_its_batch_or_shape():
    seeds = [5, 2**63, 5]
    together = normal_noise(seeds, 1, (4, 9, 9))
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    for seed, row in zip(seeds, together):
        assert torch.equal(normal_noise([seed], 1, (4, 9, 9))[0], row)
        assert torch.equal(normal_noise([seed], 1, (300,))[0], row.flatten()[:300])
    assert normal_noise([], 0, (3,)).shape == (0, 3)


# ---- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_channels", "learn_sigma", "guidance_channels", "guided"), [
    (4, True, None, 3), (4, True, "all", 4), (4, False, 2, 2), (1, True, None, 1), (1, False, None, 1), (3, True, 3, 3),
])  # fmt: skip
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guidance_formula(sampler, in_channels, learn_sigma, guidance_channels, guided):
    model, y = ToyModel(in_channels, learn_sigma, dtype=torch.float64).eval(), torch.tensor([3, 1])
    scales = [4.0, 0.5]
    options = {"steps": 5, "sampler": sampler, "seed": 3, "cfg_scale": scales, "guidance_channels": guidance_channels}
    images = sample(model, y, **options)
    assert torch.equal(model.calls[0].y, torch.tensor([3, 1, 10, 10]))
    assert torch.equal(*model.calls[0].x.chunk(2))

    walker = make_sampler(sampler, 5)

    def draw(number):
        return normal_noise([derive_seed(3, 0), derive_seed(3, 1)], number, (in_channels, 6, 6), torch.float64)

    x, scale = draw(0), torch.tensor(scales).view(2, 1, 1, 1)
    with torch.no_grad():
        for i, t in enumerate(walker.timesteps):
            t = torch.full((2,), t)
            output, uncond = model(x, t, y), model(x, t, torch.full((2,), 10))[:, :guided]
            output[:, :guided] = uncond + scale * (output[:, :guided] - uncond)
            x = walker.step(output, i, x, draw(i + 1) if walker.needs_noise(i) else None)
    assert (images - x).abs().max() < 1e-11


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


# For three labels and a model of four channels.
SAMPLE_ERRORS = [
    ({"sampler": "euler"}, ValueError, "sampler = 'euler': must be one of 'ddim', 'ddpm', 'dpmpp', 'flow', 'heun'"),
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
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), SAMPLE_ERRORS)
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
