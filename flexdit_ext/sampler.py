"""The sampling engine: the whole loop in C++, and requests of any age, sampler, guidance and size in one batch."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import numpy as np

from . import _C, _sampler_numpy
from ._checks import Grid, check_count, check_grid
from ._conditions import Config, check_batch, check_channels, check_guidance, check_one, check_size, dense_grid
from ._requests import (
    check_clip_x0,
    check_eta,
    check_grids,
    check_int,
    check_interval,
    check_sampler,
    check_seeds,
    check_step_count,
    kept_timesteps,
    progress_bar,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .model import FlexDiT
    from .single_model import FlexLatte, FlexPixArt

    Array = Tensor | np.ndarray

__all__ = ["QueueFull", "Sampler", "Session"]

QueueFull = _C.QueueFull
Latents = TypeVar("Latents")  # what a caller gets: Tensor, or numpy.ndarray without torch
_MODULATION_BYTES = 256 << 20
_NO_SIZES = (0.0, 0.0)  # the resolution of a request to a model without size_conditions


class Sampler(Generic[Latents]):
    """A model's weights prepared for sampling; the images are those of flexdit_ext.sample, on a CPU with AVX-512 to the
    bit in float32 and bfloat16, of FlexPixArt and FlexLatte those of sample_conditional; else up to rounding.

    Its own copy: adapters of peft merged, modulation layers in one matrix, packed for the CPU's products, for a GPU
    pooling blocks folded; changes of the model do not reach it. The work runs on the model's device, on a GPU in its
    current stream and from captured graphs. Without torch, from_pretrained and from_arrays make one whose latents are
    numpy arrays.

    Args:
        model: FlexDiT, FlexPixArt or FlexLatte.
        dtype: to compute with; None is the model's. The solver's state is float32 (float64 for float64).
        modulation_bytes: memory for the modulations of steps to come, which are computed together.

    Attributes: config, and of the latents dtype and device (names, where they are numpy's).

    Raises TypeError or ValueError naming the argument, RuntimeError where the device refuses.
    """

    def __init__(
        self: Sampler[Tensor],
        model: FlexDiT | FlexPixArt | FlexLatte,
        dtype: torch.dtype | None = None,
        *,
        modulation_bytes: int = _MODULATION_BYTES,
    ):
        if not _is_model(model):
            raise TypeError(
                f"model is {type(model).__name__}, must be a FlexDiT, FlexPixArt or FlexLatte; "
                "Sampler.from_pretrained takes a checkpoint"
            )
        from . import _sampler_torch

        self._set(model.config, modulation_bytes, *_sampler_torch.prepare(model, dtype))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: str | None = None,
        device: str = "cpu",
        *,
        threads: int | None = None,
        modulation_bytes: int = _MODULATION_BYTES,
    ) -> Sampler[np.ndarray]:
        """A sampler of what save_pretrained wrote, read by the C++ library: torch is not needed, and latents are numpy
        arrays, float32 (float64 in float64).

        path: the folder of a FlexDiT, FlexPixArt or FlexLatte, its model.safetensors, or the index of
            one in shards.
        dtype: to compute with, "float32", "bfloat16", on the CPU "float64", on a GPU "float16"; None is the file's.
        device: "cpu", "cuda" or "cuda:1"; there the work runs in the default stream.
        threads: on the CPU; None is OpenMP's number (OMP_NUM_THREADS).

        Raises FileNotFoundError, ValueError or TypeError naming the file or the argument.
        """
        sampler = cls.__new__(cls)
        sampler._set(*_sampler_numpy.from_pretrained(path, dtype, device, threads, modulation_bytes))
        return sampler

    @classmethod
    def from_arrays(
        cls,
        config: Config,
        arrays: Mapping[str, np.ndarray],
        device: str = "cpu",
        *,
        threads: int | None = None,
        modulation_bytes: int = _MODULATION_BYTES,
    ) -> Sampler[np.ndarray]:
        """The same of numpy arrays by the names of the model's state_dict, all float32 or all float64."""
        sampler = cls.__new__(cls)
        sampler._set(config, modulation_bytes, *_sampler_numpy.from_arrays(config, arrays, device, threads))
        return sampler

    def _set(self, config: Config, modulation_bytes: int, core, dtype, device, latents) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self._modulation_bytes = check_count("modulation_bytes", modulation_bytes, 1, 2**62)
        self._core, self._latents = core, latents  # latents: the arrays that sessions give -> what the caller gets
        self._lock, self._session = threading.Lock(), None

    def __copy__(self) -> Sampler[Latents]:
        """Another one on the same prepared weights, which never change."""
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_lock": threading.Lock(), "_session": None}
        return twin

    def __deepcopy__(self, memo) -> Sampler[Latents]:
        return self.__copy__()

    def __reduce_ex__(self, protocol):
        raise TypeError("a Sampler cannot be pickled: pickle or save its model and make a new Sampler of it")

    def sample(
        self,
        y: Array | Sequence[int] | None = None,
        steps: int | str = 50,
        sampler: str = "ddim",
        cfg_scale: float | Sequence[float] | Array = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        caption: Array | None = None,
        caption_mask: Array | None = None,
        null_caption: Array | None = None,
        null_caption_mask: Array | None = None,
        resolution: Array | Sequence[Sequence[float]] | None = None,
        aspect_ratio: Array | Sequence[float] | None = None,
        frames: int | None = None,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        grid=None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | str | None = None,
        clip_x0: bool = False,
        batch_size: int | None = None,
        start_index: int = 0,
        progress: bool = False,
    ) -> Latents:
        """Latents [B, C, H, W], of a FlexLatte [B, C, F, H, W], on the sampler's device, in its dtype. Arguments as
        flexdit_ext.sample, size as Session.add, and for a model that reads them:

        caption: [B, L, caption_channels], the text encoder's output, L up to max_caption_tokens; any float dtype.
        caption_mask: [B, L] bool, true where there is a token; None: everywhere.
        null_caption, null_caption_mask: the same of the passes without condition, one for all or one per sample; where
            cfg_scale is not 1.
        resolution: [B, 2] height and width in pixels, aspect_ratio: [B] height / width.
        frames: F of the clips, up to num_frames, which None means.

        y is None where the model has no classes; without captions, too, a list of seeds says how many clips there are.
        In these models guidance_channels None is "all".
        """
        given = {
            "y": y,
            "caption": caption,
            "caption_mask": caption_mask,
            "null_caption": null_caption,
            "null_caption_mask": null_caption_mask,
            "resolution": resolution,
            "aspect_ratio": aspect_ratio,
            "frames": frames,
        }
        conditions = check_batch(self.config, given, seed)
        total = len(conditions)
        scales = check_guidance(self.config, cfg_scale, total, null_caption)
        seeds = check_seeds(seed, check_int("start_index", start_index, 0, 2**62), total)
        size = None if size is None else check_size(size, self.config)
        grids = check_grids(grid, total)
        for name, one in _named_grids(grids):
            self.config.check_sparse_grid(name, one, dense_grid(self.config, size, conditions[0]["frames"]))
        batch_size = total if batch_size is None else check_int("batch_size", batch_size, 1, 2**31 - 1)
        table = _table(self.config, sampler, steps, eta, clip_x0)
        interval = check_interval(guidance_interval)
        channels = check_channels(guidance_channels, self.config)

        def request(i: int) -> tuple:
            scale = 1.0 if scales is None else float(scales[i])
            sparse = grids[i] if isinstance(grids, list) else grids
            return conditions[i], seeds[i], table, scale, interval, size, sparse, clip_x0

        passes = math.ceil(total / batch_size) * len(table)
        with self._lock, progress_bar(progress, passes) as tick:
            session, ids = self._kept_session(batch_size, channels), []
            try:
                ids = [session._add(*request(i)) for i in range(total)]
                while session.step():
                    tick()
                tick()
                return self._latents(np.stack([session._image(i) for i in ids]))
            except BaseException:  # leave nothing behind for the next call
                self._session = None
                raise

    def _kept_session(self, batch_size: int, guidance_channels: int) -> Session[Latents]:
        """The last call's session if it fits, because it has the plans and captured graphs."""
        key = (batch_size, guidance_channels)
        if self._session is None or self._session[0] != key:
            self._session = None  # give its memory back first
            self._session = (key, self.session(batch_size, 2**62, guidance_channels=guidance_channels))
        return self._session[1]

    def session(
        self, max_batch: int = 64, queue_capacity: int = 1024, *, guidance_channels: int | str | None = None
    ) -> Session[Latents]:
        """Continuous batching: requests join and leave at any step.

        max_batch: requests that advance together; queue_capacity: requests that may wait for a place.
        """
        return Session(self, max_batch, queue_capacity, guidance_channels)


class Session(Generic[Latents]):
    """Requests that advance together, each with its own label or caption, seed, steps, sampler, guidance, size and
    grid.

    A request's image does not depend on its company. All methods may be called by any thread; of several that call
    step, one waits for the other. Made by Sampler.session.
    """

    def __init__(
        self, sampler: Sampler[Latents], max_batch: int, queue_capacity: int, guidance_channels: int | str | None
    ):
        self._config, self._latents = sampler.config, sampler._latents
        self._core = _C.Session(
            model=sampler._core,
            max_batch=check_count("max_batch", max_batch, 1, 2**31 - 1),
            queue_capacity=check_count("queue_capacity", queue_capacity, 1, 2**62),
            guided_channels=check_channels(guidance_channels, sampler.config),
            modulation_bytes=sampler._modulation_bytes,
        )

    def __reduce_ex__(self, protocol):
        raise TypeError("a Session can be neither copied nor pickled: make another with Sampler.session")

    def add(
        self,
        label: int | None = None,
        steps: int | str = 50,
        sampler: str = "ddim",
        cfg_scale: float = 1.0,
        seed: int = 0,
        *,
        caption: Array | None = None,
        null_caption: Array | None = None,
        resolution: tuple[float, float] | None = None,
        aspect_ratio: float | None = None,
        frames: int | None = None,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        grid: Grid | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_x0: bool = False,
    ) -> int:
        """Puts a request into the queue and returns its id. Arguments as Sampler.sample, those that it has per sample
        without the first axis, captions [L, caption_channels] without padding; the image is the one that
        sample([label], ..., seed=seed) gives.

        size: (height, width) of the latent, multiples of the patch; None is the model's. Other sizes get the same
            position embedding rule and the schedule's grids in proportion.

        Raises QueueFull when queue_capacity requests wait, TypeError or ValueError naming the argument.
        """
        config = self._config
        given = {
            "label": label,
            "caption": caption,
            "null_caption": null_caption,
            "resolution": resolution,
            "aspect_ratio": aspect_ratio,
            "frames": frames,
        }
        conditions = check_one(config, given)
        size = None if size is None else check_size(size, config)
        if grid is not None:
            dense = dense_grid(config, size, conditions["frames"])
            grid = config.check_sparse_grid("grid", check_grid("grid", grid), dense)
        scales = check_guidance(config, cfg_scale, 1, null_caption)
        return self._add(
            conditions,
            check_seeds([check_int("seed", seed, 0, 2**64 - 1)], 0, 1)[0],
            _table(config, sampler, steps, eta, clip_x0),
            1.0 if scales is None else float(scales[0]),
            check_interval(guidance_interval),
            size,
            grid,
            clip_x0,
        )

    def _add(self, conditions: dict, seed, table, scale, interval, size, grid, clip_x0) -> int:
        return self._core.add(
            label=conditions.get("label", 0),
            seed=seed,
            steps=table,
            guidance=scale,
            interval=interval,
            size=(0, 0) if size is None else size,
            grid=grid,
            clip_x0=clip_x0,
            frames=conditions["frames"],
            caption=conditions.get("caption"),
            null_caption=None if scale == 1 else conditions.get("null_caption"),
            resolution=conditions.get("resolution", _NO_SIZES),
            aspect_ratio=conditions.get("aspect_ratio", 0.0),
        )

    def step(self) -> int:
        """Lets queued requests in and advances every active one by one pass of the model; the number of requests left.

        Raises RuntimeError when the device fails: the requests of that pass have failed, the session goes on.
        """
        return self._core.step()

    def cancel(self, request: int) -> bool:
        """Whether the request was still queued or active; it leaves before the next step."""
        return self._core.cancel(_check_id(request))

    def state(self, request: int) -> str:
        """ "queued", "active", "finished", "failed", or "unknown": never there, cancelled, or taken."""
        return self._core.state(_check_id(request))

    @overload
    def take(self, request: int) -> Latents | None: ...
    @overload
    def take(self, request: None = None) -> dict[int, Latents | RuntimeError]: ...
    def take(self, request=None):
        """The latent [C, H, W], of a clip [C, F, H, W], of a finished request, which is then forgotten; None while
        it is not finished, and RuntimeError raised if it failed. Without `request` all that are finished, by id, errors
        as values."""
        if request is None:
            return {
                key: RuntimeError(error) if image is None else self._latents(image)
                for key, image, error in self._core.take_all()
            }
        image = self._image(request)
        return None if image is None else self._latents(image)

    def _image(self, request: int) -> np.ndarray | None:
        finished = self._core.take(_check_id(request))
        if finished is None:
            return None
        _, image, error = finished
        if image is None:
            raise RuntimeError(error)
        return image

    @property
    def active(self) -> int:
        """Requests that advance at the moment."""
        return self._core.active

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._core.queued


def _check_id(request) -> int:
    return check_int("request", request, -(2**63), 2**63 - 1)  # any int may be asked for


def _is_model(model) -> bool:
    """Their modules are loaded where there are models."""
    kinds = (("model", "FlexDiT"), ("single_model", "SingleFlexDiT"))
    modules = [(sys.modules.get(f"{__package__}.{module}"), name) for module, name in kinds]
    return any(module is not None and isinstance(model, getattr(module, name)) for module, name in modules)


def _named_grids(grids) -> list[tuple[str, Grid]]:
    if grids is None:
        return []
    return [(f"grid[{i}]", one) for i, one in enumerate(grids)] if isinstance(grids, list) else [("grid", grids)]


def _table(config: Config, sampler: str, steps: int | str, eta: float, clip_x0: bool) -> list:
    """The sampler's numbers, the C++ library's own, so that a C++ program's image is the same to the bit."""
    check_sampler(sampler, eta)
    check_clip_x0(clip_x0)
    eta = check_eta(eta) if sampler == "ddim" else 0.0
    kept = kept_timesteps(steps) if sampler in ("ddim", "ddpm") else check_step_count(steps)
    return _C.sampler_steps(sampler, kept, eta, config.out_channels == 2 * config.in_channels)
