"""LoRA through peft: the fused blocks against weights merged by hand, one adapter per density segment, files."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import RAGGED, model_inputs, randn, random_model, reference_of, relative_error, tiny_model
from test_single_model import CLASS_CLIP, PIXART, inputs_of, make

from flexdit_ext import DensitySchedule, FlexDiT, Sampler, lora, sample

peft = pytest.importorskip("peft")
LoraConfig = peft.LoraConfig
pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = str(Path(__file__).with_name("lora_ranks.py"))
# Float64 through another order of the same sums. Worst measured, AMD EPYC with AVX-512, torch 2.13, 2026-11-25:
# outputs 3.5e-15, gradients 1.3e-13.
EXACT = 1e-12


def randomise(model, seed=0):
    """Every adapter's matrices, which peft starts with zeros in B."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * randn(*parameter.shape, seed=1000 * seed + i))
    return model


def adapters_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def merged_by_hand(plain: FlexDiT, adapted, adapter: str, scaling: float):
    """The reference with W + scaling * B A, as functions of the adapter's matrices."""
    twin = reference_of(plain)
    state = {name: tensor.detach() for name, tensor in twin.state_dict().items()}
    found = 0
    for name, layer in adapted.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            name = name.removeprefix("base_model.model.")
            delta = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
            state[f"{name}.weight"] = state[f"{name}.weight"] + scaling * delta
            found += 1
    assert found
    return lambda *inputs: torch.func.functional_call(twin, state, inputs)


@torch.no_grad()  # with gradients the blocks round differently
def assert_same_outputs(model, other, *inputs):
    assert torch.equal(model(*inputs), other(*inputs))


def config(**overrides):
    return LoraConfig(
        **({"r": 2, "lora_alpha": 3, "target_modules": ["qkv", "q", "kv", "v", "proj", "fc1"]} | overrides)
    )


@pytest.mark.parametrize(("everything", "checkpointing"), [(False, True), (True, False)])
def test_outputs_and_gradients_are_those_of_merged_weights(everything, checkpointing):
    model = random_model(torch.float64, sdtm_blocks=(1, 1, 1, 1))
    plain = copy.deepcopy(model)
    targets = None if everything else ["attn.qkv", "fc2", "from_sparse", "modulation", "kv", "v"]
    # Also the two ends, whose Linear layers are no part of a block.
    targets = targets or [n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    adapted = randomise(peft.get_peft_model(model, config(target_modules=targets)))
    model.activation_checkpointing = checkpointing
    x, t, y = model_inputs(model.config, 3, torch.float64)
    matrices = adapters_of(adapted)

    out = adapted(x, t, y, RAGGED)
    expected = merged_by_hand(plain, adapted, "default", 3 / 2)(x, t, y, RAGGED)
    assert relative_error(out, expected) < EXACT
    assert relative_error(out, plain(x, t, y, RAGGED)) > 1e-2  # an adapter that is ignored would fit, too
    grad = randn(*out.shape, seed=5)
    actual = torch.autograd.grad(out, list(matrices.values()), grad)
    wanted = torch.autograd.grad(expected, list(matrices.values()), grad)
    for name, a, b in zip(matrices, actual, wanted, strict=True):
        assert b.abs().max() > 0, name
        assert relative_error(a, b, least=1e-3) < EXACT, name


def test_only_adapters_are_trained():
    adapted = peft.get_peft_model(tiny_model(), config())
    adapted(*model_inputs(adapted.config, 2)).square().mean().backward()
    for name, parameter in adapted.named_parameters():
        assert ("lora_B" in name) <= (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)), name
        assert ("lora_" in name) == (parameter.grad is not None), name


@pytest.mark.parametrize("kind", ["rslora", "bias", "embeddings", "kept copies"])
def test_kinds_of_adapters(kind):
    options = {
        "rslora": {"use_rslora": True},
        "bias": {"lora_bias": True},
        "embeddings": {"target_modules": ["patch_embed", "label_embed", "qkv"]},
        "kept copies": {"modules_to_save": ["final_layer", "label_embed", "timestep_embed"]},
    }[kind]
    model = tiny_model(torch.float64)
    adapted = randomise(peft.get_peft_model(model, config(**options)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    inputs = model_inputs(model.config, 3, torch.float64)
    out = adapted(*inputs)
    assert relative_error(lora.merge(adapted)(*inputs), out) < EXACT
    adapted.merge_adapter()
    assert relative_error(adapted(*inputs), out) < EXACT
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        plain = adapted(*inputs)
    assert relative_error(plain, tiny_model(torch.float64)(*inputs)) < EXACT and relative_error(plain, out) > 1e-2
    assert relative_error(adapted.merge_and_unload()(*inputs), out) < EXACT  # peft's own opinion


def test_several_active_adapters_add_up():
    adapted = peft.get_peft_model(tiny_model(torch.float64), config(), adapter_name="one")
    adapted.add_adapter("two", config(r=3))
    randomise(adapted)
    adapted.base_model.set_adapter(["one", "two"])
    inputs = model_inputs(adapted.config, 3, torch.float64)
    out = adapted(*inputs)
    assert relative_error(adapted.merge_and_unload()(*inputs), out) < EXACT


def test_injected_adapter_merges_and_samples(tmp_path):
    model = tiny_model(torch.float64)
    plain = copy.deepcopy(model)
    assert peft.inject_adapter_in_model(config(), model) is model
    randomise(model)
    labels, steps = [0, 1, 2], 4
    expected = sample(model, labels, steps)
    with pytest.raises(ValueError, match="model has adapters"):
        model.save_pretrained(tmp_path)
    images = Sampler(model).sample(labels, steps)
    assert relative_error(images, expected) < 1e-4  # cosines of timesteps, in float32 by two libraries
    merged = lora.merge(model)
    assert type(merged) is FlexDiT and merged.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(Sampler(merged).sample(labels, steps), images)
    assert relative_error(Sampler(plain).sample(labels, steps), images) > 1e-2
    merged.save_pretrained(tmp_path)
    assert_same_outputs(FlexDiT.from_pretrained(tmp_path), merged, *model_inputs(plain.config, 2, torch.float64))


def test_adapters_are_saved_and_loaded(tmp_path):
    adapted = randomise(peft.get_peft_model(tiny_model(), config()))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_same_outputs(loaded, adapted, *model_inputs(adapted.config, 3))


def test_autocast_and_16_bit_weights():
    model = randomise(peft.get_peft_model(tiny_model(torch.bfloat16), config()))
    x, t, y = model_inputs(model.config, 3, torch.bfloat16)
    assert_same_outputs(lora.merge(model), model, x, t, y)
    model = randomise(peft.get_peft_model(tiny_model(), config()))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(lora.merge(model), model, x.float(), t, y)


def test_compiles_without_graph_breaks():
    model = peft.inject_adapter_in_model(config(target_modules=["qkv"]), tiny_model(sdtm_blocks=(1, 0, 1, 0)))
    randomise(model)
    inputs = model_inputs(model.config, 2)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(out, model(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_config", [PIXART, CLASS_CLIP], ids=["PixArt", "Latte"])
def test_pixart_and_latte(model_config):
    model, _ = make(model_config)
    values, plain = inputs_of(model_config), copy.deepcopy(model)
    targets = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    adapted = randomise(peft.get_peft_model(model, config(target_modules=targets)))
    out = adapted(**values)
    out.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters_of(adapted).values())
    assert relative_error(plain(**values), out) > 1e-2
    assert relative_error(adapted.merge_and_unload()(**values), out) < EXACT


@pytest.mark.parametrize(
    ("options", "message"), [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "plain LoRA")]
)
def test_what_is_no_change_of_weights_is_refused(options, message):
    adapted = peft.get_peft_model(tiny_model(), config(**options)).train()
    with pytest.raises(ValueError, match=message):
        adapted(*model_inputs(adapted.config, 2))


def test_dropout_is_nothing_in_evaluation():
    adapted = randomise(peft.get_peft_model(tiny_model(), config(lora_dropout=0.5)).eval())
    inputs = model_inputs(adapted.config, 2)
    torch.testing.assert_close(lora.merge(adapted)(*inputs), adapted(*inputs))


def test_other_layers_are_refused():
    adapted = peft.get_peft_model(tiny_model(), peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]))
    with pytest.raises(TypeError, match=r"must be a torch\.nn layer or peft's LoRA"):
        adapted(*model_inputs(adapted.config, 2))


# One adapter per density segment

SCHEDULE = DensitySchedule([(4, 4), (3, 2), (2, 2)])
T = torch.tensor([999, 10, 400, 334, 333, 1000, 700, 0])  # not in order of segments, their borders among them


def segmented(dtype=torch.float64, seed=0, **options):
    return randomise(lora.add_segment_adapters(tiny_model(dtype, schedule=SCHEDULE), LoraConfig(r=2, **options)), seed)


def segment_inputs(model, dtype=torch.float64):
    x, _, y = model_inputs(model.config, len(T), dtype)
    return x, T, y


def test_segment_of_a_timestep():
    assert SCHEDULE.begins == (0, 334, 667)
    for t in (0, 333, 333.5, 334, 666.9, 667, 1000):
        assert SCHEDULE.grids[SCHEDULE.segment(t)] == SCHEDULE.grid(t)
    with pytest.raises(ValueError):
        SCHEDULE.segment(-1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_sample_goes_through_its_segments_adapter(checkpointing):
    adapted = segmented()
    model, plain = adapted.get_base_model(), tiny_model(torch.float64, schedule=SCHEDULE)
    model.activation_checkpointing = checkpointing
    x, t, y = segment_inputs(model)
    matrices = adapters_of(adapted)
    assert all(parameter.requires_grad for parameter in matrices.values())
    out = adapted(x, t, y)
    functions = [merged_by_hand(plain, adapted, f"segment_{i}", 8 / 2) for i in range(3)]  # 8 is peft's lora_alpha

    def alone(i):
        one = slice(i, i + 1)
        return functions[SCHEDULE.segment(int(t[i]))](x[one], t[one], y[one], SCHEDULE.grid(int(t[i])))

    expected = torch.cat([alone(i) for i in range(len(t))])
    assert relative_error(out, expected) < EXACT
    grad = randn(*out.shape, seed=5)
    actual = torch.autograd.grad(out, list(matrices.values()), grad)
    wanted = torch.autograd.grad(expected, list(matrices.values()), grad)
    for name, a, b in zip(matrices, actual, wanted, strict=True):
        assert relative_error(a, b, least=1e-3) < EXACT, name
    different = lora.merge(adapted, 0)(x, t, y)
    chosen = torch.tensor([SCHEDULE.segment(int(i)) for i in t]) == 0
    assert relative_error(different[chosen], out[chosen]) < EXACT < relative_error(different[~chosen], out[~chosen])


def test_grids_follow_their_samples():
    adapted = segmented()
    x, t, y = segment_inputs(adapted)
    grids = [(4, 4), (1, 2), (3, 3), (2, 1), (4, 1), (2, 2), (1, 1), (3, 2)]
    alone = [adapted(x[i : i + 1], t[i : i + 1], y[i : i + 1], [grid]) for i, grid in enumerate(grids)]
    assert relative_error(adapted(x, t, y, grids), torch.cat(alone)) < EXACT
    with pytest.raises(ValueError, match="grid lists 2 grids"):
        adapted(x, t, y, grids[:2])


def test_a_segment_without_samples_has_zero_gradients():
    adapted = segmented(torch.float32).train()
    x, _, y = segment_inputs(adapted, torch.float32)
    adapted(x, torch.full((len(x),), 5), y).square().mean().backward()
    for name, parameter in adapters_of(adapted).items():
        assert ("segment_0" in name) == bool(parameter.grad.abs().max() > 0), name


def test_segments_sample_as_their_merged_weights():
    adapted = segmented(torch.float32).eval()
    labels, steps = [0, 1, 2], 6
    images = sample(adapted, labels, steps, cfg_scale=2.0)
    torch.testing.assert_close(sample(lora.merge_segments(adapted), labels, steps, cfg_scale=2.0), images)
    with pytest.raises(ValueError, match="adapter for each density segment"):
        Sampler(adapted.get_base_model())
    assert Sampler(lora.merge(adapted, 1)).sample(labels, 2).isfinite().all()


def test_segments_are_saved_and_loaded(tmp_path):
    adapted = segmented(torch.float32)
    inputs = segment_inputs(adapted, torch.float32)
    for seed in (1, 2):  # the second replaces the first
        randomise(adapted, seed)
        lora.save_segment_adapters(adapted, tmp_path / "adapters")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    loaded = lora.load_segment_adapters(tiny_model(schedule=SCHEDULE), tmp_path / "adapters")
    assert_same_outputs(loaded, adapted, *inputs)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = lora.load_segment_adapters(tiny_model(schedule=SCHEDULE), tmp_path / "adapters", trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in again.named_parameters())


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    adapted = segmented(torch.float32, target_modules=["qkv"])
    with pytest.raises(ValueError, match="holds no segment adapters"):
        lora.save_segment_adapters(adapted, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"segments\.json"):
        lora.load_segment_adapters(tiny_model(), tmp_path / "other")
    lora.save_segment_adapters(adapted, tmp_path / "adapters")
    with pytest.raises(ValueError, match="begins"):
        lora.load_segment_adapters(tiny_model(), tmp_path / "adapters")
    (tmp_path / "adapters" / "segment_1" / "adapter_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)):
        lora.load_segment_adapters(tiny_model(schedule=SCHEDULE), tmp_path / "adapters")


def test_wrong_use_is_refused():
    adapted = segmented(torch.float32)
    with pytest.raises(TypeError, match="must be a FlexDiT"):
        lora.add_segment_adapters(adapted, LoraConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add_segment_adapters(adapted.get_base_model(), LoraConfig())
    with pytest.raises(ValueError, match="modules_to_save"):
        lora.add_segment_adapters(tiny_model(), LoraConfig(modules_to_save=["final_layer"]))
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig"):
        lora.add_segment_adapters(tiny_model(), None)
    for segment in (None, 3, -1):
        with pytest.raises(ValueError, match="must be from 0 to 2"):
            lora.merge(adapted, segment)
    with pytest.raises(ValueError, match="must be None"):
        lora.merge(tiny_model(), 0)
    inputs = segment_inputs(adapted, torch.float32)
    adapted.merge_adapter(["segment_1"])
    with pytest.raises(ValueError, match="must apply 'segment_0' alone"):
        adapted(*inputs)
    adapted.unmerge_adapter()
    unloaded = adapted.merge_and_unload()
    with pytest.raises(ValueError, match="which no layer has"):
        unloaded(*inputs)


def test_segments_on_two_ranks(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(lora.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, RANKS, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, env=environment, text=True) for i in range(2)]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
