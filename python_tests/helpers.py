"""What the tests share: the fixture of the released model, the mapping of its names to ours, small configurations."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

_REPOSITORY = Path(__file__).resolve().parents[1]
_FIXTURE = "sparsedit_tiny.npz"

# Whole-name patterns of changsn/SparseDiT's state dict and what each part is called here.
_RELEASED_PREFIXES = (
    (r"pos_embed", "pos_embed"),
    (r"x_embedder\.proj", "patch_embed"),
    (r"t_embedder\.mlp\.0", "timestep_embed.fc1"),
    (r"t_embedder\.mlp\.2", "timestep_embed.fc2"),
    (r"y_embedder\.embedding_table", "label_embed"),
    (r"poolingformer_blocks\.(\d+)", r"pooling_blocks.\1"),
    (r"dumbbell_blocks\.(\d+)\.token_merge_blocks\.(\d+)", r"sdtm.\1.generation.\2"),
    (r"dumbbell_blocks\.(\d+)\.semantic_blocks\.(\d+)", r"sdtm.\1.sparse.\2"),
    (r"dumbbell_blocks\.(\d+)\.token_recover_blocks\.(\d+)", r"sdtm.\1.recovery.\2"),
    (r"dumbbell_blocks\.(\d+)\.normal_blocks\.(\d+)", r"sdtm.\1.dense.\2"),
    (r"normal_blocks\.(\d+)", r"dense_blocks.\1"),
    (r"final_layer", "final_layer"),
)
_RELEASED_SUFFIXES = (
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.merged_layer1\.", ".from_sparse."),
    (r"\.merged_layer2\.", ".from_dense."),
)


def released_to_flexdit(name: str) -> str | None:
    """Our state_dict name of a tensor of the released code; None for a name that the released model does not have."""
    for pattern, replacement in _RELEASED_PREFIXES:
        match = re.match(pattern + r"(?=\.|$)", name)
        if match:
            rest = name[match.end() :]
            for old, new in _RELEASED_SUFFIXES:
                rest = re.sub(old, new, rest)
            return match.expand(replacement) + rest
    return None


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
    """A small model's configuration with the attributes of FlexDiTConfig, without importing flexdit_ext."""
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
    """One run of the released model in float64; see method.md, Fixture. Names are ours, tensors float64 (t, y int64)."""

    config: SimpleNamespace
    sparse_grid: tuple[int, int]
    state_dict: dict[str, Tensor]
    x: Tensor
    t: Tensor
    y: Tensor
    out: Tensor
    grad_out: Tensor
    grad_x: Tensor
    gradients: dict[str, Tensor]  # of every parameter, float64 values that the file rounds to float32


def fixture_path() -> Path:
    """The shared fixture where the development workspace has it, else the copy in this repository."""
    shared = _REPOSITORY.parent / "shared" / "fixtures" / _FIXTURE
    return shared if shared.exists() else _REPOSITORY / "python_tests" / "data" / _FIXTURE


def load_fixture() -> Fixture:
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
        gradients=tensors("grad/"),
        **{name: tensor(name) for name in ("x", "t", "y", "out", "grad_out", "grad_x")},
    )
