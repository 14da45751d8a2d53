"""`flexdit convert`: every direction through the command line, what it prints, what it refuses."""

import json

import pytest
import safetensors.torch
import torch
from helpers import LAYOUT, assert_same_model, dit_model, dit_state_dict, same_tensors

from flexdit_ext import FlexDiT, convert
from flexdit_ext.__main__ import main

DIFFUSERS = {"timestep_shift": 1, "mlp_norm_eps": 1e-5}
SPARSE = "1/2x2,1,1,1/1"  # helpers.LAYOUT


@pytest.fixture
def dit(tmp_path):
    """A dense model, and its DiT checkpoint."""
    model = dit_model(torch.float32)
    torch.save(
        {"ema": dit_state_dict(model), "model": dit_state_dict(dit_model(torch.float32, seed=1))}, tmp_path / "dit.pt"
    )
    return model, tmp_path / "dit.pt"


def run(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def refused(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_dit_to_flexdit_and_back(dit, tmp_path, capsys):
    model, source = dit
    run(source, tmp_path / "flexdit", "--to", "flexdit", "--num-heads", 2)
    out = capsys.readouterr().out.splitlines()
    assert "mapped: 132 tensors" in out and "  dense_blocks.#.attn.qkv.* <- blocks.#.attn.qkv.*  (24 tensors)" in out
    assert "unused: 1" in out and "  model : ema was taken" in out and "missing: 0" in out
    assert_same_model(FlexDiT.from_pretrained(tmp_path / "flexdit"), model)
    for name in ("back.pt", "back.safetensors"):
        run(tmp_path / "flexdit", tmp_path / name, "--to", "dit")
        assert convert.detect(tmp_path / name) == "dit"
        assert_same_model(convert.from_dit(tmp_path / name, 2), model)
    run(source, tmp_path / "other", "--to", "flexdit", "--num-heads", 2, "--key", "model")
    assert_same_model(FlexDiT.from_pretrained(tmp_path / "other"), dit_model(torch.float32, seed=1))
    assert not list(tmp_path.glob(".saving-*"))


def test_layout_and_size(dit, tmp_path, capsys):
    model, source = dit
    target = tmp_path / "sparse"
    run(
        source,
        target,
        "--to",
        "flexdit",
        "--num-heads",
        2,
        "--layout",
        SPARSE,
        "--image-size",
        192,
        "--dtype",
        "bfloat16",
    )
    out = capsys.readouterr().out
    assert "  sdtm.#.recovery.#.from_dense.* = identity  (2 tensors)" in out
    assert "note: pos_embed: 6x6 to 12x12 positions, interpolate" in out
    loaded = FlexDiT.from_pretrained(target)
    larger = convert.resize(model, 24)
    assert_same_model(loaded, convert.sparsify(larger, loaded.config).bfloat16())
    assert {name: getattr(loaded.config, name) for name in LAYOUT} == LAYOUT


def test_sparsedit_both_ways(tmp_path, capsys):
    model = dit_model(torch.float32, **LAYOUT)
    torch.save(convert.to_sparsedit(model), tmp_path / "a.pt")
    run(tmp_path / "a.pt", tmp_path / "flexdit", "--to", "flexdit", "--num-heads", 2)
    assert_same_model(FlexDiT.from_pretrained(tmp_path / "flexdit"), model)
    run(tmp_path / "flexdit", tmp_path / "b.safetensors", "--to", "sparsedit")
    assert same_tensors(safetensors.torch.load_file(tmp_path / "b.safetensors"), convert.to_sparsedit(model))
    assert "  dumbbell_blocks.#.semantic_blocks.#.mlp.fc1.* <- sdtm.#.sparse.#.mlp.fc1.*" in capsys.readouterr().out


def test_diffusers_both_ways(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    model = dit_model(torch.float32, **DIFFUSERS)
    model.save_pretrained(tmp_path / "flexdit")
    run(tmp_path / "flexdit", tmp_path / "sharded", "--to", "diffusers", "--max-shard-size", "50KB")
    assert "pos_embed : diffusers computes it" in capsys.readouterr().out
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "sharded")
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    run(tmp_path / "pipeline", tmp_path / "back", "--to", "flexdit")
    assert_same_model(FlexDiT.from_pretrained(tmp_path / "back"), model)
    assert "pos_embed = sin-cos of 6x6" in capsys.readouterr().out
    assert "timestep_shift is 1" in refused(capsys, tmp_path / "pipeline", tmp_path / "x.pt", "--to", "dit")
    run(tmp_path / "pipeline", tmp_path / "x.pt", "--to", "dit", "--dit-constants")
    expected = {name: tensor.float() for name, tensor in dit_state_dict(model).items()}
    assert same_tensors(torch.load(tmp_path / "x.pt", weights_only=True), expected)


def test_flexdit_in_diffusers_clothes(tmp_path, capsys):
    pytest.importorskip("diffusers")
    model = dit_model(torch.float32, **LAYOUT)
    model.save_pretrained(tmp_path / "flexdit")
    for name, shards in (("single", []), ("sharded", ["--max-shard-size", "50KB"])):
        run(tmp_path / "flexdit", tmp_path / name, "--to", "diffusers", *shards)
        assert "note: written as flexdit_ext.diffusers.FlexDiTTransformer2DModel" in capsys.readouterr().out
        assert len(list((tmp_path / name).glob("*.safetensors"))) > (2 if shards else 0)
        run(tmp_path / name, tmp_path / f"{name} back", "--to", "flexdit")
        assert_same_model(FlexDiT.from_pretrained(tmp_path / f"{name} back"), model)


def test_heads_of_known_sizes(tmp_path, capsys):
    """DiT-S: its 6 heads are DiT's own, and the preset agrees."""
    small = dit_model(torch.float32, hidden_size=384, num_heads=6, input_size=4)
    torch.save(dit_state_dict(small), tmp_path / "s.pt")
    run(tmp_path / "s.pt", tmp_path / "s", "--to", "flexdit", "--layout", "S/2")
    assert "note: 6 heads, as the DiT of hidden size 384 has" in capsys.readouterr().out
    config = FlexDiT.from_pretrained(tmp_path / "s").config
    assert (config.num_heads, config.num_sdtm, config.sdtm_blocks) == (6, 2, (1, 2, 1, 1))
    error = refused(capsys, tmp_path / "s.pt", tmp_path / "x", "--to", "flexdit", "--layout", "B/2")
    assert "--layout B/2 has hidden_size 768, the source 384" in error


def test_refusals(dit, tmp_path, capsys):
    _, source = dit
    to_flexdit = (source, tmp_path / "x", "--to", "flexdit")
    heads = ("--num-heads", 2)
    for arguments, message in (
        (to_flexdit, "--num-heads has to be given: no DiT has a hidden size of 24"),
        ((*to_flexdit, *heads, "--layout", "M/2"), "--layout is 'M/2', must be a preset or such as"),
        ((*to_flexdit, *heads, "--layout", "1/1x1,1,1,1/1"), "depth 12 and 6"),
        ((*to_flexdit, *heads, "--image-size", 100), "--image-size is 100, must be a multiple of 8"),
        ((*to_flexdit, *heads, "--max-shard-size", "5 apples"), "--max-shard-size is '5 apples'"),
        ((*to_flexdit, *heads, "--dit-constants"), "--dit-constants is for a source written by diffusers"),
        ((*to_flexdit, *heads, "--key", "best"), "no state dict 'best'; it has ['ema', 'model']"),
        ((*to_flexdit, *heads, "--from", "sparsedit"), "SparseDiT does not have such tensors: blocks.0."),
        ((source, tmp_path / "x", "--to", "dit", *heads), "must be a .pt or .safetensors file for --to dit"),
        ((source, source, "--to", "diffusers", *heads), "is a file, --to diffusers writes a folder"),
        ((source, tmp_path / "x.pt", "--to", "dit", "--max-shard-size", "1GB"), "--max-shard-size is for folders"),
        ((tmp_path / "none.pt", tmp_path / "x", "--to", "flexdit"), "none.pt does not exist"),
        ((tmp_path, tmp_path / "x", "--to", "flexdit"), "model.safetensors does not exist"),
    ):
        error = refused(capsys, *arguments)
        assert message in error and error.count("error: ") == 1, error
        assert not (tmp_path / "x").exists()


def test_missing_and_unused_tensors(dit, tmp_path, capsys):
    model, _ = dit
    tensors = dit_state_dict(model)
    del tensors["blocks.0.mlp.fc1.bias"]
    torch.save(tensors | {"head.weight": torch.zeros(1)}, tmp_path / "odd.pt")
    command = (tmp_path / "odd.pt", tmp_path / "x", "--to", "flexdit", "--num-heads", 2)
    assert "DiT does not have such tensors: head.weight" in refused(capsys, *command)
    error = refused(capsys, *command, "--ignore-unused")
    assert "missing: dense_blocks.0.mlp.fc1.bias\n" in error
    torch.save(dit_state_dict(model) | {"head.weight": torch.zeros(1)}, tmp_path / "odd.pt")
    run(*command, "--ignore-unused")
    assert "  head.* : DiT has no such tensor" in capsys.readouterr().out


def test_layout_of_a_sparse_source(tmp_path, capsys):
    dit_model(torch.float32, **LAYOUT).save_pretrained(tmp_path / "flexdit")
    run(tmp_path / "flexdit", tmp_path / "same", "--to", "flexdit", "--layout", SPARSE)
    error = refused(capsys, tmp_path / "flexdit", tmp_path / "x", "--to", "flexdit", "--layout", "0/2x1,2,1,1/2")
    assert "only a dense one converts" in error
    assert json.loads((tmp_path / "same" / "config.json").read_text())["num_sdtm"] == 2
