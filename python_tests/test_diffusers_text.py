"""flexdit_ext/diffusers.py: FlexPixArt and FlexLatte in diffusers' pipelines, against its own models."""

import json

import pytest
import torch
from helpers import same_tensors

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:diffusers.*")

from text_models import LAYOUT, PROMPTS, autoencoder, latte, pixart, text_encoder, tokenizer  # noqa: E402

from flexdit_ext import DensitySchedule, convert  # noqa: E402
from flexdit_ext.diffusers import FlexLatteTransformer3DModel, FlexPixArtTransformer2DModel  # noqa: E402

BOUND = 1e-5  # images in [0, 1]; worst measured 1.1e-6


def wrap(theirs, **layout):
    """Our class around the weights of PixArtTransformer2DModel or LatteTransformer3DModel."""
    if "Latte" in type(theirs).__name__:
        return FlexLatteTransformer3DModel.from_flexlatte(convert.from_latte(theirs, **layout))
    return FlexPixArtTransformer2DModel.from_flexpixart(convert.from_pixart(theirs, **layout))


def make_pipeline(kind, transformer):
    pipeline = getattr(diffusers, kind)(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **options):
    clips = isinstance(pipeline, diffusers.LattePipeline)
    size = pipeline.transformer.config.sample_size
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "guidance_scale": 4.5, "height": size, "width": size}
    call |= {"generator": torch.Generator().manual_seed(5), "output_type": "pt" if clips else "np"}
    call |= {"video_length": 4} if clips else {"use_resolution_binning": False}
    out = pipeline(**call | {"clean_caption": False} | options)
    return out.frames if clips else torch.from_numpy(out.images)


PIXART = {
    "two prompts": {},
    "two pictures of one": {"prompt": PROMPTS[0], "num_images_per_prompt": 2},
    "a negative prompt": {"negative_prompt": "blue dog"},
    "unguided": {"guidance_scale": 1.0},
    "not square": {"height": 16, "width": 8},
}


@pytest.mark.parametrize("options", PIXART.values(), ids=PIXART)
def test_pixart_alpha(options):
    theirs = pixart()
    expected, images = (
        generate(make_pipeline("PixArtAlphaPipeline", one), **options) for one in (theirs, wrap(theirs))
    )
    assert expected.std() > 0.02
    torch.testing.assert_close(images, expected, rtol=0, atol=BOUND)


def test_pixart_of_1024_pixels():
    """The pipeline gives sizes to a model of 128 x 128 latents, which may or may not read them."""
    images = []
    for sizes in (True, False):
        theirs = pixart(sample_size=128, patch_size=16, use_additional_conditions=sizes)
        pair = [
            generate(make_pipeline("PixArtAlphaPipeline", one), prompt=PROMPTS[0], num_inference_steps=2)
            for one in (theirs, wrap(theirs))
        ]
        torch.testing.assert_close(*pair, rtol=0, atol=BOUND)
        images.append(pair[0])
    assert not torch.allclose(*images, atol=1e-2)


def test_pixart_sigma():
    theirs = pixart()
    ours = FlexPixArtTransformer2DModel.from_flexpixart(convert.from_pixart(theirs, max_caption_tokens=300))
    expected, images = (generate(make_pipeline("PixArtSigmaPipeline", one)) for one in (theirs, ours))
    torch.testing.assert_close(images, expected, rtol=0, atol=BOUND)


LATTE = {
    "two prompts": {},
    "one prompt": {"prompt": PROMPTS[0]},
    "one frame": {"video_length": 1, "enable_temporal_attentions": False},
    "unguided": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("options", LATTE.values(), ids=LATTE)
def test_latte(options):
    theirs = latte()
    expected, clips = (generate(make_pipeline("LattePipeline", one), **options) for one in (theirs, wrap(theirs)))
    assert clips.shape[1:] == (options.get("video_length", 4), 3, 8, 8) and expected.std() > 0.02
    torch.testing.assert_close(clips, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("make, kind", [(pixart, "PixArtAlphaPipeline"), (latte, "LattePipeline")])
def test_bfloat16(make, kind):
    """Near to diffusers' float32 images: in the mean 0.0033 and 0.0038, where diffusers' own are 0.0038 and 0.0039."""
    exact = generate(make_pipeline(kind, make()))
    images = generate(make_pipeline(kind, wrap(make())).to(torch.bfloat16))
    assert 0 < (images - exact).abs().mean() < 0.01


@pytest.mark.parametrize("make, kind", [(pixart, "PixArtAlphaPipeline"), (latte, "LattePipeline")])
def test_saved_sparse_pipeline(make, kind, tmp_path):
    """Saved and loaded by diffusers alone; with fewer tokens the images differ, and do not depend on the way."""
    grids = [(3, 3), (2, 2)] if make is pixart else [(2, 3, 3), (2, 2, 2)]
    transformer = wrap(make(), schedule=DensitySchedule(grids), **LAYOUT)
    pipeline = make_pipeline(kind, transformer)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["flexdit_ext.diffusers", type(transformer).__name__]
    loaded = getattr(diffusers, kind).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (
        type(loaded.transformer) is type(transformer)
        and loaded.transformer.flexdit.config.schedule.grids[1] == grids[1]
    )
    assert same_tensors(loaded.transformer.state_dict(), transformer.state_dict())
    images = generate(loaded)
    assert images.isfinite().all() and torch.equal(images, generate(pipeline))
    dense = generate(make_pipeline(kind, wrap(make())))
    assert not torch.allclose(images, dense, atol=1e-3)


def inputs(wrapper):
    config = wrapper.flexdit.config
    clip = (4,) if isinstance(wrapper, FlexLatteTransformer3DModel) else ()
    torch.manual_seed(2)
    x, caption = torch.randn(2, config.in_channels, *clip, 8, 8), torch.randn(2, 5, config.caption_channels)
    return {"hidden_states": x, "timestep": torch.tensor([30, 700]), "encoder_hidden_states": caption}


@pytest.mark.parametrize("make", [pixart, latte])
def test_output_is_the_models(make):
    wrapper = wrap(make(), **LAYOUT)
    model, call = wrapper.flexdit, inputs(wrapper)
    x, t, caption = call.values()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    grid = (2, 2) if make is pixart else (2, 2, 2)
    with torch.no_grad():
        assert torch.equal(wrapper(**call).sample, model(x, t, caption=caption))
        expected = model(x, t, caption=caption, caption_mask=mask.bool(), grid=grid)
        for one in (mask, mask.bool(), mask.float()):
            assert torch.equal(wrapper(**call, encoder_attention_mask=one, grid=grid, return_dict=False)[0], expected)
        expected = model(x, torch.tensor([500, 500]), caption=caption)
        assert torch.equal(wrapper(**call | {"timestep": 500}).sample, expected)


@pytest.mark.parametrize("make", [pixart, latte])
def test_configuration_and_files(make, tmp_path):
    wrapper = wrap(make(), **LAYOUT)
    again = type(wrapper).from_config(wrapper.config)
    assert again.flexdit.config == wrapper.flexdit.config and again.config.sample_size == 8
    assert (wrapper.config.in_channels, wrapper.config.out_channels) == (4, 8)
    wrapper.save_pretrained(tmp_path, max_shard_size="50KB")
    half, info = type(wrapper).from_pretrained(tmp_path, torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and half.dtype == torch.bfloat16
    assert same_tensors(half.state_dict(), wrapper.to(torch.bfloat16).state_dict())
    call = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs(half).items()}
    with torch.no_grad():
        assert torch.equal(half(**call).sample, wrapper(**call).sample)


@pytest.mark.parametrize("make", [pixart, latte])
def test_gradient_checkpointing(make):
    wrapper = wrap(make(), **LAYOUT)
    gradients = []
    for enable in (wrapper.disable_gradient_checkpointing, wrapper.enable_gradient_checkpointing):
        enable()
        wrapper.zero_grad()
        wrapper(**inputs(wrapper)).sample.square().sum().backward()
        gradients.append([p.grad for p in wrapper.parameters()])
        assert wrapper.flexdit.activation_checkpointing == (len(gradients) == 2)
    assert all(map(torch.equal, *gradients))


def test_labels():
    """Of a FlexLatte with classes: by hand, LattePipeline has none."""
    labelled = FlexLatteTransformer3DModel(8, hidden_size=48, num_heads=2, num_sdtm=1, video_length=4, num_classes=3)
    call = inputs(labelled) | {"encoder_hidden_states": None}
    y = torch.tensor([1, 2])
    x, t, _ = call.values()
    with torch.no_grad():
        assert torch.equal(labelled(**call, class_labels=y).sample, labelled.flexdit(x, t, y))
    with pytest.raises(ValueError, match="y is missing, the model has y"):
        labelled(**call)


def test_wrong_calls():
    painter, film = wrap(pixart(use_additional_conditions=True)), wrap(latte(), **LAYOUT)
    added = {"added_cond_kwargs": {"resolution": torch.ones(2, 2), "aspect_ratio": torch.ones(2, 1)}}
    painter(**inputs(painter), **added)
    for wrapper, change, error, message in (
        (painter, {"timestep": None}, TypeError, "timestep is None"),
        (painter, {"encoder_hidden_states": None}, TypeError, "encoder_hidden_states is None"),
        (painter, {"hidden_states": None}, TypeError, "hidden_states is None"),
        (painter, {"added_cond_kwargs": None}, TypeError, "added_cond_kwargs' resolution is None"),
        (painter, {"added_cond_kwargs": {"resolution": torch.ones(2, 2)}}, TypeError, "aspect_ratio is None"),
        (painter, {"cross_attention_kwargs": {"scale": 1}}, ValueError, "cross_attention_kwargs is dict"),
        (painter, {"attention_mask": torch.ones(2, 16)}, ValueError, "attention_mask is Tensor, must be None"),
        (painter, {"encoder_attention_mask": torch.ones(2, 1, 5)}, ValueError, r"\(2, 1, 5\), must be \[B, L\]"),
        (painter, {"encoder_attention_mask": torch.full((2, 5), 0.5)}, ValueError, "values other than 0 and 1"),
        (painter, {"encoder_attention_mask": torch.zeros(2, 5)}, ValueError, r"caption_mask\[0\] has no token"),
        (film, {"enable_temporal_attentions": False}, ValueError, "temporal_attention is False"),
        (film, {"hidden_states": torch.zeros(2, 4, 5, 8, 8)}, ValueError, "x has 5 frames"),
    ):
        with pytest.raises(error, match=message):
            wrapper(**inputs(wrapper) | (added if wrapper is painter else {}) | change)
    for cls, make in (
        (FlexPixArtTransformer2DModel, "from_flexpixart"),
        (FlexLatteTransformer3DModel, "from_flexlatte"),
    ):
        with pytest.raises(TypeError, match="model is Linear, must be a Flex"):
            getattr(cls, make)(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="num_heads"):
            cls(num_heads=5)
