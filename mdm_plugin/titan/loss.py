"""The masked-diffusion loss as torchtitan's: hidden states in, scalar out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torchtitan.components.loss import ChunkedLossWrapper, _LossParallelCrossEntropy
from torchtitan.config import CompileConfig

from mdm_plugin.loss import LinearHead, MDMLoss, Targets


class MaskedLoss(ChunkedLossWrapper):
    """``MDMLoss`` where torchtitan expects its chunked loss: the head runs on masked positions alone.

    Under tensor parallelism the head's vocabulary stays split over the ranks (loss parallel): each
    computes its part of the logits of the masked positions, and three numbers per position are
    summed over the ranks. A gathered head would cost V · D bytes on each rank and compute the same
    logits on all of them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        normalize: Literal["response", "tokens", "masked"] = "response"
        weight: Literal["inverse_p", "ones"] = "inverse_p"
        shift: bool = False
        """The token at i is predicted from position i - 1 (Dream)."""
        chunk_size: int = 1024
        """Masked positions per pass of the LM head."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.lm_head = None
        self.mdm = MDMLoss(config.normalize, config.weight, config.shift, config.chunk_size)
        if compile_config and compile_config.enable and "loss" in compile_config.components:
            self.mdm.compile_chunks(compile_config.backend)
        self.tensor_parallel: torch.distributed.ProcessGroup | None = None
        self.vocab_size = 0

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the global batch's loss.

        pred: [B, L, D], hidden states; labels: [M, 4], fp64, ``packed`` targets, whose weights are
        divided by the normaliser already.
        """
        return self.of(pred, unpacked(labels))[0], {}

    def of(self, hidden: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``MDMLoss.forward``, with the model's own head; hidden [B, L, D]."""
        return self.mdm(self.head(), self.picked(hidden, targets.positions), targets)

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
        """Hidden states [M, D] of some positions of the flattened [B · L]; hidden [B, L, D]."""
        if isinstance(hidden, DTensor):
            hidden = hidden.to_local(grad_placements=[Partial()])
        return hidden.flatten(0, 1).index_select(0, positions)


def vocabulary_parallel(
    group: torch.distributed.ProcessGroup, vocab_size: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The work on a chunk where each rank of ``group`` has its part of the head, by torchtitan's
    loss-parallel cross-entropy."""

    def chunk(h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.mm(h, weight.t()).float()
        with torch.enable_grad():
            logits.requires_grad_()
            ce = _LossParallelCrossEntropy.apply(logits, labels, group, vocab_size, "none")
            (gradient,) = torch.autograd.grad((ce * weights).sum(), logits)
        return ce.detach(), gradient.to(h.dtype)

    return chunk


def packed(targets: Targets) -> Tensor:
    """[M, 4], fp64: one tensor, as torchtitan's pipelines take labels; ids are exact in fp64."""
    return torch.stack([x.double() for x in targets], 1)


def unpacked(labels: Tensor) -> Targets:
    """The other way."""
    positions, ids, rows = labels[:, :3].long().unbind(1)
    return Targets(positions, ids, rows, labels[:, 3].float())
