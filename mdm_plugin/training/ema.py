"""The average of the weights over training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mdm_plugin.checkpoint.parts import Average


class EMA(Average):
    """Exponential moving average of the weights, for evaluation and export.

    Our reading of the paper's *EMA*, of which only the name is known to us. After each
    optimizer step, average ← d·average + (1 − d)·weights, with d = min(decay, (1 + s)/(10 + s))
    at step s, so that the first weights are soon forgotten. Training itself goes on from the
    weights. A checkpoint holds the average in ema/.

    Args:
        model: whose weights; sharded parameters give a sharded average.
        decay: d, in [0, 1).

    Raises:
        ValueError: if ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: use 0 up to below 1")
        self.decay = decay
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]

    def state_dict(self) -> dict[str, Any]:
        """The average, one tensor for each trained parameter; sharded as they are."""
        return {"average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an average of the same model."""
        for own, stored in zip(self.average, state_dict["average"], strict=True):
            own.copy_(stored)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (0, 1, …)."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average(self.average, [p.detach() for p in self.weights], step)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model has the average for its weights in here; what is loaded then is the average."""
        own = [p.detach().clone() for p in self.weights]
        try:
            for parameter, mean in zip(self.weights, self.average, strict=True):
                parameter.copy_(mean)
            yield
            for parameter, mean in zip(self.weights, self.average, strict=True):
                mean.copy_(parameter)
        finally:
            for parameter, weight in zip(self.weights, own, strict=True):
                parameter.copy_(weight)
