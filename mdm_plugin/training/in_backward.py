"""The optimizer's step within the backward pass: no gradient outlives its use."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer


class StepInBackward:
    """Each parameter is stepped, and its gradient freed, as soon as that is whole.

    One optimizer for all parameters, so that schedules and checkpoints know no difference: when a
    gradient is whole, it is the only one there, and the optimizer steps what has a gradient.
    Active inside ``with`` ``active()`` alone: P-POTS's probe runs backward passes too.

    Args:
        optimizer: of the parameters to train.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.on = optimizer, False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        if self.on:
            self.optimizer.step()
            parameter.grad = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this is open, backward passes step."""
        self.on = True
        try:
            yield
        finally:
            self.on = False
