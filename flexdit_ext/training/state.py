"""Checkpoints of a run: weights, average and optimizer in safetensors, the rest in JSON; whole or not there at all.

RUN/checkpoints/step-00001000/ holds shard-*.safetensors (torch.distributed.checkpoint's layout: each process writes its
own, any number of them reads it), state.json and SHA256SUMS, which `sha256sum -c` checks, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from ..checkpoint import fsync
from .config import MODEL_CONFIGS
from .families import FAMILIES
from .parallel import Parallel, TrainingError

STATE_NAME, SUMS_NAME = "state.json", "SHA256SUMS"
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVERS = (".saving-", ".deleting-")


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int, parallel: Parallel) -> Path:
    """Writes a checkpoint under a temporary name, then renames it; then removes all but the newest `keep`.

    Every rank has to call it. Raises OSError on all of them if it could not be written; then nothing has changed.
    """
    target = folder / f"step-{step:08d}"
    staging = Path(parallel.from_main(str(folder / f".saving-{target.name}-{secrets.token_hex(4)}")))
    try:
        try:
            writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
            with _quietly():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=parallel.world == 1)
        except CheckpointException as error:
            raise OSError(f"cannot write {staging}: {_first_failure(error)}") from error
        try:
            parallel.on_main(lambda: _publish(staging, target, state))
        except TrainingError as error:
            raise OSError(str(error)) from error
    except BaseException:  # Ctrl-C, too
        if parallel.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if parallel.is_main:
        prune(folder, keep)
    return target


def prune(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[:-keep]:
        _remove(path)


@contextlib.contextmanager
def _quietly():
    """Without the remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = sorted(error.failures.items())[0]
    return f"rank {rank}: {failure}"


def _publish(staging: Path, target: Path, state: dict) -> None:
    with open(staging / STATE_NAME, "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1, sort_keys=True)
        file.write("\n")
    names = sorted(os.listdir(staging))
    lines = [f"{_sha256(staging / name)}  {name}\n" for name in names]
    (staging / SUMS_NAME).write_text("".join(lines), encoding="utf-8")
    for name in [*names, SUMS_NAME]:
        os.chmod(staging / name, 0o644)
        fsync(staging / name)
    fsync(staging)
    if target.exists():  # of an earlier run of the same steps
        _remove(target)
    os.rename(staging, target)
    fsync(target.parent)


def _remove(path: Path) -> None:
    """Renamed first: a checkpoint is never half there."""
    doomed = path.with_name(f".deleting-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path) -> None:
    """Raises ValueError that says what is wrong unless all files of a checkpoint are as they were written."""
    try:
        lines = (path / SUMS_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{SUMS_NAME} cannot be read: {error}") from error
    sums = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
    if STATE_NAME not in sums or len(sums) != len(lines):
        raise ValueError(f"{SUMS_NAME} is damaged")
    for name, expected in sums.items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        if found != expected:
            raise ValueError(f"{name} has the checksum {found[:12]}..., {SUMS_NAME} says {expected[:12]}...")


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; damaged ones are set aside, with a warning. None if there is none at
    all. Raises TrainingError if all are damaged: then starting anew is for the user to decide."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify(path)
        except ValueError as error:
            aside = path.with_name(f".damaged-{path.name}-{secrets.token_hex(4)}")
            warnings.warn(f"checkpoint {path} is damaged: {error}; trying the one before", stacklevel=2)
            os.rename(path, aside)
        else:
            return path
    if found:
        raise TrainingError(f"every checkpoint in {folder} is damaged; remove the folder to start anew")
    return None


def remove_leftovers(folder: Path) -> None:
    """What killed saves have left. Only while no other process writes here."""
    for path in folder.iterdir():
        if path.name.startswith(_LEFTOVERS):
            shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict:
    return json.loads((path / STATE_NAME).read_text(encoding="utf-8"))


def load(path: Path, tensors: Mapping[str, Tensor], alone: bool) -> None:
    """Fills `tensors` (whole or sharded) from a checkpoint; every rank has to call it, or one `alone`."""
    try:
        with _quietly():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except CheckpointException as error:
        raise TrainingError(f"{path} does not fit this run: {_first_failure(error)}") from error


def load_average(path: str | os.PathLike, prefix: str = "average.") -> nn.Module:
    """The averaged model of a run's checkpoint ("model.": the trained one), on the CPU, in evaluation mode."""
    path = Path(path)
    verify(path)
    state = read_state(path)
    family = FAMILIES[state.get("family", "flexdit")]
    config = MODEL_CONFIGS[family.name].from_dict(state["model"])
    with torch.device("meta"):
        model = family.model(config)
    tensors = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    averaged = dict(model.named_parameters())  # buffers are the model's
    wanted = {f"{prefix if name in averaged else 'model.'}{name}": tensor for name, tensor in tensors.items()}
    load(path, wanted, alone=True)
    return family.build(config, tensors, str(path))
