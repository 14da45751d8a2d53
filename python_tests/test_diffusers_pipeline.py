"""flexdit_ext/diffusers.py: FlexDiT in diffusers' DiTPipeline, its files, its schedulers."""

import json

import pytest
import torch
from helpers import assert_same_model, flexdit_config, model_inputs, random_model, same_tensors

from flexdit_ext import DensitySchedule, FlexDiT

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:diffusers.*")

from flexdit_ext.diffusers import FlexDiTTransformer2DModel  # noqa: E402

# DiTPipeline's null class is label 1000.
SMALL = {"input_size": 8, "num_sdtm": 1, "num_classes": 1000, "schedule": DensitySchedule([(4, 4), (3, 3), (2, 2)])}
SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}


def small_model(**overrides):
    return random_model(torch.float32, **(SMALL | overrides))


def make_pipeline(model, scheduler="DDIMScheduler"):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=8,
    )
    pipeline = diffusers.DiTPipeline(
        transformer=FlexDiTTransformer2DModel.from_flexdit(model),
        vae=vae.eval(),
        scheduler=getattr(diffusers, scheduler)(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **options):
    generator = torch.Generator().manual_seed(5)
    call = {"class_labels": [3, 7], "num_inference_steps": 4, "generator": generator, "output_type": "np"} | options
    return torch.from_numpy(pipeline(**call).images)


def by_hand(model, pipeline, scale):
    """What DiTPipeline does, with FlexDiT called directly: guidance of all latent channels, the variance dropped."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    labels = torch.tensor([3, 7])
    scheduler.set_timesteps(4)
    guided = scale > 1
    x = torch.cat([x, x]) if guided else x
    for step in scheduler.timesteps:
        x = torch.cat([x[:2], x[:2]]) if guided else x
        inputs = scheduler.scale_model_input(x, step)
        t = step.expand(len(x))
        noise = model(inputs, t, torch.cat([labels, torch.full_like(labels, 1000)]) if guided else labels)[:, :4]
        if guided:
            cond, uncond = noise.chunk(2)
            noise = torch.cat([uncond + scale * (cond - uncond)] * 2)
        x = scheduler.step(noise, step, inputs).prev_sample
    images = pipeline.vae.decode(x[:2] / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["plain", "guided"])
def test_saved_pipeline(tmp_path, scale):
    """Saved, loaded from disk by diffusers alone, and equal to driving our model by hand."""
    model = small_model()
    pipeline = make_pipeline(model)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["flexdit_ext.diffusers", "FlexDiTTransformer2DModel"]
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is FlexDiTTransformer2DModel
    assert_same_model(loaded.transformer.flexdit, model)
    images = generate(loaded, guidance_scale=scale)
    with torch.no_grad():
        expected = by_hand(model, pipeline, scale)
    assert images.std() > 0.02 and torch.equal(images, generate(pipeline, guidance_scale=scale))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_are_interchangeable(name):
    """Also those whose timesteps are fractions. DDPM draws noise of its own, from the global generator here."""
    model = small_model()
    pipeline = make_pipeline(model)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    torch.manual_seed(1)
    images = generate(pipeline, guidance_scale=1.0)
    assert images.isfinite().all()
    if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):  # DiTPipeline gives step the scaled input
        with torch.no_grad():
            torch.testing.assert_close(images, by_hand(model, pipeline, 1.0), rtol=0, atol=1e-5)


def test_output_is_the_models():
    model = small_model()
    wrapper = FlexDiTTransformer2DModel.from_flexdit(model)
    x, t, y = model_inputs(model.config, 3)
    with torch.no_grad():
        expected = model(x, t, y)
        assert torch.equal(wrapper(x, timestep=t, class_labels=y).sample, expected)
        assert torch.equal(wrapper(x, t, y, return_dict=False)[0], expected)
        assert torch.equal(wrapper(x, t, y, grid=(3, 3)).sample, model(x, t, y, (3, 3)))
        same = model(x, torch.full_like(t, 500), y)
        for one in (500, 500.0, torch.tensor(500), torch.tensor([500])):
            assert torch.equal(wrapper(x, one, y).sample, same)


def test_configuration():
    model = small_model()
    config = FlexDiTTransformer2DModel.from_flexdit(model).config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 4, 8)
    again = FlexDiTTransformer2DModel.from_config(config)
    assert again.flexdit.config == model.config
    values = flexdit_config().to_dict()
    values["sample_size"] = values.pop("input_size")
    assert FlexDiTTransformer2DModel(**values, out_channels=8).flexdit.config == flexdit_config()
    with pytest.raises(ValueError, match="out_channels is 4, must be 8 or None"):
        FlexDiTTransformer2DModel(**values, out_channels=4)
    with pytest.raises(ValueError, match="num_heads"):
        FlexDiTTransformer2DModel(**(values | {"num_heads": 5}))


def test_files(tmp_path):
    """Shards, dtypes, and nothing but safetensors."""
    wrapper = FlexDiTTransformer2DModel.from_flexdit(small_model())
    wrapper.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not list(tmp_path.glob("*.bin"))
    loaded, info = FlexDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.training
    assert same_tensors(loaded.state_dict(), wrapper.state_dict())
    half = FlexDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.flexdit.pos_embed.dtype == torch.bfloat16
    x, t, y = model_inputs(half.flexdit.config, 2, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(half(x, t, y).sample, wrapper.flexdit.bfloat16()(x, t, y))


def test_default_dtype():
    """diffusers makes a model under the dtype that it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = FlexDiT(flexdit_config())
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(model.pos_embed, FlexDiT(flexdit_config(), dtype=torch.bfloat16).pos_embed)


def test_gradient_checkpointing():
    wrapper = FlexDiTTransformer2DModel.from_flexdit(small_model())
    x, t, y = model_inputs(wrapper.flexdit.config, 2)
    gradients = []
    for enable in (wrapper.disable_gradient_checkpointing, wrapper.enable_gradient_checkpointing):
        enable()
        wrapper.zero_grad()
        wrapper(x, t, y).sample.sum().backward()
        gradients.append([p.grad for p in wrapper.parameters()])
        assert wrapper.flexdit.activation_checkpointing == (len(gradients) == 2)
    assert all(map(torch.equal, *gradients))


def test_wrong_calls():
    wrapper = FlexDiTTransformer2DModel.from_flexdit(small_model())
    x, t, y = model_inputs(wrapper.flexdit.config, 2)
    for arguments, error, message in (
        ((x, None, y), TypeError, "timestep is None"),
        ((x, t), TypeError, "class_labels is None"),
        ((None, t, y), TypeError, "hidden_states is None"),
        ((x[:, :, 1:], t, y), ValueError, "x has shape"),
        ((x, t, y, {"scale": 1}), ValueError, "cross_attention_kwargs"),
    ):
        with pytest.raises(error, match=message):
            wrapper(*arguments)
    with pytest.raises(TypeError, match="model is Linear, must be a FlexDiT"):
        FlexDiTTransformer2DModel.from_flexdit(torch.nn.Linear(2, 2))


def test_the_model_is_shared():
    model = small_model()
    wrapper = FlexDiTTransformer2DModel.from_flexdit(model)
    assert wrapper.flexdit is model and isinstance(model, FlexDiT)
    assert {p.device.type for p in wrapper.parameters()} == {"cpu"}
