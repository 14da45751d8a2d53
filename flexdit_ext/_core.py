"""What every custom op needs from the C++ library: dtypes, threads, workspaces."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

for _name in ("float32", "bfloat16", "float16", "float64"):
    _C.register_dtype(getattr(torch, _name), getattr(_C.DType, _name))

_local = threading.local()


def threads() -> int:
    """torch.set_num_threads and OMP_NUM_THREADS hold for this library, too."""
    return torch.get_num_threads()


def workspace(nbytes: int) -> Tensor:
    """Scratch memory of this thread, valid until its next op. Kept, because fresh pages cost more than most ops."""
    nbytes = max(nbytes, 64)  # an empty tensor has no address
    kept = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < nbytes:
        _local.workspace = None  # give the old one back first
        kept = _local.workspace = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return kept


def rows(x: Tensor) -> Tensor:
    """x if the kernels can read its rows in place, else a contiguous copy."""
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return x.contiguous()


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def require_cpu(op: str, parameters: Sequence[Tensor] = (), **tensors: Tensor | None) -> None:
    """This build computes on the CPU only; a tensor elsewhere must not be read as if it were there."""
    for name, tensor in (*tensors.items(), *((f"parameters[{i}]", p) for i, p in enumerate(parameters))):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} is on {tensor.device}, this build of flexdit_ext computes on the CPU only")
