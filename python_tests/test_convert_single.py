"""diffusers' PixArt and Latte to and from ours: outputs and gradients against diffusers' own forward."""

import dataclasses

import pytest
import torch
from helpers import relative_error

diffusers = pytest.importorskip("diffusers")

from text_models import LAYOUT, latte, pixart  # noqa: E402

from flexdit_ext import FlexLatte, FlexLatteConfig, convert  # noqa: E402

BOUND = 1e-5  # float32, outputs and gradients; worst measured 1.0e-6


def pixart_inputs(side=(8, 8)):
    torch.manual_seed(1)
    x, t, caption = torch.randn(2, 4, *side), torch.tensor([7, 900]), torch.randn(2, 5, 10)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    resolution, ratio = torch.tensor([[512.0, 512.0], [768.0, 512.0]]), torch.tensor([1.0, 1.5])
    return x, t, caption, mask, resolution, ratio


def call_pixart(theirs, x, t, caption, mask, resolution, ratio):
    added = {"resolution": resolution, "aspect_ratio": ratio[:, None]}
    return theirs(x, caption, t, added, encoder_attention_mask=mask.to(x.dtype)).sample


def compare(mine, theirs, x, y):
    """Outputs and the gradients of the latents."""
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    out, expected = mine(a), theirs(b)
    grad = torch.randn_like(out)
    out.backward(grad), expected.backward(grad)
    assert relative_error(out, expected) < BOUND
    assert relative_error(a.grad, b.grad) < BOUND


@pytest.mark.parametrize("side", [(8, 8), (12, 8)])
@pytest.mark.parametrize("sizes", [False, True])
def test_from_pixart(sizes, side):
    theirs = pixart(use_additional_conditions=sizes)
    report = convert.Report()
    model = convert.from_pixart(theirs, report=report)
    assert not report.missing and not report.unused and not report.initialised
    x, t, caption, mask, *conditions = pixart_inputs(side)
    ours = conditions if sizes else (None, None)
    compare(
        lambda x: model(x, t, caption, mask, *ours),
        lambda x: call_pixart(theirs, x, t, caption, mask, *conditions),
        x,
        x,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_from_latte(text, bias):
    theirs = latte(attention_bias=bias, **{} if text else {"cross_attention_dim": None})
    report = convert.Report()
    model = convert.from_latte(theirs, report=report)
    assert not report.missing
    assert bool(report.initialised) == (not bias)
    assert sorted(report.unused) == [n for n in sorted(theirs.state_dict()) if n.startswith("caption") and not text]
    torch.manual_seed(1)
    x, t, caption = torch.randn(2, 4, 4, 8, 8), torch.tensor([7, 900]), torch.randn(2, 5, 10)
    ours = {"caption": caption} if text else {}
    compare(lambda x: model(x, t, **ours), lambda x: theirs(x, t, caption).sample, x, x)


def test_without_temporal_attention():
    theirs = latte()
    torch.manual_seed(1)
    x, t, caption = torch.randn(2, 4, 3, 8, 8), torch.tensor([7, 900]), torch.randn(2, 5, 10)
    compare(
        lambda x: convert.from_latte(theirs)(x, t, caption=caption, temporal_attention=False),
        lambda x: theirs(x, t, caption, enable_temporal_attentions=False).sample,
        x,
        x,
    )
    with pytest.raises(ValueError, match="temporal_attention is False, must be True for a model with pooling blocks"):
        convert.from_latte(theirs, **LAYOUT)(x, t, caption=caption, temporal_attention=False)


@pytest.mark.parametrize("make, there, back", [(pixart, "from_pixart", "to_pixart"), (latte, "from_latte", "to_latte")])
def test_there_and_back(make, there, back, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    model = getattr(convert, there)(tmp_path)
    tensors, config = getattr(convert, back)(model)
    again = type(theirs).from_config(config)
    again.load_state_dict(tensors)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(config[k] == v for k, v in theirs.config.items() if k in config and v is not None)


@pytest.mark.parametrize("make, there", [(pixart, "from_pixart"), (latte, "from_latte")])
def test_layout_takes_the_dense_blocks(make, there):
    theirs, report = make(), convert.Report()
    dense = getattr(convert, there)(theirs)
    model = getattr(convert, there)(theirs, report=report, **LAYOUT)
    assert model.config.num_dense_blocks == 1 and model.config.depth == dense.config.depth == 6
    expected, made = dense.state_dict(), model.state_dict()
    order = [
        "pooling_blocks.0",
        *(f"sdtm.0.{kind}.0" for kind in ("generation", "sparse", "recovery", "dense")),
        "dense_blocks.0",
    ]
    for k, prefix in enumerate(order):
        qkv = expected[f"dense_blocks.{k}.attn.qkv.weight"]
        kind = next(n for n in ("v", "q", "qkv") if f"{prefix}.attn.{n}.weight" in made)
        rows = {"v": qkv[96:], "q": qkv[:48], "qkv": qkv}[kind]
        assert torch.equal(made[f"{prefix}.attn.{kind}.weight"], rows)
        for name in ("modulation_table", "mlp.fc1.weight", "attn.proj.bias"):
            assert torch.equal(made[f"{prefix}.{name}"], expected[f"dense_blocks.{k}.{name}"])
        assert (f"{prefix}.cross.q.weight" in made) == dense.config.has_cross(k)
    assert not made["sdtm.0.recovery.0.from_sparse.weight"].any()
    assert torch.equal(made["sdtm.0.recovery.0.from_dense.weight"], torch.eye(48))
    assert set(report.initialised) == {
        f"sdtm.0.recovery.0.from_{n}" for n in ("sparse.weight", "sparse.bias", "dense.weight", "dense.bias")
    }


@pytest.mark.parametrize("make, there", [(pixart, "from_pixart"), (latte, "from_latte")])
def test_sparsify_is_the_converters_layout(make, there):
    dense, expected = getattr(convert, there)(make()), getattr(convert, there)(make(), **LAYOUT)
    model = convert.sparsify(dense, expected.config)
    assert type(model) is type(expected) and model.config == expected.config and not model.training
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_sparsify_refusals():
    dense = convert.from_latte(latte())
    sparse = dataclasses.replace(dense.config, **LAYOUT)
    with pytest.raises(ValueError, match="differ in num_frames 4 and 8, depth 6 and 11"):
        convert.sparsify(dense, dataclasses.replace(sparse, num_frames=8, num_dense_blocks=6))
    with pytest.raises(ValueError, match="the dense model has pooling blocks or SDTMs"):
        convert.sparsify(FlexLatte(sparse), sparse)
    with pytest.raises(TypeError, match="dense_model is a FlexLatte, which has no FlexPixArtConfig"):
        convert.sparsify(dense, convert.from_pixart(pixart()).config)


def test_refusals():
    with pytest.raises(TypeError, match="from_pixart: model is int, must be a module or a directory"):
        convert.from_pixart(3)
    with pytest.raises(ValueError, match="from_pixart: the layout has 11 blocks, the dense model has 6"):
        convert.from_pixart(pixart(), num_sdtm=1, sdtm_blocks=(1, 3, 1, 1), num_pooling_blocks=5)
    with pytest.raises(TypeError, match=r"from_latte: unknown arguments \['hidden_size'\]"):
        convert.from_latte(latte(), hidden_size=3)
    with pytest.raises(ValueError, match="from_pixart: activation_fn is 'geglu', must be 'gelu-approximate'"):
        convert.from_pixart(pixart(activation_fn="geglu"))
    with pytest.raises(ValueError, match="to_pixart: the model has pooling blocks or SDTMs"):
        convert.to_pixart(convert.from_pixart(pixart(), **LAYOUT))
    labelled = FlexLatteConfig(8, 2, 4, 8, 48, 2, num_classes=3, caption_channels=10, num_pooling_blocks=0, num_sdtm=0)
    with pytest.raises(ValueError, match="to_latte: num_classes is 3"):
        convert.to_latte(FlexLatte(labelled))
