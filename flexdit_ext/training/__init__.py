"""Training of FlexDiT, FlexPixArt and FlexLatte that can be trusted: `flexdit train` and its parts. Needs
flexdit_ext[train]."""

from .config import TrainingConfig, load_config
from .loop import FINISHED, TERMINATED, Trainer, train
from .parallel import TrainingError
from .setup import build_model, set_up
from .state import load_average

__all__ = [
    "FINISHED",
    "TERMINATED",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "build_model",
    "load_average",
    "load_config",
    "set_up",
    "train",
]
