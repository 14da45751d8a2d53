"""The training loop in one process: what a step computes, and each of its options."""

import math
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from training_cases import MODEL, assert_same_run, log_of, make_config, newest, tensors_of

from flexdit_ext import FlexDiT, FlexDiTConfig, sample
from flexdit_ext.__main__ import main
from flexdit_ext.diffusion import ddpm_loss, flow_loss
from flexdit_ext.training import FINISHED, Trainer, TrainingConfig, set_up, train
from flexdit_ext.training.data import Digits
from flexdit_ext.training.loop import average_decay, learning_rate
from flexdit_ext.training.pictures import tile

ROOT = Path(__file__).parents[1]
DENSE = {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 3}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(config, prefix="model."):
    return {name: tensor for name, tensor in tensors_of(newest(config)).items() if name.startswith(prefix)}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("loss", ["flow", "ddpm"])
def test_steps_are_adamw_on_the_loss(tmp_path, loss):
    """Against a loop of five lines: torch's AdamW, clipping, the average."""
    config = make_config(tmp_path, steps=3, loss=loss, model={"learn_sigma": loss == "ddpm"})
    assert train(config) == FINISHED
    setup, digits = set_up(config, 1), Digits()
    model = setup.model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for step in range(3):
        draws = setup.draws.of_step(step)
        y = digits.labels[draws.indices].masked_fill(torch.from_numpy(draws.dropped), 10)
        t = draws.fraction.astype(np.float32) if loss == "flow" else (draws.fraction * 1000).astype(int)
        noise = setup.draws.noise(step, range(8), (1, 8, 8))
        function = flow_loss if loss == "flow" else ddpm_loss
        value = function(model, digits.images[draws.indices], y, torch.from_numpy(t), noise).loss.mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * (step + 1) / 3
        optimizer.step()
        losses.append(value.item())
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - min(0.9, (step + 1) / (step + 10)))
    assert math.isclose(log_of(config)[-1]["loss"], np.mean(losses), rel_tol=1e-6)
    assert distance(weights(config), {f"model.{name}": tensor for name, tensor in model.state_dict().items()}) < 1e-7
    assert distance(weights(config, "average."), {f"average.{name}": tensor for name, tensor in average.items()}) < 1e-7


def test_it_learns(tmp_path):
    config = make_config(tmp_path, steps=80, batch_size=16, log={"every": 20}, checkpoint={"every": 1000})
    train(config)
    losses = [line["loss"] for line in log_of(config)]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"accumulation": 4}, 1e-5), ({"activation_checkpointing": True}, 0), ({"data": {"workers": 1}}, 0)],
)
def test_same_run_another_way(tmp_path, changes, tolerance):
    plain, other = make_config(tmp_path / "a", steps=4), make_config(tmp_path / "b", steps=4, **changes)
    train(plain)
    train(other)
    assert distance(weights(plain), weights(other)) <= tolerance
    assert math.isclose(log_of(plain)[-1]["loss"], log_of(other)[-1]["loss"], rel_tol=1e-5)


def test_bfloat16(tmp_path):
    plain, other = make_config(tmp_path / "a"), make_config(tmp_path / "b", precision="bfloat16")
    train(plain)
    train(other)
    assert all(tensor.dtype == torch.float32 for tensor in weights(other).values())
    assert 0 < distance(weights(plain), weights(other)) < 0.1
    for a, b in zip(log_of(plain), log_of(other)):
        assert math.isclose(a["loss"], b["loss"], rel_tol=0.03)


def grids_of(trainer, monkeypatch):
    """The grids that every forward pass was called with, and the timesteps."""
    calls = []
    original = trainer.wrapped.forward

    def forward(x, t, y, grid=None):
        calls.append((t.tolist(), grid))
        return original(x, t, y, grid)

    monkeypatch.setattr(trainer.wrapped, "forward", forward)
    trainer.run()
    return calls


def test_ragged_density(tmp_path, monkeypatch):
    trainer = Trainer(make_config(tmp_path, steps=2))
    for times, grids in grids_of(trainer, monkeypatch):
        assert grids == [trainer.model.schedule.grid(t) for t in times] and len(set(grids)) == 2


def test_piecewise_density(tmp_path, monkeypatch):
    trainer = Trainer(make_config(tmp_path, steps=4, accumulation=2, density={"mode": "piecewise"}))
    calls = grids_of(trainer, monkeypatch)
    for times, grid in calls:
        assert {trainer.model.schedule.grid(t) for t in times} == {grid}
    assert [grid for _, grid in calls] == [(3, 3), (2, 2), (2, 2), (3, 3), (3, 3), (2, 2), (2, 2), (3, 3)]


def test_fixed_density_and_dense(tmp_path, monkeypatch):
    trainer = Trainer(make_config(tmp_path / "a", steps=1, density={"mode": "fixed", "grid": [2, 3]}))
    assert [grid for _, grid in grids_of(trainer, monkeypatch)] == [(2, 3)]
    assert log_of(trainer.config)[0]["macs_per_image"] == trainer.model.macs((2, 3))
    trainer = Trainer(make_config(tmp_path / "b", steps=1, model=DENSE))
    assert [grid for _, grid in grids_of(trainer, monkeypatch)] == [None]
    assert log_of(trainer.config)[0]["macs_per_image"] == trainer.model.macs()


def test_compiled(tmp_path, monkeypatch):
    """One graph serves all steps, whatever their grids are. Inductor's own kernels: test_model_torch.py."""
    graphs, original = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend=backend))
    plain, compiled = make_config(tmp_path / "a", steps=3), make_config(tmp_path / "b", steps=3, compile=True)
    train(plain)
    train(compiled)
    assert len(graphs) == 1 and distance(weights(plain), weights(compiled)) < 1e-5


def test_from_a_converted_checkpoint(tmp_path):
    """A dense run's model becomes a FlexDiT, and trains."""
    dense = make_config(tmp_path / "dense", steps=2, model=DENSE | {"num_dense_blocks": 6})
    train(dense)
    source = str(tmp_path / "dense" / "model")
    model = {"checkpoint": source, "layout": "1/1x1,1,1,1/1", "schedule": {"grids": [[3, 3], [2, 2]]}}
    values = make_config(tmp_path / "sparse", steps=2).to_dict() | {"model": model}
    config = TrainingConfig.from_dict(values)
    train(config)
    trained = FlexDiT.from_pretrained(tmp_path / "sparse" / "model")
    assert trained.config == FlexDiTConfig(**MODEL)
    assert torch.isfinite(sample(trained, [1, 2], 2, "flow")).all()


def test_distillation(tmp_path):
    """With weight 1 the loss is the distance to the teacher: 0 for a copy of it, and the data do not matter."""
    teacher = make_config(tmp_path / "teacher", steps=4, model=DENSE)
    train(teacher)
    path = str(tmp_path / "teacher" / "model")
    values = make_config(tmp_path / "copy", steps=2).to_dict()
    copy = TrainingConfig.from_dict(
        values | {"model": {"checkpoint": path}, "distillation": {"teacher": path, "weight": 1.0}}
    )
    train(copy)
    assert log_of(copy)[-1]["loss"] < 1e-8  # the pass that keeps a context rounds otherwise
    changes = {"distillation": {"teacher": path, "weight": 0.25}, "steps": 1}
    distilled, plain = make_config(tmp_path / "a", **changes), make_config(tmp_path / "b", steps=1)
    trainer = Trainer(distilled)
    digits, draws = Digits(), trainer.draws.of_step(0)
    x0, t = digits.images[draws.indices], torch.from_numpy(draws.fraction).float()
    noise = trainer.draws.noise(0, range(8), (1, 8, 8))
    x = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    y = digits.labels[draws.indices].masked_fill(torch.from_numpy(draws.dropped), 10)
    with torch.no_grad():
        gap = (trainer.model(x, 1000 * t, y) - FlexDiT.from_pretrained(path)(x, 1000 * t, y)).square().mean()
    trainer.run()
    train(plain)
    assert gap > 1e-4  # a fresh model says 0, the teacher does not
    wanted = 0.75 * log_of(plain)[-1]["loss"] + 0.25 * gap.item()
    assert math.isclose(log_of(distilled)[-1]["loss"], wanted, rel_tol=1e-5)


def test_learning_rates_and_decays(tmp_path):
    config = make_config(tmp_path, steps=10, optimizer={"final_learning_rate": 1e-3})
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3]) and rates[10] == pytest.approx(1e-3)
    assert sorted(rates[3:], reverse=True) == rates[3:]
    constant = make_config(tmp_path, optimizer={"schedule": "constant"})
    assert [learning_rate(constant, step) for step in (2, 3, 11)] == pytest.approx([3e-3] * 3)
    assert average_decay(config, 0) == 0.1 and average_decay(config, 10**6) == 0.9


def test_resumed_in_the_same_process_and_extended(tmp_path):
    whole, parts = make_config(tmp_path / "a", steps=8), make_config(tmp_path / "b", steps=8)
    train(whole)
    first = Trainer(parts)
    original = first._train_step
    first._train_step = lambda source: original(source) if first.step < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.run()
    first.close()
    train(parts)
    assert_same_run(parts, whole)
    before = log_of(parts, timed=True)
    assert train(parts) == FINISHED  # there is nothing to do
    assert log_of(parts, timed=True) == before
    assert train(make_config(tmp_path / "b", steps=9, checkpoint={"keep": 1})) == FINISHED
    assert [path.name for path in (tmp_path / "b" / "checkpoints").glob("step-*")] == ["step-00000009"]


def test_the_example_with_its_logs(tmp_path, capsys):
    """examples/train_digits.toml through the command line: log, tensorboard, sample grids, curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = ROOT / "examples" / "train_digits.toml"
    settings = [f"output={tmp_path / 'run'}", "steps=6", "checkpoint.every=3", "log.every=2", "log.peak_tflops=0.1"]
    settings += ["log.sample_every=3", "log.sample_steps=2", "batch_size=16"]
    assert main(["train", "--config", str(path), *(word for text in settings for word in ("--set", text))]) == 0
    lines = log_of(TrainingConfig.from_dict({**tomllib.loads(path.read_text()), "output": str(tmp_path / "run")}), True)
    assert [line["step"] for line in lines] == [2, 4, 6]
    model = FlexDiT.from_pretrained(tmp_path / "run" / "model")
    for line in lines:
        by_timestep = [value for value in line["loss_by_timestep"] if value is not None]
        assert len(line["loss_by_timestep"]) == 10 and min(by_timestep) <= line["loss"] <= max(by_timestep)
        assert model.macs((3, 3)) < line["macs_per_image"] < model.macs((5, 5))
        flops = 6 * line["macs_per_image"] * line["images_per_second"]  # forward, and backward twice that
        assert line["mfu"] == pytest.approx(flops / 1e11, rel=0.02)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in events.Images("samples")] == [3, 6]
    from matplotlib.image import imread

    assert imread(tmp_path / "run" / "samples" / "step-00000006.png").shape == (10 * 34 - 2, 4 * 34 - 2, 3)
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'run' / 'curves.png'}\n"
    assert imread(tmp_path / "run" / "curves.png").std() > 0.05
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_tiles():
    images = torch.full((4, 1, 8, 8), -1.0)
    images[1] = 1.0
    pixels = tile(images, columns=2).still
    assert pixels.shape == (2 * 34 - 2, 2 * 34 - 2, 3)
    assert (pixels[:32, 34:] == 255).all() and (pixels[:32, :32] == 0).all() and (pixels[34:, :32] == 0).all()
    assert tile(torch.randn(2, 4, 40, 40), columns=2).still.shape == (40, 82, 3)
