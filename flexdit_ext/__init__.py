"""FlexDiT: diffusion transformers with dynamic token density (arXiv 2412.06028), for training and inference.

Without torch there are the configuration, the schedule and the Sampler, on numpy arrays.
"""

from typing import TYPE_CHECKING

from ._has_torch import HAS_TORCH as _HAS_TORCH
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .sampler import QueueFull, Sampler, Session
from .schedule import DensitySchedule
from .version import __version__

# All of it, not on demand: programs that torch.export has saved need the custom ops once this package is imported.
if TYPE_CHECKING or _HAS_TORCH:
    from . import _core as _core  # registers dtypes with the C++ library
    from . import convert, diffusion, ops, reference
    from .layout import TokenLayout
    from .model import FlexDiT
    from .sampling import sample
    from .sampling_single import sample_conditional
    from .single_model import FlexLatte, FlexPixArt
else:

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(
                f"flexdit_ext.{name} needs PyTorch, which is not installed: pip install 'flexdit_ext[torch]', or the "
                "torch of your choice. Without it there are Sampler.from_pretrained, the configurations and "
                "DensitySchedule"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DensitySchedule",
    "FlexDiT",
    "FlexDiTConfig",
    "FlexLatte",
    "FlexLatteConfig",
    "FlexPixArt",
    "FlexPixArtConfig",
    "QueueFull",
    "Sampler",
    "Session",
    "TokenLayout",
    "__version__",
    "convert",
    "diffusion",
    "ops",
    "reference",
    "sample",
    "sample_conditional",
]
