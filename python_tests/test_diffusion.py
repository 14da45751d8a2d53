"""Losses and samplers against diffusers' schedulers and independent float64 formulas.

Trajectory tolerances: see TOLERANCE.
"""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from helpers import randn
from torch import nn
from toy_model import ToyModel

from flexdit_ext.diffusion import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverPPSampler,
    FlowEulerSampler,
    FlowHeunSampler,
    GaussianDiffusion,
    ddpm_loss,
    flow_interpolate,
    flow_loss,
    flow_velocity,
    linear_betas,
    space_timesteps,
)

SHAPE = (3, 4, 6, 6)

# Worst absolute difference allowed over a whole trajectory of values of order 1, step counts 10, 25 and 1000 (999 for
# dpmpp). Beside each: the worst measured, on AMD EPYC (AVX-512), torch 2.13, diffusers 0.42.1, 2026-11-22.
STOCK = 1e-5  # diffusers as it is, 10 and 25 steps: 8.0e-6 (DDPM learned range), from its float32 alphas_cumprod
DOUBLE_TABLES = 1e-12  # diffusers' formulas on float64 tables, float64 samples: 8.9e-15
SINGLE = 1e-5  # diffusers' formulas on float64 tables, float32 samples: 7.9e-6 (DDIM, 1000 steps)
COARSE = 1e-4  # one or two steps of dpmpp, where x0 at t = 999 is 157 times a float32 difference: 2.9e-5


def call(model, x, t):
    with torch.no_grad():
        return model(x, torch.full((len(x),), t), torch.zeros(len(x), dtype=torch.int64))


def run_ours(sampler, model, x, noises):
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(call(model, x, t), i, x, noises[i])
    return x


def run_diffusers(scheduler, model, x, noises, timesteps, **step_options):
    """`timesteps`: what the model is told, step by step; the scheduler steps through its own."""
    assert len(scheduler.timesteps) == len(timesteps)
    for i, t in enumerate(scheduler.timesteps):
        # Every scheduler draws through its module's randn_tensor, so that is where our noise goes in.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, n=noises[i], **__: n)
            t = t if t.is_floating_point() else int(t)
            x = scheduler.step(call(model, x, timesteps[i]), t, x, **step_options).prev_sample
    return x


def double_tables(scheduler, betas):
    """Gives a diffusers scheduler float64 tables in place of its float32 ones; its formulas stay."""
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def deviation(scheduler, sampler, model, dtype, **step_options):
    x, noises = randn(*SHAPE).to(dtype), randn(len(sampler.steps), *SHAPE, seed=1).to(dtype)
    model.eval()
    theirs = run_diffusers(scheduler, model, x, noises, sampler.timesteps, **step_options)
    return (run_ours(sampler, model, x, noises) - theirs).abs().max().item()


# (steps, diffusers' tables in float64, dtype of the samples, tolerance)
PRECISIONS = [
    (10, False, torch.float64, STOCK),
    (25, False, torch.float32, STOCK),
    (10, True, torch.float64, DOUBLE_TABLES),
    (25, True, torch.float64, DOUBLE_TABLES),
    (1000, True, torch.float64, DOUBLE_TABLES),
    (1000, True, torch.float32, SINGLE),
]


@pytest.mark.parametrize(("steps", "double", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_ddpm_trajectory_matches_diffusers(variance_type, steps, double, dtype, tolerance):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type=variance_type, clip_sample=False)
    if double:
        double_tables(scheduler, linear_betas())
    sampler = DDPMSampler(str(steps))
    scheduler.set_timesteps(timesteps=sampler.timesteps)
    model = ToyModel(learn_sigma=variance_type == "learned_range")
    assert deviation(scheduler, sampler, model, dtype) <= tolerance


@pytest.mark.parametrize(("steps", "double", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["dit", "leading"])
def test_ddim_trajectory_matches_diffusers(spacing, eta, steps, double, dtype, tolerance):
    diffusers = pytest.importorskip("diffusers")
    if spacing == "leading":  # "ddimN" is diffusers' own spacing
        betas, sampler = linear_betas(), DDIMSampler(f"ddim{steps}", eta)
        scheduler = diffusers.DDIMScheduler(beta_end=0.02, beta_schedule="linear", clip_sample=False)
    else:  # DiT's uneven spacing: diffusers assumes one stride, so it runs all steps of the respaced process
        betas, sampler = GaussianDiffusion(str(steps)).betas, DDIMSampler(steps, eta)
        scheduler = diffusers.DDIMScheduler(steps, trained_betas=betas.tolist(), clip_sample=False)
    if double:
        double_tables(scheduler, betas)
    scheduler.set_timesteps(steps)
    if spacing == "leading":
        assert scheduler.timesteps.tolist() == sampler.timesteps
    assert deviation(scheduler, sampler, ToyModel(learn_sigma=False), dtype, eta=eta) <= tolerance


def test_clip_x0_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    betas = GaussianDiffusion("10").betas
    ddim = double_tables(diffusers.DDIMScheduler(10, trained_betas=betas.tolist(), clip_sample=True), betas)
    ddim.set_timesteps(10)
    ddpm = double_tables(diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=True), linear_betas())
    ddpm.set_timesteps(timesteps=space_timesteps(1000, 10)[::-1])
    wide = ToyModel(learn_sigma=False)
    wide.scale.data.fill_(3.0)  # far beyond [-1, 1] without the clamp
    options = {"eta": 0.5, "use_clipped_model_output": True}
    assert deviation(ddim, DDIMSampler("10", 0.5, clip_x0=True), wide, torch.float64, **options) <= DOUBLE_TABLES
    assert deviation(ddpm, DDPMSampler("10", clip_x0=True), ToyModel(), torch.float64) <= DOUBLE_TABLES


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (2, torch.float32), (10, torch.float64),
                                              (25, torch.float32), (999, torch.float32)])  # fmt: skip
def test_dpm_solver_trajectory_matches_diffusers(steps, dtype, learn_sigma):
    diffusers = pytest.importorskip("diffusers")
    sampler = DPMSolverPPSampler(steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type="learned" if learn_sigma else None
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == sampler.timesteps
    # diffusers cuts a learned variance off at channel 3, so it gets a model with three.
    model = ToyModel(in_channels=3, learn_sigma=learn_sigma)
    x = randn(3, 3, 6, 6).to(dtype)
    theirs = run_diffusers(scheduler, model.eval(), x, [None] * steps, sampler.timesteps)
    assert (run_ours(sampler, model, x, [None] * steps) - theirs).abs().max() <= (STOCK if steps > 2 else COARSE)


@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (10, torch.float64), (25, torch.float32),
                                              (1000, torch.float32)])  # fmt: skip
def test_flow_trajectory_matches_diffusers(steps, dtype):
    diffusers = pytest.importorskip("diffusers")
    sampler = FlowEulerSampler(steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
    assert scheduler.timesteps.tolist() == pytest.approx(sampler.timesteps, rel=1e-6)
    assert deviation(scheduler, sampler, ToyModel(learn_sigma=False), dtype) <= STOCK


@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (2, torch.float32), (10, torch.float64),
                                              (1000, torch.float32)])  # fmt: skip
def test_heun_trajectory_matches_diffusers(steps, dtype):
    """diffusers' own times end at 1/1000 whatever the number of steps, so it is given Euler's: 1, 1 - 1/n, ..., 1/n."""
    diffusers = pytest.importorskip("diffusers")
    sampler = FlowHeunSampler(steps)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    if steps == 1000:
        assert scheduler.timesteps.tolist() == pytest.approx(sampler.timesteps, rel=1e-6)
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    scheduler.timesteps = 1000 * torch.cat([times[:1], times[1:].repeat_interleave(2)])
    sigmas = torch.cat([times, torch.zeros(1)])
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    assert deviation(scheduler, sampler, ToyModel(learn_sigma=False), dtype) <= STOCK


def test_heun_is_the_textbooks():
    model, x = ToyModel(learn_sigma=False).eval(), randn(*SHAPE)
    expected, times = x, [k / 7 for k in range(7, -1, -1)]
    for t, s in itertools.pairwise(times):
        slope = call(model, expected, 1000 * t)
        euler = expected + (s - t) * slope
        expected = expected + (s - t) / 2 * (slope + call(model, euler, 1000 * s)) if s > 0 else euler
    sampler = FlowHeunSampler(7)
    assert sampler.timesteps == pytest.approx([1000, *[1000 * t for t in times[1:-1] for _ in range(2)]])
    assert (run_ours(sampler, model, x, [None] * 13) - expected).abs().max() <= DOUBLE_TABLES


@pytest.mark.parametrize(("kind", "order"), [(FlowEulerSampler, 1), (FlowHeunSampler, 2)])
def test_order_of_flow_samplers(kind, order):
    """dx/dt = x^2 from x(1) = 1 down to x(0) = 1/2: twice the steps, 2^order times less error."""

    def error(steps):
        sampler, x = kind(steps), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for i in range(len(sampler.timesteps)):
            x = sampler.step(x.square(), i, x)
        return abs(x.item() - 0.5)

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.05)
    assert error(128) < 0.01**order


@pytest.mark.parametrize("sampler", [DDPMSampler(20), DDIMSampler(20), DDIMSampler(20, eta=1.0), DPMSolverPPSampler(20),
                                     DPMSolverPPSampler(1000), FlowEulerSampler(20), FlowHeunSampler(20)])  # fmt: skip
def test_sampler_with_a_perfect_model_returns_its_x0(sampler):
    x0, x = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    diffusion = GaussianDiffusion()
    for i, t in enumerate(sampler.timesteps):
        if isinstance(sampler, (FlowEulerSampler, FlowHeunSampler)):
            output = (x - x0) / (t / 1000)
        else:
            output = (x - diffusion.signal_rate[t] * x0) / diffusion.noise_rate[t]
        x = sampler.step(output, i, x, randn(*SHAPE, seed=3 + i))
    assert (x - x0).abs().max() < 1e-10


def test_tables_match_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler()
    ours = GaussianDiffusion()
    assert (ours.betas - scheduler.betas).abs().max() < 1e-8
    assert ((ours.alphas_cumprod - scheduler.alphas_cumprod) / ours.alphas_cumprod).abs().max() < 1e-5
    x0, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0, 500, 999])
    assert (ours.q_sample(x0, t, noise) - scheduler.add_noise(x0, noise, t)).abs().max() < 1e-5
    assert (ours.predict_x0(ours.q_sample(x0, t, noise), t, noise) - x0).abs().max() < 1e-10


def test_space_timesteps():
    assert space_timesteps(1000, 10) == list(range(0, 1000, 111)) == space_timesteps(1000, "10")
    assert space_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert space_timesteps(1000, 1000) == list(range(1000)) == space_timesteps(1000, "ddim1000")
    assert space_timesteps(1000, 3) == [0, 500, 999]  # 499.5 rounds to even
    assert space_timesteps(30, "2,3,1") == [0, 9, 10, 14, 19, 20]  # 10 + 4.5 rounds to even
    assert [len(space_timesteps(1000, n)) for n in (1, 7, 250, 999)] == [1, 7, 250, 999]
    for bad in ("ddim300", "ddim", "ten", "", "0", "1001", "10,", 0, [500, 501]):
        with pytest.raises(ValueError, match="section_counts"):
            space_timesteps(1000, bad)
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(betas=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="timesteps"):
        GaussianDiffusion([5, 3])


class FixedOutput(nn.Module):
    """Returns the same tensor whatever it is asked, and remembers the question."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x, t, y, grid=None):
        self.x, self.t, self.grid = x, t, grid
        return self.output


def expected_vb(diffusion, x0, noise, output, index):
    """One sample's term in bits, float64, by Bayes' rule, torch.distributions and erf; nothing shared with ddpm.py."""
    full = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept = full[diffusion.timesteps]
    abar = kept[index]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    epsilon, v = output.chunk(2)
    predicted = (x - (1 - abar).sqrt() * epsilon) / abar.sqrt()

    def posterior(at, x0):  # q(x_prev | x, x0): the product of q(x | x_prev) and q(x_prev | x0)
        alpha, before = kept[at] / kept[at - 1], kept[at - 1]
        variance = 1 / (alpha / (1 - alpha) + 1 / (1 - before))
        return variance * (alpha.sqrt() / (1 - alpha) * x + before.sqrt() / (1 - before) * x0), variance

    first_beta = 1 - (kept[index] / kept[index - 1] if index else kept[0])
    low = posterior(max(index, 1), x0)[1].log()
    std = (0.5 * ((v + 1) / 2 * first_beta.log() + (1 - (v + 1) / 2) * low)).exp()
    if index:
        mean, variance = posterior(index, x0)
        truth = torch.distributions.Normal(mean, variance.sqrt())
        model = torch.distributions.Normal(posterior(index, predicted)[0], std)
        nats = torch.distributions.kl_divergence(truth, model)
    else:
        cdf = torch.distributions.Normal(predicted, std).cdf
        above = torch.where(x0 > 0.999, torch.ones_like(x0), cdf(x0 + 1 / 255))
        below = torch.where(x0 < -0.999, torch.zeros_like(x0), cdf(x0 - 1 / 255))
        nats = -(above - below).clamp(min=1e-12).log()
    return nats.mean() / math.log(2)


@pytest.mark.parametrize("spacing", [None, "25", "ddim50"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])  # 3.6e-14, 2.3e-7
def test_ddpm_loss_matches_independent_formulas(spacing, dtype, tolerance):
    diffusion = GaussianDiffusion(spacing)
    t = torch.tensor([0, 1, 2, 12, diffusion.num_timesteps - 1, 0])
    x0 = randn(6, 4, 6, 6).clamp(-1, 1).to(dtype)  # about a third lies at -1 or 1, the outermost bins
    noise = randn(6, 4, 6, 6, seed=1).to(dtype)
    # Close to the noise, else the likelihood at t = 0 is all floor; v beyond [-1, 1] as well.
    output = torch.cat([noise + 0.3 * randn(6, 4, 6, 6, seed=2), randn(6, 4, 6, 6, seed=3)], 1).to(dtype)
    model = FixedOutput(output)
    result = ddpm_loss(model, x0, torch.zeros(6, dtype=torch.int64), t, noise, diffusion=diffusion, grid=(2, 2))
    expected = torch.stack([expected_vb(diffusion, *(v.double() for v in (x0[i], noise[i], output[i])), int(t[i]))
                            for i in range(6)])  # fmt: skip
    mse = ((output[:, :4] - noise).double() ** 2).mean((1, 2, 3))
    assert ((result.vb - expected).abs() / expected.abs().clamp(min=1)).max() <= tolerance
    assert (result.mse - mse).abs().max() <= tolerance
    assert torch.equal(result.loss, result.mse + result.vb)
    assert model.t.tolist() == [diffusion.timesteps[i] for i in t]
    assert model.grid == (2, 2)

    result.vb.sum().backward(retain_graph=True)
    assert model.output.grad[:, :4].abs().max() == 0  # the bound does not train the mean
    assert model.output.grad[:, 4:].abs().amax((1, 2, 3)).min() > 0
    model.output.grad = None
    result.loss.sum().backward()
    assert torch.allclose(model.output.grad[:, :4], 2 * (output[:, :4] - noise) / 144)
    assert model.output.grad.isfinite().all()


def test_ddpm_loss_of_a_fixed_variance_and_defaults():
    x0, y = randn(*SHAPE).float(), torch.zeros(3, dtype=torch.int64)
    noise = randn(*SHAPE, seed=1).float()
    result = ddpm_loss(FixedOutput(torch.zeros(SHAPE)), x0, y, noise=noise)
    assert result.vb is None
    assert torch.equal(result.loss, result.mse)
    assert torch.allclose(result.loss, noise.square().mean((1, 2, 3)))
    first, again, other = (
        ddpm_loss(ToyModel().eval(), x0, y, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    half = ddpm_loss(ToyModel(dtype=torch.bfloat16).eval(), x0.bfloat16(), y)
    assert half.loss.dtype == torch.float32
    assert half.loss.isfinite().all()


def test_flow_loss_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[[0, 300, 998]]
    x0, noise, y = randn(*SHAPE).float(), randn(*SHAPE, seed=1).float(), torch.zeros(3, dtype=torch.int64)
    expected = scheduler.scale_noise(x0, t, noise)
    assert (flow_interpolate(x0, noise, t / 1000) - expected).abs().max() < 1e-6
    output = randn(3, 8, 6, 6, seed=2).float()
    for channels in (4, 8):  # with eight, the second half is a variance that flow matching has no use for
        model = FixedOutput(output[:, :channels])
        result = flow_loss(model, x0, y, t / 1000, noise)
        assert (model.x - expected).abs().max() < 1e-6
        assert torch.allclose(model.t, t)
        assert torch.allclose(result.loss, (output[:, :4] - (noise - x0)).square().mean((1, 2, 3)))
    eps = 1e-4
    x = [
        flow_interpolate(x0.double(), noise.double(), torch.full((3,), 0.5 + d, dtype=torch.float64))
        for d in (-eps, eps)
    ]
    assert ((x[1] - x[0]) / (2 * eps) - flow_velocity(x0, noise)).abs().max() < 1e-6
    assert flow_loss(ToyModel(), x0, y).loss.shape == (3,)


LOSS_ERRORS = [
    ({"x0": torch.zeros(3, 4, 6, 6, dtype=torch.int64)}, TypeError, "x0"),
    ({"x0": torch.zeros(0, 4, 6, 6)}, ValueError, "x0"),
    ({"x0": torch.zeros(3, 4)}, ValueError, "x0"),
    ({"y": torch.zeros(2, dtype=torch.int64)}, ValueError, "y"),
    ({"y": [0, 0, 0]}, ValueError, "y"),
    ({"t": torch.zeros(4, dtype=torch.int64)}, ValueError, "t"),
    ({"noise": torch.zeros(3, 4, 6, 5)}, ValueError, "noise"),
    ({"noise": torch.zeros(3, 4, 6, 6, dtype=torch.float64)}, ValueError, "noise"),
]


@pytest.mark.parametrize(
    ("loss", "change", "error", "name"),
    [(loss, *case) for loss in (ddpm_loss, flow_loss) for case in LOSS_ERRORS]
    + [
        (ddpm_loss, {"t": torch.tensor([0, 1, 1000])}, ValueError, "t"),
        (ddpm_loss, {"t": torch.tensor([0, 1, -1])}, ValueError, "t"),
        (ddpm_loss, {"t": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "t"),
        (flow_loss, {"t": torch.tensor([0.0, 1.0, 1.5])}, ValueError, "t"),
        (flow_loss, {"t": torch.tensor([0.0, 1.0, math.nan])}, ValueError, "t"),
        (flow_loss, {"t": torch.tensor([0, 1, 1])}, TypeError, "t"),
    ],
)
def test_losses_reject_bad_input_by_name(loss, change, error, name):
    model = ToyModel()
    arguments = {"x0": torch.zeros(SHAPE), "y": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(error, match=f"^{name}: "):
        loss(model, **arguments)
    assert not model.calls


@pytest.mark.parametrize("loss", [ddpm_loss, flow_loss])
def test_conditions_by_name_and_clips(loss):
    """A mapping goes to the model as keywords; a clip's loss is the mean over all its frames."""
    model, seen = ToyModel().eval(), []

    def named(x, t, *, labels, extra, grid=None):
        seen.append((extra, grid))
        return torch.stack([model(frame, t, labels) for frame in x.unbind(2)], dim=2)

    x0, noise, y = torch.randn(3, 4, 5, 6, 6), torch.randn(3, 4, 5, 6, 6), torch.tensor([1, 2, 3])
    t = torch.tensor([0, 5, 900]) if loss is ddpm_loss else torch.tensor([0.1, 0.5, 0.9])
    extra = torch.zeros(3, 2, 2)
    whole = loss(named, x0, {"labels": y, "extra": extra}, t, noise, grid=(2, 3, 3))
    frames = [loss(model, x0[:, :, i], y, t, noise[:, :, i]).loss for i in range(5)]
    torch.testing.assert_close(whole.loss, torch.stack(frames).mean(0))
    assert seen == [(extra, (2, 3, 3))]
    for wrong, message in ((torch.zeros(2), r"got \(2,\)"), ([0, 0, 0], "got list"), (torch.tensor(1), r"got \(\)")):
        with pytest.raises(ValueError, match=rf"^y: extra must be a tensor \[3, \.\.\.\], a row per sample, {message}"):
            loss(named, x0, {"labels": y, "extra": wrong}, t, noise)


def test_losses_reject_outputs_of_other_sizes():
    for loss in (ddpm_loss, flow_loss):
        with pytest.raises(ValueError, match="model output: must have 4 channels"):
            loss(FixedOutput(torch.zeros(3, 5, 6, 6)), torch.zeros(SHAPE), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="model output"):
        DDIMSampler(1).step(torch.zeros(3, 5, 6, 6), 0, torch.zeros(SHAPE))
