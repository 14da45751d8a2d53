"""flexdit_ext/reference.py against the released model's fixture, PyTorch's own functions and diffusers' DiT."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_fixture, make_config, model_inputs, randn, released_to_flexdit, stored_features
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdit_ext import reference

# (dense grids, sparse grids): one sample, odd sizes, one token, sparse = dense, overlapping windows, ragged, video.
GRID_CASES = {
    "one sample": ([(4, 4)], [(2, 2)]),
    "one token": ([(1, 1), (3, 2)], [(1, 1), (1, 1)]),
    "odd, overlapping": ([(7, 5), (7, 5)], [(3, 4), (5, 2)]),
    "same grid": ([(4, 3)], [(4, 3)]),
    "ragged": ([(16, 16), (5, 9), (1, 6)], [(10, 7), (5, 1), (1, 4)]),
    "video": ([(4, 6, 6), (3, 5, 4)], [(2, 3, 4), (3, 2, 3)]),
    "images and video": ([(3, 4), (2, 3, 3)], [(2, 2), (1, 2, 2)]),
}
grid_cases = pytest.mark.parametrize("grids, sparse_grids", GRID_CASES.values(), ids=GRID_CASES.keys())

DIM, HEADS = 12, 3


def rows(grids, seed=0):
    return randn(sum(reference.token_counts(grids)), DIM, seed=seed)


def samples_of(x, grids):
    return x.split(reference.token_counts(grids))


def on_grid(tokens, grid):
    """[N, C] -> [1, C, *grid], as PyTorch's pooling and interpolation want it."""
    return tokens.T.unflatten(1, grid)[None]


def off_grid(volume):
    return volume[0].flatten(1).T


def random_model(seed=0, **overrides):
    torch.manual_seed(seed)
    return reference.FlexDiT(make_config(**overrides)).double().eval()


# ---- the released model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    fixture = load_fixture()
    model = reference.FlexDiT(fixture.config).double()
    table = model.pos_embed.clone()
    model.load_state_dict(fixture.state_dict)  # strict: every name and shape has to match
    x = fixture.x.clone().requires_grad_()
    with stored_features(fixture):
        out = model(x, fixture.t, fixture.y, fixture.sparse_grid)
    out.backward(fixture.grad_out)
    return fixture, model, table, out.detach(), x.grad


def test_released_output(released):
    fixture, _, _, out, _ = released
    # Worst 1.3e-15 (largest value 3.0). These figures: torch 2.13, AVX-512 CPU, one thread, 2026-11-22.
    torch.testing.assert_close(out, fixture.out, rtol=0, atol=1e-12)


def test_released_input_gradient(released):
    fixture, _, _, _, grad_x = released
    # Worst 1.8e-15 (largest value 3.9).
    torch.testing.assert_close(grad_x, fixture.grad_x, rtol=0, atol=1e-12)


def test_released_parameter_gradients(released):
    fixture, model, _, _, _ = released
    parameters = dict(model.named_parameters())
    assert parameters.keys() == fixture.gradients.keys()
    for name, parameter in parameters.items():
        stored = fixture.gradients[name]
        # The file rounds these gradients to float32; half a unit in the last place is its own error.
        rounding = torch.from_numpy(np.spacing(stored.abs().float().numpy())).double() / 2
        excess = ((parameter.grad - stored).abs() - rounding).max().item()
        # Worst 1.7e-16 beyond it (largest gradient 81); the plain difference is at most 2.2e-6, all of it rounding.
        assert excess <= 1e-9, f"{name}: {excess:.2e} beyond the file's rounding"


def test_released_position_embedding(released):
    fixture, _, table, _, _ = released
    assert torch.equal(table, fixture.state_dict["pos_embed"])


def test_released_float32(released):
    fixture = released[0]
    single = reference.FlexDiT(fixture.config)
    single.load_state_dict(fixture.state_dict)
    with torch.no_grad():
        out = single(fixture.x.float(), fixture.t, fixture.y, fixture.sparse_grid)
    # Worst 8.8e-7.
    torch.testing.assert_close(out.double(), fixture.out, rtol=0, atol=2e-5)


def test_released_output_with_own_features(released):
    """How far the features of reference.timestep_frequencies, which are rounded better, move the output."""
    fixture, model, _, _, _ = released
    with torch.no_grad():
        out = model(fixture.x, fixture.t, fixture.y, fixture.sparse_grid)
    assert (reference.timestep_frequencies(fixture.t) - fixture.features).abs().max() <= 8e-6  # 7.5e-6
    assert 0 < (out - fixture.out).abs().max() <= 2e-7  # 1.3e-7


def test_released_name_mapping():
    assert released_to_flexdit("normal_blocks.3.mlp.fc1.bias") == "dense_blocks.3.mlp.fc1.bias"
    assert released_to_flexdit("dumbbell_blocks.1.normal_blocks.0.attn.qkv.weight") == "sdtm.1.dense.0.attn.qkv.weight"
    assert released_to_flexdit("module.x_embedder.proj.weight") is None
    assert released_to_flexdit("pos_embedding") is None


# ---- ops on packed rows ---------------------------------------------------------------------------------------------


@grid_cases
def test_pool_tokens(grids, sparse_grids):
    x = rows(grids)
    expected = []
    for tokens, grid, sparse_grid in zip(samples_of(x, grids), grids, sparse_grids):
        pool = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
        expected.append(off_grid(pool(on_grid(tokens, grid), sparse_grid)))
        torch.testing.assert_close(
            reference.adaptive_pool(tokens[None], grid, sparse_grid)[0], expected[-1], rtol=0, atol=1e-14
        )
    # Worst 2.2e-16.
    torch.testing.assert_close(reference.pool_tokens(x, grids, sparse_grids), torch.cat(expected), rtol=0, atol=1e-14)


@grid_cases
def test_recover_tokens(grids, sparse_grids):
    s, x = rows(sparse_grids, seed=1), rows(grids, seed=2)
    w1, w2 = randn(DIM, DIM, seed=3), randn(DIM, DIM, seed=4)
    b1, b2 = randn(DIM, seed=5), randn(DIM, seed=6)
    upsampled = [
        off_grid(F.interpolate(on_grid(tokens, sparse_grid), size=grid, mode="nearest"))
        for tokens, grid, sparse_grid in zip(samples_of(s, sparse_grids), grids, sparse_grids)
    ]
    expected = torch.cat(upsampled) @ w1.T + b1 + x @ w2.T + b2
    actual = reference.recover_tokens(s, x, w1, b1, w2, b2, sparse_grids, grids)
    # Worst 7.1e-15 (largest value 22).
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_nearest_index_equals_interpolate():
    """For every pair of sizes up to 43; beyond, F.interpolate's float32 factor misses integers, first at 26 -> 44."""
    for n in range(1, 44):
        for m in range(1, n + 1):
            source = torch.arange(m, dtype=torch.float64)[None, None]
            expected = F.interpolate(source, size=n, mode="nearest").flatten().long()
            assert torch.equal(reference.nearest_index((1, m), (1, n)), expected), (m, n)
    assert reference.nearest_index((26,), (44,))[22] == 13


@grid_cases
def test_attention(grids, sparse_grids):
    q, k, v = rows(sparse_grids, seed=1), rows(grids, seed=2), rows(grids, seed=3)
    expected = []
    for a, b, c in zip(samples_of(q, sparse_grids), samples_of(k, grids), samples_of(v, grids)):
        heads = []
        for head in range(HEADS):
            channels = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            scores = a[:, channels] @ b[:, channels].T / math.sqrt(DIM // HEADS)
            heads.append(scores.softmax(-1) @ c[:, channels])
        expected.append(torch.cat(heads, dim=1))
    actual = reference.attention(q, k, v, HEADS, sparse_grids, grids)
    # Worst 6.7e-16.
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-13)


@grid_cases
def test_pooled_attention(grids, sparse_grids):
    """Against the released code's way: soft-max an N x N matrix of ones and multiply the heads' values by it."""
    x = rows(grids)
    shift, scale = randn(len(grids), DIM, seed=1), randn(len(grids), DIM, seed=2)
    v_weight, proj_weight = randn(DIM, DIM, seed=3), randn(DIM, DIM, seed=4)
    v_bias, proj_bias = randn(DIM, seed=5), randn(DIM, seed=6)
    actual = reference.pooled_attention(x, shift, scale, v_weight, v_bias, proj_weight, proj_bias, grids)
    assert actual.shape == (len(grids), DIM)
    for i, tokens in enumerate(samples_of(x, grids)):
        modulated = F.layer_norm(tokens, (DIM,), eps=1e-6) * (1 + scale[i]) + shift[i]
        values = F.linear(modulated, v_weight, v_bias).unflatten(1, (HEADS, -1)).transpose(0, 1)
        weights = torch.ones(HEADS, len(tokens), len(tokens), dtype=x.dtype).softmax(-1)
        tokenwise = F.linear((weights @ values).transpose(0, 1).flatten(1), proj_weight, proj_bias)
        # Worst 1.4e-14 (largest value 41).
        torch.testing.assert_close(actual[i].expand_as(tokenwise), tokenwise, rtol=0, atol=1e-12)


@grid_cases
def test_modulated_layer_norm_and_gated_residual(grids, sparse_grids):
    x, y = rows(grids), rows(grids, seed=1)
    shift, scale, gate = (randn(len(grids), DIM, seed=seed) for seed in (2, 3, 4))
    counts = torch.tensor(reference.token_counts(grids))
    shift_rows, scale_rows, gate_rows = (v.repeat_interleave(counts, dim=0) for v in (shift, scale, gate))
    centred = x - x.mean(1, keepdim=True)
    normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = normalised * (1 + scale_rows) + shift_rows
    # Worst 2.7e-15 and 0.
    torch.testing.assert_close(reference.modulated_layer_norm(x, shift, scale, grids), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(reference.gated_residual(x, y, gate, grids), x + gate_rows * y, rtol=0, atol=1e-14)


def test_ops_accept_slices_of_larger_buffers():
    """Strided rows: every second channel of a wider buffer."""
    grids, sparse_grids = GRID_CASES["ragged"]
    wide = randn(sum(reference.token_counts(grids)), 2 * DIM)
    x, dense = wide[:, ::2], wide[:, ::2].contiguous()
    vector = randn(len(grids), 2 * DIM, seed=1)
    strided, packed = vector[:, ::2], vector[:, ::2].contiguous()
    for op, arguments in {
        reference.pool_tokens: lambda x, v: (x, grids, sparse_grids),
        reference.modulated_layer_norm: lambda x, v: (x, v, v, grids),
        reference.gated_residual: lambda x, v: (x, x, v, grids),
        reference.attention: lambda x, v: (x, x, x, HEADS, grids, grids),
    }.items():
        torch.testing.assert_close(op(*arguments(x, strided)), op(*arguments(dense, packed)), rtol=0, atol=1e-14)


def test_select_tokens():
    segments = [(10, 10), (8, 8), (7, 7), (6, 6)]
    begins = [0, 250, 500, 750]
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 1000])
    sides = [grid[0] for grid in reference.select_tokens(t, begins, segments)]
    assert sides == [10, 10, 8, 8, 7, 7, 6, 6]
    assert reference.select_tokens(torch.tensor([249.5, 250.0]), begins, segments) == [(10, 10), (8, 8)]


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reinject_position", [False, True])
def test_ragged_batch_equals_single_samples(reinject_position):
    model = random_model(reinject_position=reinject_position)
    x, t, y = model_inputs(model.config, 4, torch.float64)
    grids = [(3, 3), (2, 5), (6, 6), (3, 3)]
    out = model(x, t, y, grids)
    assert out.shape == (4, 8, 12, 12)
    for i, grid in enumerate(grids):
        single = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], grid)
        assert torch.equal(out[i : i + 1], single)
    # Worst 1.3e-15: one grid for all, given once or per sample.
    torch.testing.assert_close(model(x, t, y, (3, 3)), model(x, t, y, [(3, 3)] * 4), rtol=0, atol=1e-13)


def module_from_ops(module, x, c, grids, sparse_grids, position):
    """One SDTM written with the packed ops: x, position [R, C] -> [R, C]."""
    names = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")

    def modulation(block):
        return dict(zip(names, block.modulation(F.silu(c)).chunk(6, dim=1)))

    def mlp(block, tokens, mod, token_grids):
        normalised = reference.modulated_layer_norm(tokens, mod["shift2"], mod["scale2"], token_grids)
        return reference.gated_residual(tokens, block.mlp(normalised), mod["gate2"], token_grids)

    def self_attention(block, tokens, token_grids):
        mod = modulation(block)
        normalised = reference.modulated_layer_norm(tokens, mod["shift1"], mod["scale1"], token_grids)
        q, k, v = block.attn.qkv(normalised).chunk(3, dim=1)
        read = block.attn.proj(reference.attention(q, k, v, HEADS, token_grids, token_grids))
        return mlp(block, reference.gated_residual(tokens, read, mod["gate1"], token_grids), mod, token_grids)

    def cross_attention(block, tokens, context, token_grids, context_grids):
        mod = modulation(block)
        query = reference.modulated_layer_norm(tokens, mod["shift1"], mod["scale1"], token_grids)
        source = reference.modulated_layer_norm(context, mod["shift1"], mod["scale1"], context_grids)
        k, v = block.attn.kv(source).chunk(2, dim=1)
        read = block.attn.proj(reference.attention(block.attn.q(query), k, v, HEADS, token_grids, context_grids))
        return mlp(block, reference.gated_residual(tokens, read, mod["gate1"], token_grids), mod, token_grids)

    s = reference.pool_tokens(x, grids, sparse_grids)
    if position is not None:
        s = s + reference.pool_tokens(position, grids, sparse_grids)
    for block in module.generation:
        s = cross_attention(block, s, x, sparse_grids, grids)
    for block in module.sparse:
        s = self_attention(block, s, sparse_grids)
    for block in module.recovery:
        w1, w2 = block.from_sparse, block.from_dense
        x = reference.recover_tokens(s, x, w1.weight, w1.bias, w2.weight, w2.bias, sparse_grids, grids)
        if position is not None:
            x = x + position
        x = cross_attention(block, x, s, grids, sparse_grids)
    for block in module.dense:
        x = self_attention(block, x, grids)
    return x


@pytest.mark.parametrize("num_blocks, reinject", [((1, 1, 1, 1), False), ((2, 2, 2, 2), False), ((2, 1, 2, 1), True)])
@grid_cases
def test_module_equals_packed_ops(grids, sparse_grids, num_blocks, reinject):
    """The two halves of reference.py agree, for images and video."""
    torch.manual_seed(0)
    module = reference.SparseDenseTokenModule(DIM, HEADS, 4.0, num_blocks).double()
    x, c = rows(grids), randn(len(grids), DIM, seed=1)
    position = rows(grids, seed=2) if reinject else None
    expected = module_from_ops(module, x, c, grids, sparse_grids, position)
    positions = samples_of(position, grids) if reinject else [None] * len(grids)
    parts = zip(samples_of(x, grids), c.split(1), grids, sparse_grids, positions)
    actual = torch.cat([module(tokens[None], *rest)[0] for tokens, *rest in parts])
    # Worst 1.3e-15 (largest value 5).
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reinject_position", [False, True])
def test_reinject_position_reaches_every_module(reinject_position):
    model = random_model(reinject_position=reinject_position)
    seen = []
    for module in model.sdtm:
        module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[-1]))
    model(*model_inputs(model.config, 2, torch.float64), (3, 3))
    assert len(seen) == len(model.sdtm)
    assert all(position is (model.pos_embed if reinject_position else None) for position in seen)


def test_forward_with_cfg():
    model = random_model()
    config = model.config
    x, t, y = model_inputs(config, 2, torch.float64)
    null = torch.full_like(y, config.num_classes)
    grids = [(3, 3), (4, 4)]
    pair = torch.cat([x, torch.zeros_like(x)]), torch.cat([t, t]), torch.cat([y, null])
    out = model.forward_with_cfg(*pair, 2.5, grids * 2)
    conditional, unconditional = model(x, t, y, grids), model(x, t, null, grids)
    guided = (unconditional + 2.5 * (conditional - unconditional))[:, :3]
    torch.testing.assert_close(out[:, :3], torch.cat([guided, guided]), rtol=0, atol=1e-13)
    torch.testing.assert_close(out[:, 3:], torch.cat([conditional, unconditional])[:, 3:], rtol=0, atol=1e-13)


def test_forward_with_cfg_never_guides_the_variance():
    model = random_model(in_channels=1)
    x, t, _ = model_inputs(model.config, 1, torch.float64)
    pair = torch.cat([x, x]), torch.cat([t, t]), torch.tensor([0, model.config.num_classes])
    plain, guided = model(*pair, (3, 3)), model.forward_with_cfg(*pair, 4.0, (3, 3))
    torch.testing.assert_close(guided[:, 1:], plain[:, 1:], rtol=0, atol=1e-13)
    assert not torch.allclose(guided[:, :1], plain[:, :1])


def test_without_sparse_modules_it_is_dit():
    """diffusers' DiTTransformer2DModel with the same weights, float32."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = make_config(num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=3)
    dim, heads = config.hidden_size, config.num_heads
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=3,
        sample_size=config.input_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    model = reference.FlexDiT(config)
    weights = dit.state_dict()
    embedding = dit.transformer_blocks[0].norm1.emb  # every block has its own copy; DiT has one
    # diffusers' timestep frequencies end at 1 / 10000 (i / 127), DiT's own just before it (i / 128).
    embedding.time_proj.downscale_freq_shift = 0
    state_dict = {"pos_embed": dit.pos_embed.pos_embed[0]}
    first = "transformer_blocks.0.norm1.emb"
    state_dict["label_embed.weight"] = weights[f"{first}.class_embedder.embedding_table.weight"]
    for kind in ("weight", "bias"):
        state_dict[f"patch_embed.{kind}"] = weights[f"pos_embed.proj.{kind}"]
        state_dict[f"timestep_embed.fc1.{kind}"] = weights[f"{first}.timestep_embedder.linear_1.{kind}"]
        state_dict[f"timestep_embed.fc2.{kind}"] = weights[f"{first}.timestep_embedder.linear_2.{kind}"]
        for i in range(3):
            theirs, ours = f"transformer_blocks.{i}", f"dense_blocks.{i}"
            qkv = [weights[f"{theirs}.attn1.to_{part}.{kind}"] for part in "qkv"]
            state_dict[f"{ours}.modulation.{kind}"] = weights[f"{theirs}.norm1.linear.{kind}"]
            state_dict[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
            state_dict[f"{ours}.attn.proj.{kind}"] = weights[f"{theirs}.attn1.to_out.0.{kind}"]
            state_dict[f"{ours}.mlp.fc1.{kind}"] = weights[f"{theirs}.ff.net.0.proj.{kind}"]
            state_dict[f"{ours}.mlp.fc2.{kind}"] = weights[f"{theirs}.ff.net.2.{kind}"]
        state_dict[f"final_layer.modulation.{kind}"] = weights[f"proj_out_1.{kind}"]
        state_dict[f"final_layer.linear.{kind}"] = weights[f"proj_out_2.{kind}"]
    model.load_state_dict(state_dict)
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb = embedding
    x, t, y = model_inputs(config, 3, torch.float64)
    with torch.no_grad():
        expected = dit(x.float(), t, y).sample
        actual = model(x.float(), t, y)
    # Worst 6.0e-7 (largest value 2): the same PyTorch functions in the same order, but for those of the timesteps.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "input_size, num_pooling_blocks, num_dense_blocks, count",
    [(32, 2, 2, 680_442_656), (64, 2, 2, 681_327_392), (32, 1, 3, 683_099_168)],
    ids=["256 paper", "512 paper", "256 released log"],
)
def test_parameter_count(input_size, num_pooling_blocks, num_dense_blocks, count):
    """XL/2 with the position embedding, method.md, Layouts and counts."""
    config = make_config(
        input_size=input_size,
        hidden_size=1152,
        num_heads=16,
        num_classes=1000,
        num_pooling_blocks=num_pooling_blocks,
        num_sdtm=4,
        sdtm_blocks=(1, 3, 1, 1),
        num_dense_blocks=num_dense_blocks,
    )
    with torch.device("meta"):
        model = reference.FlexDiT(config)
    assert config.depth == 28
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == count


def test_grid_is_checked():
    model = random_model()
    x, t, y = model_inputs(model.config, 2, torch.float64)
    with pytest.raises(ValueError, match="grid"):
        model(x, t, y)
    with pytest.raises(ValueError, match="grid"):
        model(x, t, y, [(3, 3)])


@pytest.mark.parametrize("grid", [(3, 3), [(3, 3), (2, 2)]], ids=["uniform", "ragged"])
def test_compiles_without_a_graph_break(grid):
    model = random_model()
    x, t, y = model_inputs(model.config, 2, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, y, grid), model(x, t, y, grid))


def test_bfloat16():
    """bfloat16 weights, and float32 weights under autocast, stay near float64."""
    model = random_model()
    x, t, y = model_inputs(model.config, 2, torch.float64)
    expected = model(x, t, y, (3, 3))
    tolerance = {"rtol": 0, "atol": 0.05}  # worst 0.0173 (largest value 1.6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float()(x.float(), t, y, (3, 3))
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(out.double(), expected, **tolerance)
    out = model.bfloat16()(x.bfloat16(), t, y, (3, 3))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, **tolerance)


def test_position_embedding():
    table = reference.sincos_position_embedding((2, 3), 8)
    assert table.shape == (6, 8)
    row, column = 1, 2
    angles = [column, column / 100, row, row / 100]
    expected = [f(a) for half in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in half]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(reference.sincos_position_embedding((4, 2, 3), 8), table.repeat(4, 1))
    with pytest.raises(ValueError, match="dim"):
        reference.sincos_position_embedding((2, 2), 6)


# ---- properties -----------------------------------------------------------------------------------------------------

grids_2d_or_3d = st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(grid=grids_2d_or_3d, seed=st.integers(0, 2**31))
def test_pooling_to_the_same_grid_is_the_identity(grid, seed):
    x = randn(math.prod(grid), DIM, seed=seed)
    assert torch.equal(reference.pool_tokens(x, [grid], [grid]), x)
    assert torch.equal(reference.nearest_index(grid, grid), torch.arange(len(x)))


@settings(max_examples=50, deadline=None)
@given(sparse_grid=grids_2d_or_3d, data=st.data(), seed=st.integers(0, 2**31))
def test_pooling_keeps_the_mean_when_windows_tile(sparse_grid, data, seed):
    grid = tuple(m * data.draw(st.integers(1, 3)) for m in sparse_grid)
    x = randn(math.prod(grid), DIM, seed=seed)
    pooled = reference.pool_tokens(x, [grid], [sparse_grid])
    torch.testing.assert_close(pooled.mean(0), x.mean(0), rtol=0, atol=1e-13)
    # The nearest sparse token of a dense one is then the window it was pooled from: pooling undoes upsampling.
    upsampled = pooled[reference.nearest_index(sparse_grid, grid)]
    torch.testing.assert_close(reference.pool_tokens(upsampled, [grid], [sparse_grid]), pooled, rtol=0, atol=1e-13)
