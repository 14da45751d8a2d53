"""Checkpoints in several files, on one device of a map, and from the Hugging Face Hub's cache."""

import json
import os
import sys

import pytest
import safetensors.torch
import torch
from helpers import assert_same_model, tiny_model
from test_checkpoint_damage import FAILURES, fail_at

from flexdit_ext import FlexDiT, checkpoint

INDEX = "model.safetensors.index.json"
SHARD = 4000  # of about 16 KB


def files(directory, ending=".safetensors"):
    return sorted(name for name in os.listdir(directory) if name.endswith(ending))


@pytest.fixture
def sharded(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size=SHARD)
    return model, tmp_path / "sharded"


# ---- several files --------------------------------------------------------------------------------------------------


def test_round_trip(sharded):
    model, directory = sharded
    shards = files(directory)
    assert sorted(os.listdir(directory)) == sorted([*shards, INDEX, "config.json"])
    count = len(shards)
    assert count > 3 and shards == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((directory / INDEX).read_text())
    state_dict = model.state_dict()
    assert index["weight_map"].keys() == state_dict.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state_dict.values())
    for shard in shards:
        tensors = safetensors.torch.load_file(directory / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
    for path in (directory, directory / INDEX):
        assert_same_model(FlexDiT.from_pretrained(path), model)
    (directory / "config.json").unlink()
    assert_same_model(FlexDiT.from_pretrained(directory), model)  # the index has it, too


@pytest.mark.parametrize("size", ["3KB", "3kb", "2.9 KiB", "0.003MB", 3000])
def test_sizes(tmp_path, size):
    tiny_model().save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists()


def test_large_enough_is_one_file(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="1GB")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    for wrong in (0, -1, "0B"):
        with pytest.raises(ValueError, match="max_shard_size"):
            tiny_model().save_pretrained(tmp_path, max_shard_size=wrong)
    for wrong in (True, 1.5, "5", "5 apples", "-5GB"):
        with pytest.raises(TypeError, match="max_shard_size"):
            tiny_model().save_pretrained(tmp_path, max_shard_size=wrong)


def test_saving_again(sharded):
    """Any order of forms; what the last one needs is all that is left, and others' files stay."""
    _, directory = sharded
    (directory / "other-00001-of-00002.safetensors").touch()
    for seed, size in enumerate((SHARD, 6000, None, 3000, 3000, None), 1):
        model = tiny_model(seed=seed, num_dense_blocks=1 + seed % 2)
        model.save_pretrained(directory, max_shard_size=size)
        assert_same_model(FlexDiT.from_pretrained(directory), model)
        if size is None:
            wanted = {"model.safetensors"}
        else:
            wanted = {INDEX, *json.loads((directory / INDEX).read_text())["weight_map"].values()}
        assert set(os.listdir(directory)) == wanted | {"config.json", "other-00001-of-00002.safetensors"}


@pytest.mark.parametrize("failure", FAILURES, ids=["full disk", "Ctrl-C"])
@pytest.mark.parametrize("before", [None, SHARD], ids=["one file", "shards"])
@pytest.mark.parametrize("after", [None, SHARD], ids=["to one file", "to shards"])
def test_failures_leave_the_old_or_the_new(tmp_path, monkeypatch, failure, before, after):
    """Every rename in turn fails; another configuration, so that a mixture would not load."""
    old, new = tiny_model(), tiny_model(seed=1, num_dense_blocks=2)
    outcomes = set()
    for call in range(1, 20):
        old.save_pretrained(tmp_path, max_shard_size=before)
        with monkeypatch.context() as patch:
            fail_at(patch, os, "replace", failure, call)
            try:
                new.save_pretrained(tmp_path, max_shard_size=after)
            except type(failure):
                pass
            else:
                break
        loaded = FlexDiT.from_pretrained(tmp_path)
        outcomes.add(loaded.config == new.config)
        assert_same_model(loaded, new if loaded.config == new.config else old)
        assert not list(tmp_path.glob(".saving-*"))
    assert outcomes == {False, True}
    assert_same_model(FlexDiT.from_pretrained(tmp_path), new)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda index: index["weight_map"].update({"pos_embed": "../model.safetensors"}), ValueError, "beside it"),
        (lambda index: index["weight_map"].update({"pos_embed": "/etc/passwd"}), ValueError, "beside it"),
        (lambda index: index["weight_map"].update({"pos_embed": "weights.bin"}), ValueError, r"a \.safetensors file"),
        (lambda index: index["weight_map"].update({"pos_embed": 3}), ValueError, "beside it"),
        (lambda index: index["weight_map"].update({"pos_embed": "x.safetensors"}), FileNotFoundError, "1 tensors"),
        (lambda index: index["weight_map"].update({"more": index["weight_map"]["pos_embed"]}), ValueError, "no more"),
        (lambda index: index["weight_map"].pop("pos_embed"), ValueError, "has pos_embed"),
        (lambda index: index.update(weight_map={}), ValueError, "no weight_map"),
        (lambda index: index.update(weight_map=[]), ValueError, "no weight_map"),
    ],
)
def test_wrong_indexes(sharded, change, error, message):
    _, directory = sharded
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(error, match=message) as raised:
        FlexDiT.from_pretrained(directory)
    assert str(directory) in str(raised.value)


def test_damaged_shards(sharded):
    _, directory = sharded
    shard = directory / files(directory)[1]
    raw = shard.read_bytes()
    for damaged in (raw[:-1], raw[:5], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=shard.name):
            FlexDiT.from_pretrained(directory)
    for text in (b"{", b"[]", b"\xff", b"[" * 100_000):
        (directory / INDEX).write_bytes(text)
        with pytest.raises(ValueError, match=INDEX):
            FlexDiT.from_pretrained(directory)


# ---- dtype and device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}])
def test_device_map(sharded, device_map):
    model, directory = sharded
    loaded = FlexDiT.from_pretrained(directory, dtype=torch.bfloat16, device_map=device_map)
    assert_same_model(loaded, model.bfloat16())


@pytest.mark.filterwarnings("ignore:.*is a no-op")
def test_device_map_of_another_device(sharded):
    loaded = FlexDiT.from_pretrained(sharded[1], device_map={"": "meta"})
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"sdtm": "cpu", "": "cpu"}, {}, {"": "nowhere"}, [0]])
def test_device_maps_of_several_devices(sharded, device_map):
    with pytest.raises(ValueError, match=r"device_map is .*, must be one device"):
        FlexDiT.from_pretrained(sharded[1], device_map=device_map)


def test_device_and_device_map(sharded):
    with pytest.raises(ValueError, match="device is cpu and device_map 'cpu': give one of them"):
        FlexDiT.from_pretrained(sharded[1], device="cpu", device_map="cpu")


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    """A cache of huggingface_hub that holds the tiny model, with a pickle that nobody must touch."""
    pytest.importorskip("huggingface_hub")
    repository, commit = tmp_path / "cache" / "models--someone--tiny.flexdit", "0" * 40
    snapshot = repository / "snapshots" / commit
    model = tiny_model()
    model.save_pretrained(snapshot, max_shard_size=SHARD)
    (snapshot / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return model, tmp_path / "cache"


def test_hub(cache, tmp_path, monkeypatch):
    model, folder = cache
    monkeypatch.chdir(tmp_path)
    options = {"cache_dir": folder, "local_files_only": True}
    assert_same_model(FlexDiT.from_pretrained("someone/tiny.flexdit", **options), model)
    half = FlexDiT.from_pretrained("someone/tiny.flexdit", torch.bfloat16, device_map="cpu", revision="main", **options)
    assert_same_model(half, model.bfloat16())
    for options in ({"revision": "other"}, {}):
        name = "someone/tiny.flexdit" if options else "someone/else"
        with pytest.raises(
            FileNotFoundError, match=f"{name} is not there, nor can it be had from the Hugging Face Hub"
        ):
            FlexDiT.from_pretrained(name, cache_dir=folder, local_files_only=True, **options)


def test_only_json_and_safetensors_are_fetched(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        FlexDiT.from_pretrained("someone/tiny", revision="v1", token="secret")
    options = {"revision": "v1", "cache_dir": None, "token": "secret", "local_files_only": False}
    assert calls == [(("someone/tiny",), {"allow_patterns": ["*.json", "*.safetensors"], **options})]


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("someone/tiny")
    assert_same_model(FlexDiT.from_pretrained("someone/tiny"), model)


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"someone/tiny is not there; .* `pip install huggingface_hub`"):
        FlexDiT.from_pretrained("someone/tiny")
    for path in ("a/b/c", "nowhere", "./a/b", "../b"):  # no ids
        with pytest.raises(FileNotFoundError, match="does not exist"):
            checkpoint.load_pretrained(path)
