"""flexdit_ext/convert.py: the released model's fixture, and what the tensors of a checkpoint tell. Dense DiTs are in
test_convert_dit.py."""

import argparse

import numpy as np
import pytest
import torch
from helpers import LAYOUT, dit_model, dit_state_dict, fixture_path, load_fixture, same_tensors, stored_features

from flexdit_ext import DensitySchedule, FlexDiTConfig, convert

# ---- changsn/SparseDiT ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    with np.load(fixture_path(), allow_pickle=False) as archive:
        return {
            kind: {
                name.removeprefix(kind): torch.from_numpy(archive[name]) for name in archive if name.startswith(kind)
            }
            for kind in ("param/", "grad/")
        }


def test_sparsedit_output(released):
    fixture = load_fixture()
    model = convert.from_sparsedit(released["param/"], num_heads=2, dtype=torch.float64)
    for name in ("input_size", "hidden_size", "num_classes", "num_pooling_blocks", "num_sdtm", "sdtm_blocks", "depth"):
        assert getattr(model.config, name) == getattr(fixture.config, name)
    assert not model.training
    with torch.no_grad(), stored_features(fixture):
        out = model(fixture.x, fixture.t, fixture.y, fixture.sparse_grid)
    # Worst 1.6e-15 (largest value 1), 2-core development machine.
    torch.testing.assert_close(out, fixture.out, rtol=0, atol=1e-10)


def test_sparsedit_round_trip(released):
    model = convert.from_sparsedit(released["param/"], num_heads=2)
    assert model.patch_embed.weight.dtype == torch.float32
    assert same_tensors(convert.to_sparsedit(model), released["param/"])
    assert same_tensors(convert.to_sparsedit(model.state_dict(), model.config), released["param/"])


def test_sparsedit_gradient_names(released):
    fixture = load_fixture()
    model = convert.from_sparsedit(released["param/"], num_heads=2, dtype=torch.float64)
    with stored_features(fixture):
        model(fixture.x, fixture.t, fixture.y, fixture.sparse_grid).backward(fixture.grad_out)
    gradients = convert.to_sparsedit({name: p.grad for name, p in model.named_parameters()}, model.config)
    assert gradients.keys() == released["grad/"].keys()
    for name, expected in released["grad/"].items():
        # The file rounds gradients to float32.
        torch.testing.assert_close(
            gradients[name], expected.double(), rtol=2e-7, atol=1e-8, msg=lambda m, n=name: n + m
        )


def test_names_are_inverse():
    for name in dit_model(**LAYOUT).state_dict():
        assert convert.released_to_flexdit(convert.flexdit_to_released(name)) == name
    assert convert.released_to_flexdit("blocks.0.mlp.fc1.weight") is None
    assert convert.flexdit_to_released("pooling_blocks") is None


def test_sparsedit_training_checkpoint(released, tmp_path):
    ema = {f"module.{name}": tensor for name, tensor in released["param/"].items()}  # as DataParallel names them
    model = {name: torch.zeros_like(tensor) for name, tensor in released["param/"].items()}
    content = {"model": model, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "0400000.pt")
    for source in (content, tmp_path / "0400000.pt", str(tmp_path / "0400000.pt")):
        loaded = convert.from_sparsedit(source, num_heads=2)
        assert same_tensors(convert.to_sparsedit(loaded), released["param/"])


def test_sparsedit_schedule(released):
    model = convert.from_sparsedit(released["param/"], num_heads=2, grid=(3, 3))
    assert model.config.schedule == DensitySchedule([(3, 3)])
    schedule = DensitySchedule([(4, 4), (2, 2)])
    assert convert.from_sparsedit(released["param/"], num_heads=2, schedule=schedule).config.schedule == schedule
    with pytest.raises(ValueError, match="grid and schedule"):
        convert.from_sparsedit(released["param/"], num_heads=2, grid=(3, 3), schedule=schedule)
    with pytest.raises(ValueError, match="schedule"):
        convert.from_sparsedit(released["param/"], num_heads=2, grid=(9, 9))


def test_what_sparsedit_cannot_express():
    with pytest.raises(ValueError, match="reinject_position"):
        convert.to_sparsedit(dit_model(**LAYOUT, reinject_position=True))
    with pytest.raises(ValueError, match="not_a_tensor"):
        convert.to_sparsedit({"not_a_tensor": torch.zeros(1)})
    several = dit_model(**(LAYOUT | {"sdtm_blocks": (1, 1, 2, 1)}))
    with pytest.warns(UserWarning, match="recovery"):
        state_dict = convert.to_sparsedit(several)
    with pytest.warns(UserWarning, match="recovery"):
        assert same_tensors(convert.from_sparsedit(state_dict, num_heads=2).state_dict(), several.state_dict())


# ---- what the tensors tell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        LAYOUT,
        LAYOUT | {"sdtm_blocks": (1, 0, 2, 0), "num_dense_blocks": 0},
        {"in_channels": 1, "learn_sigma": False, "input_size": 8, "patch_size": 1},
        {"mlp_ratio": 2.5},
        {"hidden_size": 28, "num_heads": 7, "mlp_ratio": 1.93},
        {"num_pooling_blocks": 2, "num_dense_blocks": 0},
    ],
)
def test_configuration_is_read(overrides):
    model = dit_model(**overrides)
    config = convert.read_config(model.state_dict(), num_heads=model.config.num_heads)
    for name in FlexDiTConfig.__dataclass_fields__:
        if name == "mlp_ratio":
            assert config.mlp_hidden_size == model.config.mlp_hidden_size
        elif name != "sdtm_blocks" or config.num_sdtm:
            assert getattr(config, name) == getattr(model.config, name), name


def test_every_mlp_width_is_read():
    """mlp_ratio survives FlexDiTConfig's rounding down."""
    state_dict = dit_model(num_dense_blocks=1).state_dict()
    for hidden in (24, 28, 100, 1152):
        for width in range(1, 300):
            state_dict["dense_blocks.0.mlp.fc1.weight"] = torch.empty(width, hidden, device="meta")
            state_dict["patch_embed.weight"] = torch.empty(hidden, 4, 2, 2, device="meta")
            assert convert.read_config(state_dict, num_heads=1).mlp_hidden_size == width


def test_classes():
    rows = dit_model().state_dict()  # 11 label rows
    assert convert.read_config(rows, 2).num_classes == 10
    config = convert.read_config(rows, 2, num_classes=11)
    assert (config.num_classes, config.class_dropout_prob) == (11, 0.0)
    config = convert.read_config(rows, 2, class_dropout_prob=0.0)
    assert (config.num_classes, config.class_dropout_prob) == (11, 0.0)
    config = convert.read_config(rows, 2, class_dropout_prob=0.3)
    assert (config.num_classes, config.class_dropout_prob) == (10, 0.3)
    state_dict = dit_state_dict(dit_model())
    assert convert.from_dit(state_dict, 2, num_classes=11).config.class_dropout_prob == 0
    with pytest.raises(ValueError, match=r"label_embed.weight \[11, 24\], must be \[12"):
        convert.from_dit(state_dict, 2, num_classes=12)


def test_position_embedding_may_be_missing():
    model = dit_model()
    state_dict = dit_state_dict(model)
    del state_dict["pos_embed"]
    with pytest.raises(ValueError, match="input_size"):
        convert.from_dit(state_dict, num_heads=2)
    loaded = convert.from_dit(state_dict, num_heads=2, input_size=12)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def without(name):
    return lambda state_dict: state_dict.pop(name)


def with_tensor(name, *shape, dtype=torch.float32):
    return lambda state_dict: state_dict.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    "change, message",
    [
        (without("x_embedder.proj.weight"), "no patch_embed.weight"),
        (without("x_embedder.proj.bias"), "1 missing: patch_embed.bias"),
        (without("dumbbell_blocks.1.normal_blocks.0.mlp.fc1.bias"), "missing: sdtm.1.dense.0.mlp.fc1.bias"),
        (with_tensor("unknown.weight", 1), "unknown.weight"),
        (with_tensor("normal_blocks.0.unknown", 1), "1 unexpected: dense_blocks.0.unknown"),
        (with_tensor("dumbbell_blocks.1.semantic_blocks.2.mlp.fc1.bias", 192), r"sdtm.1 has \(1, 3, 1, 1\)"),
        (
            with_tensor("dumbbell_blocks.1.semantic_blocks.3.mlp.fc1.bias", 192),
            "sdtm.1.sparse.3 but no sdtm.1.sparse.2",
        ),
        (with_tensor("dumbbell_blocks.7.semantic_blocks.0.mlp.fc1.bias", 192), "sdtm.7 but no sdtm.2"),
        (with_tensor("x_embedder.proj.weight", 48, 16), "patch_embed.weight has the shape"),
        (with_tensor("x_embedder.proj.weight", 0, 4, 2, 2), "hidden_size"),
        (with_tensor("pos_embed", 1, 63, 48), "63 positions"),
        (with_tensor("final_layer.linear.weight", 33, 48), r"final_layer.linear.weight \[33, 48\], must be \[16"),
        (
            with_tensor("normal_blocks.0.attn.qkv.weight", 48, 144),
            r"1 misshaped: dense_blocks.0.attn.qkv.weight \[48, 144\], must be \[144, 48\]",
        ),
        (with_tensor("normal_blocks.0.attn.qkv.bias", 144, dtype=torch.int64), "not floating point: dense_blocks.0"),
        (dict.clear, "empty"),
    ],
)
def test_wrong_state_dicts(released, change, message):
    state_dict = dict(released["param/"])
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        convert.from_sparsedit(state_dict, num_heads=2)


def test_wrong_arguments(released):
    with pytest.raises(ValueError, match="num_heads"):
        convert.from_sparsedit(released["param/"], num_heads=5)
    with pytest.raises(TypeError, match="num_heads"):
        convert.from_sparsedit(released["param/"], num_heads=None)
    with pytest.raises(TypeError, match="no_such_field"):
        convert.from_sparsedit(released["param/"], num_heads=2, no_such_field=1)
    with pytest.raises(TypeError, match="'a' is a list"):
        convert.from_sparsedit({"a": []}, num_heads=2)
    with pytest.raises(TypeError, match="int"):
        convert.from_sparsedit(3, num_heads=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert.from_sparsedit("nowhere.pt", num_heads=2)
