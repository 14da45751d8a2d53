"""Session of FlexPixArt and FlexLatte: requests of any caption, size and number of frames in one batch give the images
they give alone."""

import copy
import functools

import hypothesis
import numpy as np
import pytest
import torch
from devices import CUDA, short
from hypothesis import strategies as st
from single_sampling import CONFIGS, actual_of, conditions_of, error_of, model_of, null_of, sampler_of
from test_session import COMPANY, alone, run_out, same

from flexdit_ext import Sampler, sample_conditional

SOLVERS = [("ddim", 2, 0.0), ("ddim", "ddim4", 0.7), ("ddpm", 2, 0.0), ("dpmpp", 3, 0.0), ("heun", 2, 0.0)]


def caption_of(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, 10, generator=torch.Generator().manual_seed(seed))


@st.composite
def requests(draw, name: str):
    config = CONFIGS[name]
    sampler, steps, eta = draw(st.sampled_from(SOLVERS))
    request = {"sampler": sampler, "steps": steps, "eta": eta, "seed": draw(st.integers(0, 2))}
    request["cfg_scale"] = draw(st.sampled_from([1.0, 2.5, 0.0]))
    request["size"] = draw(st.sampled_from([None, None, (4, 12), (12, 8)]))
    request["guidance_interval"] = draw(st.sampled_from([None, (200, 700)]))
    if config.num_classes:
        request["label"] = draw(st.integers(0, config.num_classes))
    if config.caption_channels:
        for key in ("caption", "null_caption"):
            request[key] = draw(st.tuples(st.integers(1, config.max_caption_tokens), st.integers(0, 2)))
    if config.size_conditions:
        request["resolution"] = draw(st.sampled_from([(64.0, 64.0), (32.0, 96.0)]))
        request["aspect_ratio"] = draw(st.sampled_from([1.0, 0.5]))
    if config.num_frames > 1:
        request["frames"] = draw(st.sampled_from([None, 1, 2, 3]))
        request["grid"] = draw(st.sampled_from([None, None, (1, 1, 2)]))
    return request


def given(request: dict) -> dict:
    """The request with its captions."""
    return {key: caption_of(*value) if key.endswith("caption") else value for key, value in request.items()}


@functools.cache
def image_of(name, items):
    return alone(sampler_of(name), **given(dict(items)))


@pytest.mark.parametrize("name", ["pixart with sizes", "clip of both"])
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(data=st.data())
def test_every_image_is_the_one_alone(name, data):
    session, expected = sampler_of(name).session(data.draw(st.integers(1, 4))), {}
    for arrivals in data.draw(st.lists(st.lists(requests(name), max_size=2), min_size=1, max_size=5)):
        for request in arrivals:
            expected[session.add(**given(request))] = request
        if expected and data.draw(st.integers(0, 4)) == 0:
            key = data.draw(st.sampled_from(sorted(expected)))
            if session.cancel(key):
                del expected[key]
        session.step()
    run_out(session)
    taken = session.take()
    assert taken.keys() == expected.keys()
    for key, request in expected.items():
        assert same(taken[key], image_of(name, tuple(request.items()))), request


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_company_on_the_cuda_kernels(dtype, backend, device):
    sampler = Sampler(copy.deepcopy(model_of("clip of both", dtype)).to(device))
    request = {"label": 1, "caption": caption_of(3, 0), "null_caption": caption_of(2, 1), "cfg_scale": 2.0, "steps": 3}
    expected = alone(sampler, **request)
    session = sampler.session(3)
    session.add(label=0, caption=caption_of(7, 3), steps=2, frames=2)
    session.step()
    key = session.add(**request)
    session.add(label=5, caption=caption_of(1, 4), steps=1, size=(4, 12))
    run_out(session)
    assert error_of(session.take(key), expected) <= (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_image_is_samples(name):
    """What sample gives of the batch's captions with their masks, add gives of each caption's own tokens."""
    conditions, run = conditions_of(name), {"steps": 2, "sampler": "ddpm", "cfg_scale": 2.0}
    images = actual_of(name, torch.float32, run | {"seed": [3, 4, 5]})
    session, keys = sampler_of(name).session(), []
    for i in range(3):
        one = {key: value[i] for key, value in conditions.items() if key not in ("y", "caption", "caption_mask")}
        one = {key: value.tolist() for key, value in one.items()}
        if "caption" in conditions:
            one["caption"] = conditions["caption"][i, conditions["caption_mask"][i]]
            one["null_caption"] = null_of(name)["caption"][0, :2]
        label = int(conditions["y"][i]) if "y" in conditions else None
        keys.append(session.add(label, seed=i + 3, **one, **run))
    run_out(session)
    assert all(same(session.take(key), image) for key, image in zip(keys, images, strict=True))


def test_a_caption_is_copied():
    caption = caption_of(3, 0).numpy()
    expected = alone(sampler_of("pixart"), caption=caption, steps=2)
    session = sampler_of("pixart").session()
    key = session.add(caption=caption, steps=2)
    caption[:] = np.nan
    run_out(session)
    assert torch.equal(session.take(key), expected)


def test_frames_join_and_leave():
    """A clip that is under way keeps its state while others of other lengths come and go."""
    sampler = sampler_of("class clip")
    request = {"label": 2, "steps": 6, "cfg_scale": 2.0, "frames": 3}
    expected = alone(sampler, **request)
    session = sampler.session(4)
    key = session.add(**request)
    for frames in (1, 4, 2):
        session.step()
        session.add(label=0, steps=1, frames=frames)
    run_out(session)
    assert same(session.take(key), expected)
    assert {image.shape for image in session.take().values()} == {(4, frames, 8, 8) for frames in (1, 4, 2)}


def test_captions_of_every_length():
    """One batch against one by one in Python, which has the captions in one tensor."""
    captions = torch.randn(7, 7, 10)
    mask = torch.arange(7) < torch.arange(1, 8)[:, None]
    model = model_of("pixart")
    images = sampler_of("pixart").sample(caption=captions, caption_mask=mask, steps=2)
    expected = sample_conditional(model, {"caption": captions, "caption_mask": mask}, 2)
    assert error_of(images, expected) <= 1e-5
    assert COMPANY > 0 or len({image.numpy().tobytes() for image in images}) == 7
