"""What the tests of training text and video share: tiny models and data, and runs on them."""

import numpy as np
import safetensors.numpy
import torch
from training_cases import MODEL, make_config

from flexdit_ext.training import TrainingConfig, build_model
from flexdit_ext.training.config import ModelSettings

_SHARED = {name: MODEL[name] for name in MODEL if name not in ("num_classes", "learn_sigma", "schedule")}
MODELS = {
    "flexpixart": _SHARED
    | {
        "in_channels": 4,
        "out_channels": 4,
        "caption_channels": 6,
        "max_caption_tokens": 5,
        "schedule": {"grids": [[3, 3], [2, 2]]},
    },
    "flexlatte": _SHARED
    | {
        "out_channels": 1,
        "num_frames": 3,
        "num_classes": 4,
        "class_dropout_prob": 0.2,
        "schedule": {"grids": [[2, 3, 3], [2, 2, 2]]},
    },
}
KINDS = {"flexpixart": "captions", "flexlatte": "clips"}


def captions(count=10, length=4, **changes) -> dict[str, np.ndarray]:
    """Arrays of a shard for a flexpixart; caption i has 1 + i % length tokens."""
    rng = np.random.default_rng(0)
    arrays = {
        "latents": rng.standard_normal((count, 4, 8, 8)).astype(np.float32),
        "caption": rng.standard_normal((count, length, 6)).astype(np.float16),
        "caption_mask": np.arange(length) <= np.arange(count)[:, None] % length,
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def clips(count=10, frames=3, **changes) -> dict[str, np.ndarray]:
    """Arrays of a shard for a flexlatte: a bright column that walks to the right, at a speed that is the label."""
    labels = np.arange(count) % 4
    values = np.full((count, 1, frames, 8, 8), -0.8, np.float32)
    for i, label in enumerate(labels):
        for frame in range(frames):
            values[i, 0, frame, :, (frame * label + i) % 8] = 0.8
    return {name: array for name, array in ({"clips": values, "labels": labels} | changes).items() if array is not None}


ARRAYS = {"flexpixart": captions, "flexlatte": clips}


def save(folder, arrays, name="a.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **arrays)
    else:
        safetensors.numpy.save_file(arrays, folder / name)
    return folder


def family_config(output, family, shards, **changes) -> TrainingConfig:
    """make_config for a tiny model of the family on the folder `shards`; changes["model"] go over its
    fields."""
    model = {"family": family} | MODELS[family] | changes.pop("model", {})
    changes = {"batch_size": 4} | changes
    changes["data"] = {"kind": KINDS[family], "path": str(shards)} | changes.get("data", {})
    return TrainingConfig.from_dict(make_config(output, **changes).to_dict() | {"model": model})


def save_random(folder, family, **fields) -> str:
    """A model none of whose weights is zero, so that what it says depends on all that it is given."""
    model = build_model(ModelSettings(family, config=MODELS[family] | fields), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return str(folder)
