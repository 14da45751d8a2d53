"""Runs that are killed, terminated, damaged, out of disk or out of numbers."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from training_cases import (
    assert_same_run,
    call_at,
    die,
    in_process,
    log_of,
    make_config,
    newest,
    start,
    train_and_die,
    wait,
)

from flexdit_ext import FlexDiT
from flexdit_ext.training import FINISHED, TERMINATED, Trainer, TrainingError, load_average, train
from flexdit_ext.training import state as checkpoints
from flexdit_ext.training.state import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a break, in a process of its own, as the others are."""
    config = make_config(tmp_path_factory.mktemp("whole"))
    assert in_process(train, config) == FINISHED
    return config


def folder(config) -> list[str]:
    return sorted(os.listdir(Path(config.output) / "checkpoints"))


def resume(config, whole):
    assert in_process(train, config) == FINISHED
    assert_same_run(config, whole)
    assert folder(config) == ["step-00000008", "step-00000012"]


def test_checkpoints_of_a_whole_run(whole):
    assert folder(whole) == ["step-00000008", "step-00000012"]
    verify(newest(whole))
    assert [line["step"] for line in log_of(whole)] == [3, 6, 9, 12]
    averaged, exported = load_average(newest(whole)), FlexDiT.from_pretrained(Path(whole.output) / "model")
    for name, tensor in averaged.state_dict().items():
        assert tensor.equal(exported.state_dict()[name])
    trained = load_average(newest(whole), "model.")
    assert not trained.final_layer.linear.weight.equal(averaged.final_layer.linear.weight)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("_train_step", 1),  # nothing is saved yet
        ("_gradient_norm", 7),  # in the middle of a step
        ("_update_average", 10),  # weights have moved, the average has not
    ],
)
def test_killed_in_a_step(tmp_path, whole, name, call):
    config = make_config(tmp_path)
    assert in_process(train_and_die, config, Trainer, name, call) == -signal.SIGKILL
    resume(config, whole)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("fsync", 6),  # the second save: its tensors are written
        ("rename", 2),  # just before the second one is published
        ("rename", 4),  # the third is published, the first not yet removed
    ],
)
def test_killed_in_a_save(tmp_path, whole, name, call):
    config = make_config(tmp_path)
    assert in_process(train_and_die, config, None, name, call) == -signal.SIGKILL
    resume(config, whole)


def die_after(config, seconds):
    threading.Timer(seconds, die).start()
    status = train(config)
    os._exit(status)  # the timer must not outlive the run


def test_killed_at_random_moments_until_it_is_done(tmp_path, whole):
    config, random_source = make_config(tmp_path, checkpoint={"every": 1}), random.Random(time.time_ns())
    statuses = []
    while FINISHED not in statuses and len(statuses) < 40:
        limit = random_source.uniform(0.2, 0.5 + 0.2 * len(statuses))
        statuses.append(in_process(die_after, config, limit))
    assert set(statuses) <= {FINISHED, -signal.SIGKILL} and statuses[-1] == FINISHED
    assert_same_run(config, whole)


def train_and_terminate(config, number):
    call_at(Trainer, "_train_step", 6, lambda: os.kill(os.getpid(), number))
    return train(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated(tmp_path, whole, number):
    """The step ends, a checkpoint is written, and the run goes on from it."""
    config = make_config(tmp_path)
    assert in_process(train_and_terminate, config, number) == TERMINATED
    assert newest(config).name in ("step-00000006", "step-00000007")
    assert in_process(train, config) == FINISHED
    assert_same_run(config, whole)


def train_in_a_group(config):
    os.setpgid(0, 0)
    call_at(Trainer, "_train_step", 6, lambda: os.killpg(0, signal.SIGTERM))
    return train(config)


def test_a_signal_to_the_loading_processes_too(tmp_path, whole):
    """As job schedulers send it."""
    config = make_config(tmp_path, data={"workers": 1})
    assert in_process(train_in_a_group, config) == TERMINATED
    resume(config, whole)


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "SHA256SUMS"])
def test_damaged_checkpoint(tmp_path, whole, name):
    shutil.copytree(whole.output, tmp_path / "run")
    config = make_config(tmp_path / "run")
    damage(newest(config) / name, 40)
    with pytest.warns(UserWarning, match=rf"step-00000012 is damaged: .*{name}"):
        trainer = Trainer(config)
    assert trainer.step == 8
    assert folder(config)[1:] == ["step-00000008"] and folder(config)[0].startswith(".damaged-step-00000012-")
    trainer.close()
    damage(newest(config) / name, 40)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(TrainingError, match="every checkpoint"):
        Trainer(config)


def test_missing_file_of_a_checkpoint(tmp_path, whole):
    shutil.copytree(whole.output, tmp_path / "run")
    config = make_config(tmp_path / "run")
    (newest(config) / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"state\.json cannot be read"):
        trainer = Trainer(config)
    assert trainer.step == 8
    trainer.close()
    assert in_process(train, config) == FINISHED
    assert_same_run(config, whole)


def train_on_a_full_disk(config):
    """From step 6 on no file can grow beyond 10,000 bytes: the write itself fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    call_at(Trainer, "_train_step", 6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    try:
        train(config)
    except TrainingError as error:
        (Path(config.output) / "error").write_text(str(error))
        return 1


def test_full_disk(tmp_path, whole):
    """A run goes on with the last good checkpoint, and says so in the end, where it must save."""
    config = make_config(tmp_path)
    assert in_process(train_on_a_full_disk, config) == 1
    assert folder(config) == ["step-00000004"]
    error = (tmp_path / "error").read_text()
    assert error.startswith("step 12 is not saved: cannot write ") and error.endswith("step-00000004")
    assert "File too large" in error
    verify(newest(config))
    resume(config, whole)


def test_not_finite(tmp_path):
    """One sample of the data is NaN: step, rank, which samples, and what is left."""
    latents = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    latents[37] = np.nan
    np.savez(tmp_path / "shard.npz", latents=latents, labels=np.arange(64) % 10)
    config = make_config(tmp_path / "run", data={"kind": "latents", "path": str(tmp_path)}, checkpoint={"every": 1})
    trainer = Trainer(config)
    step = next(step for step in range(12) if 37 in trainer.draws.of_step(step).indices)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith(f"the loss of step {step + 1} is not finite; rank 0: {tmp_path}/shard.npz[37] (sample 37")
    assert "the batch: " + ", ".join(map(str, trainer.draws.of_step(step).indices)) in message
    last = f"{tmp_path}/run/checkpoints/step-{step:08d}" if step else "none"
    assert message.endswith(f"last good checkpoint: {last}")
    assert folder(config) == [f"step-{good:08d}" for good in range(max(1, step - 1), step + 1)]


def test_gradient_that_is_not_finite(tmp_path, monkeypatch):
    config = make_config(tmp_path, checkpoint={"every": 2})
    trainer = Trainer(config)
    original = trainer._loss
    monkeypatch.setattr(  # sqrt's slope at 0 is infinite
        trainer, "_loss", lambda *args: original(*args) + ((original(*args) * 0).sqrt() if trainer.step == 5 else 0)
    )
    with pytest.raises(TrainingError, match=r"the gradient of step 6 has the norm nan, .*; the batch: .*step-00000004"):
        trainer.run()


def test_two_runs_in_one_folder(tmp_path):
    first = Trainer(make_config(tmp_path))
    with pytest.raises(TrainingError, match="belongs to a run that is still going on"):
        Trainer(make_config(tmp_path))
    first.close()
    Trainer(make_config(tmp_path))


def test_a_killed_run_frees_its_folder(tmp_path):
    process = start(train, make_config(tmp_path, steps=10**6, batch_size=64))
    while not list(tmp_path.glob("checkpoints/step-*")) and process.is_alive():
        time.sleep(0.02)
    process.kill()
    assert wait(process) == -signal.SIGKILL
    (tmp_path / "checkpoints" / ".saving-step-00000099-0000").mkdir()
    assert Trainer(make_config(tmp_path, steps=10**6, batch_size=64)).step >= 4
    assert not list((tmp_path / "checkpoints").glob(".saving-*"))


def test_resumed_with_another_configuration(tmp_path, whole):
    shutil.copytree(whole.output, tmp_path / "run")
    with pytest.raises(ValueError, match=r"seed: 0 -> 1; optimizer.eps|optimizer.eps: 1e-08 -> 1e-06; seed: 0 -> 1"):
        Trainer(make_config(tmp_path / "run", seed=1, optimizer={"eps": 1e-6}))
    assert Trainer(make_config(tmp_path / "run", steps=20, log={"every": 1})).step == 12


def test_a_run_of_an_older_version_goes_on(whole, tmp_path, monkeypatch):
    shutil.copytree(whole.output, tmp_path / "run")
    read_state = checkpoints.read_state

    def without_later_keys(path):
        state = read_state(path)
        del state["config"]["data"]["frame_step"], state["config"]["model"]["family"]
        return state

    monkeypatch.setattr(checkpoints, "read_state", without_later_keys)
    trainer = Trainer(dataclasses.replace(whole, output=str(tmp_path / "run")))
    trainer.close()
    assert trainer.step == 12
