"""FlexPixArt and FlexLatte against their references, outputs and gradients, on every device."""

import pytest
import torch
from devices import dtypes_of
from helpers import relative_error

from flexdit_ext import FlexLatte, FlexLatteConfig, FlexPixArt, FlexPixArtConfig
from flexdit_ext import reference_single as reference

LAYOUT = {"num_pooling_blocks": 1, "num_sdtm": 2, "sdtm_blocks": (1, 2, 1, 1), "num_dense_blocks": 1}
SIZES = {"input_size": 8, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2.0}  # head size 24
PIXART = FlexPixArtConfig(**SIZES, **LAYOUT, caption_channels=10, max_caption_tokens=7, size_conditions=True)
TEXT_CLIP = FlexLatteConfig(**SIZES, **LAYOUT, caption_channels=10, max_caption_tokens=7, num_frames=4)
CLASS_CLIP = FlexLatteConfig(**SIZES, **LAYOUT, num_classes=5, class_dropout_prob=0.1, num_frames=4)
# Of outputs and gradients, the largest difference over the largest value. Worst measured, 2-core AMD machine with
# AVX-512, torch 2.13, 2026-11-25, CPU and emulator: 2.6e-15, 1.1e-6, 3.2e-2, 2.6e-3.
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 8e-2, torch.float16: 8e-3}


def make(config, dtype=torch.float64, device="cpu"):
    """A model none of whose weights is zero, and its reference in float64 with the same, rounded to dtype."""
    torch.manual_seed(0)
    kind = FlexPixArt if isinstance(config, FlexPixArtConfig) else FlexLatte
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.7 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
            )
    model = model.to(dtype)
    twin = getattr(reference, kind.__name__)(config)
    twin.load_state_dict(model.state_dict())
    return model.to(device).eval(), twin.double()


def inputs_of(config, batch=3, frames=4, side=(8, 8), dtype=torch.float64):
    torch.manual_seed(1)
    values = {"t": torch.tensor([3, 400, 950])[:batch]}
    shape = (batch, 4, *side) if isinstance(config, FlexPixArtConfig) else (batch, 4, frames, *side)
    values["x"] = torch.randn(shape).to(dtype)
    if config.caption_channels:
        values["caption"] = torch.randn(batch, 6, 10).to(dtype)
        values["caption_mask"] = torch.arange(6) < torch.tensor([6, 1, 4])[:batch, None]
    if config.size_conditions:
        values["resolution"] = torch.tensor([[64.0, 64.0], [96.0, 48.0], [64.0, 32.0]])[:batch]
        values["aspect_ratio"] = values["resolution"][:, 0] / values["resolution"][:, 1]
    if config.num_classes:
        values["y"] = torch.tensor([0, 5, 3])[:batch]
    return values


def to(values, device):
    return {name: value.to(device) for name, value in values.items()}


def expected_of(twin, values, grids):
    """The reference, which takes one grid at a time."""
    values = {n: v.double() if v.is_floating_point() and n in ("x", "caption") else v for n, v in values.items()}
    leaves = {n: v.requires_grad_() for n, v in values.items() if n in ("x", "caption")}
    outs = []
    for i, grid in enumerate(grids):
        outs.append(twin(**{n: v[i : i + 1] for n, v in values.items()}, grid=grid))
    return torch.cat(outs), leaves


CASES = {
    "pixart": (PIXART, [(3, 3), (2, 4), (4, 4)], {}),
    "pixart, wide": (PIXART, [(2, 3), (1, 4), (1, 6)], {"side": (4, 12)}),
    "text clip": (TEXT_CLIP, [(2, 3, 3), (4, 2, 2), (1, 4, 1)], {}),
    "class clip": (CLASS_CLIP, [(2, 3, 3), (4, 2, 2), (1, 4, 1)], {}),
    "short clip": (CLASS_CLIP, [(2, 3, 3), (3, 2, 2), (1, 4, 1)], {"frames": 3}),
    "one frame": (CLASS_CLIP, [(1, 3, 3), (1, 2, 2), (1, 4, 1)], {"frames": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, backend, device):
    config, grids, options = CASES[name]
    for dtype in dtypes_of(backend):
        model, twin = make(config, dtype, device)
        values = inputs_of(config, dtype=dtype, **options)
        expected, leaves = expected_of(twin, values, grids)
        mine = to(values, device)
        for leaf in leaves:
            mine[leaf] = mine[leaf].detach().requires_grad_()
        out = model(**mine, grid=grids)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        expected.backward(grad.double())
        out.backward(grad.to(device))
        assert relative_error(out.cpu().double(), expected) <= BOUNDS[dtype]
        for leaf, value in leaves.items():
            assert relative_error(mine[leaf].grad.cpu().double(), value.grad) <= BOUNDS[dtype], leaf
        theirs = dict(twin.named_parameters())
        for key, a in model.named_parameters():
            assert relative_error(a.grad.cpu().double(), theirs[key].grad) <= BOUNDS[dtype], key
        with torch.no_grad():
            assert relative_error(model(**to(values, device), grid=grids).cpu().double(), expected) <= BOUNDS[dtype]
