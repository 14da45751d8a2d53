"""FlexDiT: diffusion transformers with dynamic token density (arXiv 2412.06028), for training and inference."""

from . import _core as _core  # registers dtypes with the C++ library
from . import convert, diffusion, ops, reference
from .config import FlexDiTConfig
from .config_single import FlexLatteConfig, FlexPixArtConfig
from .layout import TokenLayout
from .model import FlexDiT
from .sampler import QueueFull, Sampler, Session
from .sampling import sample
from .schedule import DensitySchedule
from .single_model import FlexLatte, FlexPixArt
from .version import __version__

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
]
