"""Names and shapes in state dicts: what other libraries call FlexDiT's tensors, and the configuration they tell."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ._report import Report
from .checkpoint import load_checkpoint_file, select_state_dict, state_dict_key
from .config import FlexDiTConfig

# (name there, name here), # standing for a number; first the beginnings of a name, then parts of the rest.
_EMBEDDINGS = (
    ("pos_embed", "pos_embed"),
    ("x_embedder.proj", "patch_embed"),
    ("t_embedder.mlp.0", "timestep_embed.fc1"),
    ("t_embedder.mlp.2", "timestep_embed.fc2"),
    ("y_embedder.embedding_table", "label_embed"),
    ("final_layer", "final_layer"),
)
DIT = (*_EMBEDDINGS, ("blocks.#", "dense_blocks.#"))
SPARSEDIT = (
    *_EMBEDDINGS,
    ("poolingformer_blocks.#", "pooling_blocks.#"),
    ("dumbbell_blocks.#.token_merge_blocks.#", "sdtm.#.generation.#"),
    ("dumbbell_blocks.#.semantic_blocks.#", "sdtm.#.sparse.#"),
    ("dumbbell_blocks.#.token_recover_blocks.#", "sdtm.#.recovery.#"),
    ("dumbbell_blocks.#.normal_blocks.#", "sdtm.#.dense.#"),
    ("normal_blocks.#", "dense_blocks.#"),
)
DIFFUSERS = (
    ("pos_embed.proj", "patch_embed"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "timestep_embed.fc1"),
    ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_2", "timestep_embed.fc2"),
    ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table", "label_embed"),
    ("transformer_blocks.#", "dense_blocks.#"),
    ("proj_out_1", "final_layer.modulation"),
    ("proj_out_2", "final_layer.linear"),
)
PARTS = (
    ("adaLN_modulation.1", "modulation"),
    ("merged_layer1", "from_sparse"),
    ("merged_layer2", "from_dense"),
)
DIFFUSERS_PARTS = (
    ("norm1.linear", "modulation"),
    ("attn1.to_out.0", "attn.proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
SDTM_KINDS = ("generation", "sparse", "recovery", "dense")

# ---- tensors ---------------------------------------------------------------------------------------------------------


def load_tensors(source, what: str, report: Report, key: str | None = None) -> dict[str, Tensor]:
    """Named tensors from a state dict, a training checkpoint or a file, without DataParallel's and compile's prefix."""
    is_file = isinstance(source, (str, os.PathLike))
    content = load_checkpoint_file(source) if is_file else source
    try:
        tensors = select_state_dict(content, key, str(source) if is_file else "checkpoint")
    except TypeError as error:
        raise (ValueError if is_file else TypeError)(str(error)) from None
    if (chosen := state_dict_key(content, key)) is not None:
        report.unused |= {name: f"{chosen} was taken" for name in content if name != chosen}
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise ValueError(f"{what}: the state dict is empty")
    report.start(tensors)
    return tensors


# ---- names ----------------------------------------------------------------------------------------------------------


def rename(name: str, beginnings: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str | None:
    """The name by these tables, or None if it begins like none of them."""
    for old, new in beginnings:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)", name)
        if match:
            rest = name[match.end() :]
            for old_part, new_part in parts:
                rest = rest.replace(f".{old_part}.", f".{new_part}.")
            return new.replace("#", "{}").format(*match.groups()) + rest
    return None


def reverse(table: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(new, old) for old, new in table]


def translate(
    tensors: Mapping[str, Tensor],
    new_name: Callable[[str], str | None],
    source: str,
    report: Report,
    ignore_unused: bool = False,
) -> dict[str, Tensor]:
    """The tensors under their new names. Those that new_name gives None for are left out with ignore_unused; otherwise
    they raise ValueError."""
    names = {name: new_name(name) for name in tensors}
    unknown = [name for name, new in names.items() if new is None]
    if unknown and not ignore_unused:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"{source} does not have such tensors: {', '.join(unknown[:5])}{more}")
    kept = {name: new for name, new in names.items() if new is not None}
    report.follow({new: (name,) for name, new in kept.items()}, dict.fromkeys(unknown, f"{source} has no such tensor"))
    return {new: tensors[name] for name, new in kept.items()}


def flatten_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """pos_embed [1, N, C], as the other libraries keep it, to [N, C]."""
    position = tensors.get("pos_embed")
    if position is not None and position.dim() == 3 and position.shape[0] == 1:
        return tensors | {"pos_embed": position[0]}
    return tensors


# ---- the configuration that tensors tell ----------------------------------------------------------------------------


def read_config(state_dict: Mapping[str, Tensor], num_heads: int, **overrides) -> FlexDiTConfig:
    """FlexDiTConfig of a state dict with our names; `overrides` are its fields and win over what the shapes tell.

    The last row of the label embedding is taken for the null class (class_dropout_prob 0.1), unless num_classes says
    that all rows are classes. Without pos_embed, input_size has to be given. Raises ValueError.
    """
    needed = ("patch_embed.weight", "label_embed.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"state_dict has no {', '.join(missing)}, from which the configuration is read")
    dims = {"patch_embed.weight": 4, "label_embed.weight": 2, "final_layer.linear.weight": 2, "pos_embed": 2}
    for name, dim in dims.items():
        if name in state_dict and state_dict[name].dim() != dim:
            raise ValueError(f"{name} has the shape {list(state_dict[name].shape)}, must have {dim} dimensions")
    hidden, in_channels, patch, _ = state_dict["patch_embed.weight"].shape
    values = {
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(state_dict, hidden),
        "learn_sigma": state_dict["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch * patch,
        **_input_size(state_dict, patch),
        **_layout(state_dict),
        **_classes(state_dict["label_embed.weight"].shape[0], overrides),
    }
    values |= overrides
    if "input_size" not in values:
        raise ValueError("input_size has to be given: the state dict has no pos_embed to read it from")
    return FlexDiTConfig(**values)


def _mlp_ratio(state_dict: Mapping[str, Tensor], hidden: int) -> float:
    mlp = next((tensor for name, tensor in state_dict.items() if name.endswith(".mlp.fc1.weight")), None)
    if mlp is None or mlp.dim() != 2 or hidden == 0:
        return 4.0  # build_model names what is missing or misshaped
    ratio = mlp.shape[0] / hidden
    # FlexDiTConfig rounds hidden_size * mlp_ratio down.
    return ratio if int(hidden * ratio) == mlp.shape[0] else math.nextafter(ratio, math.inf)


def _input_size(state_dict: Mapping[str, Tensor], patch: int) -> dict[str, int]:
    if "pos_embed" not in state_dict:
        return {}
    tokens = state_dict["pos_embed"].shape[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"pos_embed has {tokens} positions, must be a square number")
    return {"input_size": side * patch}


def _classes(rows: int, overrides: Mapping) -> dict[str, int | float]:
    with_null = overrides.get("class_dropout_prob", 0.1) > 0 and overrides.get("num_classes", rows - 1) == rows - 1
    return {"num_classes": rows - with_null, "class_dropout_prob": 0.1 if with_null else 0.0}


def _layout(state_dict: Mapping[str, Tensor]) -> dict[str, int | tuple[int, ...]]:
    modules = _count(state_dict, "sdtm")
    blocks = [tuple(_count(state_dict, f"sdtm.{i}.{kind}") for kind in SDTM_KINDS) for i in range(modules)]
    for i, one in enumerate(blocks):
        if one != blocks[0]:
            raise ValueError(
                f"sdtm.{i} has {one} (generation, sparse, recovery, dense) blocks, sdtm.0 has {blocks[0]}: must agree"
            )
    layout = {
        "num_pooling_blocks": _count(state_dict, "pooling_blocks"),
        "num_sdtm": modules,
        "num_dense_blocks": _count(state_dict, "dense_blocks"),
    }
    return layout | ({"sdtm_blocks": blocks[0]} if blocks else {})


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix`, which must be 0, 1, 2, ... without a gap."""
    found = {int(match[1]) for name in state_dict if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    if found and max(found) != len(found) - 1:
        gap = min(set(range(len(found))) - found)
        raise ValueError(f"state_dict has {prefix}.{max(found)} but no {prefix}.{gap}")
    return len(found)
