"""Two gloo processes are one: DDP and FSDP2 on the CPU, their checkpoints, their signals, and the overlap."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from training_cases import MODEL, call_at, in_process, in_ranks, log_of, make_config, newest, tensors_of

from flexdit_ext import FlexDiT
from flexdit_ext.blocks import Block
from flexdit_ext.training import FINISHED, TERMINATED, Trainer, TrainingError, load_average, train
from flexdit_ext.training.data import batches
from flexdit_ext.training.state import STATE_NAME, SUMS_NAME, _sha256, load

ROOT = Path(__file__).parents[1]
STRATEGIES = ["ddp", "fsdp2"]


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint of any number of processes."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    shapes = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.full(entry.size, torch.nan) for name, entry in shapes.items()}
    load(checkpoint, tensors, alone=True)
    return tensors


def assert_close_runs(config, expected):
    """Adam divides by the root of the squares: where a gradient is nearly nothing, its rounding is the step."""
    ours, theirs = whole_tensors(newest(config)), tensors_of(newest(expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        tolerance = 2e-3 if name.startswith(("model.", "average.")) else 1e-4  # gradients and their squares
        assert ((tensor - theirs[name]).abs().max() / scale).item() < tolerance, name
    for a, b in zip(log_of(config), log_of(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
        pairs = zip(a["loss_by_timestep"], b["loss_by_timestep"], strict=True)
        assert all(x == y if y is None else x == pytest.approx(y, rel=1e-4) for x, y in pairs)
        assert a["macs_per_image"] == b["macs_per_image"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("alone"), accumulation=2)
    assert in_process(train, config) == FINISHED
    return config


@pytest.fixture(scope="module", params=STRATEGIES)
def together(request, tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp(request.param), parallel={"strategy": request.param})
    assert in_ranks(2, train, config) == [FINISHED, FINISHED]
    return config


def test_two_processes_are_one(together, alone):
    assert_close_runs(together, alone)
    average = load_average(newest(together))
    exported = FlexDiT.from_pretrained(Path(together.output) / "model")
    for name, tensor in average.state_dict().items():
        assert tensor.equal(exported.state_dict()[name])


def test_sharded_with_all_that_saves_memory(tmp_path):
    changes = {"precision": "bfloat16", "activation_checkpointing": True, "accumulation": 2, "steps": 4}
    alone = make_config(tmp_path / "alone", **changes)
    sharded = make_config(tmp_path / "sharded", parallel={"strategy": "fsdp2"}, **changes)
    assert in_process(train, alone) == FINISHED and in_ranks(2, train, sharded) == [FINISHED, FINISHED]
    for a, b in zip(log_of(alone), log_of(sharded), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=0.02)


def test_shards_hold_each_number_once(together):
    shards = sorted(newest(together).glob("*.safetensors"))
    assert len(shards) == 2
    whole = sum(tensor.nbytes for tensor in whole_tensors(newest(together)).values())
    sizes = [path.stat().st_size for path in shards]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    assert sum(sizes) - headers == whole and min(sizes) > 0.3 * max(sizes)


def test_they_resume_to_the_same_bits(together, tmp_path):
    """The same number of processes, from the checkpoint in the middle."""
    shutil.copytree(together.output, tmp_path / "run")
    shutil.rmtree(newest(make_config(tmp_path / "run")))
    config = make_config(tmp_path / "run", parallel={"strategy": together.parallel.strategy})
    assert in_ranks(2, train, config) == [FINISHED, FINISHED]
    ours, theirs = whole_tensors(newest(config)), whole_tensors(newest(together))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert log_of(config) == log_of(together)


def check_loaded(config, folder):
    """In every rank: what a trainer has loaded is what the checkpoint holds."""
    trainer = Trainer(config)
    assert trainer.step == 12
    wanted = torch.load(folder / "wanted.pt")
    whole = trainer.parallel.full(trainer._tensors())
    if whole is not None:
        assert whole.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in whole.items())
    trainer.close()
    return 0


def test_any_number_of_processes_loads_it(together, tmp_path):
    """2 to 1 and to 3 sharded ones, which do not divide most sizes; of one row, two have none."""
    shutil.copytree(together.output, tmp_path / "run")
    torch.save(whole_tensors(newest(together)), tmp_path / "wanted.pt")
    assert check_loaded(make_config(tmp_path / "run"), tmp_path) == 0
    rewrite_config(newest(make_config(tmp_path / "run")), batch_size=9)  # 8 cannot be split in three
    config = make_config(tmp_path / "run", batch_size=9, parallel={"strategy": "fsdp2"})
    assert in_ranks(3, check_loaded, config, tmp_path) == [0, 0, 0]


def rewrite_config(checkpoint: Path, **changes):
    state = json.loads((checkpoint / STATE_NAME).read_text())
    state["config"] |= changes
    (checkpoint / STATE_NAME).write_text(json.dumps(state))
    names = [line.split()[1] for line in (checkpoint / SUMS_NAME).read_text().splitlines()]
    (checkpoint / SUMS_NAME).write_text("".join(f"{_sha256(checkpoint / name)}  {name}\n" for name in names))


def record_overlap(config):
    """One step; which blocks' backward passes and which reductions of gradients began, in order."""
    trainer = Trainer(config)

    def mark(name):
        with torch.profiler.record_function(f"backward {name}"):
            pass

    for name, module in trainer.model.named_modules():
        if isinstance(module, Block):
            module.register_full_backward_pre_hook(lambda *_, name=name: mark(name))
    source = batches(trainer.data, trainer.draws, config, 0, trainer.parallel.rank, 2, pin=False)
    trainer._train_step(source)  # DDP orders its buckets by the first step
    with torch.profiler.profile() as profile:
        trainer._train_step(source)
    if trainer.parallel.is_main:
        events = sorted(profile.events(), key=lambda event: event.time_range.start)
        reductions = ("c10d::allreduce_", "c10d::_reduce_scatter_base_")
        names = [event.name for event in events if event.name in reductions or event.name.startswith("backward ")]
        (Path(config.output) / "events.json").write_text(json.dumps(names))
    trainer.close()
    return 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reductions_begin_while_earlier_blocks_are_still_to_come(tmp_path, strategy):
    blocks = {"num_dense_blocks": 3}
    config = make_config(tmp_path, steps=2, model=blocks, parallel={"strategy": strategy, "bucket_mb": 0.004})
    assert in_ranks(2, record_overlap, config) == [0, 0]
    events = json.loads((tmp_path / "events.json").read_text())
    backward = [i for i, event in enumerate(events) if event.startswith("backward")]
    assert len(backward) == 8, events
    # Between a block's backward pass and the one after the next, its gradients are on their way.
    for here, there in zip(backward, backward[2:]):
        assert any(event.startswith("c10d") for event in events[here:there]), events


def terminate_one(config):
    if os.environ["RANK"] == "1":
        call_at(Trainer, "_train_step", 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return train(config)


def test_sigterm_of_one_ends_all(tmp_path):
    config = make_config(tmp_path)
    assert in_ranks(2, terminate_one, config) == [TERMINATED, TERMINATED]
    assert newest(config).name in ("step-00000006", "step-00000007")


def blow_up_on_one(config):
    if os.environ["RANK"] == "1":
        original = Trainer._loss
        Trainer._loss = lambda self, *args: original(self, *args) * (torch.nan if self.step == 9 else 1)
    try:
        return train(config)
    except TrainingError as error:
        (Path(config.output) / f"error{os.environ['RANK']}").write_text(str(error))
        return 1


def test_not_finite_names_the_rank(tmp_path):
    config = make_config(tmp_path)
    assert in_ranks(2, blow_up_on_one, config) == [1, 1]
    error = (tmp_path / "error0").read_text()
    assert error == (tmp_path / "error1").read_text()
    assert error.startswith("the loss of step 10 is not finite; rank 1: digit ") and "rank 0" not in error
    assert error.endswith("step-00000008")


def test_torchrun(tmp_path):
    """The real launcher and the command line."""
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in MODEL.items() if key != "schedule")
    (tmp_path / "run.toml").write_text(
        f'output = "{tmp_path / "run"}"\nsteps = 2\nbatch_size = 4\nloss = "flow"\n[data]\nkind = "digits"\n'
        f'[parallel]\nstrategy = "fsdp2"\ndevice = "cpu"\n[model]\n{text}schedule = {{ grids = [[2, 2]] }}\n'
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flexdit_ext", "train", "--config", str(tmp_path / "run.toml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert FlexDiT.from_pretrained(tmp_path / "run" / "model").config.hidden_size == 16
    assert len(list(newest(make_config(tmp_path / "run")).glob("*.safetensors"))) == 2
