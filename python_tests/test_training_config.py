"""Configurations: TOML, --set, and every mistake named before anything starts."""

import sys

import numpy as np
import pytest
from PIL import Image
from training_cases import MODEL, make_config

from flexdit_ext import FlexDiT, FlexDiTConfig
from flexdit_ext.__main__ import main
from flexdit_ext.training import build_model, load_config, set_up
from flexdit_ext.training.config import ModelSettings, TrainingConfig, changed_keys

TOML = """
output = "run"
steps = 10
batch_size = 4
[model]
preset = "B/2"
hidden_size = 96
[data]
kind = "digits"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path / "run.toml"


def test_toml_and_set(file):
    settings = [
        "steps=20",
        "optimizer.betas=[0.8, 0.9]",
        "loss=flow",
        "model.num_heads=4",
        "average.decay=0",
        "data.flip=true",
    ]
    config = load_config(file, settings)
    assert (config.steps, config.loss, config.optimizer.betas) == (20, "flow", (0.8, 0.9))
    assert config.model.preset == "B/2" and config.model.config == {"hidden_size": 96, "num_heads": 4}
    assert config.average.decay == 0.0 and config.data.flip is True
    again = TrainingConfig.from_dict(config.to_dict())  # as a checkpoint keeps it
    assert again == config and changed_keys(config.to_dict(), again.to_dict()) == []


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("stps=3", ValueError, "stps is not a key; the nearest is steps"),
        ("optimizer.ep=1", ValueError, "optimizer.ep is not a key; the nearest is optimizer.eps"),
        ("model.hiden_size=64", ValueError, "model.hiden_size is not a key; the nearest is model.hidden_size"),
        ("optimiser.eps=1e-8", ValueError, "optimiser is not a key; the nearest is optimizer"),
        ("steps=ten", TypeError, "steps is 'ten', must be of type int"),
        ("steps=2.5", TypeError, "steps is 2.5, must be of type int"),
        ("steps=true", TypeError, "steps is True, must be of type int"),
        ("steps=0", ValueError, "steps is 0, must be at least 1"),
        ("optimizer=3", TypeError, "optimizer is 3, must be a table"),
        ("optimizer.betas=[0.9]", TypeError, r"optimizer.betas is \[0.9\], must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", ValueError, r"optimizer.betas\[1\] is 1.0, must be at least 0 and below 1"),
        ("optimizer.learning_rate=nan", ValueError, "optimizer.learning_rate is nan, must be finite"),
        ("loss=dppm", ValueError, "loss is 'dppm', must be one of 'ddpm', 'flow'; did you mean 'ddpm'"),
        ("density.mode=fixed", ValueError, "density.grid is None and density.mode 'fixed'"),
        ("data.kind=images", ValueError, "data.path is missing"),
        ("steps", ValueError, "--set is 'steps', must be key=value"),
        ("steps.x=1", ValueError, "but steps is 10, not a table"),
    ],
)  # fmt: skip
def test_mistakes(file, setting, error, message):
    with pytest.raises(error, match=message):
        load_config(file, [setting])


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ValueError, match=r"bad\.toml is not a readable TOML file"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("steps = 3")
    with pytest.raises(ValueError, match="output is missing"):
        load_config(tmp_path / "empty.toml")


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (2, {"batch_size": 7}, "batch_size is 7, must be a multiple of 2: 2 processes times accumulation 1"),
        (1, {"batch_size": 8, "accumulation": 3}, "must be a multiple of 3: 1 processes times accumulation 3"),
        (1298, {"batch_size": 1298}, "1298 processes are more than the 1297 samples of the data set"),
        (1, {"model": {"hidden_size": 15}}, "model: hidden_size is 15, must be a multiple of num_heads"),
        (1, {"model": {"input_size": 16}}, r"samples of shape \(1, 8, 8\), the model takes \(1, 16, 16\)"),
        (1, {"model": {"num_classes": 9}}, "has 10 classes, model.num_classes is only 9"),
        (1, {"model": {"checkpoint": "nowhere"}}, "nowhere"),
        (1, {"model": {"layout": "1/1x1,1,1,1/1"}}, "there is no checkpoint"),
        (1, {"model": {"class_dropout_prob": 0.0}, "label_dropout": 0.1}, "the model has no null class"),
        (1, {"density": {"mode": "fixed", "grid": [5, 5]}}, r"density.grid has the sparse grid \(5, 5\)"),
        (1, {"model": {"schedule": {"grids": [[2, 2]], "num_timesteps": 500}}}, "model.schedule has 500 timesteps"),
        (
            1,
            {"model": {"schedule": {"grids": [[3, 3], [2, 2]], "begins": [0, 100]}}, "density": {"mode": "piecewise"}},
            r"segments of the schedule are \[100, 900\] timesteps long",
        ),
        (1, {"distillation": {"teacher": "nowhere"}}, "nowhere"),
        (1, {"data": {"kind": "images", "path": "/nowhere"}}, "data.path is /nowhere, which does not exist"),
    ],
)
def test_what_does_not_fit(tmp_path, world, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        set_up(make_config(tmp_path, **changes), world)


def test_command_line_names_the_mistake_and_starts_nothing(file, capsys):
    assert main(["train", "--config", str(file), "--set", "stps=3"]) == 2
    assert capsys.readouterr().err == "flexdit train: error: stps is not a key; the nearest is steps\n"
    assert main(["train", "--config", str(file), "--set", f"output={file.parent / 'run'}"]) == 2
    assert "data (digits) has samples of shape (1, 8, 8)" in capsys.readouterr().err
    assert not (file.parent / "run").exists()


def test_command_line_checks(tmp_path, capsys):
    text = 'output = "run"\nsteps = 1\nbatch_size = 4\n[model]\n'
    text += "".join(f"{key} = {str(value).lower()}\n" for key, value in MODEL.items() if key != "schedule")
    (tmp_path / "run.toml").write_text(text + 'schedule = { grids = [[2, 2]] }\n[data]\nkind = "digits"\n')
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--check"]) == 0
    assert capsys.readouterr().out.startswith("1297 samples, ")


def test_what_is_not_installed_is_named_with_its_extra(file, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flexdit_ext.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", "--config", str(file)]) == 2
    assert "accelerate is not installed: pip install 'flexdit_ext[train]'" in capsys.readouterr().err


def test_models(tmp_path):
    fresh = build_model(ModelSettings(config=MODEL), seed=1)
    assert fresh.patch_embed.weight.equal(build_model(ModelSettings(config=MODEL), seed=1).patch_embed.weight)
    assert not fresh.patch_embed.weight.equal(build_model(ModelSettings(config=MODEL), seed=2).patch_embed.weight)
    dense = FlexDiT(FlexDiTConfig(**MODEL | {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 6}))
    dense.bfloat16().save_pretrained(tmp_path)
    loaded = build_model(ModelSettings(checkpoint=str(tmp_path)), seed=0)
    assert loaded.config == dense.config and loaded.patch_embed.weight.equal(dense.patch_embed.weight.float())
    sparse = build_model(ModelSettings(checkpoint=str(tmp_path), layout="1/1x1,1,1,1/1"), seed=0)
    assert sparse.config == fresh.config
    assert sparse.dense_blocks[0].mlp.fc1.weight.equal(loaded.dense_blocks[5].mlp.fc1.weight)
    other = build_model(ModelSettings(checkpoint=str(tmp_path), config={"class_dropout_prob": 0.2}), seed=0)
    assert other.config.class_dropout_prob == 0.2
    assert FlexDiTConfig(**MODEL) == FlexDiTConfig.from_dict(fresh.config.to_dict())


def test_image_folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("cat", 2), ("dog", 3)):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 16 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("more" if i else ".") / f"{i}.png")
    changes = {"model": {"in_channels": 3, "num_classes": 2}, "data": {"kind": "images", "path": str(tmp_path)}}
    data = set_up(make_config(tmp_path / "run", **changes), 1).data
    assert len(data) == 5 and data.labels.tolist() == [0, 0, 1, 1, 1] and data.name(0).endswith("cat/0.png")
    images, conditions = data.__getitems__([4, 0])
    assert images.shape == (2, 3, 8, 8) and -1 <= images.min() < images.max() <= 1
    assert conditions["y"].tolist() == [1, 0]
    grey = set_up(make_config(tmp_path / "run", data=changes["data"]), 1).data
    assert grey.__getitems__([0])[0].shape == (1, 1, 8, 8)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0\.png is not a readable image"):
        data.__getitems__([0])
    (tmp_path / "eel").mkdir()
    with pytest.raises(ValueError, match=r"the class .*eel is empty"):
        set_up(make_config(tmp_path / "run", **changes), 1)
    with pytest.raises(ValueError, match="there must be one for each class"):
        set_up(make_config(tmp_path / "run", data={"kind": "images", "path": str(tmp_path / "eel")}), 1)
