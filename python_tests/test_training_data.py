"""Latents on disk, and what chance decides: the same for any number of ranks, and after any break."""

import numpy as np
import pytest
import safetensors.numpy
import torch
from training_cases import make_config

from flexdit_ext import DensitySchedule
from flexdit_ext.training._latents import FeatureFolder, Shards
from flexdit_ext.training.data import batches, open_data, rank_slots
from flexdit_ext.training.draws import Draws, equal_segments, timesteps
from flexdit_ext.training.families import FAMILIES
from flexdit_ext.training.setup import set_up


@pytest.fixture
def latents():
    rng = np.random.default_rng(0)
    return rng.standard_normal((10, 4, 6, 6)).astype(np.float32), rng.integers(0, 7, 10)


def assert_holds(data, latents, labels):
    order = [9, 0, 5, 5, 4]
    found, conditions = data.__getitems__(order)
    found_labels = conditions["y"]
    assert len(data) == 10 and data.shape == (4, 6, 6)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), latents[order])
    assert found_labels.dtype == torch.int64 and found_labels.tolist() == labels[order].tolist()


def test_shards(tmp_path, latents):
    values, labels = latents
    safetensors.numpy.save_file({"latents": values[:3], "labels": labels[:3]}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", latents=values[3:9], labels=labels[3:9].astype(np.uint8))
    safetensors.numpy.save_file({"labels": labels[9:], "latents": values[9:]}, tmp_path / "c.safetensors")
    data = Shards(tmp_path)
    assert_holds(data, values, labels)
    assert data.name(4) == f"{tmp_path}/b.npz[1]" and data.num_classes == labels.max() + 1
    assert all(isinstance(shard["samples"], np.memmap) for shard in data._maps.values())


def test_feature_folder_as_fast_dit_writes_it(tmp_path, latents):
    values, labels = latents
    for kind in ("features", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i, (value, label) in enumerate(zip(values, labels)):
        np.save(tmp_path / "imagenet256_features" / f"{i}.npy", value[None])
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", label[None])
    assert_holds(FeatureFolder(tmp_path), values, labels)
    (tmp_path / "imagenet256_labels" / "3.npy").unlink()
    with pytest.raises(ValueError, match=r"only one of them has 3\.npy"):
        FeatureFolder(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"latents": np.zeros((2, 4, 6, 6), np.float32)}, "has no array 'labels'; it has"),
        ({"latents": np.zeros((2, 4, 6), np.float32), "labels": np.zeros(2, int)}, r"must be floating-point \[n, C"),
        ({"latents": np.zeros((2, 4, 6, 6), int), "labels": np.zeros(2, int)}, r"latents are int64"),
        ({"latents": np.zeros((2, 4, 6, 6), np.float32), "labels": np.zeros(3, int)}, r"must be integers \[2\]"),
        ({"latents": np.zeros((2, 4, 6, 6), np.float32), "labels": -np.ones(2, int)}, "go down to -1"),
        ({"latents": np.zeros((2, 4, 5, 6), np.float32), "labels": np.zeros(2, int)}, r"the model takes \(4, 6, 6\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_bad_shards(tmp_path, arrays, message, suffix):
    if suffix == "npz":
        np.savez(tmp_path / "a.npz", **arrays)
    else:
        safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    changes = {"model": {"in_channels": 4, "input_size": 6}, "data": {"kind": "latents", "path": str(tmp_path)}}
    config = make_config(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        set_up(config, 1)


def test_unreadable_shards(tmp_path, latents):
    values, labels = latents
    np.savez_compressed(tmp_path / "a.npz", latents=values, labels=labels)
    with pytest.raises(ValueError, match=r"latents\.npy is compressed, .* write it with numpy\.savez"):
        Shards(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.npz is not a readable shard"):
        Shards(tmp_path)
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors or \.npz"):
        Shards(tmp_path)
    safetensors.numpy.save_file({"latents": values, "labels": labels}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable shard"):
        Shards(tmp_path)


def make_draws(**changes):
    values = {"seed": 3, "size": 50, "batch": 8, "groups": 4, "stratified": False, "label_dropout": 0.2, "flip": True}
    return Draws(**values | changes)


def test_every_epoch_visits_every_sample_once():
    draws = make_draws()
    visited = np.concatenate([draws.of_step(step).indices for step in range(25)])  # 200 samples, 4 epochs
    for epoch in visited.reshape(4, 50):
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(visited[:50], visited[50:100])
    large = make_draws(batch=120, groups=1)  # more than an epoch in a step
    visited = np.concatenate([large.of_step(step).indices for step in range(5)])
    assert all(sorted(epoch) == list(range(50)) for epoch in visited.reshape(12, 50))


def test_draws_depend_on_seed_and_step_alone():
    a, b = make_draws(), make_draws(groups=1)
    for step in (7, 0, 100):
        for ours, theirs in zip(vars(a.of_step(step)).values(), vars(b.of_step(step)).values()):
            assert np.array_equal(ours, theirs)
    assert not np.array_equal(a.of_step(1).fraction, a.of_step(2).fraction)
    assert not np.array_equal(a.of_step(1).fraction, make_draws(seed=4).of_step(1).fraction)
    noise = a.noise(5, range(8), (1, 4, 4))
    assert torch.equal(torch.cat([a.noise(5, range(3), (1, 4, 4)), a.noise(5, range(3, 8), (1, 4, 4))]), noise)
    assert not torch.equal(a.noise(6, range(8), (1, 4, 4)), noise)


def test_distributions():
    draws = make_draws(batch=4000, groups=1)
    step = draws.of_step(0)
    assert np.abs(np.histogram(step.fraction, 10, (0, 1))[0] / 400 - 1).max() < 0.2
    assert abs(step.dropped.mean() - 0.2) < 0.03 and abs(step.flipped.mean() - 0.5) < 0.03
    assert not make_draws(flip=False, label_dropout=0.0).of_step(0).flipped.any()
    strata = make_draws(stratified=True, batch=40, groups=1).of_step(3).fraction
    assert sorted((strata * 40).astype(int)) == list(range(40))
    assert not np.array_equal(np.sort(strata), strata)  # no rank gets the early timesteps alone
    assert timesteps(np.array([0.0, 0.9999999]), "ddpm").tolist() == [0, 999]


def test_piecewise_draws_one_segment_for_a_forward_pass():
    segments = equal_segments(DensitySchedule([(4, 4), (3, 3), (2, 2)]))
    draws = make_draws(batch=12, groups=4, segments=segments, stratified=True)
    seen = set()
    for step in range(6):
        of_step = draws.of_step(step)
        for group in range(4):
            part = slice(3 * group, 3 * group + 3)
            (segment,) = set(of_step.segment[part])
            first, last = segments[segment]
            assert ((first <= of_step.fraction[part]) & (of_step.fraction[part] < last)).all()
            seen.add((group, segment))
    assert len(seen) == 12  # every rank sees every segment in turn


def test_ranks_and_passes_share_the_batch(tmp_path):
    whole = make_config(tmp_path)
    split = make_config(tmp_path, accumulation=2)
    setup = set_up(whole, 1)
    x, y = next(batches(setup.data, setup.draws, whole, 2, 0, 1, pin=False))
    found_x, found_y = torch.empty_like(x), torch.empty_like(y["y"])
    for rank in range(2):
        source = batches(setup.data, setup.draws, split, 2, rank, 2, pin=False)
        for slots, (part, conditions) in zip(rank_slots(split, rank, 2), source):
            found_x[slots.start : slots.stop], found_y[slots.start : slots.stop] = part, conditions["y"]
    assert torch.equal(found_x, x) and torch.equal(found_y, y["y"])


def test_loading_processes_give_the_same(tmp_path):
    configs = [make_config(tmp_path, steps=4, data={"kind": "digits", "workers": workers}) for workers in (0, 2)]
    setup = set_up(configs[0], 1)
    one, two = (list(batches(setup.data, setup.draws, config, 1, 0, 1, pin=False)) for config in configs)
    assert len(one) == len(two) == 3
    for (left, left_conditions), (right, right_conditions) in zip(one, two):
        assert torch.equal(left, right) and torch.equal(left_conditions["y"], right_conditions["y"])


def test_labels_of_a_feature_folder_are_checked_when_they_are_read(tmp_path):
    for kind in ("features", "labels"):
        (tmp_path / f"x_{kind}").mkdir()
    for i in range(8):
        np.save(tmp_path / "x_features" / f"{i}.npy", np.zeros((1, 1, 8, 8), np.float32))
        np.save(tmp_path / "x_labels" / f"{i}.npy", np.array([3 if i < 7 else 10]))
    config = make_config(tmp_path / "run", data={"kind": "latents", "path": str(tmp_path)})
    from flexdit_ext.training import Trainer, TrainingError

    with pytest.raises(TrainingError, match=r"x_features/7\.npy has the label 10, must be in 0\.\.9"):
        Trainer(config).run()
    assert isinstance(open_data(config.data, FAMILIES["flexdit"], set_up(config, 1).model.config), FeatureFolder)
