"""What a request for images may be: labels, guidance, seeds, grids, sampler and steps, checked without torch.

Arrays may be numpy's, torch's, or of any library that has DLPack. A TypeError or ValueError names the argument, says
what it was and what is allowed.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import re
import sys
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from . import _C
from ._checks import check_number

NUM_TIMESTEPS = 1000
SAMPLER_NAMES = ("ddim", "ddpm", "dpmpp", "flow", "heun")
_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


def check_int(name: str, value, low: int, high: int | None = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}: must be an int") from None
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} = {value}: must be at least {low}" + (f", at most {high}" if high is not None else "")
        )
    return value


def host_array(name: str, value):
    """A numpy array of another library's array or tensor, in the machine's byte order; anything else as it is."""
    try:
        if isinstance(value, np.ndarray):
            return value.astype(value.dtype.newbyteorder("="), copy=False)
        if hasattr(value, "detach"):
            return _of_tensor(value)
        if not hasattr(value, "__dlpack__"):
            return value
        torch = sys.modules.get("torch")  # which also reads a GPU's
        return np.from_dlpack(value) if torch is None else _of_tensor(torch.from_dlpack(value))
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: an array of {type(value).__name__} that cannot be read: {error}") from None


def _of_tensor(tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def check_labels(y, config) -> np.ndarray:
    """int64 [B]"""
    given = y
    y = host_array("y", y)
    if not isinstance(y, np.ndarray):
        if isinstance(y, (str, bytes)) or not hasattr(y, "__len__"):
            raise TypeError(f"y: must be int64 [B] or a list of ints, got {type(y).__name__}")
        try:
            y = given = np.asarray(y) if len(y) else np.empty(0, np.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"y = {y!r}: must be int64 [B] or a list of ints") from None
    if y.dtype not in _INTEGERS:
        raise TypeError(f"y: must be int64, got {getattr(given, 'dtype', y.dtype)}")
    if y.ndim != 1 or len(y) == 0:
        raise ValueError(f"y: must be one-dimensional with at least one label, got shape {y.shape}")
    last = last_label(config)
    if y.min() < 0 or y.max() > last:
        raise ValueError(f"y: labels must be in 0..{last}, got {y.min()}..{y.max()}")
    return y.astype(np.int64)


def last_label(config) -> int:
    """The largest label that is allowed: the null class, where there is one."""
    return config.num_classes - (0 if config.class_dropout_prob > 0 else 1)


def check_cfg_scale(cfg_scale, total: int, config) -> np.ndarray | None:
    """check_scales of a model whose guidance needs a null class."""
    scales = check_scales(cfg_scale, total)
    if scales is not None and not config.class_dropout_prob > 0:
        raise ValueError(
            f"cfg_scale = {cfg_scale!r}: guidance needs a null class, and this model has none "
            f"(class_dropout_prob = {config.class_dropout_prob}); only 1.0 is allowed"
        )
    return scales


def check_scales(cfg_scale, total: int) -> np.ndarray | None:
    """None without guidance, else float64 [B]."""
    wrong = f"cfg_scale = {cfg_scale!r}: must be a float or one float per sample"
    try:
        scales = np.asarray(host_array("cfg_scale", cfg_scale))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(wrong) from None
    if scales.dtype.kind not in "iuf":
        raise TypeError(wrong)
    if scales.ndim > 0 and scales.shape != (total,):
        raise ValueError(f"cfg_scale: must be a float or one per sample ({total}), got shape {scales.shape}")
    scales = np.broadcast_to(scales.astype(np.float64), (total,))
    bad = [s for s in scales.tolist() if not (s >= 0 and math.isfinite(s))]
    if bad:
        raise ValueError(f"cfg_scale = {bad[0]}: must be finite and at least 0")
    return None if (scales == 1).all() else scales.copy()


def check_interval(guidance_interval) -> tuple[float, float]:
    if guidance_interval is None:
        return (0.0, math.inf)
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        raise TypeError(f"guidance_interval = {guidance_interval!r}: must be (first, last) timestep or None")
    first, last = (check_number(f"guidance_interval[{i}]", value) for i, value in enumerate(guidance_interval))
    if not first <= last:
        raise ValueError(f"guidance_interval = {guidance_interval!r}: the first must be at most the last")
    return first, last


def check_guidance_channels(guidance_channels, config) -> int:
    if guidance_channels is None:
        return min(3, config.in_channels)
    if isinstance(guidance_channels, str):
        if guidance_channels != "all":
            raise ValueError(
                f"guidance_channels = {guidance_channels!r}: must be None, 'all' or 1..{config.in_channels}"
            )
        return config.in_channels
    return check_int("guidance_channels", guidance_channels, 1, config.in_channels)


def derive_seed(seed: int, index: int) -> int:
    """The seed, in [0, 2**64), of sample `index` of a run: distinct for distinct indices."""
    return _C.derive_seed(seed, index)


def check_seeds(seed, start_index: int, total: int) -> list[int]:
    seed = host_array("seed", seed)
    if isinstance(seed, np.ndarray):
        seed = seed.tolist()
    if isinstance(seed, (list, tuple)):
        if len(seed) != total:
            raise ValueError(f"seed: a list must have one seed per sample ({total}), got {len(seed)}")
        return [derive_seed(check_int(f"seed[{i}]", s, 0, 2**64 - 1), 0) for i, s in enumerate(seed)]
    seed = check_int("seed", seed, 0, 2**64 - 1)
    return [derive_seed(seed, start_index + i) for i in range(total)]


def check_grids(grid, total: int):
    """None, one tuple for all samples, or a list of one tuple per sample."""

    def one(value, name: str) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
            raise TypeError(f"{name} = {value!r}: must be (h, w) or (f, h, w)")
        return tuple(check_int(f"{name}[{axis}]", side, 1) for axis, side in enumerate(value))

    if grid is None:
        return None
    if isinstance(grid, list) and grid and isinstance(grid[0], (tuple, list)):
        if len(grid) != total:
            raise ValueError(f"grid: a list must have one grid per sample ({total}), got {len(grid)}")
        return [one(value, f"grid[{i}]") for i, value in enumerate(grid)]
    return one(grid, "grid")


def _ddim_timesteps(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps):
        if math.ceil(num_timesteps / stride) == count:
            return list(range(0, num_timesteps, stride))
    raise ValueError(f"section_counts = 'ddim{count}': no whole stride through {num_timesteps} timesteps takes {count}")


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> list[int]:
    """The timesteps a respaced process keeps, ascending, as ADM and DiT choose them (IDDPM, section 4).

    section_counts: n or "n" spreads n timesteps evenly from 0 to num_timesteps - 1, both included (1 keeps
    timestep 0); "a,b,c" or a sequence does so within equal sections; "ddimN" takes N by a fixed whole stride from 0.
    Raises ValueError where a section cannot give its count or no stride fits.
    """
    if isinstance(section_counts, str):
        if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", section_counts):
            raise ValueError(f"section_counts = {section_counts!r}: must read 'N', 'A,B,...' or 'ddimN'")
        if section_counts.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, int(section_counts[4:]))
        counts = [int(part) for part in section_counts.split(",")]
    else:
        counts = [section_counts] if isinstance(section_counts, int) else list(section_counts)
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"section_counts = {section_counts!r}: a section of {length} cannot keep {count} timesteps"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed, not multiplied: halves must round as they do in ADM
        start += length
    return kept


def check_step_count(steps) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        count = None
    if count is None or isinstance(steps, bool):
        raise TypeError(f"steps = {steps!r}: must be an int in 1..{NUM_TIMESTEPS}")
    if not 1 <= count <= NUM_TIMESTEPS:
        raise ValueError(f"steps = {count}: must be in 1..{NUM_TIMESTEPS}")
    return count


def kept_timesteps(steps: int | str) -> list[int]:
    """The timesteps of `steps` steps of ddim or ddpm, ascending."""
    if not isinstance(steps, str):
        return space_timesteps(NUM_TIMESTEPS, check_step_count(steps))
    try:
        return space_timesteps(NUM_TIMESTEPS, steps)
    except ValueError as error:
        raise ValueError(f"steps = {steps!r}: {error}") from None


def check_clip_x0(clip_x0) -> bool:
    if not isinstance(clip_x0, bool):
        raise TypeError(f"clip_x0 = {clip_x0!r}: must be a bool")
    return clip_x0


def check_eta(eta) -> float:
    """DDIM's."""
    if isinstance(eta, bool) or not isinstance(eta, numbers.Real):
        raise TypeError(f"eta = {eta!r}: must be a float in [0, 1]")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be in [0, 1]")
    return float(eta)


def check_sampler(sampler, eta) -> str:
    """The sampler's name, and that its eta is 0 where it has none."""
    if not isinstance(sampler, str) or sampler not in SAMPLER_NAMES:
        raise ValueError(f"sampler = {sampler!r}: must be one of {', '.join(map(repr, SAMPLER_NAMES))}")
    if sampler != "ddim" and eta != 0:
        raise ValueError(f"eta = {eta!r}: only sampler 'ddim' has it, {sampler!r} takes 0")
    return sampler


@contextlib.contextmanager
def progress_bar(progress: bool, total: int, what: str = "sampling", unit: str = "step") -> Iterator:
    """Yields what to call after each step."""
    bar = None
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            warnings.warn("progress: tqdm is not installed, so there is no progress bar", stacklevel=3)
        else:
            bar = tqdm(total=total, desc=what, unit=unit)
    try:
        yield (lambda: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()
