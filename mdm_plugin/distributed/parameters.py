"""Parameters in whole and in parts: their names, this rank's share, and how they are filled."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules.peft import get_adapter_params

from mdm_plugin.noise import keyed_generator


def bare(name: str) -> str:
    """A name without what activation checkpointing adds to it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that checkpoints use."""
    return {bare(name): p for name, p in model.named_parameters()}


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters (LoRA, DoRA); none for a model without."""
    return {bare(name) for name in get_adapter_params(model)}


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, only: set[str] | None = None) -> None:
    """Random weights: N(0, 1/D) for matrices [*, D], 1 for norms' scales, 0 for biases.

    Adapters begin as nothing: LoRA's B is 0, and DoRA's magnitude that of the weight's rows. Each
    tensor is a function of (seed, its name): the same for any number of ranks. ``only`` these.
    """
    parameters = named_parameters(model)

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            if only is not None and name not in only:
                continue
            full = torch.empty(parameter.shape)
            if name.endswith(".magnitude"):
                continue
            if name.endswith("lora_b.weight"):
                full.zero_()
            elif parameter.ndim >= 2:
                generator = keyed_generator(seed, "init", name)
                full.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                full.fill_(0.0 if name.endswith("bias") else 1.0)
            yield name, full

    fill(model, values())
    for name, parameter in named_parameters(model).items():
        if name.endswith(".magnitude") and (only is None or name in only):
            weight = local_part(parameters[name.removesuffix("magnitude") + "weight"])[1]
            local_part(parameter)[1].copy_(dequantized(weight).float().norm(dim=1))


def dequantized(weight: Tensor) -> Tensor:
    """A tensor that is not DTensor, of no quantised kind."""
    data = weight.data
    return data.get_original_weight() if isinstance(data, NF4Tensor) else data


@torch.no_grad()
def fill(
    model: nn.Module,
    values: Iterable[tuple[str, Any]],
    into: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy this rank's parts of whole parameters into the model; NF4 parameters are quantised.

    ``values``: name → a tensor of the parameter's shape, or what can be sliced like one.
    ``into``: tensors to fill in the place of the model's own, by their names.
    """
    parameters, quantized = named_parameters(model) if into is None else into, {}
    for name, whole in values:
        parameter = parameters[name]
        index, local = local_part(parameter)
        if not isinstance(local.data, NF4Tensor):
            local.copy_(whole[index])
            continue
        weight = to_nf4(whole[index].to(local.device, local.dtype))
        quantized[name] = nn.Parameter(weight, requires_grad=False)
    if quantized:  # what was NF4 on the meta device cannot be filled in place
        model.load_state_dict(quantized, strict=False, assign=True)


def local_part(parameter: Tensor) -> tuple[tuple[slice, ...], Tensor]:
    """This rank's part of a parameter: its place in the whole, and its storage."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape), parameter
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(o, o + n) for n, o in zip(shape, offset, strict=True))
    return index, parameter.to_local()


def full(parameter: Tensor) -> Tensor:
    """A parameter in whole, of no quantised kind. Called on every rank."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    return dequantized(parameter)
