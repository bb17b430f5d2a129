"""Signals that end a run at a checkpoint."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mdm_plugin.distributed.world import World

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """SIGTERM (preemption) or SIGINT (Ctrl-C): finish the step, save, and exit with 128 + signal.

    A second signal ends the process at once. What comes soon after the first is no second one:
    torchrun passes on a Ctrl-C that its processes have already had from the terminal, and a SIGTERM
    that SLURM has sent to all of them.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        # Ranks agree over the CPU, without waiting for the device.
        apart = world.size > 1 and world.device.type != "cpu"
        self._group = dist.new_group(backend="gloo") if apart else None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            if self.world.rank == 0:
                name = signal.Signals(number).name
                print(f"\n{name}: finishing the step and saving; again to exit at once", flush=True)
        elif now - self._since > (1 if number == signal.SIGINT else 10):
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal that any rank has had, 0 for none. Called on every rank, once a step."""
        if self.world.size == 1:
            return self.number
        number = torch.tensor(self.number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)
