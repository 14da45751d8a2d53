"""DensitySchedule, TokenLayout and FlexDiTConfig as Python sees them."""

import copy
import json
import math
import pickle
from itertools import pairwise

import pytest
import torch
from helpers import flexdit_config
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, TokenLayout, ops, reference

# ---- DensitySchedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates, dense_side, sides",
    [((0.61, 0.86), 16, [10, 8, 7, 6]), ((0.61, 0.86), 32, [20, 16, 14, 12])],
)
def test_published_grids(rates, dense_side, sides):
    """method.md, Density schedule."""
    schedule = DensitySchedule.from_pruning_rates(*rates, (dense_side, dense_side))
    assert schedule.grids == tuple((side, side) for side in sides)
    assert schedule.begins == (0, 250, 500, 750) and schedule.num_timesteps == 1000


def test_default_is_the_paper_at_256():
    assert DensitySchedule() == DensitySchedule.from_pruning_rates(0.61, 0.86, (16, 16))


def test_segments_begin_at_their_boundaries():
    schedule = DensitySchedule()
    sides = {0: 10, 249: 10, 249.999: 10, 250: 8, 499.5: 8, 500: 7, 749: 7, 750: 6, 999: 6, 1000: 6}
    assert {t: schedule.grid(t)[0] for t in sides} == sides


def test_uneven_segments():
    schedule = DensitySchedule([(4, 4, 4), (2, 3, 5), (3, 3)], 10, [0, 1, 9])
    grids = [schedule.grid(t) for t in range(11)]
    assert grids == [(4, 4, 4)] + 8 * [(2, 3, 5)] + 2 * [(3, 3)]
    # Three segments of 10: the first integers at or behind 10/3 and 20/3.
    assert DensitySchedule([(3, 3), (2, 2), (1, 1)], 10).begins == (0, 4, 7)


def test_pruning_rate():
    schedule = DensitySchedule()
    for t in (0, 300, 1000):
        side = schedule.grid(t)[0]
        assert schedule.pruning_rate(t, (16, 16)) == pytest.approx(1 - side * side / 256, abs=1e-15)
    assert DensitySchedule([(2, 4, 4)]).pruning_rate(5, (4, 8, 8)) == 1 - 32 / 256


def continuous_rate(t, r_min, r_max, total):
    """method.md, Density schedule, as it is written there."""
    if t < total / 4:
        return r_min
    return (4 * total - 4 * t) / (3 * total) * r_min + (4 * t - total) / (3 * total) * r_max


def test_continuous_follows_the_formula():
    """The grid keeps at least the share of tokens that the formula asks for at the next larger side, and no more than
    the published rates' rounding (0.005) allows: checked against the rate itself, timestep by timestep."""
    side, r_min, r_max = 17, 0.61, 0.86  # not a multiple of 16: sides in steps of one
    schedule = DensitySchedule.continuous(r_min, r_max, (side, side))
    assert schedule.grid(0) == schedule.grid(249) == (10, 10)
    for t in range(1001):
        keep = 1 - continuous_rate(t, r_min, r_max, 1000) + 0.005
        assert schedule.grid(t) == (math.floor(side * math.sqrt(keep)),) * 2
    assert schedule.begins[0] == 0 and all(
        schedule.grid(begin) != schedule.grid(begin - 1) for begin in schedule.begins[1:]
    )

    # Pure noise, where flow matching starts, may be alone on its grid.
    schedule = DensitySchedule.continuous(0.3, 0.97, (16, 16))
    assert (schedule.grid(999), schedule.grid(1000)) == ((3, 3), (2, 2))


rates = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)
dense_grids = st.tuples(st.integers(1, 64), st.integers(1, 64)) | st.tuples(*3 * [st.integers(1, 24)])
steps = st.integers(4, 1500)


@settings(max_examples=60, deadline=None)
@given(rates=rates, dense=dense_grids, total=steps, continuous=st.booleans())
def test_schedules_of_pruning_rates(rates, dense, total, continuous):
    make = DensitySchedule.continuous if continuous else DensitySchedule.from_pruning_rates
    schedule = make(*rates, dense, total)
    grids = schedule.grids
    # Every grid has tokens and fits into the dense one; a video keeps its frames.
    full, sparse = (1, *dense)[-3:], [(1, *grid)[-3:] for grid in grids]
    assert all(1 <= m <= n for grid in sparse for m, n in zip(grid, full, strict=True))
    assert all(grid[0] == full[0] for grid in sparse)
    # Tokens never grow towards noise, and neither does any side.
    assert all(a >= b for before, after in pairwise(sparse) for a, b in zip(before, after, strict=True))
    # The segments cover [0, T] without a gap.
    assert schedule.begins[0] == 0 and schedule.begins[-1] <= total
    assert list(schedule.begins) == sorted(set(schedule.begins))
    for i, begin in enumerate(schedule.begins):
        end = schedule.begins[i + 1] if i + 1 < len(grids) else total + 1
        assert schedule.grid(begin) == schedule.grid(end - 1) == grids[i]
    if continuous:
        assert all(a != b for a, b in pairwise(grids))


@settings(max_examples=40, deadline=None)
@given(
    grids=st.lists(dense_grids, min_size=1, max_size=8),
    total=st.integers(8, 10**6),
    t=st.floats(0, 1, allow_nan=False),
)
def test_equal_segments(grids, total, t):
    schedule = DensitySchedule(grids, total)
    position = t * total
    index = min(int(position * len(grids) / total), len(grids) - 1)
    # Segments begin at integers: between a boundary and the next integer the earlier grid still holds.
    allowed = {schedule.grids[index], schedule.grids[max(index - 1, 0)]}
    assert schedule.grid(position) in allowed
    assert [schedule.grid(math.ceil(i * total / len(grids))) for i in range(len(grids))] == list(schedule.grids)


SCHEDULES = [DensitySchedule(), DensitySchedule([(4, 2, 2), (3, 1)], 50, [0, 7]), DensitySchedule([(1, 1)], 1)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    "again",
    [
        lambda s: DensitySchedule.from_dict(s.to_dict()),
        lambda s: DensitySchedule.from_dict(json.loads(json.dumps(s.to_dict()))),
        lambda s: pickle.loads(pickle.dumps(s)),
        copy.deepcopy,
        copy.copy,
        lambda s: eval(repr(s), {"DensitySchedule": DensitySchedule}),
        lambda s: DensitySchedule(s.grids, s.num_timesteps, s.begins),
    ],
    ids=["dict", "json", "pickle", "deepcopy", "copy", "repr", "constructor"],
)
def test_copies_are_equal(schedule, again):
    twin = again(schedule)
    assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)
    assert all(twin.grid(t) == schedule.grid(t) for t in range(schedule.num_timesteps + 1))


def test_inequality():
    base = DensitySchedule([(4, 4), (2, 2)], 100, [0, 50])
    others = [
        DensitySchedule([(4, 4), (2, 3)], 100, [0, 50]),
        DensitySchedule([(4, 4), (2, 2)], 101, [0, 50]),
        DensitySchedule([(4, 4), (2, 2)], 100, [0, 51]),
        DensitySchedule([(4, 4)], 100),
    ]
    assert all(base != other for other in others) and len({base, *others}) == 5
    assert base != ((4, 4), (2, 2)) and base is not None
    assert base == DensitySchedule([(4, 4), (2, 2)], 100)  # the same segments, however they were given


# ---- TokenLayout ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(grids=st.lists(dense_grids, max_size=6))
def test_layout(grids):
    layout = TokenLayout(grids)
    counts = reference.token_counts(grids)
    assert layout.batch == len(grids) and layout.total == layout.rows == sum(counts)
    assert layout.table.dtype == torch.int32 and layout.table.shape == (len(grids) + 1, 4)
    assert layout.table[:, 0].tolist() == [sum(counts[:i]) for i in range(len(grids) + 1)]
    samples = [sample for sample, count in enumerate(counts) for _ in range(count)]
    row_map = layout.mapped[1:].flatten().tolist()
    assert row_map == samples + [max(len(grids) - 1, 0)] * (len(row_map) - len(samples))
    assert torch.equal(layout.mapped[0], layout.table)
    # A clip of one frame is an image.
    assert layout.grids == [grid[1:] if len(grid) == 3 and grid[0] == 1 else grid for grid in grids]


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_uniform_layout(batch, grid):
    layout, expected = TokenLayout.uniform(batch, grid), TokenLayout([grid] * batch)
    assert torch.equal(layout.mapped, expected.mapped) or batch == 0  # whose grid only one of them knows
    assert torch.equal(layout.table, expected.table) and layout.rows == expected.rows
    assert torch.equal(layout.mapped[0], layout.table)
    assert repr(layout) == f"TokenLayout({[grid] * batch})"


def test_layout_with_spare_rows():
    layout = TokenLayout.of(TokenLayout([(2, 2)]).table, 9)
    assert (layout.rows, layout.total, layout.grids) == (9, 4, [(2, 2)])
    x = torch.ones(4, 8)
    assert ops.pool_tokens(x, TokenLayout([(2, 2)]), TokenLayout.of(TokenLayout([(1, 1)]).table, 3)).shape == (3, 8)


# ---- FlexDiTConfig --------------------------------------------------------------------------------------------------


def state_values(config: FlexDiTConfig) -> int:
    with torch.device("meta"):
        model = FlexDiT(config)
    return sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "overrides, image_size, count",
    [
        ({}, 256, 680_442_656),
        ({}, 512, 681_327_392),
        ({"num_pooling_blocks": 1, "num_dense_blocks": 3}, 256, 683_099_168),
    ],
    ids=["256 paper", "512 paper", "256 released log"],
)
def test_parameter_counts(overrides, image_size, count):
    """method.md, Layouts and counts; the position embedding included."""
    assert state_values(FlexDiTConfig.preset("XL/2", image_size, **overrides)) == count


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize(
    "name, hidden, heads, depth",
    [("S/2", 384, 6, 12), ("B/2", 768, 12, 12), ("L/2", 1024, 16, 24), ("XL/2", 1152, 16, 28)],
)
def test_presets(name, hidden, heads, depth, image_size):
    """Widths and depths of DiT (arXiv 2212.09748, table 1)."""
    config = FlexDiTConfig.preset(name, image_size)
    assert (config.hidden_size, config.num_heads, config.depth) == (hidden, heads, depth)
    assert config.dense_grid == (image_size // 16,) * 2 and config.out_channels == 8 and config.num_classes == 1000
    assert FlexDiTConfig.preset(name, image_size, num_classes=10).num_classes == 10


def test_config_round_trip():
    configs = [
        flexdit_config(),
        flexdit_config(schedule=DensitySchedule([(5, 5), (2, 3)], 300, [0, 17]), reinject_position=True),
        flexdit_config(sdtm_blocks=[2, 0, 3, 0], mlp_ratio=2.5, learn_sigma=False, class_dropout_prob=0),
        FlexDiTConfig.preset("XL/2", 512),
    ]
    for config in configs:
        stored = json.loads(json.dumps(config.to_dict()))
        for again in (FlexDiTConfig.from_dict(stored), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
            assert again == config and hash(again) == hash(config)
            assert again.sdtm_blocks == tuple(config.sdtm_blocks) and again.schedule == config.schedule
    assert flexdit_config() != flexdit_config(hidden_size=48)


def test_config_derives():
    config = flexdit_config(input_size=12, patch_size=3, mlp_ratio=2.5, learn_sigma=False, num_sdtm=3)
    assert config.dense_grid == (4, 4) and config.out_channels == 4 and config.mlp_hidden_size == 60
    assert config.depth == 1 + 3 * 5 + 1
    # Without a schedule of its own a model follows the paper's pruning rates on its grid.
    assert config.density_schedule == DensitySchedule.from_pruning_rates(0.61, 0.86, (4, 4))
    own = DensitySchedule([(2, 2)])
    assert flexdit_config(schedule=own).density_schedule == own
    assert flexdit_config(schedule=own.to_dict()).schedule == own


BAD_FIELDS = [
    ("input_size", 12.0, TypeError),
    ("input_size", 0, ValueError),
    ("input_size", 13, ValueError),
    ("patch_size", 5, ValueError),
    ("patch_size", "2", TypeError),
    ("in_channels", 0, ValueError),
    ("hidden_size", 25, ValueError),
    ("hidden_size", -24, ValueError),
    ("hidden_size", True, TypeError),
    ("num_heads", 5, ValueError),
    ("num_heads", None, TypeError),
    ("mlp_ratio", -1.0, ValueError),
    ("mlp_ratio", 0.01, ValueError),
    ("mlp_ratio", math.nan, ValueError),
    ("mlp_ratio", math.inf, ValueError),
    ("mlp_ratio", "4", TypeError),
    ("num_classes", 0, ValueError),
    ("learn_sigma", 1, TypeError),
    ("class_dropout_prob", 1.0, ValueError),
    ("class_dropout_prob", -0.1, ValueError),
    ("class_dropout_prob", math.nan, ValueError),
    ("class_dropout_prob", "0.1", TypeError),
    ("num_pooling_blocks", -1, ValueError),
    ("num_sdtm", 1.5, TypeError),
    ("num_dense_blocks", -2, ValueError),
    ("sdtm_blocks", (1, 2, 1), TypeError),
    ("sdtm_blocks", 4, TypeError),
    ("sdtm_blocks", (1, 2.0, 1, 1), TypeError),
    ("sdtm_blocks", (0, 2, 1, 1), ValueError),
    ("sdtm_blocks", (1, 2, 0, 1), ValueError),
    ("sdtm_blocks", (1, -2, 1, 1), ValueError),
    ("reinject_position", None, TypeError),
    ("schedule", 5, TypeError),
    ("schedule", "paper", TypeError),
    ("schedule", DensitySchedule([(7, 2)]), ValueError),
    ("schedule", DensitySchedule([(2, 2, 2)]), ValueError),
    ("schedule", {"grid": [[2, 2]]}, ValueError),
]


@pytest.mark.parametrize("field, value, error", BAD_FIELDS, ids=lambda value: getattr(value, "__name__", None))
def test_bad_field(field, value, error):
    with pytest.raises(error, match=field):
        flexdit_config(**{field: value})
    with pytest.raises(error, match=field):
        FlexDiTConfig.from_dict(flexdit_config().to_dict() | {field: value})


def test_bad_config():
    with pytest.raises(ValueError, match=r"num_pooling_blocks.*num_sdtm.*num_dense_blocks"):
        flexdit_config(num_pooling_blocks=0, num_sdtm=0, num_dense_blocks=0)
    with pytest.raises(ValueError, match="hiden_size"):
        FlexDiTConfig.from_dict({"hiden_size": 24})
    for name in ("M/2", "S/4", "XL", "", 3, None):
        with pytest.raises(ValueError, match=f"preset.*{name}"):
            FlexDiTConfig.preset(name)
    for size in (0, 257, "256"):
        with pytest.raises(ValueError, match=f"image_size.*{size}"):
            FlexDiTConfig.preset("S/2", size)
    with pytest.raises(TypeError, match="config"):
        FlexDiT({"hidden_size": 24})
