"""What requests for images and clips are conditioned on: labels, captions, sizes, frames; checked without torch.

As in _requests, arrays may be numpy's, torch's, or of any library that has DLPack, and errors name the argument.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import _C
from ._checks import Grid, check_grid
from ._requests import (
    check_cfg_scale,
    check_guidance_channels,
    check_int,
    check_labels,
    check_scales,
    host_array,
    last_label,
)
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .schedule import DensitySchedule

Config = FlexDiTConfig | FlexPixArtConfig | FlexLatteConfig
_MAX_SIDE = 1 << 14  # of a latent image, as csrc/model/request.cpp has it


def check_batch(config: Config, given: Mapping, seed) -> list[dict]:
    """What each request's Session._add is given.

    given: Sampler.sample's y, caption, caption_mask, null_caption, null_caption_mask, resolution, aspect_ratio and
        frames, None where they are not. seed: where nothing else has a number of samples, a list's length is it.
    """
    _check_presence(config, given, "y")
    columns = {} if given["y"] is None else {"label": check_labels(given["y"], config).tolist()}
    if config.caption_channels:
        columns["caption"] = _captions(config, "caption", given["caption"], given["caption_mask"])
    if config.size_conditions:
        columns["resolution"] = _positive("resolution", given["resolution"], (None, 2)).tolist()
        columns["aspect_ratio"] = _positive("aspect_ratio", given["aspect_ratio"], (None,)).tolist()
    counts = {"y" if name == "label" else name: len(column) for name, column in columns.items()}
    total = next(iter(counts.values()), None)
    if total is None:
        seeds = host_array("seed", seed)
        total = len(seeds) if isinstance(seeds, (list, tuple)) or np.ndim(seeds) else 1
    if any(count != total for count in counts.values()):
        raise ValueError(f"{', '.join(counts)} have {list(counts.values())} samples, must have the same number")
    if given["null_caption"] is not None:
        nulls = _captions(config, "null_caption", given["null_caption"], given["null_caption_mask"])
        if len(nulls) not in (1, total):
            raise ValueError(f"null_caption has {len(nulls)} captions, must have 1 or one per sample ({total})")
        columns["null_caption"] = nulls * total if len(nulls) == 1 else nulls
    frames = check_frames(config, given["frames"])
    return [{name: column[i] for name, column in columns.items()} | {"frames": frames} for i in range(total)]


def check_one(config: Config, given: Mapping) -> dict:
    """The same of Session.add's label, caption, null_caption, resolution, aspect_ratio and frames."""
    _check_presence(config, given, "label")
    out = {"frames": check_frames(config, given["frames"])}
    if config.num_classes:
        out["label"] = check_int("label", given["label"], 0, last_label(config))
    for name in ("caption", "null_caption"):
        if given[name] is not None:
            rows = _floats(name, given[name], (None, config.caption_channels))
            _check_length(config, name, len(rows))
            out[name] = _finite(name, rows)
    if config.size_conditions:
        out["resolution"] = _positive("resolution", given["resolution"], (2,)).tolist()
        out["aspect_ratio"] = _positive("aspect_ratio", given["aspect_ratio"], ()).item()
    return out


def _check_presence(config: Config, given: Mapping, label: str) -> None:
    """Everything that the model reads, and nothing that it does not."""
    has = {label: config.num_classes, "caption": config.caption_channels}
    has |= {name: config.size_conditions for name in ("resolution", "aspect_ratio")}
    for name, wanted in has.items():
        if given[name] is None and wanted:
            raise TypeError(f"{name} is None, the model needs {name}")
        if given[name] is not None and not wanted:
            raise ValueError(f"{name} is given, the model has no {name}")
    if given["null_caption"] is not None and not config.caption_channels:
        raise ValueError("null_caption is given, the model has no caption")
    for name in ("caption", "null_caption"):
        if given.get(f"{name}_mask") is not None and given[name] is None:
            raise ValueError(f"{name}_mask is given without {name}")


def _captions(config: Config, name: str, value, mask) -> list[np.ndarray]:
    """Of [B, L, caption_channels] and a mask [B, L] or None the rows that each caption has, float64."""
    rows = _floats(name, value, (None, None, config.caption_channels))
    _check_length(config, name, rows.shape[1])
    if mask is None:
        return [_finite(f"{name}[{i}]", one) for i, one in enumerate(rows)]
    given, mask = mask, host_array(f"{name}_mask", mask)
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "b":
        found = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"{name}_mask is {found}, must be an array of bool [B, L]")
    if mask.shape != rows.shape[:2]:
        raise ValueError(f"{name}_mask has shape {mask.shape}, must be {rows.shape[:2]} as {name}")
    for i, there in enumerate(mask):
        if not there.any():
            raise ValueError(f"{name}_mask[{i}] has no token, every caption must have one (the empty text has one)")
    return [_finite(f"{name}[{i}]", one[there]) for i, (one, there) in enumerate(zip(rows, mask, strict=True))]


def _check_length(config: Config, name: str, length: int) -> None:
    if not 1 <= length <= config.max_caption_tokens:
        raise ValueError(f"{name} has {length} tokens, must have 1 to max_caption_tokens = {config.max_caption_tokens}")


def _floats(name: str, value, shape: tuple, kinds: str = "f") -> np.ndarray:
    """Of that shape (None: any), float64. kinds: numpy's letters of the dtypes that are allowed."""
    given, value = value, host_array(name, value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        found = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"{name} is {found}, must be an array of {'floats' if kinds == 'f' else 'numbers'}")
    if value.ndim != len(shape) or any(b not in (None, a) for a, b in zip(value.shape, shape)):
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} has shape {value.shape}, must be [{sides}]")
    return value.astype(np.float64)


def _positive(name: str, value, shape: tuple) -> np.ndarray:
    value = host_array(name, value)
    values = _floats(name, np.asarray(value) if isinstance(value, (int, float, list, tuple)) else value, shape, "iuf")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} is {values.tolist()}, must hold finite numbers above 0")
    return values


def _finite(name: str, rows: np.ndarray) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} holds values that are not finite")
    return rows


def check_frames(config: Config, frames) -> int:
    """0 where the config's are meant."""
    if frames is None:
        return 0
    if not isinstance(config, FlexLatteConfig):
        raise ValueError(f"frames is {frames!r}, must be None: the model makes images")
    return check_int("frames", frames, 1, config.num_frames)


def check_size(size, config: Config) -> tuple[int, int]:
    size = check_grid("size", size)
    if len(size) != 2 or any(side % config.patch_size or side > _MAX_SIDE for side in size):
        raise ValueError(
            f"size is {size}, must be (height, width): multiples of the patch size {config.patch_size}, "
            f"at most {_MAX_SIDE}"
        )
    return size


def dense_grid(config: Config, size: tuple[int, int] | None, frames: int) -> Grid:
    """The tokens of a request. frames: check_frames's."""
    *own_frames, _, _ = own = config.dense_grid
    if size is not None:
        own = (*own_frames, *(side // config.patch_size for side in size))
    return (frames, *own[1:]) if frames else own


def check_guidance(config: Config, cfg_scale, total: int, null_caption) -> np.ndarray | None:
    """None without guidance, else float64 [B]: guidance needs what the passes without condition read, the null caption
    and the null class; a label without a null class stays as it is where there is a caption."""
    if config.num_classes and not config.caption_channels:
        return check_cfg_scale(cfg_scale, total, config)
    scales = check_scales(cfg_scale, total)
    if scales is None:
        return None
    if not config.caption_channels:
        raise ValueError(f"cfg_scale = {cfg_scale!r}: the model has no condition to guide by; only 1.0 is allowed")
    if null_caption is None:
        raise ValueError(f"cfg_scale = {cfg_scale!r}: guidance needs null_caption, the caption of the empty text")
    return scales


def core_schedule(config: Config, schedule: DensitySchedule) -> _C.DensitySchedule | None:
    """A model's schedule for the C++ library: None is the default one of FlexPixArt and FlexLatte, which for other
    sizes is another."""
    single = not isinstance(config, FlexDiTConfig)
    default = single and config.schedule is None and schedule == config.density_schedule
    return None if default else schedule._core


def check_channels(guidance_channels, config: Config) -> int:
    """None is all in FlexPixArt and FlexLatte, DiT's first three in FlexDiT."""
    every = guidance_channels is None and not isinstance(config, FlexDiTConfig)
    return check_guidance_channels("all" if every else guidance_channels, config)
