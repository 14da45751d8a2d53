"""flexdit_ext/checkpoint.py: failures while writing, broken and hostile files."""

import argparse
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import assert_same_model, tiny_model

from flexdit_ext import checkpoint

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
        checkpoint.save_pretrained(tiny_model(seed=1, **overrides), directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert_same_model(checkpoint.load_pretrained(directory), model)
    checkpoint.save_pretrained(model, directory)


@failures
def test_failure_after_the_old_configuration_was_set_aside(saved, monkeypatch, failure):
    model, directory = saved
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, os, "replace", failure, call=2)  # config.json, then model.safetensors
        checkpoint.save_pretrained(tiny_model(seed=1, num_dense_blocks=2), directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert_same_model(checkpoint.load_pretrained(directory), model)


@failures
@other_models
def test_failure_between_the_two_renames(saved, monkeypatch, failure, overrides):
    """The new weights are there; their metadata holds the new configuration, the old config.json is gone or equal."""
    _, directory = saved
    new = tiny_model(seed=1, **overrides)
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, os, "replace", failure, call=3 if overrides else 2)
        checkpoint.save_pretrained(new, directory)
    assert set(os.listdir(directory)) <= {"config.json", "model.safetensors"}
    assert_same_model(checkpoint.load_pretrained(directory), new)


@failures
def test_failure_of_the_first_save(tmp_path, monkeypatch, failure):
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        fail_at(patch, safetensors.torch, "save_file", failure)
        checkpoint.save_pretrained(tiny_model(), tmp_path)
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
    assert_same_model(checkpoint.load_pretrained(directory), model)


def test_killed_between_the_renames(saved):
    """SIGKILL leaves no chance to clean up, and still a whole checkpoint."""
    model, directory = saved
    for call, expected in ((2, 0), (3, 1)):
        code = (
            "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
            "from helpers import tiny_model\n"
            "original, calls = os.replace, []\n"
            "def replace(*args):\n"
            "    calls.append(args)\n"
            f"    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    original(*args)\n"
            "os.replace = replace\n"
            "tiny_model(seed=1, num_dense_blocks=2).save_pretrained(sys.argv[1])"
        )
        command = [sys.executable, "-c", code, str(directory), os.path.dirname(__file__)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        models = (model, tiny_model(seed=1, num_dense_blocks=2))
        assert_same_model(checkpoint.load_pretrained(directory), models[expected])
        checkpoint.save_pretrained(model, directory)


def test_target_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        checkpoint.save_pretrained(tiny_model(), tmp_path / "file")
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
