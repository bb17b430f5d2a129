"""The average of the weights over training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mdm_plugin.checkpoint.parts import Average
from mdm_plugin.distributed.parameters import named_parameters


class EMA(Average):
    """Exponential moving average of the weights, for evaluation and export.

    Our reading of the paper's *EMA*, of which only the name is known to us. After each
    optimizer step, average ← d·average + (1 − d)·weights, with d = min(decay, (1 + s)/(10 + s))
    at step s, so that the first weights are soon forgotten. Training itself goes on from the
    weights. The average is fp32, whatever they are. A checkpoint holds it in ema/.

    Args:
        model: whose weights; sharded parameters give a sharded average.
        decay: d, in [0, 1).

    Raises:
        ValueError: if ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: use 0 up to below 1")
        self.decay, self.model = decay, model
        self.trained = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
        # In bf16 a change of 1 − d would be rounded away.
        self.average = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.trained.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The average of each trained parameter, by its name; sharded as they are."""
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an average of the same model."""
        for name, own in self.average.items():
            own.copy_(state_dict[name])

    def weights(self) -> Mapping[str, Tensor]:
        """The average itself, by parameters' names: what is copied into it is the average."""
        return self.average

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (0, 1, …)."""
        change = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.average.items():
            mean.lerp_(self.trained[name].detach().to(mean.dtype), change)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model has the average for its weights in here, in their dtype."""
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            for name, p in self.trained.items():
                p.copy_(self.average[name])
            self._reshard()
            yield
        finally:
            for name, p in self.trained.items():
                p.copy_(own[name])
            self._reshard()

    def _reshard(self) -> None:
        """Let go of what FSDP2 may still have gathered of other weights: without
        ``fsdp_reshard_after_forward`` a forward without gradients leaves it there."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
