"""flexdit_ext/convert.py the other way: weights for DiT and diffusers, other resolutions, reports.

diffusers' forward is diffusers' own. facebookresearch/DiT is on no package index: its names are checked against a list
written down apart from the library's (helpers.dit_name) and, with FLEXDIT_DIT naming a checkout of it (it needs timm),
against its own forward. Errors in comments: 2-core development machine, torch 2.13, diffusers 0.42, 2026-11-25.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    LAYOUT,
    assert_same_model,
    dit_config,
    dit_model,
    dit_state_dict,
    model_inputs,
    relative_error,
    same_tensors,
)
from test_convert_dit import diffusers_dit

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, Sampler, convert, sample

DIFFUSERS = {"timestep_shift": 1, "mlp_norm_eps": 1e-5}  # what DiTTransformer2DModel computes with


def output(model, inputs):
    with torch.no_grad():
        out = model(*inputs)
    return out if isinstance(out, torch.Tensor) else out.sample


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("overrides", [DIFFUSERS, DIFFUSERS | {"learn_sigma": False, "mlp_norm_eps": 0.01}])
@pytest.mark.usefixtures("torch_features")
def test_diffusers_loads_what_is_written(tmp_path, overrides, shards):
    diffusers = pytest.importorskip("diffusers")
    model = dit_model(torch.float32, **overrides)
    convert.save_diffusers(model, tmp_path, max_shard_size=shards)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (shards is not None)
    dit, info = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = model_inputs(model.config, 3)
    # Worst 2.4e-6 (largest value 4).
    torch.testing.assert_close(output(dit.eval(), inputs), output(model, inputs), rtol=0, atol=1e-5)
    assert_same_model(convert.from_diffusers(tmp_path), model)


def test_diffusers_writes_what_is_loaded(tmp_path):
    """diffusers' own files, in one and in several."""
    dit = diffusers_dit(norm_eps=1e-5, downscale_freq_shift=1)
    dit.save_pretrained(tmp_path / "single")
    dit.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 5
    inputs = model_inputs(dit_config(), 3)
    for name in ("single", "sharded"):
        model = convert.from_diffusers(tmp_path / name)
        torch.testing.assert_close(output(model, inputs), output(dit, inputs), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("torch_features")
def test_dit_constants_in_diffusers_are_near():
    """A model with DiT's frequencies cannot be expressed: a warning says so, and the weights are still right."""
    model = dit_model(torch.float32)
    with pytest.warns(UserWarning, match="timestep_shift is 0"):
        tensors, config = convert.to_diffusers(model)
    assert config["norm_eps"] == 1e-6
    dit = diffusers_dit(norm_eps=1e-6, downscale_freq_shift=0)  # with the frequencies put right in the module
    dit.load_state_dict(tensors)
    inputs = model_inputs(model.config, 3)
    torch.testing.assert_close(output(dit, inputs), output(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (LAYOUT, "pooling blocks or SDTMs"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2.0"),
        ({"num_classes": 1, "class_dropout_prob": 0.0}, "one label"),
    ],
)
def test_what_diffusers_cannot_express(overrides, message):
    with pytest.raises(ValueError, match=message):
        convert.to_diffusers(dit_model(**overrides))


def test_diffusers_has_no_place_for_positions():
    model = dit_model(**DIFFUSERS)
    model.pos_embed[3, 2] += 0.1
    with pytest.raises(ValueError, match="pos_embed is not the sin-cos table"):
        convert.to_diffusers(model)


def test_sampler_computes_with_the_constants():
    """1.2e-7 apart, and 0.39 with the other constants."""
    model = dit_model(torch.float32, timestep_shift=1, mlp_norm_eps=0.1)
    run = {"y": [1, 2], "steps": 3, "seed": 1}
    expected = sample(model, **run)
    assert relative_error(Sampler(model).sample(**run), expected) < 1e-5
    plain = dit_model(torch.float32)  # the same weights
    assert relative_error(Sampler(plain).sample(**run), expected) > 0.1


# ---- facebookresearch/DiT -------------------------------------------------------------------------------------------


def test_dit_round_trip(tmp_path):
    """As train.py of DiT and fast-DiT save it: model, ema, opt, args; the argparse.Namespace loads, code does not."""
    model, ema = dit_model(), dit_model(seed=1)
    assert same_tensors(convert.to_dit(model), dit_state_dict(model))
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"model": convert.to_dit(model), "ema": convert.to_dit(ema), "opt": optimizer.state_dict()}
    torch.save(content | {"args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}, tmp_path / "0400000.pt")
    assert_same_model(convert.from_dit(tmp_path / "0400000.pt", 2), ema)
    assert_same_model(convert.from_dit(tmp_path / "0400000.pt", 2, key="model"), model)
    with pytest.raises(ValueError, match="no state dict 'best'"):
        convert.from_dit(tmp_path / "0400000.pt", 2, key="best")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (LAYOUT, "pooling blocks or SDTMs"),
        ({"timestep_shift": 1}, "timestep_shift is 1, DiT has 0"),
        ({"mlp_norm_eps": 1e-5}, "mlp_norm_eps is 1e-05, DiT has 1e-6"),
    ],
)
def test_what_dit_cannot_express(overrides, message):
    with pytest.raises(ValueError, match=message):
        convert.to_dit(dit_model(**overrides))
    if overrides != LAYOUT:
        with pytest.raises(ValueError, match="the released code has"):
            convert.to_sparsedit(dit_model(**overrides))


@pytest.fixture
def original_dit():
    """The class DiT of a checkout of facebookresearch/DiT or fast-DiT."""
    checkout = os.environ.get("FLEXDIT_DIT")
    if not checkout:
        pytest.skip("FLEXDIT_DIT names no checkout of facebookresearch/DiT")
    pytest.importorskip("timm", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("original_dit_models", Path(checkout) / "models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.DiT


@pytest.mark.parametrize("overrides", [{}, {"learn_sigma": False, "class_dropout_prob": 0.0, "patch_size": 3}])
@pytest.mark.usefixtures("torch_features")
def test_original_dit(original_dit, overrides):
    model = dit_model(torch.float32, **overrides)
    c = model.config
    sizes = {name: getattr(c, name) for name in ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads")}
    theirs = original_dit(
        depth=c.depth,
        class_dropout_prob=c.class_dropout_prob,
        num_classes=c.num_classes,
        learn_sigma=c.learn_sigma,
        **sizes,
    ).eval()
    table = theirs.pos_embed.detach().clone()
    theirs.load_state_dict(convert.to_dit(model))
    torch.testing.assert_close(theirs.pos_embed, table, rtol=0, atol=1e-6)
    inputs = model_inputs(c, 4)
    expected = output(theirs, inputs)
    assert expected.abs().max() > 1  # not the zeros that DiT starts with
    torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    loaded = convert.from_dit(theirs.state_dict(), c.num_heads, **({"num_classes": 10} if overrides else {}))
    torch.testing.assert_close(output(loaded, inputs), output(theirs, inputs), rtol=0, atol=1e-5)


# ---- other resolutions ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("torch_features")
def test_resize_to_dits_own_table():
    """256 to 512: what diffusers' model of the larger size computes with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    small = dit_model(torch.float32, **DIFFUSERS)
    model = convert.resize(small, 24, position="sincos")
    assert model.config == dit_config(input_size=24, **DIFFUSERS) and not model.training
    tensors, config = convert.to_diffusers(model)
    dit = diffusers.DiTTransformer2DModel.from_config(config).eval()
    dit.load_state_dict(tensors)
    inputs = model_inputs(model.config, 2)
    torch.testing.assert_close(output(model, inputs), output(dit, inputs), rtol=0, atol=1e-5)  # worst 1.9e-6
    assert small.config.input_size == 12  # a copy


def test_resize_by_interpolation():
    """Places keep their meaning: every value of the small table is near the mean of its four in the large one, corners
    of the picture keep their values, and the same size gives the same table."""
    small = dit_model(torch.float64)
    table = small.pos_embed.T.unflatten(1, (6, 6))
    large = convert.resize(small, 24).pos_embed.T.unflatten(1, (12, 12))
    means = torch.nn.functional.avg_pool2d(large, 2)
    assert (means - table)[:, 1:-1, 1:-1].abs().max() < 0.15  # 0.10: the fastest wave, sin(x)
    assert (means - table)[4:6].abs().max() < 0.01  # a slow one
    assert torch.equal(convert.resize(small, 12).pos_embed, small.pos_embed)
    assert (
        convert.resize(small, 24, "sincos")
        .pos_embed[13]
        .equal(FlexDiT(dit_config(input_size=24)).pos_embed[13].double())
    )


def test_resize_keeps_the_rest():
    model = dit_model(torch.bfloat16, **LAYOUT)
    larger = convert.resize(model, 24)
    assert larger.config.density_schedule.grids == dit_config(**LAYOUT, input_size=24).density_schedule.grids
    assert larger.pos_embed.dtype == torch.bfloat16
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), larger.parameters(), strict=True))
    with pytest.raises(ValueError, match="position is 'nearest', must be one of interpolate, sincos"):
        convert.resize(model, 24, "nearest")
    with pytest.raises(ValueError, match="input_size is 25"):
        convert.resize(model, 25)
    fixed = dit_model(**LAYOUT, schedule=DensitySchedule([(5, 5)]))
    with pytest.raises(ValueError, match=r"schedule has the sparse grid \(5, 5\)"):
        convert.resize(fixed, 8)


# ---- reports --------------------------------------------------------------------------------------------------------


def test_report_of_dit():
    dense = dit_model()
    report = convert.Report()
    source = {"ema": dit_state_dict(dense), "model": dit_state_dict(dense), "opt": {}}
    model = convert.from_dit(source, 2, dit_config(**LAYOUT), report=report)
    names = set(model.state_dict())
    assert set(report.mapped) | set(report.initialised) == names and not set(report.mapped) & set(report.initialised)
    assert report.unused == {"model": "ema was taken", "opt": "ema was taken"} and not report.missing
    assert report.mapped["pooling_blocks.0.attn.v.weight"] == ("blocks.0.attn.qkv.weight",)
    assert report.mapped["sdtm.0.generation.1.attn.kv.bias"] == ("blocks.2.attn.qkv.bias",)
    assert report.initialised == {
        f"sdtm.{i}.recovery.0.{layer}.{kind}": "identity" if (layer, kind) == ("from_dense", "weight") else "0"
        for i in range(2)
        for layer in ("from_sparse", "from_dense")
        for kind in ("weight", "bias")
    }


def test_report_of_diffusers_and_back():
    report = convert.Report()
    model = convert.from_diffusers(diffusers_dit(), report=report)
    parts = tuple(f"transformer_blocks.4.attn1.to_{part}.weight" for part in "qkv")
    assert report.mapped["dense_blocks.4.attn.qkv.weight"] == parts
    assert list(report.initialised) == ["pos_embed"]
    assert len(report.unused) == 11 * 5 and set(report.unused.values()) == {"the same as block 0's"}
    assert set(report.mapped) | set(report.initialised) == set(model.state_dict())
    convert.to_dit(model, report)  # two conversions make one
    assert report.mapped["blocks.4.attn.qkv.weight"] == parts and list(report.initialised) == ["pos_embed"]


def test_unused_and_missing_tensors():
    state_dict = dit_state_dict(dit_model())
    state_dict |= {"head.weight": torch.zeros(2), "blocks.0.attn.q_norm.weight": torch.zeros(12)}
    for name in ("head.weight", "unexpected: dense_blocks.0.attn.q_norm.weight"):
        with pytest.raises(ValueError, match=name):
            convert.from_dit(state_dict, 2)
        state_dict.pop("head.weight", None)
    report = convert.Report()
    convert.from_dit(state_dict | {"head.weight": torch.zeros(2)}, 2, report=report, ignore_unused=True)
    assert report.unused == {
        "head.weight": "DiT has no such tensor",
        "blocks.0.attn.q_norm.weight": "the model has no such tensor",
    }
    del state_dict["blocks.11.mlp.fc1.bias"]
    report = convert.Report()
    with pytest.raises(ValueError, match=r"1 missing: dense_blocks\.11\.mlp\.fc1\.bias"):
        convert.from_dit(state_dict, 2, report=report, ignore_unused=True)
    assert report.missing == ["dense_blocks.11.mlp.fc1.bias"]


def test_lines_of_a_report():
    report = convert.Report()
    convert.from_dit(dit_state_dict(dit_model()), 2, dit_config(**LAYOUT), report=report)
    lines = report.lines()
    assert "  sdtm.#.recovery.#.from_dense.* = identity  (2 tensors)" in lines
    assert "  sdtm.#.sparse.#.mlp.fc1.* <- blocks.#.mlp.fc1.*  (4 tensors)" in lines
    assert lines[0] == f"mapped: {len(report.mapped)} tensors" and "missing: 0" in lines and len(lines) < 60


# ---- detect ---------------------------------------------------------------------------------------------------------


def test_detect(tmp_path):
    dense = dit_model(torch.float32, **DIFFUSERS)
    convert.save_diffusers(dense, tmp_path / "diffusers")
    dense.save_pretrained(tmp_path / "flexdit")
    files = {"dit": dit_state_dict(dit_model()), "sparsedit": convert.to_sparsedit(dit_model(**LAYOUT))}
    for name, tensors in files.items():
        torch.save({"ema": {f"module.{key}": tensor for key, tensor in tensors.items()}}, tmp_path / f"{name}.pt")
    for path in tmp_path.iterdir():
        assert convert.detect(path) == path.stem
    assert convert.detect(tmp_path / "flexdit" / "model.safetensors") == "flexdit"
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no tensor of .* such as head\.weight"):
        convert.detect(tmp_path / "other.pt")
    config = tmp_path / "diffusers" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "UNet2DModel"))
    with pytest.raises(ValueError, match="class UNet2DModel"):
        convert.detect(tmp_path / "diffusers")


@pytest.mark.parametrize("field, value", [("timestep_shift", 2), ("timestep_shift", -1), ("mlp_norm_eps", 0.0)])
def test_constants_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        FlexDiTConfig(**{field: value})
    for wrong in (None, "1", True):
        with pytest.raises(TypeError, match=field):
            FlexDiTConfig(**{field: wrong})
