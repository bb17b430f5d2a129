"""The masked-diffusion loss as torchtitan's: hidden states in, a scalar out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torchtitan.components.loss import ChunkedLossWrapper, _LossParallelCrossEntropy

from mdm_plugin.loss import LinearHead, MDMLoss, Targets


class MaskedLoss(ChunkedLossWrapper):
    """``MDMLoss`` where torchtitan has its chunked loss: the head runs on masked positions alone.

    Under tensor parallelism the vocabulary of the head stays split over the ranks (loss parallel):
    each has its part of the masked positions' logits, and sums three numbers for each position with
    the others. A gathered head would cost V · D on each rank, for the same logits on all of them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        normalize: Literal["response", "tokens", "masked"] = "response"
        chunk_size: int = 1024
        """Masked positions per pass of the LM head."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.lm_head: nn.Module | None = None
        self.mdm = MDMLoss(config.normalize, config.chunk_size)
        if compile_config and compile_config.enable and "loss" in compile_config.components:
            self.mdm.compile_chunks(compile_config.backend)
        self.tensor_parallel: ProcessGroup | None = None
        self.vocab_size, self.shift, self.normalizer = 0, False, torch.ones(())
        self.kept: list[Tensor] | None = None  # CE [M] of each call, for a sampler that learns

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the global batch's loss.

        pred: [B, L, D], hidden states. labels: [M, 4], the columns of ``Targets`` in fp64, in which
        ids are exact. ``normalizer`` is the step's, from the loader: on the device, without a wait.
        """
        positions, ids, rows = labels[:, :3].long().unbind(1)
        targets = Targets(positions, ids, rows, labels[:, 3].float() / self.normalizer)
        total, ce = self.mdm(self.head(), self.picked(pred, positions), targets)
        if self.kept is not None:
            self.kept.append(ce)
        return total, {}

    def head(self) -> nn.Module | LinearHead:
        """The model's head, gathered where FSDP2 shards it."""
        head: Any = self.lm_head
        if isinstance(head, FSDPModule):
            head.unshard()
        if self.tensor_parallel is None:
            return head
        weight = head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight
        return LinearHead(weight, vocabulary_parallel(self.tensor_parallel, self.vocab_size))

    def picked(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The hidden states [M, D] that some positions of the flattened [B · L] are predicted from:
        their own, or under ``shift`` the ones before; hidden [B, L, D]."""
        if self.shift:
            positions = positions - (positions % hidden.shape[1] > 0).long()
        if isinstance(hidden, DTensor):
            hidden = hidden.to_local(grad_placements=[Partial()])
        return hidden.flatten(0, 1).index_select(0, positions)


def vocabulary_parallel(
    group: ProcessGroup, vocab_size: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A chunk's work for ``LinearHead`` where each rank of ``group`` has its part of the weight, by
    torchtitan's loss-parallel cross-entropy."""

    def chunk(h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.mm(h, weight.t()).float().requires_grad_()
        with torch.enable_grad():
            ce = _LossParallelCrossEntropy.apply(logits, labels, group, vocab_size, "none")
            (gradient,) = torch.autograd.grad((ce * weights).sum(), logits)
        return ce.detach(), gradient.to(h.dtype)

    return chunk
