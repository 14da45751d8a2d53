"""The training loop: steps, averages, checkpoints, and what ends a run."""

from __future__ import annotations

import contextlib
import fcntl
import math
import signal
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .._vae import load_decoder
from ..diffusion import ddpm_loss, flow_loss
from ..diffusion.ddpm import NUM_TIMESTEPS, at_least_float32
from . import state as checkpoints
from .config import FREE_PATHS, FREE_TABLES, TrainingConfig, changed_keys
from .data import batches, rank_slots
from .draws import StepDraws, timesteps
from .families import BLOCKS
from .log import RunLog, Window, peak_tflops
from .parallel import Parallel, TrainingError, local
from .pictures import sample_grid, shown_conditions
from .setup import set_up

FINISHED, TERMINATED = 0, 128 + signal.SIGTERM
MODEL_NAME = "model"  # in the run's folder: the averaged model at the end


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of step `step`, 0 being the first."""
    settings = config.optimizer
    rate = settings.learning_rate
    if step < settings.warmup_steps:
        return rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "cosine":
        progress = (step - settings.warmup_steps) / max(1, config.steps - settings.warmup_steps)
        floor = settings.final_learning_rate
        return floor + (rate - floor) * (1 + math.cos(math.pi * progress)) / 2
    return rate


def average_decay(config: TrainingConfig, step: int) -> float:
    decay = config.average.decay
    return min(decay, (step + 1) / (step + 10)) if config.average.warmup else decay


@dataclass
class _Pending:
    """A step whose numbers the host has not read yet; reading them at once would make it wait for the GPU."""

    step: int
    draws: StepDraws
    values: Tensor  # [world, B / world + 1]: a loss for each slot of the rank, and whether it was asked to end
    norm: Tensor
    macs: float


class Trainer:
    """A run from its configuration; `run` trains to the end, from the newest checkpoint in the run's folder if there is
    one. Raises OSError, TypeError, ValueError or TrainingError before the first step if anything is wrong."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.folder = Path(config.output)
        self.wrapped = self._lock = None
        self.parallel = Parallel(config)
        with self._closing_on_error():
            self._prepare()

    def close(self) -> None:
        """Frees the run's folder and leaves the other processes. torch can wait for itself for ever where a DDP module
        outlives its process group, so it goes first."""
        self.wrapped = None
        self.parallel.close()
        if self._lock is not None:
            self._lock.close()

    @contextlib.contextmanager
    def _closing_on_error(self):
        try:
            yield
        except BaseException as error:
            cause = error if self.parallel.world > 1 else None
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)  # they may hold the DDP module
                cause = cause.__context__
            self.close()
            raise

    # ---- before the first step

    def _prepare(self) -> None:
        config, parallel = self.config, self.parallel
        setup = set_up(config, parallel.world)
        self.family, self.model, self.null = setup.family, setup.model, setup.null
        self.data, self.draws = setup.data, setup.draws
        self._decode = None
        parallel.on_main(self._load_decoder)
        parallel.on_main(self._claim_folder)
        # In eval(): conditions are dropped here, by the draws of their slots.
        self.model.eval()
        self.model.activation_checkpointing = config.activation_checkpointing
        self.teacher = None if setup.teacher is None else setup.teacher.to(parallel.device)
        self.wrapped = parallel.wrap(self.model)
        if config.compile:
            self._compile()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = self._new_optimizer()
        self.slots = rank_slots(config, parallel.rank, parallel.world)
        self.step, self._saved_step = 0, None
        self._asked_to_end = self._ending = False
        self._pending: _Pending | None = None
        self._sample_macs = lru_cache(maxsize=None)(partial(self.family.macs, self.model))
        self.window = Window(config.log.buckets, self._resume())

    def _load_decoder(self) -> None:
        log, device = self.config.log, self.parallel.device
        if log.vae is not None and log.sample_every:
            self._decode = load_decoder(Path(log.vae), self.model.config.in_channels, device)

    def _claim_folder(self) -> None:
        """The run's folder, with a lock that the kernel releases when the process ends, however it ends."""
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (kept open as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise TrainingError(f"output {self.folder} belongs to a run that is still going on") from None
        except OSError as error:
            warnings.warn(f"{self.folder} cannot be locked ({error.strerror}): start one run in it only", stacklevel=2)
        checkpoints.remove_leftovers(self.folder / "checkpoints")
        self._lock = lock

    def _compile(self) -> None:
        """In place, so that names stay. FSDP2 gathers weights in hooks around a block: what is within is compiled."""
        if not self.parallel.sharded:
            self.model.compile()
            return
        for block in self.model.modules():
            if isinstance(block, BLOCKS):
                block.forward = torch.compile(block.forward)

    def _new_optimizer(self) -> torch.optim.AdamW:
        settings = self.config.optimizer
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=self.parallel.device.type == "cuda",
        )
        home = self.parallel.device if self.parallel.device.type == "cuda" else "cpu"
        for parameter in self.parameters.values():  # as AdamW's first step would
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=home),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, under its names there; loading fills the same tensors."""
        tensors = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return tensors

    def _resume(self) -> dict | None:
        """Goes on from the newest good checkpoint; returns the log's window in it."""
        root = self.folder / "checkpoints"
        path = self.parallel.on_main(lambda: checkpoints.newest_good(root))
        if path is None:
            return None
        self.parallel.on_main(lambda: checkpoints.prune(root, self.config.checkpoint.keep))
        state = checkpoints.read_state(path)
        if changes := changed_keys(state["config"], self.config.to_dict()):
            raise ValueError(
                f"output {self.folder} holds a run of another configuration ({'; '.join(changes)}); take another output"
                f", or change only {', '.join(FREE_PATHS + FREE_TABLES)} and steps"
            )
        if state["samples"] != len(self.data):
            raise ValueError(
                f"data has {len(self.data)} samples, the run in {self.folder} began with {state['samples']}"
            )
        checkpoints.load(path, self._tensors(), alone=self.parallel.world == 1)
        self.step = self._saved_step = state["step"]
        for values in self.optimizer.state.values():
            values["step"].fill_(self.step)
        return state["window"]

    # ---- the run

    def run(self) -> int:
        """FINISHED, or TERMINATED after SIGTERM or Ctrl-C, with a checkpoint to go on from."""
        config, parallel = self.config, self.parallel
        log = RunLog(self.folder, config.log, self.step, config.steps) if parallel.is_main else None
        try:
            with self._signals():
                self._train(log)
                if self._ending and self.step < config.steps:
                    self._save(must=True)
                    return TERMINATED
            self._finish()
            return FINISHED
        finally:
            if log is not None:
                log.close()

    def _train(self, log: RunLog | None) -> None:
        config = self.config
        source = batches(
            self.data,
            self.draws,
            config,
            self.step,
            self.parallel.rank,
            self.parallel.world,
            pin=self.parallel.device.type == "cuda",
        )
        self.window.go_on()
        while self.step < config.steps and not self._ending:
            pending = self._train_step(source)
            self._settle()
            self._pending = pending
            self.step += 1
            if log is not None:
                log.bar.update()
            self._every_so_often(log)
        self._settle()

    def _every_so_often(self, log: RunLog | None) -> None:
        config, step = self.config, self.step
        at_end = step == config.steps
        logs = step % config.log.every == 0 or at_end
        samples = config.log.sample_every and (step % config.log.sample_every == 0 or at_end)
        saves = step % config.checkpoint.every == 0 or at_end
        if not (logs or samples or saves):
            return
        self._settle()  # nothing that has turned NaN is logged or saved
        self.window.pause()
        if logs:
            if log is not None:
                peak = peak_tflops(config.log, self.parallel.device, config.precision)
                peak = None if peak is None else peak * 1e12 * self.parallel.world
                log.write(self.window.line(step, learning_rate(config, step - 1), peak))
            self.window = Window(config.log.buckets)
        if samples:
            self._sample(log)
        if saves and not self._ending:
            self._save(must=at_end)
        self.window.go_on()

    def _train_step(self, source: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> _Pending:
        draws = self.draws.of_step(self.step)
        self.optimizer.zero_grad()
        losses = []
        for number, slots in enumerate(self.slots):
            with self.parallel.accumulating(self.wrapped, last=number + 1 == len(self.slots)):
                loss = self._loss(*next(source), draws, slots)
                (loss.mean() / len(self.slots)).backward()
            losses.append(loss.detach())
        norm = self._gradient_norm()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self._update_average()
        asked = torch.tensor([float(self._asked_to_end)], device=self.parallel.device)
        values = self.parallel.gather(torch.cat([*losses, asked.to(losses[0].dtype)]))
        return _Pending(self.step, draws, values, norm, self._step_macs(draws))

    def _loss(self, samples: Tensor, conditions: dict[str, Tensor], draws: StepDraws, slots: range) -> Tensor:
        """Per sample, [n]; t stays on the host, where the grids are made from it."""
        config, device, part = self.config, self.parallel.device, slice(slots.start, slots.stop)
        if "y" in conditions:
            self._check_labels(conditions["y"], draws.indices[part])
        samples = _where(draws.flipped[part], samples.flip(-1), samples)
        dropped = {name: _where(draws.dropped[part], value, conditions[name]) for name, value in self.null.items()}
        noise = self.draws.noise(self.step, slots, tuple(samples.shape[1:]))
        t = timesteps(draws.fraction[part], config.loss)
        samples, noise = (tensor.to(device, non_blocking=True) for tensor in (samples, noise))
        conditions = {name: value.to(device, non_blocking=True) for name, value in (conditions | dropped).items()}
        forward = _Forward(self.wrapped, device, config.precision)
        loss_function = ddpm_loss if config.loss == "ddpm" else flow_loss
        grid = self._grids(draws, part)
        if isinstance(grid, list) and config.compile:
            grid = None  # a graph for every list of grids would be too many: one with room for the largest grid
        loss = loss_function(forward, samples, conditions, t, noise, grid=grid).loss
        if self.teacher is not None:
            weight = config.distillation.weight
            loss = (1 - weight) * loss + weight * self._distance_to_teacher(forward)
        return loss

    def _check_labels(self, labels: Tensor, indices: np.ndarray) -> None:
        """Feature folders tell their labels only now."""
        bad = (labels < 0) | (labels >= self.model.config.num_classes)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise TrainingError(
                f"{self.data.name(int(indices[first]))} has the label {int(labels[first])}, "
                f"must be in 0..{self.model.config.num_classes - 1} (model.num_classes)"
            )

    def _grids(self, draws: StepDraws, part: slice):
        """For the model: None where it is dense, one grid, or one of each sample."""
        if not self.model.config.num_sdtm:
            return None
        density = self.config.density
        if density.mode == "fixed":
            return density.grid
        schedule = self.model.schedule
        if density.mode == "piecewise":
            return schedule.grids[draws.segment[part.start]]
        times = timesteps(draws.fraction[part], self.config.loss)
        times = times if self.config.loss == "ddpm" else times * NUM_TIMESTEPS
        return [schedule.grid(t) for t in times.tolist()]

    def _distance_to_teacher(self, forward: _Forward) -> Tensor:
        x, t, conditions = forward.inputs
        with torch.no_grad():
            wanted = _Forward(self.teacher, self.parallel.device, self.config.precision)(x, t, **conditions)
        channels = x.shape[1]
        difference = at_least_float32(forward.output[:, :channels]) - at_least_float32(wanted[:, :channels])
        return difference.square().flatten(1).mean(1)

    def _gradient_norm(self) -> Tensor:
        most = self.config.optimizer.max_gradient_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), most)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def _update_average(self) -> None:
        averages = [local(tensor) for tensor in self.average.values()]
        weights = [local(parameter.detach()) for parameter in self.parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - average_decay(self.config, self.step))

    def _step_macs(self, draws: StepDraws) -> float:
        """Of the forward passes of all ranks."""
        tokens = [None] * self.config.batch_size
        if (captions := self.data.captions) is not None:
            tokens = np.where(draws.dropped, len(captions.null), captions.tokens[draws.indices]).tolist()
        grids = []
        size = self.config.batch_size // self.draws.groups
        for group in range(self.draws.groups):
            of_group = self._grids(draws, slice(group * size, (group + 1) * size))
            grids += of_group if isinstance(of_group, list) else [of_group] * size
        return sum(map(self._sample_macs, grids, tokens))

    # ---- what the host reads

    def _settle(self) -> None:
        """Reads the numbers of the last step. Stops the run, on every rank alike, where one is not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = pending.values.double().cpu().numpy()
        self._ending = self._ending or bool(values[:, -1].any())
        world = self.parallel.world
        losses = np.empty(self.config.batch_size)
        for rank in range(world):
            losses[np.concatenate([list(slots) for slots in rank_slots(self.config, rank, world)])] = values[rank, :-1]
        norm = float(pending.norm)
        if not np.isfinite(losses).all() or not math.isfinite(norm):
            raise TrainingError(self._describe(pending, losses, norm))
        self.window.add(losses, pending.draws.fraction, norm, pending.macs)

    def _describe(self, pending: _Pending, losses: np.ndarray, norm: float) -> str:
        where = f"step {pending.step + 1}"
        lines = [f"the gradient of {where} has the norm {norm}, all losses are finite"]
        if not np.isfinite(losses).all():
            lines = [f"the loss of {where} is not finite"]
        for rank in range(self.parallel.world):
            slots = [slot for part in rank_slots(self.config, rank, self.parallel.world) for slot in part]
            bad = [slot for slot in slots if not math.isfinite(losses[slot])]
            names = ", ".join(
                f"{self.data.name(int(pending.draws.indices[slot]))} (sample {pending.draws.indices[slot]}, t = "
                f"{pending.draws.fraction[slot] * NUM_TIMESTEPS:.0f}, loss {losses[slot]})"
                for slot in bad[:8]
            )
            if bad:
                lines.append(f"rank {rank}: {names}" + (f" and {len(bad) - 8} more" if len(bad) > 8 else ""))
        ids = ", ".join(map(str, pending.draws.indices.tolist()))
        good = checkpoints.checkpoints(self.folder / "checkpoints")
        lines.append(f"the batch: {ids}")
        lines.append(f"last good checkpoint: {good[-1] if good else 'none'}")
        return "; ".join(lines)

    # ---- what the run leaves

    def _save(self, must: bool) -> None:
        """A checkpoint. If it cannot be written a run goes on with the last good one, unless it `must`."""
        state = {
            "step": self.step,
            "samples": len(self.data),
            "config": self.config.to_dict(),
            "family": self.family.name,
            "model": self.model.config.to_dict(),
            "window": self.window.state(),
        }
        root = self.folder / "checkpoints"
        if self._saved_step == self.step:
            return
        try:
            checkpoints.save(root, self.step, self._tensors(), state, self.config.checkpoint.keep, self.parallel)
        except OSError as error:
            good = checkpoints.checkpoints(root)
            message = f"step {self.step} is not saved: {error}; last good checkpoint: {good[-1] if good else 'none'}"
            if must:
                raise TrainingError(message) from error
            if self.parallel.is_main:
                warnings.warn(message, stacklevel=2)
        else:
            self._saved_step = self.step

    def averaged_model(self) -> nn.Module | None:
        """On the main process's CPU, in evaluation mode; None on the others, which have to call it as well."""
        tensors = self.parallel.full(self.model.state_dict() | self.average)
        if tensors is None:
            return None
        with torch.device("meta"):
            model = self.family.model(self.model.config)
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def _sample(self, log: RunLog | None) -> None:
        model = self.averaged_model()
        if model is not None:
            shown = shown_conditions(self.family, self.data, model.config, self.config.log.sample_classes)
            model = model.to(self.parallel.device)
            log.samples(self.step, sample_grid(self.family, model, shown, self.null, self.config, self._decode))

    def _finish(self) -> None:
        model = self.averaged_model()
        self.parallel.on_main(lambda: model.save_pretrained(self.folder / MODEL_NAME))

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C let the step end; a second Ctrl-C does not wait."""

        def ask(number, _):
            if self._asked_to_end and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked_to_end = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Forward:
    """The model as the losses call it, under autocast for bfloat16; remembers the call."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str):
        self.model, self.device, self.precision = model, device, precision

    def __call__(self, x: Tensor, t: Tensor, grid=None, **conditions: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            self.output = self.model(x, t, **conditions, grid=grid)
        self.inputs = (x, t, conditions)
        return self.output


def _where(chosen: np.ndarray, value: Tensor, other: Tensor) -> Tensor:
    """A row of `value` for each sample that is chosen; one row stands for all."""
    return torch.where(torch.from_numpy(chosen).view(-1, *[1] * (other.dim() - 1)), value, other)


def train(config: TrainingConfig) -> int:
    """Trains; returns FINISHED or TERMINATED. See Trainer."""
    trainer = Trainer(config)
    with trainer._closing_on_error():
        status = trainer.run()
    trainer.close()
    return status
