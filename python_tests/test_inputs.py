"""Bad input raises a TypeError or ValueError that names the argument and shows the value, before anything is computed.

Configurations: test_schedule.py. Checkpoints and state dicts: test_checkpoint.py, test_convert.py.
"""

import math
import re

import pytest
import torch
from helpers import model_inputs, randn, random_model

from flexdit_ext import DensitySchedule, TokenLayout, ops


def assert_raises(error, argument, value, call):
    """`argument` as a word and `value` literally are in the message."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert type(raised.value) in (TypeError, ValueError)
    assert re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message), f"{argument!r} is not named: {message}"
    assert value in message, f"{value!r} is not shown: {message}"


# ---- FlexDiT.forward and forward_with_cfg ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return random_model(torch.float32, num_sdtm=1)


def cases(argument, *rows):
    """(argument, changed value, error, what the message shows)"""
    return [pytest.param(argument, *row, id=f"{argument}: {name}") for name, *row in rows]


GOOD_T, GOOD_Y = torch.tensor([3, 700]), torch.tensor([1, 10])
X = torch.zeros(2, 4, 12, 12)

BAD_INPUTS = [
    *cases(
        "x",
        ("three dimensions", X[0], ValueError, "(4, 12, 12)"),
        ("five dimensions", X[None], ValueError, "(1, 2, 4, 12, 12)"),
        ("channels", X[:, :3], ValueError, "(2, 3, 12, 12)"),
        ("height", X[:, :, :11], ValueError, "(2, 4, 11, 12)"),
        ("width", torch.zeros(2, 4, 12, 14), ValueError, "(2, 4, 12, 14)"),
        ("float64", X.double(), TypeError, "float64"),
        ("float16", X.half(), TypeError, "float16"),
        ("integers", X.long(), TypeError, "int64"),
        ("complex", X + 0j, TypeError, "complex64"),
        ("device", X.to("meta"), ValueError, "meta"),
        ("list", X.tolist(), TypeError, "list"),
        ("array", X.numpy(), TypeError, "ndarray"),
        ("None", None, TypeError, "None"),
    ),
    *cases(
        "t",
        ("NaN", torch.tensor([1.0, math.nan]), ValueError, "nan"),
        ("infinite", torch.tensor([math.inf, 1.0]), ValueError, "inf"),
        ("negative", torch.tensor([3, -1]), ValueError, "-1"),
        ("slightly negative", torch.tensor([3, -0.25]), ValueError, "-0.25"),
        ("too large", torch.tensor([3, 1001]), ValueError, "1001"),
        ("slightly too large", torch.tensor([1000.5, 3]), ValueError, "1000.5"),
        ("matrix", GOOD_T[:, None], ValueError, "(2, 1)"),
        ("scalar", GOOD_T[0], ValueError, "()"),
        ("count", torch.tensor([1, 2, 3]), ValueError, "(3,)"),
        ("bool", GOOD_T > 5, TypeError, "bool"),
        ("complex", GOOD_T + 0j, TypeError, "complex64"),
        ("device", GOOD_T.to("meta"), ValueError, "meta"),
        ("int", 5, TypeError, "int"),
        ("list", [3, 700], TypeError, "list"),
    ),
    *cases(
        "y",
        ("negative", torch.tensor([1, -1]), ValueError, "-1"),
        ("behind the null class", torch.tensor([11, 1]), ValueError, "11"),
        ("far out", torch.tensor([1, 2**40]), ValueError, str(2**40)),
        ("float", GOOD_Y.float(), TypeError, "float32"),
        ("bool", GOOD_Y > 5, TypeError, "bool"),
        ("one-hot", torch.zeros(2, 11).long(), ValueError, "(2, 11)"),
        ("count", GOOD_Y[:1], ValueError, "(1,)"),
        ("device", GOOD_Y.to("meta"), ValueError, "meta"),
        ("list", [1, 2], TypeError, "list"),
        ("None", None, TypeError, "None"),
    ),
    *cases(
        "grid",
        ("zero", (0, 3), ValueError, "(0, 3)"),
        ("negative", (3, -1), ValueError, "(3, -1)"),
        ("too high", (7, 6), ValueError, "(7, 6)"),
        ("too wide", (6, 7), ValueError, "(6, 7)"),
        ("overflowing", (2**31, 2**33), ValueError, str(2**31)),
        ("frames", (2, 3, 3), ValueError, "(2, 3, 3)"),
        ("one side", (3,), TypeError, "(3,)"),
        ("four sides", (1, 1, 3, 3), TypeError, "(1, 1, 3, 3)"),
        ("floats", (3.0, 3.0), TypeError, "(3.0, 3.0)"),
        ("bools", (True, True), TypeError, "True"),
        ("string", "33", TypeError, "33"),
        ("strings", ["3x3", "3x3"], TypeError, "3x3"),
        ("int", 3, TypeError, "3"),
        ("tensor", torch.tensor([3, 3]), TypeError, "tensor([3, 3])"),
        ("empty list", [], (TypeError, ValueError), "[]"),
        ("too few", [(3, 3)], ValueError, "1"),
        ("too many", [(3, 3)] * 3, ValueError, "3"),
        ("one too large", [(3, 3), (9, 3)], ValueError, "(9, 3)"),
        ("one zero", [(3, 3), (3, 0)], ValueError, "(3, 0)"),
        ("one None", [(3, 3), None], TypeError, "None"),
        ("one a string", [(3, 3), "33"], TypeError, "33"),
        ("generator", (side for side in (3, 3)), TypeError, "generator"),
    ),
]


@pytest.mark.parametrize("method", ["forward", "forward_with_cfg", "forward in training"])
@pytest.mark.parametrize("argument, value, error, shown", BAD_INPUTS)
def test_model_input(model, argument, value, error, shown, method):
    arguments = {"x": X, "t": GOOD_T, "y": GOOD_Y, "grid": (3, 3)} | {argument: value}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    computed = []
    handle = model.pooling_blocks[0].register_forward_pre_hook(lambda *_: computed.append(1))
    model.train(method == "forward in training")
    torch.manual_seed(0)
    try:
        if method == "forward_with_cfg":
            # It halves x first; what it was given is what the message must show.
            assert_raises(error, argument, shown, lambda: model.forward_with_cfg(**arguments, cfg_scale=2.0))
        else:
            for _ in range(20):  # dropping a label must not hide that it is bad
                assert_raises(error, argument, shown, lambda: model(**arguments))
    finally:
        handle.remove()
        model.eval()
    assert not computed, "blocks ran before the error"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None, True, [1.0, 2.0], torch.tensor([1.0, 2.0])], ids=repr)
def test_cfg_scale(model, scale):
    assert_raises(
        (TypeError, ValueError), "cfg_scale", repr(scale), lambda: model.forward_with_cfg(X, GOOD_T, GOOD_Y, scale)
    )


def test_odd_batch_for_guidance(model):
    x, t, y = model_inputs(model.config, 3)
    assert_raises(ValueError, "x", "(3, 4, 12, 12)", lambda: model.forward_with_cfg(x, t, y, 2.0))


@pytest.mark.parametrize("grid", [(9, 9), (0, 2), "33", (2.0, 2), [(2, 2)], (2, 2, 2)], ids=repr)
def test_macs(model, grid):
    assert_raises((TypeError, ValueError), "grid", str(grid), lambda: model.macs(grid))


@pytest.mark.parametrize("grid", [(9, 9), (0, 2), "33"], ids=repr)
def test_grid_without_sparse_modules(grid):
    """A model that has no use for a grid does not excuse a bad one."""
    model = random_model(torch.float32, num_sdtm=0)
    assert_raises((TypeError, ValueError), "grid", str(grid), lambda: model(X, GOOD_T, GOOD_Y, grid))


def test_schedule_decides_the_range_of_t():
    model = random_model(torch.float32, num_sdtm=1, schedule=DensitySchedule([(3, 3)], 50))
    assert_raises(ValueError, "t", "51", lambda: model(X, torch.tensor([0, 51]), GOOD_Y))
    assert_raises(ValueError, "t", "51", lambda: model(X, torch.tensor([0, 51]), GOOD_Y, (2, 2)))


PARTS = ["sdtm.0.recovery.0.from_sparse", "dense_blocks.0.mlp.fc2", "final_layer.linear", "timestep_embed.fc2"]


@pytest.mark.parametrize("change", ["float64", "meta", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
def test_model_whose_parts_disagree(part, change):
    """One layer of another dtype or on another device: an error, not the memory of something else."""
    model = random_model(torch.float32, num_sdtm=1)
    model.get_submodule(part).to("meta" if change == "meta" else getattr(torch, change))
    with pytest.raises((TypeError, ValueError), match=change), torch.no_grad():
        model(X, GOOD_T, GOOD_Y)


# ---- ops ------------------------------------------------------------------------------------------------------------

C = 12
DENSE, SPARSE = TokenLayout([(2, 3), (1, 2)]), TokenLayout([(1, 2), (1, 1)])


def good_arguments():
    """Every op's arguments by name."""
    x, s, vector = randn(8, C).float(), randn(3, C).float(), randn(2, C).float()
    weight, bias = randn(C, C).float(), randn(C).float()
    return {
        "modulated_layer_norm": {"x": x, "shift": vector, "scale": vector, "layout": DENSE},
        "gated_residual": {"x": x, "y": x, "gate": vector, "layout": DENSE},
        "pooled_attention": {
            "x": x, "shift": vector, "scale": vector, "v_weight": weight, "v_bias": bias, "proj_weight": weight,
            "proj_bias": bias, "layout": DENSE,
        },
        "pool_tokens": {"x": x, "layout": DENSE, "sparse_layout": SPARSE},
        "recover_tokens": {
            "s": s, "x": x, "sparse_weight": weight, "sparse_bias": bias, "dense_weight": weight, "dense_bias": bias,
            "sparse_layout": SPARSE, "layout": DENSE,
        },
        "attention": {"q": s, "k": x, "v": x, "num_heads": 3, "layout_q": SPARSE, "layout_k": DENSE},
        "select_tokens": {"t": GOOD_T, "schedule": DensitySchedule()},
    }  # fmt: skip


def test_good_arguments_are_good():
    for name, arguments in good_arguments().items():
        getattr(ops, name)(**arguments)


TENSORS = [
    (op, name)
    for op, arguments in good_arguments().items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]
LAYOUTS = [
    (op, name)
    for op, arguments in good_arguments().items()
    for name, value in arguments.items()
    if isinstance(value, TokenLayout)
]
CHANGES = {
    "short": lambda x: (x[:1] if len(x) < 8 else x[:5], str(1 if len(x) < 8 else 5)),
    "narrow": lambda x: (x[..., :-1].contiguous(), str(x.shape[-1] - 1)),
    "another rank": lambda x: (x[None], None),
    "integers": lambda x: (x.long(), "int64"),
    "float16": lambda x: (x.half(), "float16"),
    "another dtype": lambda x: (x.double(), "float64"),
    "device": lambda x: (x.to("meta"), "meta"),
    "list": lambda x: (x.tolist(), "list"),
    "None": lambda x: (None, "None"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("op, argument", [pair for pair in TENSORS if pair[0] != "select_tokens"])
def test_op_tensor(op, argument, change):
    """All tensors of a call agree in dtype, device and width, so any of them may be the one that is named."""
    arguments = good_arguments()[op]
    changed, shown = change(arguments[argument])
    tensors = "|".join(name for name, value in arguments.items() if isinstance(value, torch.Tensor))
    named = tensors if shown in ("float64", "float16", "meta", str(C - 1)) else argument
    if op == "pool_tokens" and (shown == "float64" or shown == str(C - 1)):
        pytest.skip("its only tensor: any dtype and width is good")
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(ops, op)(**arguments | {argument: changed})
    assert re.search(rf"\b({named})\b", str(raised.value)), f"not named: {raised.value}"
    assert shown is None or shown in str(raised.value)


@pytest.mark.parametrize(
    "value", [[(2, 3), (1, 2)], None, "layout", torch.zeros(3, 4)], ids=["list", "None", "str", "tensor"]
)
@pytest.mark.parametrize("op, argument", LAYOUTS)
def test_op_layout_of_wrong_type(op, argument, value):
    if (argument, value) == ("layout_k", None):
        pytest.skip("None is self-attention")
    with pytest.raises(TypeError, match=argument):
        getattr(ops, op)(**good_arguments()[op] | {argument: value})


@pytest.mark.parametrize("op, argument", LAYOUTS)
def test_op_layout_elsewhere(op, argument):
    """torch would run the fake of the op, and return what was never computed."""
    arguments = good_arguments()[op]
    assert_raises(
        ValueError,
        f"{argument}.table",
        "meta",
        lambda: getattr(ops, op)(**arguments | {argument: arguments[argument].to("meta")}),
    )


@pytest.mark.parametrize(
    "op, argument, value",
    [
        ("pool_tokens", "sparse_layout", TokenLayout([(1, 1)])),
        ("pool_tokens", "sparse_layout", TokenLayout([(3, 3), (1, 1)])),
        ("pool_tokens", "sparse_layout", TokenLayout([(2, 1, 1), (1, 1)])),
        ("recover_tokens", "sparse_layout", TokenLayout([(1, 2)])),
        ("recover_tokens", "sparse_layout", TokenLayout([(1, 2), (2, 1)])),
        ("attention", "layout_k", TokenLayout([(8, 1)])),
        ("attention", "layout_q", TokenLayout([(3, 1)])),
        ("modulated_layer_norm", "x", TokenLayout([(3, 3), (1, 2)])),  # more tokens than rows
    ],
)
def test_layouts_that_do_not_fit(op, argument, value):
    layout = argument if argument != "x" else "layout"
    # Two layouts that disagree may both be the wrong one.
    with pytest.raises(
        ValueError, match={"sparse_layout": r"sparse[_ ](layout|grid)|\bs\b", "x": "x"}.get(argument, "layout_[qk]")
    ):
        getattr(ops, op)(**good_arguments()[op] | {layout: value})


@pytest.mark.parametrize("num_heads", [0, -1, 5, 24, 2.0, "3", None], ids=repr)
def test_num_heads(num_heads):
    arguments = good_arguments()["attention"] | {"num_heads": num_heads}
    assert_raises((TypeError, ValueError), "num_heads", str(num_heads), lambda: ops.attention(**arguments))


@pytest.mark.parametrize("op", ["modulated_layer_norm", "pooled_attention"])
@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf, "1e-6", None], ids=repr)
def test_eps(op, eps):
    arguments = good_arguments()[op] | {"eps": eps}
    assert_raises((TypeError, ValueError), "eps", str(eps), lambda: getattr(ops, op)(**arguments))


@pytest.mark.parametrize(
    "t, shown",
    [
        (torch.tensor([1.0, math.nan]), "nan"),
        (torch.tensor([1, 1001]), "1001"),
        (torch.tensor([-1, 1]), "-1"),
        (torch.zeros(2, 2), "(2, 2)"),
        (torch.tensor(3), "()"),
        (torch.tensor([True, False]), "bool"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, device="meta"), "meta"),
        ([1, 2], "list"),
    ],
    ids=str,
)
def test_select_tokens_t(t, shown):
    assert_raises((TypeError, ValueError), "t", shown, lambda: ops.select_tokens(t, DensitySchedule()))


def test_select_tokens_schedule():
    assert_raises(TypeError, "schedule", "list", lambda: ops.select_tokens(GOOD_T, [(3, 3)]))


# ---- TokenLayout and DensitySchedule --------------------------------------------------------------------------------

BAD_GRIDS = [
    ((0, 1), ValueError),
    ((2, -1), ValueError),
    ((40000, 1), ValueError),
    ((3,), TypeError),
    ((1, 1, 1, 1), TypeError),
    ((1.0, 2), TypeError),
    ((True, 2), TypeError),
    ("ab", TypeError),
    (None, TypeError),
    (7, TypeError),
]


@pytest.mark.parametrize("grid, error", BAD_GRIDS, ids=repr)
def test_grids(grid, error):
    assert_raises(error, "grids[1]", str(grid), lambda: TokenLayout([(2, 2), grid]))
    assert_raises(error, "grids[1]", str(grid), lambda: DensitySchedule([(2, 2), grid]))
    assert_raises(error, "grid", str(grid), lambda: TokenLayout.uniform(2, grid))
    assert_raises(error, "dense_grid", str(grid), lambda: DensitySchedule.from_pruning_rates(0.1, 0.5, grid))
    assert_raises(error, "dense_grid", str(grid), lambda: DensitySchedule.continuous(0.1, 0.5, grid))
    assert_raises(error, "dense_grid", str(grid), lambda: DensitySchedule().pruning_rate(5, grid))


@pytest.mark.parametrize("grids", [None, 5], ids=repr)
def test_grids_that_are_no_list(grids):
    assert_raises(TypeError, "grids", str(grids), lambda: TokenLayout(grids))
    assert_raises(TypeError, "grids", str(grids), lambda: DensitySchedule(grids))


def test_layouts_too_large_or_malformed():
    huge = (32767, 32767)
    assert_raises(ValueError, "grids", str(3 * 32767**2), lambda: TokenLayout([huge] * 3))
    assert_raises(ValueError, "batch", "-1", lambda: TokenLayout.uniform(-1, (2, 2)))
    assert_raises(ValueError, "batch", "3", lambda: TokenLayout.uniform(3, huge))
    table = DENSE.table
    for bad in (table.long(), table[:, :3], table[0], table.to("meta"), table.T, table.repeat(1, 2)[:, ::2]):
        with pytest.raises((TypeError, ValueError), match="table"):
            ops.modulated_layer_norm(**good_arguments()["modulated_layer_norm"] | {"layout": TokenLayout.of(bad, 8)})
    with pytest.raises(ValueError, match=r"rows|out"):
        ops.pool_tokens(randn(8, C), DENSE, TokenLayout.of(SPARSE.table, 2))


BAD_SCHEDULES = {
    "no grid": ({"grids": []}, ValueError, "grids"),
    "no timesteps": ({"num_timesteps": 0}, ValueError, "num_timesteps"),
    "fractional timesteps": ({"num_timesteps": 10.5}, (TypeError, ValueError), "num_timesteps"),
    "more grids than timesteps": ({"num_timesteps": 2}, ValueError, "num_timesteps"),
    "fractional timesteps, begins": (
        {"num_timesteps": 9.5, "begins": [0, 1, 2, 3]}, (TypeError, ValueError), "num_timesteps",
    ),
    "too few begins": ({"begins": [0, 1, 2]}, ValueError, "begins"),
    "late first begin": ({"begins": [1, 2, 3, 4]}, ValueError, "begins"),
    "repeated begin": ({"begins": [0, 1, 1, 4]}, ValueError, "begins"),
    "begin behind the end": ({"begins": [0, 1, 2, 1001]}, ValueError, "begins"),
    "fractional begin": ({"begins": [0, 1.5, 2, 3]}, TypeError, "begins"),
    "begins as a string": ({"begins": "abcd"}, TypeError, "begins"),
    "begins as an int": ({"begins": 5}, TypeError, "begins"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, error, named", BAD_SCHEDULES.values(), ids=BAD_SCHEDULES.keys())
def test_schedule(arguments, error, named):
    with pytest.raises(error, match=named):
        DensitySchedule(**arguments)


@pytest.mark.parametrize("t", [math.nan, -0.5, 1000.5, "3", None], ids=repr)
def test_schedule_t(t):
    assert_raises((TypeError, ValueError), "t", str(t), lambda: DensitySchedule().grid(t))
    assert_raises((TypeError, ValueError), "t", str(t), lambda: DensitySchedule().pruning_rate(t, (16, 16)))


@pytest.mark.parametrize(
    "r_min, r_max, named",
    [(-0.1, 0.5, "r_min"), (0.9, 0.5, "r_max"), (0.5, 1.0, "r_max"), (math.nan, 0.5, "r_min"), (0.1, "0.5", "r_max")],
)
def test_pruning_rates(r_min, r_max, named):
    for make in (DensitySchedule.from_pruning_rates, DensitySchedule.continuous):
        value = str({"r_min": r_min, "r_max": r_max}[named]).removesuffix(".0")
        assert_raises((TypeError, ValueError), named, value, lambda make=make: make(r_min, r_max, (16, 16)))


@pytest.mark.parametrize(
    "values", [5, None, {}, {"begins": [0]}, {"grids": 5}, {"grids": [[2, 2]], "steps": 4}], ids=repr
)
def test_schedule_dict(values):
    with pytest.raises((TypeError, ValueError), match=r"schedule|grids"):
        DensitySchedule.from_dict(values)
