"""Sampling from FlexPixArt and FlexLatte."""

import pytest
import torch
from test_single_model import CLASS_CLIP, PIXART, TEXT_CLIP, inputs_of, make

from flexdit_ext import sample_conditional
from flexdit_ext.diffusion.samplers import make_sampler
from flexdit_ext.sampling import normal_noise

CONFIGS = {"pixart": PIXART, "text clip": TEXT_CLIP, "class clip": CLASS_CLIP}


def conditions_of(config):
    values = inputs_of(config)
    conditions = {name: value for name, value in values.items() if name not in ("x", "t")}
    null = {"y": torch.tensor([5])} if config.num_classes else {"caption": torch.zeros(1, 6, 10, dtype=torch.float64)}
    return conditions, null


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_by_hand(name, sampler):
    """Two passes per step, all channels guided."""
    model, _ = make(CONFIGS[name])
    conditions, null = conditions_of(CONFIGS[name])
    actual = sample_conditional(model, conditions, 3, sampler, 2.5, [7, 8, 9], unconditional=null)
    without = conditions | {key: value.expand(3, *value.shape[1:]) for key, value in null.items()}
    walker, shape = make_sampler(sampler, 3, 0.0, False), inputs_of(CONFIGS[name])["x"].shape[1:]
    seeds = [sample_seed(seed) for seed in (7, 8, 9)]
    x = normal_noise(seeds, 0, shape, torch.float64)
    for i, timestep in enumerate(walker.timesteps):
        t = torch.full((3,), timestep)
        with torch.no_grad():
            cond, uncond = model(x, t, **conditions), model(x, t, **without)
        output = torch.cat([uncond[:, :4] + 2.5 * (cond[:, :4] - uncond[:, :4]), cond[:, 4:]], dim=1)
        noise = normal_noise(seeds, i + 1, shape, torch.float64) if walker.needs_noise(i) else None
        x = walker.step(output, i, x, noise)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-9)


def sample_seed(seed):
    from flexdit_ext.sampling import derive_seed

    return derive_seed(seed, 0)


def test_a_sample_does_not_depend_on_its_batch():
    model, _ = make(TEXT_CLIP)
    conditions, null = conditions_of(TEXT_CLIP)
    run = {"steps": 2, "cfg_scale": [1.0, 3.0, 2.0], "seed": 4, "unconditional": null}
    together = sample_conditional(model, conditions, **run)
    torch.testing.assert_close(sample_conditional(model, conditions, batch_size=1, **run), together, rtol=0, atol=1e-12)


def test_other_sizes():
    clips, _ = make(CLASS_CLIP)
    out = sample_conditional(clips, {"y": torch.tensor([1, 2])}, 2, size=(4, 12), frames=2, grid=[(1, 2, 2), (2, 1, 3)])
    assert out.shape == (2, 4, 2, 4, 12) and out.isfinite().all()


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"conditions": {}}, ValueError, "conditions has {} samples"),
        ({"conditions": [1]}, TypeError, "conditions is list, must map names to tensors"),
        ({"cfg_scale": 2.0}, ValueError, "cfg_scale is 2.0, guidance needs unconditional"),
        ({"cfg_scale": 2.0, "unconditional": {"z": torch.zeros(1)}}, ValueError, r"unconditional names \['z'\]"),
        (
            {"cfg_scale": 2.0, "unconditional": {"y": torch.tensor([5, 5])}},
            ValueError,
            "unconditional has 2 samples, must",
        ),
        ({"steps": 0}, ValueError, "steps"),
        ({"size": (7, 8)}, ValueError, r"size is \(7, 8\), must be \(height, width\): multiples of the patch size 2"),
        ({"frames": 9}, ValueError, "frames = 9: must be at least 1, at most 4"),
    ],
)
def test_refusals(change, kind, message):
    model, _ = make(CLASS_CLIP)
    with pytest.raises(kind, match=message):
        sample_conditional(model, **{"conditions": {"y": torch.tensor([0, 1, 2])}, "steps": 2} | change)
