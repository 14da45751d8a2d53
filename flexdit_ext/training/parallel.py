"""One process or several: accelerate brings up the processes and DDP, torch's fully_shard is FSDP2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .config import TrainingConfig
from .families import BLOCKS


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says where it was and what is left."""


class Parallel:
    """The processes of a run (as torchrun or `accelerate launch` started them), and the model across them.

    accelerate's own FSDP2 is for GPUs alone and calls fully_shard, too; called here it is the same on CPU and GPU.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        device = config.parallel.device
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("parallel.device is 'cuda', but torch sees no GPU")
        self.accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="no",  # autocast is the trainer's
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    bucket_cap_mb=config.parallel.bucket_mb, broadcast_buffers=False, gradient_as_bucket_view=True
                )
            ],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.sharded = config.parallel.strategy == "fsdp2" and self.world > 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call, with `model`'s parameters on the device and, with FSDP2, sharded in place."""
        model.to(self.device)
        if self.world == 1:
            return model
        if self.sharded:
            self._shard(model)
            return model
        return self.accelerator.prepare_model(model)

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # timesteps must not lose their digits
        if self.config.precision == "bfloat16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in list(model.modules()):
            if isinstance(module, BLOCKS):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, last: bool):
        """Around a forward and backward pass: gradients are reduced in the last pass of a step alone."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(wrapped):
                yield

    def gather(self, values: Tensor) -> Tensor:
        """[n] of every rank -> [world, n], without waiting for a GPU."""
        return self.accelerator.gather(values).view(self.world, -1)

    def from_main(self, value: Any) -> Any:
        """The main process's value, on all of them."""
        return broadcast_object_list([value])[0] if self.world > 1 else value

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Runs on the main process; its result, or its exception, is everybody's."""
        result = error = None
        if self.is_main:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, problem = self.from_main((result, None if error is None else str(error)))
        if error is not None:
            raise error
        if problem is not None:
            raise TrainingError(f"rank 0: {problem}")
        return result

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors on the main process's CPU, None on the others; every rank has to call it."""
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
            if self.is_main:
                whole[name] = tensor.detach().cpu()
        return whole if self.is_main else None

    def close(self) -> None:
        if self.world > 1:
            self.accelerator.free_memory()  # the module that it has wrapped
        if dist.is_initialized():
            dist.destroy_process_group()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor
