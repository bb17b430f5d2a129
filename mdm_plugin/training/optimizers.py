"""Muon for the hidden matrices, and AdamW for the rest, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from mdm_plugin.distributed.parameters import local_part

_ENDS = ("tok_embeddings", "output")  # the model's modules whose matrices are not hidden


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of the layers: neither the token embedding nor the head.

    ``name``: as checkpoints have it. A head that is the embedding, too, is named as that.
    """
    return parameter.ndim == 2 and name.split(".")[0] not in _ENDS


class Muon(torch.optim.Optimizer):
    """Hidden matrices by torch's Muon, all other parameters by torch's AdamW.

    Muon (Jordan et al. 2024) replaces a matrix's momentum U·S·Vᵀ by about U·Vᵀ. Its step is scaled
    by 0.2·sqrt(max(A, B)) for a matrix [A, B] (Liu et al. 2025, arXiv 2502.16982), so that an
    element's root mean square is about AdamW's: one ``lr`` and one ``weight_decay`` serve both,
    and their defaults are AdamW's.

    By Muon: matrices of the layers. By AdamW: token embedding, head (tied or not), norms, biases.
    LoRA's factors in the layers are matrices, and go by Muon, each for itself: their product's step
    is not orthogonal. Those of the head, and DoRA's magnitudes, go by AdamW.

    A parameter group for each; torch's two optimizers step them, on the state that is kept here. A
    matrix that FSDP2 has sharded keeps its momentum sharded. For the step it is gathered in bf16,
    in which Newton–Schulz computes anyway; the ranks share the matrices out, and each sends the
    whole of what it has computed to the others.

    Args:
        params: (name, parameter) pairs, by the names that checkpoints use.
        lr, weight_decay: of both; the decay is decoupled.
        momentum, nesterov: of Muon.
        betas, eps: of AdamW.

    Raises:
        ValueError: if parameters come without names, or a value is out of range; for
            ``nesterov=False`` on matrices in bf16, whose momentum torch 2.13's Muon overwrites.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        named = list(params)
        if not all(isinstance(x, tuple) for x in named):
            raise ValueError("Muon goes by parameters' names: give (name, parameter) pairs")
        hidden = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
        rest = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
        if not nesterov and any(p.dtype == torch.bfloat16 for _, p in hidden):
            raise ValueError(
                "nesterov=False: torch's Muon overwrites a momentum in bf16: use nesterov=True, or "
                "fp32 parameters"
            )
        self.inner: list[torch.optim.Optimizer] = []
        if hidden:
            sharded = any(isinstance(p, DTensor) for _, p in hidden)
            self.inner.append(
                (_Sharing if sharded else torch.optim.Muon)(
                    hidden,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            self.inner.append(
                torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
            )
        super().__init__([group for x in self.inner for group in x.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Have torch's optimizers use this one's groups and state, and no copies of them."""
        for inner, group in zip(self.inner, self.param_groups, strict=True):
            inner.param_groups, inner.state = [group], self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict comes by here, with groups and state anew
        self._link()

    def step(self, closure: Any = None) -> Any:
        """Step each parameter that has a gradient; the value of ``closure``, called before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self.inner:
            inner.step()
        return loss


class _Sharing(torch.optim.Muon):
    """torch's Muon for DTensors, with the same result as on whole tensors.

    torch 2.13's own runs on DTensors, but sums parts of each product in bf16 (which changes a step
    by about 2 % on two ranks), and fails where a dimension is smaller than the ranks.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None  # the optimizer around it has called it
        for group in self.param_groups:
            params: list[Any] = []
            grads: list[Any] = []
            momenta: list[Any] = []
            self._init_group(group, params, grads, momenta)
            # Like sizes together, so that no rank waits long for another one.
            matrices = sorted(zip(params, grads, momenta, strict=True), key=lambda x: x[0].numel())
            ranks = dist.get_world_size(_sharing(params[0])) if params else 1
            for start in range(0, len(matrices), ranks):
                self._step_some(group, matrices[start : start + ranks])

    def _step_some(
        self, group: dict[str, Any], matrices: list[tuple[DTensor, DTensor, DTensor]]
    ) -> None:
        """As torch's ``_single_tensor_muon``, each rank with the products of one matrix.

        ``matrices``: parameter, gradient and momentum, of not more than there are ranks.
        """
        ranks = _sharing(matrices[0][0])
        rank, mine = dist.get_rank(ranks), torch.empty(0)
        for owner, (p, grad, momentum) in enumerate(matrices):
            momentum.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            # Under CPU offloading the products are still the device's.
            shard = update.to(p.device_mesh.device_type, torch.bfloat16)
            assert isinstance(shard, DTensor)
            whole = shard.full_tensor()
            mine = whole if owner == rank else mine
        if rank < len(matrices):
            mine = _zeropower_via_newtonschulz(
                mine, group["ns_coefficients"], group["ns_steps"], group["eps"]
            ).contiguous()
        for owner, (p, _, _) in enumerate(matrices):
            whole = mine if owner == rank else whole.new_empty(p.shape)
            dist.broadcast(whole, group=ranks, group_src=owner)
            index, local = local_part(p)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
            local.add_(whole[index].to(local.device), alpha=-rate)


def _sharing(parameter: DTensor) -> dist.ProcessGroup:
    """The ranks that hold a parameter together: under HSDP not those that hold copies."""
    sharded = [i for i, x in enumerate(parameter.placements) if isinstance(x, Shard)]
    return parameter.device_mesh.get_group(sharded[0])
