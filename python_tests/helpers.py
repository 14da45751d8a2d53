"""What the tests share: the fixture of the released model under our names, small configurations."""

import ast
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig, _block_ops, reference
from flexdit_ext.convert import released_to_flexdit

_REPOSITORY = Path(__file__).resolve().parents[1]
_FIXTURE = "sparsedit_tiny.npz"
_FEATURES = _REPOSITORY / "python_tests" / "data" / "sparsedit_tiny_features.npz"


def released_config(arguments: dict) -> tuple[SimpleNamespace, tuple[int, int]]:
    """The released constructor's arguments as our configuration, and the sparse grid, which the released code fixes."""
    config = make_config(
        input_size=arguments["input_size"],
        patch_size=arguments["patch_size"],
        in_channels=arguments["in_channels"],
        hidden_size=arguments["hidden_size"],
        num_heads=arguments["num_heads"],
        num_classes=arguments["num_classes"],
        num_pooling_blocks=arguments["num_poolingformer"],
        num_sdtm=arguments["num_dumbbell"],
        sdtm_blocks=tuple(arguments["dumbbell_group"]),
        num_dense_blocks=arguments["num_normal_block"],
    )
    if config.depth != arguments["depth"]:
        raise ValueError(f"depth {arguments['depth']} in the fixture, its blocks add up to {config.depth}")
    return config, (arguments["semantic_size"],) * 2


def make_config(**overrides) -> SimpleNamespace:
    """A small model's configuration with the attributes of FlexDiTConfig, none of its checks."""
    values = {
        "input_size": 12,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "num_classes": 10,
        "learn_sigma": True,
        "class_dropout_prob": 0.1,
        "num_pooling_blocks": 1,
        "num_sdtm": 2,
        "sdtm_blocks": (1, 2, 1, 1),
        "num_dense_blocks": 1,
        "reinject_position": False,
        "timestep_shift": 0,
        "mlp_norm_eps": 1e-6,
        "schedule": None,
    }
    if unknown := set(overrides) - set(values):
        raise TypeError(f"unknown configuration fields: {sorted(unknown)}")
    config = SimpleNamespace(**(values | overrides))
    config.dense_grid = (config.input_size // config.patch_size,) * 2
    config.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
    config.depth = config.num_pooling_blocks + config.num_sdtm * sum(config.sdtm_blocks) + config.num_dense_blocks
    return config


@dataclass
class Fixture:
    """One run of the released model in float64 (method.md, Fixture). Our names; tensors float64, t and y int64."""

    config: SimpleNamespace
    sparse_grid: tuple[int, int]
    state_dict: dict[str, Tensor]
    x: Tensor
    t: Tensor
    y: Tensor
    features: Tensor  # of t, float32, as the released model had them
    out: Tensor
    grad_out: Tensor
    grad_x: Tensor
    gradients: dict[str, Tensor]  # of every parameter, float64 values that the file rounds to float32


def fixture_path() -> Path:
    """The shared fixture where the development workspace has it, else the copy in this repository."""
    shared = _REPOSITORY.parent / "shared" / "fixtures" / _FIXTURE
    return shared if shared.exists() else _REPOSITORY / "python_tests" / "data" / _FIXTURE


def load_fixture() -> Fixture:
    """The run, and the timestep features it was made with. The released model has these from torch's float32 exp, cos
    and sin, which differ between processors by a rounding (6e-5 of a feature): with others the run cannot be repeated
    in float64. The fixture lacks them. sparsedit_tiny_features.npz holds released_features(t) under
    MKL_CBWR=COMPATIBLE, the code that MKL takes on the fixture's machine."""
    with np.load(_FEATURES, allow_pickle=False) as archive:
        features = torch.from_numpy(archive["features"])
    with np.load(fixture_path(), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    config, sparse_grid = released_config(ast.literal_eval(str(arrays["config"])))

    def tensor(name: str) -> Tensor:
        value = torch.from_numpy(arrays[name])
        return value.double() if value.is_floating_point() else value

    def tensors(prefix: str) -> dict[str, Tensor]:
        mapped = {}
        for name in arrays:
            if name.startswith(prefix):
                ours = released_to_flexdit(name.removeprefix(prefix))
                if ours is None or ours in mapped:
                    raise ValueError(f"{name}: no place for it in FlexDiT's state dict")
                mapped[ours] = tensor(name)
        return mapped

    state_dict = tensors("param/")
    state_dict["pos_embed"] = state_dict["pos_embed"][0]  # [1, N, C] in the released code
    return Fixture(
        config=config,
        sparse_grid=sparse_grid,
        state_dict=state_dict,
        features=features,
        gradients=tensors("grad/"),
        **{name: tensor(name) for name in ("x", "t", "y", "out", "grad_out", "grad_x")},
    )


def released_features(t: Tensor, shift: int = 0) -> Tensor:
    """Timestep features [B, 256] by torch's float32 functions, as the released model, DiT and diffusers compute them;
    reference.timestep_frequencies rounds them better."""
    exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / (128 - shift)
    angles = t[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@contextlib.contextmanager
def use_features(compute: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """The module and the reference with the float32 features compute(t, shift) instead of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "timestep_frequencies", lambda t, shift=0: compute(t, shift))
        patch.setattr(_block_ops, "timestep_features", lambda t, dtype, shift=0: compute(t, shift).to(dtype))
        yield


def stored_features(fixture: Fixture) -> contextlib.AbstractContextManager[None]:
    """The module and the reference with the features of the fixture's t that its file was made with."""

    def look_up(t: Tensor, shift: int) -> Tensor:
        assert torch.equal(t.cpu(), fixture.t) and shift == 0, "the fixture has features of its own t only"
        return fixture.features.to(t.device)

    return use_features(look_up)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that depend on the seed and the shape alone, rounded to dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flexdit_config(**overrides) -> FlexDiTConfig:
    """make_config's small model as a FlexDiTConfig."""
    values = vars(make_config())
    return FlexDiTConfig(**{field.name: values[field.name] for field in fields(FlexDiTConfig)} | overrides)


def random_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> FlexDiT:
    """flexdit_ext's model in eval mode with random weights, none of them zero, of size 1 / sqrt(fan in)."""
    model = FlexDiT(flexdit_config(**overrides), dtype=dtype).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = randn(*parameter.shape, seed=1000 * seed + i)
            parameter.copy_(values * (values[0].numel() ** -0.5 if values.dim() > 1 else 0.1))
    return model


# What a model may have and lack.
VARIANTS = {
    "plain": {},
    "position again": {"reinject_position": True},
    "several generation and recovery blocks": {"sdtm_blocks": (2, 1, 2, 0), "reinject_position": True},
    "no sparse and no dense block": {"sdtm_blocks": (1, 0, 1, 0), "num_dense_blocks": 0, "num_pooling_blocks": 0},
    "diffusers' constants": {"timestep_shift": 1, "mlp_norm_eps": 1e-2, "num_sdtm": 1},
    "DiT": {"num_sdtm": 0, "num_pooling_blocks": 0, "num_dense_blocks": 3},
    "pooling only": {"num_sdtm": 0, "num_pooling_blocks": 2, "num_dense_blocks": 0},
    "noise alone, no null class": {"learn_sigma": False, "class_dropout_prob": 0.0},
    "patch 1, one channel": {"patch_size": 1, "input_size": 7, "in_channels": 1},
    "patch 4": {"patch_size": 4, "input_size": 16},
    "odd head size, narrow MLP": {"hidden_size": 36, "num_heads": 4, "mlp_ratio": 1.5},
}
RAGGED = [(2, 3), (4, 1), (4, 4)]  # fits all variants

# What the tests of convert.py start from: a dense DiT as deep as LAYOUT.
DENSE = {"num_pooling_blocks": 0, "num_sdtm": 0, "sdtm_blocks": (1, 3, 1, 1), "num_dense_blocks": 12}
LAYOUT = {"num_pooling_blocks": 1, "num_sdtm": 2, "sdtm_blocks": (2, 1, 1, 1), "num_dense_blocks": 1}


def dit_config(**overrides) -> FlexDiTConfig:
    return flexdit_config(**(DENSE | overrides))


def dit_model(dtype: torch.dtype = torch.float64, **overrides) -> FlexDiT:
    return random_model(dtype, **(DENSE | overrides))


def dit_name(name):
    """facebookresearch/DiT's name of a dense FlexDiT's tensor, written down apart from the library's table."""
    for ours, theirs in (
        ("patch_embed.", "x_embedder.proj."),
        ("timestep_embed.fc1.", "t_embedder.mlp.0."),
        ("timestep_embed.fc2.", "t_embedder.mlp.2."),
        ("label_embed.", "y_embedder.embedding_table."),
        ("dense_blocks.", "blocks."),
        (".modulation.", ".adaLN_modulation.1."),
    ):
        name = name.replace(ours, theirs)
    return name


def dit_state_dict(model):
    state_dict = {dit_name(name): tensor for name, tensor in model.state_dict().items()}
    return state_dict | {"pos_embed": state_dict["pos_embed"][None]}


# Small enough to be written to disk hundreds of times: one block of everything, 16 tokens, 8 channels.
TINY = {
    "input_size": 8,
    "in_channels": 1,
    "hidden_size": 8,
    "num_classes": 3,
    "num_sdtm": 1,
    "sdtm_blocks": (1, 1, 1, 1),
    "schedule": DensitySchedule([(3, 3), (2, 2)]),
}


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> FlexDiT:
    return random_model(dtype, seed, **(TINY | overrides))


def same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Names, dtypes and values, to the bit."""
    return actual.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in actual.items()
    )


def assert_same_model(actual: FlexDiT, expected: FlexDiT) -> None:
    assert actual.config == expected.config
    assert same_tensors(actual.state_dict(), expected.state_dict())


def reference_of(model: FlexDiT, dtype: torch.dtype = torch.float64) -> reference.FlexDiT:
    """The reference with the model's weights."""
    twin = reference.FlexDiT(model.config).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def model_inputs(
    config, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y; the last label is the null class where the model has one."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, 1001, (batch,), generator=generator)
    y = torch.randint(0, config.num_classes, (batch,), generator=generator)
    if config.class_dropout_prob > 0:
        y[-1:] = config.num_classes
    return randn(batch, config.in_channels, config.input_size, config.input_size, seed=seed, dtype=dtype), t, y


def forward_backward(model, x, t, y, grid=None, grad=None):
    """Output, gradient of x, gradients of the parameters by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x, t, y, grid)
    out.backward(randn(*out.shape, seed=77).to(out) if grad is None else grad)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return SimpleNamespace(out=out.detach(), x=x.grad, parameters=gradients)


def tensors_of(result):
    return {"out": result.out, "grad x": result.x, **result.parameters}


def relative_error(actual: Tensor, expected: Tensor, least: float = 1.0) -> float:
    """Largest difference over the largest expected value, which counts as at least `least`."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((actual.to(expected.dtype) - expected).abs().max() / expected.abs().max().clamp(min=least)).item()
