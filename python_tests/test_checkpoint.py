"""flexdit_ext/checkpoint.py: round trips and wrong configurations. test_checkpoint_damage.py has the failures."""

import json
import os
import stat

import pytest
import safetensors.torch
import torch
from helpers import assert_same_model, tiny_model

from flexdit_ext import DensitySchedule, FlexDiT, checkpoint

# ---- round trips ----------------------------------------------------------------------------------------------------


def test_round_trip(saved):
    model, directory = saved
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    loaded = checkpoint.load_pretrained(directory)
    assert_same_model(loaded, model)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_methods_of_the_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(str(tmp_path / "a" / "b"))
    assert_same_model(FlexDiT.from_pretrained(str(tmp_path / "a" / "b")), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    model = tiny_model(dtype=dtype)
    checkpoint.save_pretrained(model, tmp_path)
    assert_same_model(checkpoint.load_pretrained(tmp_path), model)
    assert_same_model(checkpoint.load_pretrained(tmp_path, dtype=torch.float32, device="cpu"), model.float())


def test_one_file_is_enough(saved, tmp_path):
    model, directory = saved
    assert_same_model(checkpoint.load_pretrained(directory / "model.safetensors"), model)
    alone = tmp_path / "digits.safetensors"
    os.replace(directory / "model.safetensors", alone)
    assert_same_model(checkpoint.load_pretrained(alone), model)
    # A file of its own name trusts its metadata more than a config.json that happens to lie in the same folder.
    (tmp_path / "config.json").write_text("{}")
    assert_same_model(checkpoint.load_pretrained(alone), model)


def test_edited_configuration_counts(saved):
    model, directory = saved
    config = model.config.to_dict() | {"schedule": {"grids": [[4, 4]]}}
    (directory / "config.json").write_text(json.dumps(config))
    assert checkpoint.load_pretrained(directory).config.schedule == DensitySchedule([(4, 4)])


def test_weights_of_another_program(saved):
    """No metadata: config.json beside the weights. Pickles are for flexdit convert."""
    model, directory = saved
    safetensors.torch.save_file(model.state_dict(), directory / "other.safetensors")
    torch.save(model.state_dict(), directory / "other.pt")
    assert_same_model(checkpoint.load_pretrained(directory / "other.safetensors"), model)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors has no configuration"):
        checkpoint.load_pretrained(directory / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.pt is not a \.safetensors file; `flexdit convert`"):
        checkpoint.load_pretrained(directory / "other.pt")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save_pretrained(tiny_model(), tmp_path)
    finally:
        os.umask(before)
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_saving_again(saved):
    _, directory = saved
    for model in (tiny_model(seed=1), tiny_model(seed=2, num_dense_blocks=2)):  # same configuration, another one
        checkpoint.save_pretrained(model, directory)
        assert_same_model(checkpoint.load_pretrained(directory), model)
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_loading_leaves_the_random_numbers_alone(saved):
    state = torch.get_rng_state()
    checkpoint.load_pretrained(saved[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_not_a_model(tmp_path):
    with pytest.raises(TypeError, match="Linear"):
        checkpoint.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- wrong configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ('{"input_size": 8', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "JSON list"),
        ("null", "JSON NoneType"),
    ],
)
def test_config_is_no_json_object(saved, text, message):
    path = saved[1] / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_pretrained(saved[1])
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"no_such_key": 1}, "unknown keys.*no_such_key"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 8.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_heads": 3}, "num_heads"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"mlp_ratio": float("inf")}, "configuration"),
        ({"class_dropout_prob": float("nan")}, "class_dropout_prob"),
        ({"sdtm_blocks": 3}, "sdtm_blocks"),
        ({"sdtm_blocks": [1, 1, 1]}, "sdtm_blocks"),
        ({"schedule": 5}, "schedule"),
        ({"schedule": {}}, "schedule"),
        ({"schedule": {"grids": 5}}, "configuration"),
        ({"schedule": {"grids": [[5, 5]]}}, "schedule"),
        ({"schedule": {"grids": [["a", "b"]]}}, "grids"),
        ({"schedule": {"grids": [[2, 2]], "begins": "ab"}}, "configuration"),
        ({"hidden_size": 16}, r"patch_embed.weight \[8, 1, 2, 2\], must be \[16, 1, 2, 2\]"),
        ({"hidden_size": 2**40}, r"pos_embed \[16, 8\], must be \[16, 1099511627776\]"),
        ({"input_size": 2**40}, "pos_embed"),
        ({"mlp_ratio": 1e300}, "mlp.fc1.weight"),
        ({"num_classes": 10**30}, "label_embed.weight"),
        ({"learn_sigma": False}, "final_layer.linear.weight"),
        ({"num_dense_blocks": 10**12}, "blocks"),
        ({"num_dense_blocks": 2}, "10 missing: dense_blocks.1.modulation.weight.* and 5 more"),
        ({"num_dense_blocks": 0}, "10 unexpected: dense_blocks.0.attn.proj.bias.* and 5 more"),
        ({"sdtm_blocks": [1, 1, 2, 1]}, "16 missing: sdtm.0.recovery.1"),
    ],
)
def test_config_does_not_fit(saved, change, message):
    model, directory = saved
    (directory / "config.json").write_text(json.dumps(model.config.to_dict() | change))
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load_pretrained(directory)
    assert str(directory / "config.json") in str(raised.value)


def test_config_in_the_metadata_is_checked(saved, tmp_path):
    path = tmp_path / "x.safetensors"
    for text in ("{", '{"no_such_key": 1}'):
        safetensors.torch.save_file(saved[0].state_dict(), path, {"config": text})
        with pytest.raises(ValueError, match=r"the metadata of .*x\.safetensors is not"):
            checkpoint.load_pretrained(path)


# ---- check_state_dict -----------------------------------------------------------------------------------------------


def test_check_state_dict():
    model = tiny_model()
    state_dict = model.state_dict()
    checkpoint.check_state_dict(model, state_dict)
    del state_dict["dense_blocks.0.mlp.fc1.bias"]
    state_dict["extra"] = torch.zeros(1)
    state_dict["patch_embed.bias"] = torch.zeros(2, 4)
    state_dict["pos_embed"] = torch.zeros(16, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"file\.pt does not fit the model") as raised:
        checkpoint.check_state_dict(model, state_dict, "file.pt")
    for part in (
        "1 missing: dense_blocks.0.mlp.fc1.bias",
        "1 unexpected: extra",
        "1 misshaped: patch_embed.bias [2, 4], must be [8]",
        "1 not floating point: pos_embed (torch.int32)",
    ):
        assert part in str(raised.value)


def test_long_lists_are_cut():
    model = tiny_model()
    with pytest.raises(ValueError, match="does not fit") as raised:
        checkpoint.check_state_dict(model, {f"layer{i}": torch.zeros(1) for i in range(7)})
    assert "7 unexpected: layer0, layer1, layer2, layer3, layer4 and 2 more" in str(raised.value)


def test_values_are_not_judged(saved):
    model, directory = saved
    with torch.no_grad():
        model.patch_embed.bias.fill_(float("nan"))
    checkpoint.save_pretrained(model, directory)
    assert checkpoint.load_pretrained(directory).patch_embed.bias.isnan().all()
