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


def test_numbers_have_no_gradient():
    model, _ = make(PIXART, torch.float32)
    values = inputs_of(PIXART, dtype=torch.float32)
    numbers = {name: values[name].float().requires_grad_() for name in ("t", "resolution", "aspect_ratio")}
    model(**(values | numbers)).sum().backward()
    assert all(number.grad is None for number in numbers.values())
    assert model.resolution_embed.fc1.weight.grad is not None


@pytest.mark.parametrize("config", [PIXART, CLASS_CLIP], ids=["pixart", "class clip"])
def test_save_and_load(config, tmp_path):
    model, _ = make(config, torch.float32)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == config
    values = inputs_of(config, dtype=torch.float32)
    assert torch.equal(model(**values), again(**values))
    other = FlexLatte if isinstance(model, FlexPixArt) else FlexPixArt
    with pytest.raises(ValueError, match=f"is not the configuration of a {other.__name__}"):
        other.from_pretrained(tmp_path)


def test_schedule_is_followed():
    model, _ = make(CLASS_CLIP)
    values = inputs_of(CLASS_CLIP)
    grids = [model.schedule.grid(t) for t in values["t"].tolist()]
    assert torch.equal(model(**values), model(**values, grid=grids))
    assert not torch.equal(model(**values), model(**values, grid=(1, 1, 1)))


def test_paper_budgets():
    """Mean multiply-accumulates of the default schedules against the paper's -38% (PixArt-alpha) and -56% (Latte)."""
    for config, saved in ((FlexPixArtConfig(), 0.38), (FlexLatteConfig(), 0.56)):
        dense = dict(num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=28)
        kind = FlexPixArt if isinstance(config, FlexPixArtConfig) else FlexLatte
        with torch.device("meta"):
            sparse_macs = kind(config).macs()
            dense_macs = kind(type(config)(**dense)).macs()
        assert abs(1 - sparse_macs / dense_macs - saved) < 0.015


@pytest.mark.parametrize("config", [PIXART, TEXT_CLIP, CLASS_CLIP], ids=["pixart", "text clip", "class clip"])
def test_activation_checkpointing_and_compile(config):
    model, _ = make(config)
    values = inputs_of(config)
    model.zero_grad()
    model(**values).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing = True
    model(**values).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))
    model.activation_checkpointing = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**values), model(**values), rtol=0, atol=1e-12)


REFUSALS = [
    (
        PIXART,
        {"x": torch.zeros(3, 4, 7, 8).double()},
        ValueError,
        r"x has height and width \(7, 8\), must be multiples",
    ),
    (
        PIXART,
        {"x": torch.zeros(3, 3, 8, 8).double()},
        ValueError,
        r"x has shape \(3, 3, 8, 8\), must be \[any, 4, any, any\]",
    ),
    (
        PIXART,
        {"caption": torch.zeros(3, 8, 10).double()},
        ValueError,
        "caption has 8 tokens, must have 1 to max_caption_t",
    ),
    (
        PIXART,
        {"caption": torch.zeros(3, 6, 9).double()},
        ValueError,
        r"caption has shape \(3, 6, 9\), must be \[3, any, 10\]",
    ),
    (
        PIXART,
        {"caption_mask": torch.ones(3, 5).bool()},
        ValueError,
        r"caption_mask has shape \(3, 5\), must be \[3, 6\]",
    ),
    (PIXART, {"caption_mask": torch.ones(3, 6)}, TypeError, "caption_mask is torch.float32, must be torch.bool"),
    (
        PIXART,
        {"caption_mask": torch.arange(6) < torch.tensor([[6], [0], [1]])},
        ValueError,
        r"caption_mask\[1\] has no tok",
    ),
    (PIXART, {"resolution": None}, TypeError, "resolution is None, must be a torch.Tensor"),
    (PIXART, {"t": torch.tensor([0, 0, 1001])}, ValueError, r"t is \[0, 0, 1001\], must lie in \[0, 1000\]"),
    (PIXART, {"grid": (5, 4)}, ValueError, r"grid has the sparse grid \(5, 4\), at most the dense grid \(4, 4\)"),
    (
        CLASS_CLIP,
        {"x": torch.zeros(3, 4, 5, 8, 8).double()},
        ValueError,
        "x has 5 frames, must have 1 to num_frames = 4",
    ),
    (
        CLASS_CLIP,
        {"x": torch.zeros(3, 4, 8, 8).double()},
        ValueError,
        r"x has shape \(3, 4, 8, 8\), must be \[any, 4, any, a",
    ),
    (CLASS_CLIP, {"y": None}, ValueError, "y is missing, the model has y"),
    (CLASS_CLIP, {"y": torch.tensor([0, 6, 1])}, ValueError, r"y is \[0, 6, 1\], must lie in \[0, 6\)"),
    (
        CLASS_CLIP,
        {"grid": (5, 1, 1)},
        ValueError,
        r"grid has the sparse grid \(5, 1, 1\), at most the dense grid \(4, 4, 4\)",
    ),
    (CLASS_CLIP, {"caption": torch.zeros(3, 6, 10).double()}, ValueError, "caption is given, the model has no caption"),
    (TEXT_CLIP, {"caption": None, "caption_mask": None}, ValueError, "caption is missing, the model has caption"),
]


@pytest.mark.parametrize("config, change, kind, message", REFUSALS)
def test_bad_input(config, change, kind, message):
    model, _ = make(config)
    with pytest.raises(kind, match=message):
        model(**inputs_of(config) | change)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (FlexPixArtConfig, {"caption_channels": 0}, "caption_channels is 0, FlexPixArt reads captions"),
        (FlexPixArtConfig, {"hidden_size": 64, "size_conditions": True}, "hidden_size is 64, must be a multiple of 3"),
        (FlexLatteConfig, {"num_frames": 0}, "num_frames is 0, must be from 1"),
        (FlexLatteConfig, {"schedule": {"grids": [(17, 4, 4)]}}, r"schedule has the sparse grid \(17, 4, 4\)"),
        (FlexLatteConfig, {"hidden_size": 66}, "hidden_size is 66, must be a multiple of num_heads"),
    ],
)
def test_bad_configuration(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)
