"""What the tests of the engine's FlexPixArt and FlexLatte share: models, conditions, and both ways to sample."""

from __future__ import annotations

import dataclasses
import functools

import torch
from helpers import relative_error
from test_single_model import CLASS_CLIP, PIXART, TEXT_CLIP, inputs_of, make

from flexdit_ext import Sampler, sample_conditional

CONFIGS = {
    "pixart": dataclasses.replace(PIXART, size_conditions=False),
    "pixart with sizes": PIXART,
    "text clip": TEXT_CLIP,
    "class clip": CLASS_CLIP,
    "clip of both": dataclasses.replace(TEXT_CLIP, num_classes=5, class_dropout_prob=0.1),
}
NULL_TOKENS = 2


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32, **overrides):
    return make(dataclasses.replace(CONFIGS[name], **overrides), dtype)[0]


@functools.cache
def sampler_of(name: str, dtype: torch.dtype = torch.float32, **overrides) -> Sampler:
    return Sampler(model_of(name, dtype, **overrides))


def conditions_of(name: str, dtype: torch.dtype = torch.float32) -> dict:
    """Three samples' y, caption and so on: captions of 6, 1 and 4 tokens of 6, not all at the front."""
    conditions = {key: value for key, value in inputs_of(CONFIGS[name], dtype=dtype).items() if key not in ("x", "t")}
    if "caption_mask" in conditions:
        conditions["caption_mask"] = conditions["caption_mask"].roll(2, 1)
    return conditions


def null_of(name: str, dtype: torch.dtype = torch.float32) -> dict:
    """What passes without condition read: the null class, and a caption of two tokens, padded to six."""
    null, config = {}, CONFIGS[name]
    if config.num_classes:
        null["y"] = torch.tensor([config.num_classes])
    if config.caption_channels:
        null["caption"] = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(5)).to(dtype)
        null["caption_mask"] = torch.arange(6)[None] < NULL_TOKENS
    return null


def null_caption_of(name: str, dtype: torch.dtype = torch.float32) -> dict:
    """The same for Sampler.sample, without padding."""
    return {"null_caption": null["caption"][:, :NULL_TOKENS]} if "caption" in (null := null_of(name, dtype)) else {}


def expected_of(name: str, dtype: torch.dtype, run: dict, model=None) -> torch.Tensor:
    model = model or model_of(name, dtype)
    guidance = {"unconditional": null_of(name, dtype)} if "cfg_scale" in run else {}
    return sample_conditional(model, conditions_of(name, dtype), **guidance, **run)


def actual_of(name: str, dtype: torch.dtype, run: dict, sampler: Sampler | None = None) -> torch.Tensor:
    guidance = null_caption_of(name, dtype) if "cfg_scale" in run else {}
    return (sampler or sampler_of(name, dtype)).sample(**conditions_of(name, dtype), **guidance, **run)


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and actual.isfinite().all()
    return relative_error(actual.cpu().double(), expected.cpu().double(), least=1e-3)
