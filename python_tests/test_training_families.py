"""Training of FlexPixArt and FlexLatte: what a step computes, and what holds for every run."""

import math

import numpy as np
import pytest
import torch
from family_cases import ARRAYS, MODELS, family_config, save, save_random
from test_training_parallel import assert_close_runs
from training_cases import assert_same_run, in_ranks, log_of, newest, tensors_of

from flexdit_ext import FlexLatte, FlexPixArt
from flexdit_ext.diffusion import ddpm_loss, flow_loss
from flexdit_ext.training import FINISHED, Trainer, TrainingConfig, build_model, load_average, set_up, train
from flexdit_ext.training.config import ModelSettings

CLASSES = {"flexpixart": FlexPixArt, "flexlatte": FlexLatte}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CLASSES)
def family(request):
    return request.param


@pytest.fixture
def data(family, tmp_path):
    return save(tmp_path / "data", ARRAYS[family]())


def loss_by_hand(setup, step, loss):
    """[B], from the draws and the rows of the arrays."""
    draws = setup.draws.of_step(step)
    samples, conditions = setup.data.__getitems__(draws.indices.tolist())
    for i in np.flatnonzero(draws.dropped):
        if "y" in conditions:
            conditions["y"][i] = 4
        else:
            conditions["caption"][i], conditions["caption_mask"][i] = 0, torch.arange(4) < 1
    t = draws.fraction.astype(np.float32) if loss == "flow" else (draws.fraction * 1000).astype(int)
    noise = setup.draws.noise(step, range(len(samples)), tuple(samples.shape[1:]))
    function = flow_loss if loss == "flow" else ddpm_loss
    return function(setup.model.eval(), samples, conditions, torch.from_numpy(t), noise).loss


@pytest.mark.parametrize("loss", ["flow", "ddpm"])
def test_a_step_is_the_loss_on_the_data(family, data, tmp_path, loss):
    channels = {"flexpixart": 4, "flexlatte": 1}[family] * (2 if loss == "ddpm" else 1)
    model = {"checkpoint": save_random(tmp_path / "model", family, out_channels=channels), "family": None}
    config = family_config(
        tmp_path / "run",
        family,
        data,
        steps=1,
        loss=loss,
        label_dropout=0.5,
        batch_size=8,
        model={"out_channels": channels, **model},
    )
    assert train(config) == FINISHED
    setup = set_up(config, 1)
    assert isinstance(setup.model, CLASSES[family]) and 0 < setup.draws.of_step(0).dropped.sum() < 8
    (line,) = log_of(config)
    losses = loss_by_hand(setup, 0, loss)
    assert math.isclose(line["loss"], losses.mean().item(), rel_tol=1e-6)
    losses.mean().backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in setup.model.parameters()))
    assert math.isclose(line["gradient_norm"], norm, rel_tol=1e-5)


def test_it_resumes_to_the_same_bits(family, data, tmp_path):
    whole, parts = (family_config(tmp_path / name, family, data, steps=8) for name in "ab")
    assert train(whole) == FINISHED
    trainer = Trainer(parts)
    original = trainer._train_step
    trainer._train_step = lambda source: original(source) if trainer.step < 6 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    trainer.close()
    assert newest(parts).name == "step-00000004"
    assert train(parts) == FINISHED
    assert_same_run(parts, whole)
    averaged, exported = load_average(newest(parts)), CLASSES[family].from_pretrained(tmp_path / "b" / "model")
    assert isinstance(averaged, CLASSES[family]) and averaged.config == exported.config
    assert all(torch.equal(a, b) for a, b in zip(averaged.state_dict().values(), exported.state_dict().values()))


@pytest.mark.parametrize(("family", "strategy"), [("flexpixart", "ddp"), ("flexlatte", "fsdp2")])
def test_two_processes_are_one(family, data, tmp_path, strategy):
    changes = {"steps": 3, "checkpoint": {"every": 3}, "model": {"checkpoint": save_random(tmp_path / "m", family)}}
    alone = family_config(tmp_path / "alone", family, data, accumulation=2, **changes)
    together = family_config(tmp_path / "together", family, data, parallel={"strategy": strategy}, **changes)
    assert train(alone) == FINISHED
    assert in_ranks(2, train, together) == [FINISHED, FINISHED]
    assert_close_runs(together, alone)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"activation_checkpointing": True, "data": {"workers": 1}}, 0), ({"precision": "bfloat16"}, 0.03)],
)
def test_other_ways_to_the_same(family, data, tmp_path, changes, tolerance):
    changes = {"model": {"checkpoint": save_random(tmp_path / "m", family)}, "steps": 2} | changes
    plain = family_config(tmp_path / "a", family, data, steps=2, model=changes["model"])
    other = family_config(tmp_path / "b", family, data, **changes)
    train(plain)
    train(other)
    a, b = log_of(plain)[-1]["loss"], log_of(other)[-1]["loss"]
    assert math.isclose(a, b, rel_tol=tolerance) and (a != b) == (tolerance > 0)
    ours, theirs = tensors_of(newest(plain)), tensors_of(newest(other))
    assert tolerance or all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_compiled_in_one_graph(family, data, tmp_path, monkeypatch):
    """Whatever the grids and the lengths of the captions are. Inductor's own kernels: test_model_torch.py."""
    torch._dynamo.reset()  # shapes that other tests have seen count as well
    graphs, original = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend=backend))
    changes = {"model": {"checkpoint": save_random(tmp_path / "m", family)}, "steps": 3}
    plain = family_config(tmp_path / "a", family, data, **changes)
    compiled = family_config(tmp_path / "b", family, data, compile=True, **changes)
    train(plain)
    train(compiled)
    assert len(graphs) == 1
    assert math.isclose(log_of(plain)[-1]["loss"], log_of(compiled)[-1]["loss"], rel_tol=1e-5)


def test_grids_and_what_they_cost(family, data, tmp_path):
    """A fixed grid; multiply-accumulates count the tokens that the captions have."""
    grid = {"flexpixart": (2, 3), "flexlatte": (2, 1, 3)}[family]
    density = {"mode": "fixed", "grid": list(grid)}
    config = family_config(tmp_path, family, data, steps=1, batch_size=10, label_dropout=0.5, density=density)
    trainer = Trainer(config)
    draws = trainer.draws.of_step(0)
    tokens = np.where(draws.dropped, 1, 1 + draws.indices % 4)  # family_cases.captions
    assert 0 < draws.dropped.sum() < 10
    trainer.run()
    wanted = trainer.model.macs(grid)
    if family == "flexpixart":
        wanted = np.mean([trainer.model.macs(grid, int(count)) for count in tokens])
    assert math.isclose(log_of(config)[0]["macs_per_image"], wanted, rel_tol=1e-12)


def test_ragged_and_piecewise(family, data, tmp_path, monkeypatch):
    for mode in ("ragged", "piecewise"):
        trainer = Trainer(family_config(tmp_path / mode, family, data, steps=2, density={"mode": mode}))
        schedule, calls, original = trainer.model.schedule, [], trainer.wrapped.forward
        monkeypatch.setattr(
            trainer.wrapped,
            "forward",
            lambda x, t, grid=None, _of=original, _in=calls, **c: _in.append((t, grid)) or _of(x, t, **c, grid=grid),
        )
        trainer.run()
        for t, grid in calls:
            wanted = [schedule.grid(one) for one in t.tolist()]
            assert (grid if mode == "ragged" else [grid] * 4) == wanted
        assert len({str(grid) for _, grid in calls}) == 2


def test_a_dense_checkpoint_becomes_sparse(family, data, tmp_path):
    """Block k takes block k; W_1 = 0, W_2 = I: at first the recovered tokens are the dense ones."""
    dense = {"num_pooling_blocks": 0, "num_sdtm": 0, "num_dense_blocks": 6}
    path = save_random(tmp_path / "dense", family, **dense)
    model = {"checkpoint": path, "layout": "1/1x1,1,1,1/1"} | dict.fromkeys(dense)
    schedule = {"schedule": MODELS[family]["schedule"]}
    values = family_config(tmp_path / "run", family, data, steps=1).to_dict() | {"model": model | schedule}
    values["model"] = {name: value for name, value in values["model"].items() if value is not None}
    config = TrainingConfig.from_dict(values)
    old, new = CLASSES[family].from_pretrained(path), set_up(config, 1).model
    assert new.config == build_model(ModelSettings(family, config=MODELS[family]), 0).config
    order = [new.pooling_blocks[0], *(getattr(new.sdtm[0], kind)[0] for kind in ("generation", "sparse", "recovery"))]
    order += [new.sdtm[0].dense[0], new.dense_blocks[0]]
    for ours, theirs in zip(order, old.dense_blocks, strict=True):
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
        assert torch.equal(ours.attn.proj.weight, theirs.attn.proj.weight)
    assert torch.equal(order[3].from_dense.weight, torch.eye(16)) and not order[3].from_sparse.weight.any()
    assert torch.equal(order[1].attn.q.weight, old.dense_blocks[1].attn.qkv.weight[:16])
    assert train(config) == FINISHED
    values["model"]["hidden_size"] = 32
    with pytest.raises(ValueError, match="model: the dense model and config differ in hidden_size 16 and 32"):
        set_up(TrainingConfig.from_dict(values), 1)


def test_distillation(family, data, tmp_path):
    """With weight 1 the loss is the distance to the teacher: 0 for a copy of it."""
    path = save_random(tmp_path / "teacher", family)
    changes = {"model": {"checkpoint": path}, "distillation": {"teacher": path, "weight": 1.0}, "steps": 1}
    train(copy := family_config(tmp_path / "copy", family, data, **changes))
    assert log_of(copy)[0]["loss"] < 1e-8
    changes["model"] = {}
    train(fresh := family_config(tmp_path / "fresh", family, data, **changes))
    assert log_of(fresh)[0]["loss"] > 1e-3
    other = next(name for name in CLASSES if name != family)
    changes["distillation"] = {"teacher": save_random(tmp_path / "other", other)}
    with pytest.raises(ValueError, match=f"is a {other}, the model a {family}: they must agree"):
        set_up(family_config(tmp_path / "odd", family, data, **changes), 1)
