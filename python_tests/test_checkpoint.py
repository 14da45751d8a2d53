"""flexdit_ext/checkpoint.py: round trips, failures while writing, broken and hostile files."""

import argparse
import json
import os
import pickle
import random
import resource
import signal
import stat
import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, checkpoint


def make_model(seed=0, dtype=torch.float32, **overrides):
    values = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 8,
        "num_heads": 2,
        "num_classes": 3,
        "num_pooling_blocks": 1,
        "num_sdtm": 1,
        "sdtm_blocks": (1, 1, 1, 1),
        "num_dense_blocks": 1,
        "schedule": DensitySchedule([(3, 3), (2, 2)]),
    }
    model = FlexDiT(FlexDiTConfig(**(values | overrides)), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_same(loaded, model):
    assert loaded.config == model.config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.fixture
def saved(tmp_path):
    """A model and the directory it was saved to."""
    model = make_model()
    checkpoint.save_pretrained(model, tmp_path / "saved")
    return model, tmp_path / "saved"


# ---- round trips ----------------------------------------------------------------------------------------------------


def test_round_trip(saved):
    model, directory = saved
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    loaded = checkpoint.load_pretrained(directory)
    assert_same(loaded, model)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_methods_of_the_model(tmp_path):
    model = make_model()
    model.save_pretrained(str(tmp_path / "a" / "b"))
    assert_same(FlexDiT.from_pretrained(str(tmp_path / "a" / "b")), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    model = make_model(dtype=dtype)
    checkpoint.save_pretrained(model, tmp_path)
    assert_same(checkpoint.load_pretrained(tmp_path), model)
    assert_same(checkpoint.load_pretrained(tmp_path, dtype=torch.float32, device="cpu"), model.float())


def test_one_file_is_enough(saved, tmp_path):
    model, directory = saved
    assert_same(checkpoint.load_pretrained(directory / "model.safetensors"), model)
    alone = tmp_path / "digits.safetensors"
    os.replace(directory / "model.safetensors", alone)
    assert_same(checkpoint.load_pretrained(alone), model)
    # A file of its own name trusts its metadata more than a config.json that happens to lie in the same folder.
    (tmp_path / "config.json").write_text("{}")
    assert_same(checkpoint.load_pretrained(alone), model)


def test_edited_configuration_counts(saved):
    model, directory = saved
    config = model.config.to_dict() | {"schedule": {"grids": [[4, 4]]}}
    (directory / "config.json").write_text(json.dumps(config))
    assert checkpoint.load_pretrained(directory).config.schedule == DensitySchedule([(4, 4)])


def test_weights_of_another_program(saved):
    """No metadata: config.json beside the weights, safetensors or torch.save."""
    model, directory = saved
    safetensors.torch.save_file(model.state_dict(), directory / "other.safetensors")
    torch.save(model.state_dict(), directory / "other.pt")
    for name in ("other.safetensors", "other.pt"):
        assert_same(checkpoint.load_pretrained(directory / name), model)
    (directory / "config.json").unlink()
    for name in ("other.safetensors", "other.pt"):
        with pytest.raises(FileNotFoundError, match=f"{name} has no configuration"):
            checkpoint.load_pretrained(directory / name)


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save_pretrained(make_model(), tmp_path)
    finally:
        os.umask(before)
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_saving_again(saved):
    _, directory = saved
    for model in (make_model(seed=1), make_model(seed=2, num_dense_blocks=2)):  # same configuration, another one
        checkpoint.save_pretrained(model, directory)
        assert_same(checkpoint.load_pretrained(directory), model)
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_loading_leaves_the_random_numbers_alone(saved):
    state = torch.get_rng_state()
    checkpoint.load_pretrained(saved[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_not_a_model(tmp_path):
    with pytest.raises(TypeError, match="Linear"):
        checkpoint.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- failures while writing -----------------------------------------------------------------------------------------

FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt()]
failures = pytest.mark.parametrize("failure", FAILURES, ids=["full disk", "Ctrl-C"])
other_models = pytest.mark.parametrize(
    "overrides", [{}, {"num_dense_blocks": 2}], ids=["same config", "another config"]
)


def fail_at(monkeypatch, owner, name, failure, call=1):
    """owner.name raises `failure` at its call number `call`."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise failure
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@failures
@other_models
@pytest.mark.parametrize(
    "owner, name, call",
    [
        (safetensors.torch, "save_file", 1),
        (os, "fsync", 1),
        (os, "fsync", 2),
        (checkpoint, "_publish", 1),
        (os, "replace", 1),
    ],
)
def test_failure_before_the_new_weights_are_in_place(saved, monkeypatch, failure, overrides, owner, name, call):
    model, directory = saved
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, owner, name, failure, call)
        checkpoint.save_pretrained(make_model(seed=1, **overrides), directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert_same(checkpoint.load_pretrained(directory), model)
    checkpoint.save_pretrained(model, directory)


@failures
def test_failure_after_the_old_configuration_was_set_aside(saved, monkeypatch, failure):
    model, directory = saved
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, os, "replace", failure, call=2)  # config.json, then model.safetensors
        checkpoint.save_pretrained(make_model(seed=1, num_dense_blocks=2), directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert_same(checkpoint.load_pretrained(directory), model)


@failures
@other_models
def test_failure_between_the_two_renames(saved, monkeypatch, failure, overrides):
    """The new weights are there; their metadata holds the new configuration, the old config.json is gone or equal."""
    _, directory = saved
    new = make_model(seed=1, **overrides)
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, os, "replace", failure, call=3 if overrides else 2)
        checkpoint.save_pretrained(new, directory)
    assert set(os.listdir(directory)) <= {"config.json", "model.safetensors"}
    assert_same(checkpoint.load_pretrained(directory), new)


@failures
def test_failure_of_the_first_save(tmp_path, monkeypatch, failure):
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, safetensors.torch, "save_file", failure)
        checkpoint.save_pretrained(make_model(), tmp_path)
    assert os.listdir(tmp_path) == []


def limit_file_size(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_files_that_cannot_grow(saved):
    """A real failure of write(), which stops short of the weights' size."""
    model, directory = saved
    code = (
        "import sys; from flexdit_ext import checkpoint\n"
        "model = checkpoint.load_pretrained(sys.argv[1])\n"
        "try: checkpoint.save_pretrained(model, sys.argv[1])\n"
        "except OSError as error: print('OSError', error)"
    )
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, preexec_fn=lambda: limit_file_size(10_000)
    )
    assert done.stdout.startswith(f"OSError cannot write model.safetensors to {directory}: ")
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert_same(checkpoint.load_pretrained(directory), model)


def test_killed_between_the_renames(saved):
    """SIGKILL leaves no chance to clean up, and still a whole checkpoint."""
    model, directory = saved
    for call, expected in ((2, 0), (3, 1)):
        code = (
            "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
            "from test_checkpoint import *\n"
            "original, calls = os.replace, []\n"
            "def replace(*args):\n"
            "    calls.append(args)\n"
            f"    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    original(*args)\n"
            "os.replace = replace\n"
            "checkpoint.save_pretrained(make_model(seed=1, num_dense_blocks=2), sys.argv[1])"
        )
        command = [sys.executable, "-c", code, str(directory), os.path.dirname(__file__)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        models = (model, make_model(seed=1, num_dense_blocks=2))
        assert_same(checkpoint.load_pretrained(directory), models[expected])
        checkpoint.save_pretrained(model, directory)


def test_target_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        checkpoint.save_pretrained(make_model(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


# ---- broken files ---------------------------------------------------------------------------------------------------


def header_size(raw):
    return 8 + struct.unpack("<Q", raw[:8])[0]


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "model.pt"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            checkpoint.load_pretrained(path)
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        checkpoint.load_state_dict_file(tmp_path / "x.pt")


def test_unreadable_files(saved, monkeypatch):
    _, directory = saved
    with pytest.raises(ValueError, match=f"{directory} cannot be read: Is a directory"):
        checkpoint.load_state_dict_file(directory)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", args[0])

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr("builtins.open", refuse)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: Permission denied"):
            checkpoint.load_pretrained(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Is a directory"):
        checkpoint.load_pretrained(directory)


def test_truncated_safetensors(saved):
    _, directory = saved
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    header = header_size(raw)
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable checkpoint"):
            checkpoint.load_pretrained(directory)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable checkpoint"):
        checkpoint.load_pretrained(directory)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_truncated_pickles(saved, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for zipped in (True, False):
        torch.save(saved[0].state_dict(), path, _use_new_zipfile_serialization=zipped)
        raw = path.read_bytes()
        for size in (0, 1, 10, 100, len(raw) // 2, len(raw) - 1):
            path.write_bytes(raw[:size])
            with pytest.raises(ValueError, match=f"weights{suffix} is not a readable checkpoint"):
                checkpoint.load_state_dict_file(path)


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20, 0x80])
def test_flipped_header_bytes(saved, mask):
    """The file is refused by name, or what it still says makes a whole model. All 7,904 positions passed once."""
    model, directory = saved
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    positions = [*range(8), *random.Random(mask).sample(range(8, header_size(raw)), 150)]
    for position in positions:
        flipped = bytearray(raw)
        flipped[position] ^= mask
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load_pretrained(directory)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert loaded.state_dict().keys() == model.state_dict().keys()


class Malicious:
    """Unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # armed
    trap.rmdir()
    weights = {"a": torch.zeros(2)}
    torch.save(weights | {"b": Malicious(trap)}, tmp_path / "zip.pt")
    torch.save(Malicious(trap), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": weights, "args": argparse.Namespace(x=Malicious(trap))}, tmp_path / "arguments.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious(trap)))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Malicious(trap)))
    for path in [*tmp_path.glob("*.pt"), *tmp_path.glob("*.pth"), tmp_path / "pickle.safetensors"]:
        with pytest.raises(ValueError, match=path.name):
            checkpoint.load_state_dict_file(path)
        with pytest.raises(ValueError, match=path.name):
            checkpoint.load_pretrained(path)
    assert not trap.exists()


def test_training_checkpoints(tmp_path):
    def state_dict(value):
        return {"weight": torch.full((2,), value)}

    path = tmp_path / "0050000.pt"
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": state_dict(1.0), "ema": state_dict(2.0), "opt": optimizer, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, path)
    assert checkpoint.load_state_dict_file(path)["weight"][0] == 2
    assert checkpoint.load_state_dict_file(path, key="model")["weight"][0] == 1
    with pytest.raises(ValueError, match=r"0050000.pt has no state dict 'best'; it has \['model', 'ema', 'opt'\]"):
        checkpoint.load_state_dict_file(path, key="best")
    with pytest.raises(ValueError, match="'state' is a dict, must be a tensor"):
        checkpoint.load_state_dict_file(path, key="opt")
    del content["ema"]
    torch.save(content, path)
    assert checkpoint.load_state_dict_file(path)["weight"][0] == 1
    torch.save(state_dict(3.0), path)
    assert checkpoint.load_state_dict_file(path)["weight"][0] == 3
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.load_state_dict_file(path)


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
    model = make_model()
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
    model = make_model()
    with pytest.raises(ValueError, match="does not fit") as raised:
        checkpoint.check_state_dict(model, {f"layer{i}": torch.zeros(1) for i in range(7)})
    assert "7 unexpected: layer0, layer1, layer2, layer3, layer4 and 2 more" in str(raised.value)


def test_values_are_not_judged(saved):
    model, directory = saved
    with torch.no_grad():
        model.patch_embed.bias.fill_(float("nan"))
    checkpoint.save_pretrained(model, directory)
    assert checkpoint.load_pretrained(directory).patch_embed.bias.isnan().all()
