"""What every custom op needs from the C++ library: dtypes, devices, workspaces."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

for _name in ("float32", "bfloat16", "float16", "float64"):
    _C.register_dtype(getattr(torch, _name), getattr(_C.DType, _name))

_local = threading.local()

# What the CUDA kernels were compiled for, None without them.
CUDA_ARCHITECTURES: str | None = _C.build_info()["cuda"]


def execution(like: Tensor) -> _C.Execution:
    """Where an op on such tensors runs: the GPU's current stream, or the CPU with torch's number of threads, so that
    torch.set_num_threads and OMP_NUM_THREADS hold for this library, too."""
    if like.is_cuda:
        return _C.Execution(device_index=like.device.index, stream=torch.cuda.current_stream(like.device).cuda_stream)
    return _C.Execution(threads=torch.get_num_threads())


def workspace(nbytes: int, like: Tensor) -> Tensor:
    """Scratch memory where `like` is. On the CPU it is this thread's and valid until its next op: kept, because fresh
    pages cost more than most ops. torch's allocator keeps a GPU's, in the order of the stream."""
    nbytes = max(nbytes, 64)  # an empty tensor has no address
    if like.is_cuda:
        return torch.empty(nbytes, dtype=torch.uint8, device=like.device)
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


def require_device(op: str, parameters: Sequence[Tensor] = (), **tensors: Tensor | None) -> None:
    """All tensors of a call in one place where this build computes; one elsewhere must not be read as if it were
    there."""
    named = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, home = named[0][0], named[0][1].device
    if home.type == "cuda" and not CUDA_ARCHITECTURES:
        raise ValueError(
            f"{op}: {first} is on {home}, but this build of flexdit_ext has no CUDA backend: install it where nvcc is "
            "found (`flexdit info` prints what was built), or move the model and its inputs to the CPU"
        )
    if home.type not in ("cpu", "cuda"):
        raise ValueError(f"{op}: {first} is on {home}, flexdit_ext computes on the CPU and on CUDA devices")
    for name, tensor in (*named, *((f"parameters[{i}]", p) for i, p in enumerate(parameters))):
        if tensor.device != home:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {home}: they must agree")
