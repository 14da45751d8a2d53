"""The sampling engine: the whole loop in C++, and requests of any age, sampler, guidance and size in one batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from ._adapters import merged_state_dict
from ._arguments import DTYPES, Grid, check_count, check_grid
from ._core import execution, require_device
from .diffusion.samplers import make_sampler
from .model import FlexDiT
from .sampling import (
    check_cfg_scale,
    check_grids,
    check_guidance_channels,
    check_int,
    check_interval,
    check_labels,
    check_seeds,
    progress_bar,
)

__all__ = ["QueueFull", "Sampler", "Session"]

QueueFull = _C.QueueFull
_MODULATION_BYTES = 256 << 20
_MAX_SIDE = 1 << 14  # of a latent image, as csrc/model/session.cpp has it


class Sampler:
    """A FlexDiT's weights prepared for sampling; the images are those of flexdit_ext.sample, up to rounding.

    Its own copy: adapters of peft merged, modulation layers in one matrix, pooling blocks folded, packed for the CPU's
    products; changes of the model do not reach it. The work runs on the model's device, on a GPU in its current stream
    and from captured graphs.

    Args:
        model: FlexDiT.
        dtype: to compute with; None is the model's. The solver's state is float32 (float64 for float64).
        modulation_bytes: memory for the modulations of steps to come, which are computed together.

    Raises TypeError or ValueError naming the argument, RuntimeError where the device refuses.
    """

    def __init__(self, model: FlexDiT, dtype: torch.dtype | None = None, *, modulation_bytes: int = _MODULATION_BYTES):
        if not isinstance(model, FlexDiT):
            raise TypeError(f"model is {type(model).__name__}, must be a FlexDiT")
        if model.segment_adapters is not None:
            raise ValueError(
                "model has an adapter for each density segment: flexdit_ext.lora.merge gives one's weights"
            )
        self.config = model.config
        state = merged_state_dict(model)
        require_device("Sampler", model=state["pos_embed"])
        self.device = state["pos_embed"].device
        self.dtype = check_dtype(state["pos_embed"].dtype if dtype is None else dtype, self.device)
        self._modulation_bytes = check_count("modulation_bytes", modulation_bytes, 1, 2**62)
        names = [name for name, _, _ in _C.model_parameters(self.config.core)]
        parameters = [state[name].detach().to(self.dtype).contiguous() for name in names]
        self._core = _C.SamplingModel(
            config=self.config.core,
            schedule=model.schedule._core,
            parameters=parameters,
            null_label=self.config.num_classes if self.config.class_dropout_prob > 0 else -1,
            exec=execution(parameters[0]),
        )
        self._lock, self._session = threading.Lock(), None

    def __copy__(self) -> Sampler:
        """Another one on the same prepared weights, which never change."""
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_lock": threading.Lock(), "_session": None}
        return twin

    def __deepcopy__(self, memo) -> Sampler:
        return self.__copy__()

    def __reduce_ex__(self, protocol):
        raise TypeError("a Sampler cannot be pickled: pickle or save its FlexDiT and make a new Sampler of it")

    def sample(
        self,
        y: Tensor | Sequence[int],
        steps: int | str = 50,
        sampler: str = "ddim",
        cfg_scale: float | Sequence[float] | Tensor = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        grid=None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | str | None = None,
        clip_x0: bool = False,
        batch_size: int | None = None,
        start_index: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Latents [B, C, H, W] for the labels y, on the sampler's device, in its dtype. Arguments as
        flexdit_ext.sample, and size as Session.add."""
        labels = check_labels(y, self.config)
        total = len(labels)
        scales = check_cfg_scale(cfg_scale, total, self.config)
        seeds = check_seeds(seed, check_int("start_index", start_index, 0, 2**62), total)
        size = None if size is None else check_size(size, self.config)
        grids = check_grids(grid, total)
        for name, one in _named_grids(grids):
            self.config.check_sparse_grid(name, one, _dense_grid(size, self.config))
        batch_size = total if batch_size is None else check_int("batch_size", batch_size, 1, 2**31 - 1)
        table = _table(self.config, sampler, steps, eta, clip_x0)
        interval = check_interval(guidance_interval)
        channels = check_guidance_channels(guidance_channels, self.config)

        def request(i: int) -> tuple:
            scale = 1.0 if scales is None else float(scales[i])
            sparse = grids[i] if isinstance(grids, list) else grids
            return int(labels[i]), seeds[i], table, scale, interval, size, sparse, clip_x0

        passes = math.ceil(total / batch_size) * len(table)
        with self._lock, progress_bar(progress, passes) as tick:
            session, ids = self._kept_session(batch_size, channels), []
            try:
                ids = [session._add(*request(i)) for i in range(total)]
                while session.step():
                    tick()
                tick()
                return torch.stack([session.take(i) for i in ids])
            except BaseException:  # leave nothing behind for the next call
                self._session = None
                raise

    def _kept_session(self, batch_size: int, guidance_channels: int) -> Session:
        """The last call's session if it fits, because it has the plans and captured graphs."""
        key = (batch_size, guidance_channels)
        if self._session is None or self._session[0] != key:
            self._session = None  # give its memory back first
            self._session = (key, self.session(batch_size, 2**62, guidance_channels=guidance_channels))
        return self._session[1]

    def session(
        self, max_batch: int = 64, queue_capacity: int = 1024, *, guidance_channels: int | str | None = None
    ) -> Session:
        """Continuous batching: requests join and leave at any step.

        max_batch: requests that advance together; queue_capacity: requests that may wait for a place.
        """
        return Session(self, max_batch, queue_capacity, guidance_channels)


class Session:
    """Requests that advance together, each with its own label, seed, steps, sampler, guidance, size and grid.

    A request's image does not depend on its company. All methods may be called by any thread; of several that call
    step, one waits for the other. Made by Sampler.session.
    """

    def __init__(self, sampler: Sampler, max_batch: int, queue_capacity: int, guidance_channels: int | str | None):
        self._config, self._dtype, self._device = sampler.config, sampler.dtype, sampler.device
        self._core = _C.Session(
            model=sampler._core,
            max_batch=check_count("max_batch", max_batch, 1, 2**31 - 1),
            queue_capacity=check_count("queue_capacity", queue_capacity, 1, 2**62),
            guided_channels=check_guidance_channels(guidance_channels, sampler.config),
            modulation_bytes=sampler._modulation_bytes,
        )

    def __reduce_ex__(self, protocol):
        raise TypeError("a Session can be neither copied nor pickled: make another with Sampler.session")

    def add(
        self,
        label: int,
        steps: int | str = 50,
        sampler: str = "ddim",
        cfg_scale: float = 1.0,
        seed: int = 0,
        *,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        grid: Grid | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_x0: bool = False,
    ) -> int:
        """Puts a request into the queue and returns its id. Arguments as flexdit_ext.sample; the image is the one that
        sample([label], ..., seed=seed) gives.

        size: (height, width) of the latent, multiples of the patch; None is the model's. Other sizes get the same
            position embedding rule and the schedule's grids in proportion.

        Raises QueueFull when queue_capacity requests wait, TypeError or ValueError naming the argument.
        """
        config = self._config
        size = None if size is None else check_size(size, config)
        if grid is not None:
            grid = config.check_sparse_grid("grid", check_grid("grid", grid), _dense_grid(size, config))
        scales = check_cfg_scale(cfg_scale, 1, config)
        return self._add(
            check_int("label", label, 0, config.num_classes - (0 if config.class_dropout_prob > 0 else 1)),
            check_seeds([check_int("seed", seed, 0, 2**64 - 1)], 0, 1)[0],
            _table(config, sampler, steps, eta, clip_x0),
            1.0 if scales is None else float(scales[0]),
            check_interval(guidance_interval),
            size,
            grid,
            clip_x0,
        )

    def _add(self, label, seed, table, scale, interval, size, grid, clip_x0) -> int:
        return self._core.add(
            label=label,
            seed=seed,
            steps=table,
            guidance=scale,
            interval=interval,
            size=(0, 0) if size is None else size,
            grid=grid,
            clip_x0=clip_x0,
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

    def take(self, request: int | None = None) -> Tensor | dict[int, Tensor | RuntimeError] | None:
        """The latent [C, H, W] of a finished request, which is then forgotten; None while it is not finished, and
        RuntimeError raised if it failed. Without `request` all that are finished, by id, errors as values."""
        if request is None:
            return {key: self._result(image, error) for key, image, error in self._core.take_all()}
        finished = self._core.take(_check_id(request))
        if finished is None:
            return None
        result = self._result(*finished[1:])
        if isinstance(result, RuntimeError):
            raise result
        return result

    def _result(self, image, error: str) -> Tensor | RuntimeError:
        if image is None:
            return RuntimeError(error)
        return torch.from_numpy(image).to(self._device, self._dtype)

    @property
    def active(self) -> int:
        """Requests that advance at the moment."""
        return self._core.active

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._core.queued


def check_dtype(dtype, device: torch.device) -> torch.dtype:
    known = DTYPES[device.type]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, must be a torch.dtype or None")
    if dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise TypeError(f"dtype is {dtype}, must be one of {names} on {device.type}")
    return dtype


def _check_id(request) -> int:
    return check_int("request", request, -(2**63), 2**63 - 1)  # any int may be asked for


def check_size(size, config) -> tuple[int, int]:
    size = check_grid("size", size)
    if len(size) != 2 or any(side % config.patch_size or side > _MAX_SIDE for side in size):
        raise ValueError(
            f"size is {size}, must be (height, width): multiples of the patch size {config.patch_size}, "
            f"at most {_MAX_SIDE}"
        )
    return size


def _dense_grid(size: tuple[int, int] | None, config) -> tuple[int, int]:
    return config.dense_grid if size is None else (size[0] // config.patch_size, size[1] // config.patch_size)


def _named_grids(grids) -> list[tuple[str, Grid]]:
    if grids is None:
        return []
    return [(f"grid[{i}]", one) for i, one in enumerate(grids)] if isinstance(grids, list) else [("grid", grids)]


def _table(config, sampler: str, steps: int | str, eta: float, clip_x0: bool) -> list:
    """The sampler's numbers as the C++ library takes them: its own, so that a C++ program's image is the same to the
    bit, but for respaced timesteps, which only Python knows."""
    made = make_sampler(sampler, steps, eta, clip_x0)  # checks the arguments
    learned = config.out_channels == 2 * config.in_channels
    if isinstance(steps, int):
        return _C.sampler_steps(sampler, steps, eta, learned)
    return [
        _C.SamplerStep(
            timestep=float(step.timestep),
            x0_from_x=step.x0_from_x,
            x0_from_output=step.x0_from_output,
            x_coef=step.x_coef,
            x0_coef=step.x0_coef,
            x0_previous_coef=step.x0_previous_coef,
            noise_coef=step.noise_coef,
            log_variances=step.log_variances if learned else None,
        )
        for step in made.steps
    ]
