"""FlexPixArt's and FlexLatte's references against diffusers' own models, outputs and gradients."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel  # noqa: E402

from flexdit_ext import reference_single as reference  # noqa: E402
from flexdit_ext.config_single import FlexLatteConfig, FlexPixArtConfig  # noqa: E402

DENSE = {"num_pooling_blocks": 0, "num_sdtm": 0}
COMMON = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 48,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 10,
}
OURS = {"hidden_size": 48, "num_heads": 4, "caption_channels": 10}


def their_name(name: str, latte: bool) -> tuple[str, ...]:
    """diffusers' names of one of our parameters; several where we stack."""
    for old, new in (
        ("patch_embed", "pos_embed.proj"),
        ("timestep_embed.fc", "adaln_single.emb.timestep_embedder.linear_"),
        ("resolution_embed.fc", "adaln_single.emb.resolution_embedder.linear_"),
        ("aspect_ratio_embed.fc", "adaln_single.emb.aspect_ratio_embedder.linear_"),
        ("caption_embed.fc", "caption_projection.linear_"),
        ("final_layer.modulation_table", "scale_shift_table"),
        ("final_layer.linear", "proj_out"),
    ):
        if name.startswith(old):
            return (new + name[len(old) :],)
    if not name.startswith("dense_blocks"):
        return ("adaln_single.linear." + name.removeprefix("modulation."),)
    _, k, rest = name.split(".", 2)
    block = f"transformer_blocks.{k}."
    if latte:
        block = f"{'temporal_' if int(k) % 2 else ''}transformer_blocks.{int(k) // 2}."
    part, _, leaf = rest.rpartition(".")
    stacks = {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.proj": ("attn1.to_out.0",),
        "cross.q": ("attn2.to_q",),
        "cross.kv": ("attn2.to_k", "attn2.to_v"),
        "cross.proj": ("attn2.to_out.0",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
    }
    return tuple(f"{block}{one}.{leaf}" for one in stacks[part]) if part else (f"{block}scale_shift_table",)


def compare(model, theirs, inputs, their_inputs, latte):
    """Copies the weights, runs both in float64 and compares outputs and all gradients."""
    torch.manual_seed(1)
    model.double(), theirs.double()
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
        used = set()
        for name, parameter in model.named_parameters():
            parts = their_name(name, latte)
            used |= set(parts)
            parameter.copy_(torch.cat([named[part] for part in parts]))
    assert used == set(named)
    x = inputs["x"].requires_grad_()
    twin = x.detach().clone().requires_grad_()
    out, expected = model(**inputs), theirs(twin, **their_inputs).sample
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)  # diffusers has positions in float32
    grad = torch.randn_like(out)
    out.backward(grad), expected.backward(grad)
    scale = twin.grad.abs().max()
    assert (x.grad - twin.grad).abs().max() < 1e-5 * scale
    for name, parameter in model.named_parameters():
        expected = torch.cat([named[part].grad for part in their_name(name, latte)])
        assert (parameter.grad - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (12, 8)])
@pytest.mark.usefixtures("torch_features")
def test_pixart_is_diffusers(sizes, shape):
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(num_layers=3, sample_size=8, use_additional_conditions=sizes, **COMMON)
    config = FlexPixArtConfig(input_size=8, num_dense_blocks=3, size_conditions=sizes, **OURS, **DENSE)
    x, t = torch.randn(2, 4, *shape, dtype=torch.float64), torch.tensor([7, 900])
    caption = torch.randn(2, 5, 10, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    resolution = torch.tensor([[512.0, 512.0], [768.0, 512.0]])
    ratio = torch.tensor([[1.0], [1.5]])
    added = {"resolution": resolution if sizes else None, "aspect_ratio": ratio if sizes else None}
    inputs = {"x": x, "t": t, "caption": caption, "caption_mask": mask}
    if sizes:
        inputs |= {"resolution": resolution, "aspect_ratio": ratio[:, 0]}
    their_inputs = {"encoder_hidden_states": caption, "timestep": t, "encoder_attention_mask": mask.double()}
    compare(reference.FlexPixArt(config), theirs, inputs, their_inputs | {"added_cond_kwargs": added}, latte=False)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.usefixtures("torch_features")
def test_latte_is_diffusers(frames, text):
    torch.manual_seed(0)
    theirs = LatteTransformer3DModel(
        num_layers=2, sample_size=8, video_length=frames, **COMMON | ({} if text else {"cross_attention_dim": None})
    )
    if not text:
        del theirs.caption_projection.linear_1, theirs.caption_projection.linear_2  # it would be called for nothing
        theirs.caption_projection.forward = lambda caption: caption
    ours = OURS | ({} if text else {"caption_channels": 0})
    config = FlexLatteConfig(input_size=8, num_dense_blocks=4, num_frames=frames, **ours, **DENSE)
    x, t = torch.randn(2, 4, frames, 8, 8, dtype=torch.float64), torch.tensor([7, 900])
    caption = torch.randn(2, 5, 10, dtype=torch.float64)
    their_inputs = {"encoder_hidden_states": caption, "timestep": t}
    inputs = {"x": x, "t": t} | ({"caption": caption} if text else {})
    compare(reference.FlexLatte(config), theirs, inputs, their_inputs, latte=True)
