"""Models that are born sharded."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import Float8LinearRecipeName
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from mdm_plugin.distributed.parameters import adapter_names
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer
from mdm_plugin.models.transformer import ROTARY


class Build(NamedTuple):
    """How a model is built.

    compile: torch.compile of each layer, for lengths that vary.
    float8: torchao's recipe for the layers' matrix products (``tensorwise``, ``rowwise``,
        ``rowwise_with_gw_hp``); None for the parameters' dtype. Parameters and head stay in that.
    activation_checkpointing: recompute each layer in the backward pass.
    cpu_offload: FSDP2's; parameters, gradients and optimizer state rest in CPU memory.
    reshard_after_forward: FSDP2's; False keeps gathered weights until the backward pass.
    """

    compile: bool = False
    float8: str | None = None
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    reshard_after_forward: bool = True


def build_model(
    build: Callable[[], MDMTransformer], world: World, dtype: torch.dtype, how: Build | None = None
) -> MDMTransformer:
    """A model on its device and sharded, its parameters empty: fill them before use.

    It is built on the meta device, so that no rank ever holds the whole of it.

    Args:
        build: makes the model.
        world: where; FSDP2 over its mesh if there is one.
        dtype: of the parameters.
        how: None for ``Build``'s defaults.

    Raises:
        UserError: on ``float8`` that is no recipe, or for a model with adapters; on several ranks
            and a quantised base: torchao 0.15's NF4 does not pass through
            the gathering of torch 2.13's FSDP2.
    """
    how = how or Build()
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = build()
    if world.size > 1 and any(isinstance(p.data, NF4Tensor) for p in model.parameters()):
        raise UserError(
            f"model.quantize_base: {world.size} ranks, and an NF4 base is not sharded: use one "
            "rank, or leave quantize_base out"
        )
    if adapters := adapter_names(model):  # they alone are trained
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in adapters)
    offloaded = _transform(model, world, how)
    model.to_empty(device="cpu" if offloaded else world.device)
    with training.set_default_dtype(dtype), world.device:
        for module in model.modules():
            if isinstance(module, ROTARY):  # no checkpoint holds its buffers
                module.rope_init()
    return model


def _transform(model: MDMTransformer, world: World, how: Build) -> bool:
    """float8, compiled, checkpointed and sharded, in this order; whether it is offloaded."""
    if how.float8:
        _to_float8(model, how.float8)
    if how.compile:
        for layer in model.layers:
            # One graph for all lengths; without `dynamic` the second length compiles again.
            layer.compile(dynamic=True, backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
    if how.activation_checkpointing:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    if world.mesh is None or world.size == 1:
        return False
    training.shard_model(
        model,
        [training.get_shard_conditions],
        cpu_offload=how.cpu_offload,
        reshard_after_forward=how.reshard_after_forward,
        dp_mesh=world.mesh,
    )
    return how.cpu_offload


def _to_float8(model: MDMTransformer, recipe: str) -> None:
    if adapter_names(model):
        raise UserError(
            "enable_fp8_training: the model has adapters, whose products are too small to gain "
            "from it: leave it out"
        )
    try:
        config = Float8LinearConfig.from_recipe_name(recipe)
    except ValueError as error:
        known = ", ".join(x.value for x in Float8LinearRecipeName)
        raise UserError(f"fp8_recipe_name: {recipe!r} is not known (known: {known})") from error

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(x % 16 for x in module.weight.shape)

    convert_to_float8_training(model.layers, module_filter_fn=fits, config=config)
