"""The fixtures of csrc/tests/checkpoint_test.cpp: what save_pretrained writes, and what the model computes from it; and
what the C++ library reads from it.

`python python_tests/test_cpp_checkpoint.py` writes it anew, after the format has changed on purpose.
"""

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import reference_of

from flexdit_ext import (
    _C,
    DensitySchedule,
    FlexDiT,
    FlexDiTConfig,
    FlexLatte,
    FlexLatteConfig,
    FlexPixArt,
    FlexPixArtConfig,
    reference,
)

DATA = Path(__file__).parents[1] / "csrc/tests/data"
FORWARD = DATA / "tiny_forward.safetensors"
CAPTION = DATA / "tiny_caption.safetensors"  # for examples/cpp/sample_caption.cpp
SIZES = {"input_size": 8, "in_channels": 1, "hidden_size": 8, "num_heads": 2}
LAYOUT = {"num_pooling_blocks": 1, "num_sdtm": 1, "sdtm_blocks": (1, 1, 1, 1), "num_dense_blocks": 1}
SINGLE = SIZES | LAYOUT | {"hidden_size": 12, "mlp_ratio": 2.0, "out_channels": 2}


def tiny_model() -> FlexDiT:
    config = FlexDiTConfig(
        **SIZES,
        **LAYOUT,
        mlp_ratio=3.3,  # 26 units
        num_classes=3,
        reinject_position=True,
        schedule=DensitySchedule([(3, 3), (2, 3), (2, 2)], begins=[0, 400, 700]),
    )
    return filled(FlexDiT(config))


def tiny_pixart() -> FlexPixArt:
    options = {"caption_channels": 6, "max_caption_tokens": 5, "size_conditions": True, "position_scale": 0.5}
    return filled(FlexPixArt(FlexPixArtConfig(**SINGLE, **options)))


def tiny_latte() -> FlexLatte:
    options = {"num_frames": 3, "num_classes": 3, "class_dropout_prob": 0.1, "caption_channels": 6}
    schedule = DensitySchedule([(3, 3, 3), (2, 2, 3), (1, 2, 2)], begins=[0, 400, 700])
    return filled(FlexLatte(FlexLatteConfig(**SINGLE, **options, max_caption_tokens=5, schedule=schedule)))


FOLDERS = {"tiny": tiny_model, "tiny_pixart": tiny_pixart, "tiny_latte": tiny_latte}


def filled(model):
    """Parameter k's value i is ((73 i + 37 k) mod 255 - 127) / 256, which every dtype holds exactly."""
    model.eval()
    with torch.no_grad():
        for k, parameter in enumerate(model.state_dict().values()):
            values = (torch.arange(parameter.numel()) * 73 + 37 * k) % 255 - 127
            parameter.copy_(values.view(parameter.shape) / 256)
    return model


def forward(model: FlexDiT) -> dict[str, torch.Tensor]:
    """Inputs, timestep features and the reference's output in float64."""
    x = ((torch.arange(3 * 64) * 29 % 97 - 48) / 32).view(3, 1, 8, 8).double()
    t, y = torch.tensor([12.0, 400.0, 999.5], dtype=torch.float64), torch.tensor([0, 3, 2])
    with torch.no_grad():
        grids = [model.schedule.grid(float(time)) for time in t]
        out = reference_of(model).double()(x, t, y, grids)
    features = reference.timestep_frequencies(t).double()
    return {"x": x, "t": t, "features": features, "y": y, "out": out}


def caption() -> dict[str, torch.Tensor]:
    values = torch.arange(24).view(4, 6) * 29 % 17 / 16 - 0.5
    return {"caption": values[:3].clone(), "null_caption": values[3:].clone()}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_what_save_pretrained_writes(name, tmp_path):
    FOLDERS[name]().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (DATA / name / "config.json").read_text()
    with (
        safetensors.safe_open(tmp_path / "model.safetensors", "pt") as new,
        safetensors.safe_open(DATA / name / "model.safetensors", "pt") as old,
    ):
        assert new.metadata() == old.metadata() and set(new.keys()) == set(old.keys())
        for name in new.keys():  # noqa: SIM118, it is no dict
            assert torch.equal(new.get_tensor(name), old.get_tensor(name)), name


@pytest.mark.parametrize("name", FOLDERS)
def test_cpp_library_reads_the_same(name):
    model, checkpoint = FOLDERS[name](), _C.Checkpoint(str(DATA / name), None)
    assert checkpoint.config == model.config.core
    assert checkpoint.schedule == model.schedule._core
    specs = _C.model_parameters(checkpoint.config)
    assert {name for name, _, _ in specs} == set(model.state_dict())


PIXART, LATTE = SINGLE | {"caption_channels": 5}, SINGLE
CONFIGS = [
    FlexPixArtConfig(**PIXART),
    FlexPixArtConfig(**PIXART | {"input_size": 24, "patch_size": 4, "in_channels": 3, "num_sdtm": 0, "mlp_ratio": 1.5}),
    FlexPixArtConfig(**PIXART, size_conditions=True, position_scale=2.5, max_caption_tokens=300),
    FlexPixArtConfig(**PIXART, schedule=DensitySchedule([(4, 4), (1, 2)], 500, [0, 3])),
    FlexLatteConfig(**LATTE),
    FlexLatteConfig(**LATTE | {"num_frames": 7, "input_size": 22, "num_classes": 5, "sdtm_blocks": (2, 0, 1, 0)}),
    FlexLatteConfig(**LATTE | {"num_classes": 5, "class_dropout_prob": 0.25, "caption_channels": 9, "num_sdtm": 2}),
    FlexLatteConfig(**LATTE, class_dropout_prob=0.25, num_frames=1),  # of labels that it does not have
    FlexDiTConfig(**SIZES, **LAYOUT, learn_sigma=False, class_dropout_prob=0.0),
    FlexDiTConfig(**SIZES, **LAYOUT, timestep_shift=1, mlp_norm_eps=1e-5, reinject_position=True, num_classes=7),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_cpp_library_reads_every_field(config, tmp_path):
    kinds = {FlexDiTConfig: FlexDiT, FlexPixArtConfig: FlexPixArt, FlexLatteConfig: FlexLatte}
    kinds[type(config)](config).save_pretrained(tmp_path)
    checkpoint = _C.Checkpoint(str(tmp_path), None)
    assert checkpoint.config == config.core
    assert checkpoint.schedule == config.density_schedule._core


def test_forward_is_the_references():
    stored, computed = safetensors.torch.load_file(FORWARD), forward(tiny_model())
    assert stored.keys() == computed.keys()
    for name, tensor in computed.items():
        assert stored[name].dtype == tensor.dtype
        torch.testing.assert_close(stored[name], tensor, rtol=1e-12, atol=1e-12)


def test_caption_is_the_examples():
    stored = safetensors.torch.load_file(CAPTION)
    assert stored.keys() == caption().keys() and all(torch.equal(stored[name], caption()[name]) for name in stored)


if __name__ == "__main__":
    safetensors.torch.save_file(caption(), CAPTION)
    DATA.mkdir(exist_ok=True)
    for name, make in FOLDERS.items():
        make().save_pretrained(DATA / name)
    safetensors.torch.save_file(forward(tiny_model()), FORWARD)
