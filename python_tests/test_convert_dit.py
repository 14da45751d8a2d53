"""flexdit_ext/convert.py: facebookresearch/DiT's and diffusers' dense DiTs, and the paper's initialisation from one."""

import json
import math

import pytest
import torch
from helpers import LAYOUT, dit_config, dit_model, dit_state_dict, model_inputs, same_tensors

from flexdit_ext import DensitySchedule, FlexDiT, convert, reference

# ---- dense DiT ------------------------------------------------------------------------------------------------------


def test_dit_is_exact():
    model = dit_model()
    loaded = convert.from_dit(dit_state_dict(model), num_heads=2)
    assert same_tensors(loaded.state_dict(), model.state_dict())
    expected = reference.FlexDiT(model.config).double()
    expected.load_state_dict(model.state_dict())
    x, t, y = model_inputs(model.config, 3, torch.float64)
    with torch.no_grad():
        # Worst 3.1e-15 (largest value 4), 2-core development machine.
        torch.testing.assert_close(loaded(x, t, y), expected(x, t, y), rtol=0, atol=1e-10)


def test_dit_with_a_layout():
    dense = dit_model()
    state_dict = dit_state_dict(dense)
    config = dit_config(**LAYOUT, schedule=DensitySchedule([(3, 3)]))
    expected = convert.sparsify(dense, config).state_dict()
    by_config = convert.from_dit(state_dict, 2, config)
    assert by_config.config == config and same_tensors(by_config.state_dict(), expected)
    by_fields = convert.from_dit(state_dict, 2, num_pooling_blocks=1, num_sdtm=2, sdtm_blocks=(2, 1, 1, 1), grid=(3, 3))
    assert by_fields.config == config and same_tensors(by_fields.state_dict(), expected)


def test_dit_without_null_class_by_config():
    dense = dit_model(num_classes=11, class_dropout_prob=0.0)
    config = dit_config(**LAYOUT, num_classes=11, class_dropout_prob=0.0)
    assert convert.from_dit(dit_state_dict(dense), 2, config).config == config


def test_dit_layout_errors():
    state_dict = dit_state_dict(dit_model())
    with pytest.raises(ValueError, match="both config and num_sdtm"):
        convert.from_dit(state_dict, 2, dit_config(**LAYOUT), num_sdtm=1)
    with pytest.raises(ValueError, match="num_heads 3 and 2"):
        convert.from_dit(state_dict, 3, dit_config(**LAYOUT))
    with pytest.raises(ValueError, match="depth 12 and 18"):
        convert.from_dit(state_dict, 2, num_pooling_blocks=0, num_sdtm=3)
    with pytest.raises(ValueError, match="hidden_size 24 and 32"):
        convert.from_dit(state_dict, 2, dit_config(**LAYOUT, hidden_size=32))


# ---- the paper's initialisation -------------------------------------------------------------------------------------


def test_sparsify_takes_block_k_from_block_k():
    """Block k of the dense model holds the constant k + 1; order as method.md's flattened FlexDiT."""
    dense = FlexDiT(dit_config())
    with torch.no_grad():
        for k, block in enumerate(dense.dense_blocks):
            for parameter in block.parameters():
                parameter.fill_(k + 1)
    model = convert.sparsify(dense, dit_config(**LAYOUT))
    order = [model.pooling_blocks[0]]
    for sdtm in model.sdtm:
        order += [*sdtm.generation, *sdtm.sparse, *sdtm.recovery, *sdtm.dense]
    order += [*model.dense_blocks]
    assert len(order) == model.config.depth
    for k, block in enumerate(order):
        for name, parameter in block.named_parameters():
            if not name.startswith("from_"):
                assert (parameter == k + 1).all(), (k, name)


def test_sparsify_splits_qkv_and_starts_recovery_at_identity():
    dense = dit_model()
    model = convert.sparsify(dense, dit_config(**LAYOUT))
    c = dense.config.hidden_size
    pooling, generation, recovery = model.pooling_blocks[0], model.sdtm[0].generation[1], model.sdtm[1].recovery[0]
    for kind in ("weight", "bias"):
        qkv = [getattr(block.attn.qkv, kind) for block in dense.dense_blocks]
        assert torch.equal(getattr(pooling.attn.v, kind), qkv[0][2 * c :])
        assert torch.equal(getattr(generation.attn.q, kind), qkv[2][:c])
        assert torch.equal(getattr(generation.attn.kv, kind), qkv[2][c:])
        assert torch.equal(getattr(recovery.attn.q, kind), qkv[9][:c])
        assert torch.equal(getattr(recovery.attn.kv, kind), qkv[9][c:])
    assert torch.equal(recovery.from_dense.weight, torch.eye(c, dtype=torch.float64))
    for zero in (recovery.from_sparse.weight, recovery.from_sparse.bias, recovery.from_dense.bias):
        assert not zero.any()
    s, x = torch.randn(4, c, dtype=torch.float64), torch.randn(36, c, dtype=torch.float64)
    linears = (getattr(recovery, name) for name in ("from_sparse", "from_dense"))
    weights = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
    assert torch.equal(reference.recover_tokens(s, x, *weights, [(2, 2)], [(6, 6)]), x)  # m = x


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (2, 5)])
def test_sparsified_model_without_its_sparse_parts_is_the_dense_model(grid):
    """With the gates of all but dense blocks shut, m = x carries the dense tokens through, whatever the grid."""
    dense = dit_model()
    model = convert.sparsify(dense, dit_config(**LAYOUT))
    open_blocks = [model.sdtm[0].dense[0], model.sdtm[1].dense[0], model.dense_blocks[0]]
    with torch.no_grad():
        for block in [*model.modules(), *dense.dense_blocks]:
            if hasattr(block, "attn") and not any(block is kept for kept in open_blocks):
                block.modulation.weight.zero_()
                block.modulation.bias.zero_()
        for k, block in zip((5, 10, 11), open_blocks, strict=True):
            dense.dense_blocks[k].load_state_dict(block.state_dict())
    x, t, y = model_inputs(dense.config, 3, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y, grid), dense(x, t, y), rtol=0, atol=1e-10)


def test_sparsify_copies():
    dense = dit_model()
    config = dit_config(**LAYOUT, class_dropout_prob=0.3, reinject_position=True)
    model = convert.sparsify(dense, config)
    assert model.config == config and not model.training and model.patch_embed.weight.dtype == torch.float64
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pointers = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same_tensors(dense.state_dict(), before)
    expected = sum(tensor.numel() for tensor in reference.FlexDiT(config).state_dict().values())
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == expected


def test_sparsify_takes_the_reference():
    dense = reference.FlexDiT(dit_config())
    model = convert.sparsify(dense, dit_config(**LAYOUT))
    assert torch.equal(model.sdtm[1].dense[0].attn.qkv.weight, dense.dense_blocks[10].attn.qkv.weight)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_dense_blocks": 2}, "depth 12 and 13"),
        ({"hidden_size": 32}, "hidden_size 24 and 32"),
        ({"mlp_ratio": 2.0}, "mlp_hidden_size 96 and 48"),
        ({"input_size": 24}, "input_size 12 and 24"),
        ({"class_dropout_prob": 0.0}, "null class True and False"),
    ],
)
def test_sparsify_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        convert.sparsify(FlexDiT(dit_config()), dit_config(**(LAYOUT | overrides)))


def test_sparsify_wants_a_dense_model():
    with pytest.raises(ValueError, match="dense blocks only"):
        convert.sparsify(FlexDiT(dit_config(**LAYOUT)), dit_config(**LAYOUT))
    with pytest.raises(TypeError, match="FlexDiTConfig"):
        convert.sparsify(FlexDiT(dit_config()), {"num_sdtm": 1})


# ---- diffusers ------------------------------------------------------------------------------------------------------


def diffusers_dit(norm_eps=1e-6, downscale_freq_shift=0):
    """diffusers' DiT, by default with DiT's constants; one embedding for all blocks, as in converted checkpoints."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=dit_config().depth,
        sample_size=12,
        num_embeds_ada_norm=10,
        norm_eps=norm_eps,
    ).eval()
    first = dit.transformer_blocks[0].norm1.emb
    for block in dit.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = downscale_freq_shift
    return dit


def diffusers_output(dit):
    x, t, y = model_inputs(dit_config(), 3)
    with torch.no_grad():
        return dit(x, t, y).sample


def flexdit_output(model):
    with torch.no_grad():
        return model(*model_inputs(dit_config(), 3))


def test_diffusers_output():
    dit = diffusers_dit()
    model = convert.from_diffusers(dit)
    assert model.config == dit_config()
    # Worst 7.2e-7 (largest value 2.5), 2-core development machine.
    torch.testing.assert_close(flexdit_output(model), diffusers_output(dit), rtol=0, atol=1e-5)


def test_dit_output_against_diffusers():
    """The same weights under facebookresearch/DiT's names, q, k and v stacked by hand."""
    dit = diffusers_dit()
    theirs = dit.state_dict()
    embedding = "transformer_blocks.0.norm1.emb"
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        f"{embedding}.timestep_embedder.linear_1": "t_embedder.mlp.0",
        f"{embedding}.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for i in range(dit_config().depth):
        block = f"transformer_blocks.{i}"
        renamed |= {
            f"{block}.norm1.linear": f"blocks.{i}.adaLN_modulation.1",
            f"{block}.attn1.to_out.0": f"blocks.{i}.attn.proj",
            f"{block}.ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            f"{block}.ff.net.2": f"blocks.{i}.mlp.fc2",
        }
    state_dict = {"pos_embed": dit.pos_embed.pos_embed}
    state_dict["y_embedder.embedding_table.weight"] = theirs[f"{embedding}.class_embedder.embedding_table.weight"]
    for kind in ("weight", "bias"):
        state_dict |= {f"{new}.{kind}": theirs[f"{old}.{kind}"] for old, new in renamed.items()}
        for i in range(dit_config().depth):
            qkv = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            state_dict[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    model = convert.from_dit(state_dict, num_heads=2)
    assert model.config == dit_config()
    torch.testing.assert_close(flexdit_output(model), diffusers_output(dit), rtol=0, atol=1e-5)


def test_diffusers_own_constants():
    """A model as diffusers makes it: exponents i / 127 and eps 1e-5. With DiT's constants its output is only near."""
    dit = diffusers_dit(norm_eps=1e-5, downscale_freq_shift=1)
    model = convert.from_diffusers(dit)
    assert (model.config.timestep_shift, model.config.mlp_norm_eps) == (1, 1e-5)
    torch.testing.assert_close(flexdit_output(model), diffusers_output(dit), rtol=0, atol=1e-5)  # worst 7.2e-7
    as_trained = convert.from_diffusers(dit, timestep_shift=0, mlp_norm_eps=1e-6)
    assert as_trained.config == dit_config()
    difference = (flexdit_output(as_trained) - diffusers_output(dit)).abs().max()
    assert 1e-5 < difference < 0.5  # 0.10 (largest value 2.5), of it 1.1e-5 from eps


def test_diffusers_directory_and_state_dict(tmp_path):
    dit = diffusers_dit()
    expected = convert.from_diffusers(dit).state_dict()
    dit.save_pretrained(tmp_path / "pipeline" / "transformer")
    dit.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    sources = (tmp_path / "pipeline", str(tmp_path / "pipeline" / "transformer"), tmp_path / "pickled")
    for source in sources:
        assert same_tensors(convert.from_diffusers(source).state_dict(), expected)
    assert same_tensors(convert.from_diffusers(dit.state_dict(), 2, input_size=12).state_dict(), expected)
    config = dit_config(**LAYOUT)
    assert convert.from_diffusers(dit, config=config).config == config
    assert convert.from_diffusers(dit, num_sdtm=2, num_pooling_blocks=0, grid=(3, 3)).config.num_dense_blocks == 0


def test_diffusers_errors(tmp_path):
    dit = diffusers_dit()
    state_dict = dit.state_dict()
    with pytest.raises(TypeError, match="num_heads"):
        convert.from_diffusers(state_dict, input_size=12)
    with pytest.raises(ValueError, match="input_size"):
        convert.from_diffusers(state_dict, 2)
    own = "transformer_blocks.3.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=own):
        convert.from_diffusers(state_dict | {own: state_dict[own] + 1}, 2, input_size=12)
    key = "transformer_blocks.3.attn1.to_k.bias"
    with pytest.raises(ValueError, match=key):
        convert.from_diffusers({name: tensor for name, tensor in state_dict.items() if name != key}, 2, input_size=12)
    with pytest.raises(ValueError, match="differ in shape"):
        convert.from_diffusers(state_dict | {key: torch.zeros(3)}, 2, input_size=12)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        convert.from_diffusers(tmp_path)
    dit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_fn": "geglu"}))
    with pytest.raises(ValueError, match="activation_fn"):
        convert.from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"config\.json"):
        convert.from_diffusers(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert.from_diffusers(tmp_path)


def test_timestep_frequencies_of_diffusers_are_out_of_reach():
    """Why from_diffusers cannot adapt fc1: the best linear map of DiT's features misses diffusers' by up to 1.9."""
    t = torch.arange(1000, dtype=torch.float64)[:, None]

    def features(steps):
        angles = t * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / steps)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    solution = torch.linalg.lstsq(features(128), features(127)).solution
    assert (features(128) @ solution - features(127)).abs().max() > 1
