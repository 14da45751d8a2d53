"""Training of FlexPixArt and FlexLatte: what a step computes, and what holds for every run."""

import math

import numpy as np
import pytest
import torch
from family_cases import ARRAYS, family_config, save, save_random
from training_cases import log_of

from flexdit_ext import FlexLatte, FlexPixArt
from flexdit_ext.diffusion import ddpm_loss, flow_loss
from flexdit_ext.training import FINISHED, set_up, train

CLASSES = {"flexpixart": FlexPixArt, "flexlatte": FlexLatte}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CLASSES)
def family(request):
    return request.param


@pytest.fixture
def data(family, tmp_path):
    return save(tmp_path / "data", ARRAYS[family]())


def loss_by_hand(setup, step, loss):
    """[B], from the draws and the rows of the arrays."""
    draws = setup.draws.of_step(step)
    samples, conditions = setup.data.__getitems__(draws.indices.tolist())
    for i in np.flatnonzero(draws.dropped):
        if "y" in conditions:
            conditions["y"][i] = 4
        else:
            conditions["caption"][i], conditions["caption_mask"][i] = 0, torch.arange(4) < 1
    t = draws.fraction.astype(np.float32) if loss == "flow" else (draws.fraction * 1000).astype(int)
    noise = setup.draws.noise(step, range(len(samples)), tuple(samples.shape[1:]))
    function = flow_loss if loss == "flow" else ddpm_loss
    return function(setup.model.eval(), samples, conditions, torch.from_numpy(t), noise).loss


@pytest.mark.parametrize("loss", ["flow", "ddpm"])
def test_a_step_is_the_loss_on_the_data(family, data, tmp_path, loss):
    channels = {"flexpixart": 4, "flexlatte": 1}[family] * (2 if loss == "ddpm" else 1)
    model = {"checkpoint": save_random(tmp_path / "model", family, out_channels=channels), "family": None}
    config = family_config(
        tmp_path / "run",
        family,
        data,
        steps=1,
        loss=loss,
        label_dropout=0.5,
        batch_size=8,
        model={"out_channels": channels, **model},
    )
    assert train(config) == FINISHED
    setup = set_up(config, 1)
    assert isinstance(setup.model, CLASSES[family]) and 0 < setup.draws.of_step(0).dropped.sum() < 8
    (line,) = log_of(config)
    losses = loss_by_hand(setup, 0, loss)
    assert math.isclose(line["loss"], losses.mean().item(), rel_tol=1e-6)
    losses.mean().backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in setup.model.parameters()))
    assert math.isclose(line["gradient_norm"], norm, rel_tol=1e-5)
