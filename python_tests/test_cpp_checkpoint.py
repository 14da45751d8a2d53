"""The fixture of csrc/tests/checkpoint_test.cpp: what save_pretrained writes, and what the model computes from it.

`python python_tests/test_cpp_checkpoint.py` writes it anew, after the format has changed on purpose.
"""

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import reference_of

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, reference

DATA = Path(__file__).parents[1] / "csrc/tests/data"
FOLDER, FORWARD = DATA / "tiny", DATA / "tiny_forward.safetensors"


def tiny_model() -> FlexDiT:
    """Parameter k's value i is ((73 i + 37 k) mod 255 - 127) / 256, which every dtype holds exactly."""
    config = FlexDiTConfig(
        input_size=8,
        in_channels=1,
        hidden_size=8,
        num_heads=2,
        mlp_ratio=3.3,  # 26 units
        num_classes=3,
        num_pooling_blocks=1,
        num_sdtm=1,
        sdtm_blocks=(1, 1, 1, 1),
        num_dense_blocks=1,
        reinject_position=True,
        schedule=DensitySchedule([(3, 3), (2, 3), (2, 2)], begins=[0, 400, 700]),
    )
    model = FlexDiT(config).eval()
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


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_folder_is_what_save_pretrained_writes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (FOLDER / "config.json").read_text()
    with (
        safetensors.safe_open(tmp_path / "model.safetensors", "pt") as new,
        safetensors.safe_open(FOLDER / "model.safetensors", "pt") as old,
    ):
        assert new.metadata() == old.metadata() and set(new.keys()) == set(old.keys())
        for name in new.keys():  # noqa: SIM118, it is no dict
            assert torch.equal(new.get_tensor(name), old.get_tensor(name)), name


def test_forward_is_the_references(model):
    stored, computed = safetensors.torch.load_file(FORWARD), forward(model)
    assert stored.keys() == computed.keys()
    for name, tensor in computed.items():
        assert stored[name].dtype == tensor.dtype
        torch.testing.assert_close(stored[name], tensor, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    tiny_model().save_pretrained(FOLDER)
    safetensors.torch.save_file(forward(tiny_model()), FORWARD)
