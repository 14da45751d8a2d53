"""What the tests of training share: a run of a second, runs in processes of their own, and how runs are compared."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import safetensors
import torch

from flexdit_ext.training import TrainingConfig, train

MODEL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "num_classes": 10,
    "learn_sigma": False,
    "num_pooling_blocks": 1,
    "num_sdtm": 1,
    "sdtm_blocks": [1, 1, 1, 1],
    "num_dense_blocks": 1,
    "schedule": {"grids": [[3, 3], [2, 2]]},
}
# One interpreter with torch loaded, from which every process forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["flexdit_ext.training", "accelerate", "sklearn.model_selection", "torch._dynamo", "torch.distributed.fsdp"]
)


def make_config(output, **changes) -> TrainingConfig:
    """12 steps on the digits, a checkpoint every 4; `changes` go over the top level, dicts into their tables."""
    values = {
        "output": str(output),
        "steps": 12,
        "batch_size": 8,
        "loss": "flow",
        "timesteps": "stratified",
        "model": dict(MODEL),
        "data": {"kind": "digits"},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 3, "max_gradient_norm": 1.0},
        "average": {"decay": 0.9},
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"every": 3, "tensorboard": False},
        "parallel": {"device": "cpu"},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return TrainingConfig.from_dict(values)


def in_process(function, *arguments, timeout=120):
    """Runs a function of a module in a process of its own; returns the exit status, negative for a signal."""
    return wait(start(function, *arguments), timeout)


def start(function, *arguments):
    process = _context.Process(target=_exit_with, args=(function, *arguments))
    process.start()
    return process


def wait(process, timeout=120):
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError("the process did not end")
    return process.exitcode


def _exit_with(function, *arguments):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes; another server would load torch again
    raise SystemExit(function(*arguments))


def in_ranks(world, function, *arguments):
    """Runs a function in `world` processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(as_rank, rank, world, port, function, *arguments) for rank in range(world)]
    return [wait(process) for process in processes]


def as_rank(rank, world, port, function, *arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"
    return function(*arguments)


def call_at(owner, name, call, action):
    """Replaces owner.name by a function that does `action` before its `call`-th call."""
    original, calls = getattr(owner, name), []

    def replacement(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            action()
        return original(*arguments, **options)

    setattr(owner, name, replacement)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config, owner, name, call):
    call_at(os if owner is None else owner, name, call, die)  # modules cannot be sent to a process
    return train(config)


def newest(config) -> Path:
    return sorted((Path(config.output) / "checkpoints").glob("step-*"))[-1]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint that one process has written."""
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def log_of(config, timed=False) -> list[dict]:
    lines = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    return lines if timed else [{key: line[key] for key in line if key != "images_per_second"} for line in lines]


def assert_same_run(config, expected):
    """Weights, average, optimizer and log, to the bit."""
    assert newest(config).name == newest(expected).name
    ours, theirs = tensors_of(newest(config)), tensors_of(newest(expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert log_of(config) == log_of(expected)
    a, b = (json.loads((newest(run) / "state.json").read_text()) for run in (config, expected))
    assert {key: a[key] for key in a if key != "config"} == {key: b[key] for key in b if key != "config"}
