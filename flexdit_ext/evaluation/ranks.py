"""The processes of a run: one, or as many as torchrun started, brought up by accelerate."""

from __future__ import annotations

import os
from datetime import timedelta

import torch


class Ranks:
    """index of count processes, and the device of this one.

    device: a "cuda" without index is the GPU of the process's own. Raises ImportError where several processes need
    accelerate.
    """

    def __init__(self, device: torch.device):
        self._state = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            try:
                from accelerate import PartialState
            except ImportError:
                raise ImportError("several processes need accelerate: pip install flexdit_ext[evaluate]") from None
            # Ranks wait for each other only at the ends, by then for as long as a shard takes.
            self._state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))
            if device.type == "cuda" and device.index is None:
                device = self._state.device
        self.device = device
        self.index = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def agree(self, value):
        """The main process's value, in all of them."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def close(self) -> None:
        """The others may leave before the main process is done."""
        if self._state is not None:
            self._state.destroy_process_group()
