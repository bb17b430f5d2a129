"""Models that are born sharded."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import Float8LinearRecipeName
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import DoRALinear

from mdm_plugin.distributed.parameters import adapter_names
from mdm_plugin.distributed.world import World, mesh_of_one
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
    masters: dtype of what is trained and of its gradients, where that is wider than the one that
        the model computes in; None for that one.
    """

    compile: bool = False
    float8: str | None = None
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    reshard_after_forward: bool = True
    masters: torch.dtype | None = None


def build_model(
    build: Callable[[], MDMTransformer], world: World, dtype: torch.dtype, how: Build | None = None
) -> MDMTransformer:
    """A model on its device and sharded, its parameters empty: fill them before use.

    It is built on the meta device, so that no rank ever holds the whole of it. Where what is
    trained is wider than ``dtype``, FSDP2 keeps it so, gathers it in ``dtype``, and sums gradients
    over the ranks in fp32, on a single process too; but a single process's adapters are cast by
    torch's autocast, which gives the same products and no second copy of their base.

    Args:
        build: makes the model.
        world: where; FSDP2 over its mesh if there is one.
        dtype: that it computes in.
        how: None for ``Build``'s defaults.

    Raises:
        UserError: on ``float8`` that is no recipe, or for a model with adapters; on several ranks
            or offloading, and a quantised base: torchao 0.15's NF4 does not pass through the
            gathering of torch 2.13's FSDP2.
    """
    how = how or Build()
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = build()
    sharded = world.size > 1 or how.cpu_offload
    if sharded and any(isinstance(p.data, NF4Tensor) for p in model.parameters()):
        raise UserError(
            "model.quantize_base: an NF4 base is not sharded: use one rank without "
            "fsdp_cpu_offload, or leave quantize_base out"
        )
    if adapters := adapter_names(model):  # they alone are trained
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in adapters)
    mixed = how.masters not in (None, dtype)
    if mixed:
        _widen(model, how.masters)
    _transform(model, how)
    if sharded or (mixed and not adapters):
        _shard(model, world, dtype, how)
    elif mixed:  # one process need not gather a base that is in `dtype` already
        model.forward = torch.autocast(world.device.type, dtype)(model.forward)  # type: ignore[method-assign]
        for module in model.modules():
            if isinstance(
                module, DoRALinear
            ):  # its magnitude is multiplied beyond autocast's reach
                module.register_forward_hook(lambda _, given, out: out.to(given[0].dtype))
    model.to_empty(device="cpu" if how.cpu_offload else world.device)
    with training.set_default_dtype(dtype), world.device:
        for module in model.modules():
            if isinstance(module, ROTARY):  # no checkpoint holds its buffers
                module.rope_init()
    return model


def compile_backend() -> str:
    """torch.compile's, by the environment variable that torchtune's recipes read."""
    return os.environ.get("TORCH_COMPILE_BACKEND", "inductor")


def _widen(model: MDMTransformer, dtype: torch.dtype | None) -> None:
    """Give what is trained another dtype."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                module.register_parameter(name, nn.Parameter(parameter.to(dtype)))


def _transform(model: MDMTransformer, how: Build) -> None:
    """float8, compiled and checkpointed, in this order."""
    if how.float8:
        _to_float8(model, how.float8)
    if how.compile:
        for layer in model.layers:
            # One graph for all lengths; without `dynamic` the second length compiles again.
            layer.compile(dynamic=True, backend=compile_backend())
    if how.activation_checkpointing:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )


def _shard(model: MDMTransformer, world: World, dtype: torch.dtype, how: Build) -> None:
    """FSDP2, each layer by itself: torchtune's ``shard_model`` has no mixed precision."""
    options: dict[str, Any] = {
        "mesh": world.mesh or mesh_of_one(world.device),
        "reshard_after_forward": how.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if how.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in reversed(model.layers):
        fully_shard(layer, **options)
    fully_shard(model, **options)


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
