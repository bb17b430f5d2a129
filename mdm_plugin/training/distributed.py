"""One process or many: process group, device mesh, and models that are born sharded."""

import atexit
import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import Float8LinearRecipeName
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params
from torchtune.utils import get_device

from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator


class World(NamedTuple):
    """This process among those that share the rows.

    mesh is None for a single process. group: theirs, None for all processes. averages: whether
    gradients are averaged over them (FSDP2's default) or summed.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    group: dist.ProcessGroup | None = None
    averages: bool = True

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, on the device."""
        x = x.to(self.device)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x


@contextmanager
def distributed(
    device: str, shard_dim: int = -1, replicate_dim: int = 1, timeout_minutes: float = 30
) -> Iterator[World]:
    """The world that torchrun has made, or one process without it; its end is the group's end.

    Args:
        device: ``cpu``, ``cuda``, ….
        shard_dim: ranks that one copy of the model is sharded over (FSDP2); −1 for all that
            ``replicate_dim`` leaves.
        replicate_dim: copies of the model (HSDP); 1 for plain FSDP2.
        timeout_minutes: a collective that waits longer ends the run, with a line that says so.

    Raises:
        UserError: if the device is not there, or the sizes do not make up the world.
    """
    try:
        place = get_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device}: {str(error).splitlines()[0]}") from error
    if not training.is_distributed():
        if replicate_dim != 1 or shard_dim not in (-1, 1):
            raise UserError(
                "data_parallel_replicate_dim, data_parallel_shard_dim: this is a single process; "
                "start more with tune run --nproc_per_node"
            )
        yield World(0, 1, place, None)
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if replicate_dim < 1 or size % replicate_dim:
        raise UserError(
            f"data_parallel_replicate_dim: {size} ranks do not divide into {replicate_dim} copies"
        )
    shard = size // replicate_dim if shard_dim == -1 else shard_dim
    if shard * replicate_dim != size:
        raise UserError(
            f"data_parallel_shard_dim: {shard} × data_parallel_replicate_dim {replicate_dim} is "
            f"not the number of ranks, {size}"
        )
    backend = training.get_distributed_backend(place.type, offload_ops_to_cpu=place.type != "cpu")
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        if replicate_dim > 1:
            mesh = init_device_mesh(
                place.type, (replicate_dim, shard), mesh_dim_names=("dp_replicate", "dp_shard")
            )
        else:
            mesh = init_device_mesh(place.type, (size,), mesh_dim_names=("dp_shard",))
        yield World(rank, size, place, mesh)
    except RuntimeError as error:  # gloo's and NCCL's errors are of this kind
        if re.search(r"gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            reason = str(error).strip().splitlines()[0][:200]
            print(
                f"error: rank {rank}: another rank has died, or has not come for "
                f"{timeout_minutes:g} minutes (timeout_minutes): {reason}",
                file=sys.stderr,
                flush=True,
            )
        raise
    finally:
        dist.destroy_process_group()


@atexit.register
def _end_process_groups() -> None:
    """Free the groups that ``destroy_process_group`` has closed, and so end gloo's threads.

    Before Python 3.14, one that still lets go of a tensor while Python ends aborts the process
    ("terminate called without an active exception"), and torchrun calls the whole run failed.
    A group lives as long as its meshes, and DTensor's caches of shardings keep those.
    """
    if dist.is_initialized() or not training.is_distributed():
        return
    gc.collect()
    for mesh in [x for x in gc.get_objects() if type(x) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()


def build_model(
    build: Callable[[], MDMTransformer],
    world: World,
    *,
    dtype: torch.dtype,
    compile: bool = False,
    float8: str | None = None,
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> MDMTransformer:
    """A model on its device and sharded, its parameters empty: fill them before use.

    It is built on the meta device, so that no rank ever holds the whole of it.

    Args:
        build: makes the model.
        world: where; FSDP2 over its mesh if there is one.
        dtype: of the parameters.
        compile: torch.compile of each layer, for lengths that vary.
        float8: torchao's recipe for the layers' matrix products (``tensorwise``, ``rowwise``,
            ``rowwise_with_gw_hp``); None for ``dtype``. Parameters and head stay in ``dtype``.
        activation_checkpointing: recompute each layer in the backward pass.
        cpu_offload: FSDP2's; parameters, gradients and optimizer state rest in CPU memory.
        reshard_after_forward: FSDP2's; False keeps gathered weights until the backward pass.

    Raises:
        UserError: on ``float8`` that is no recipe, or for a model with adapters; on several ranks
            and a quantised base: torchao 0.15's NF4 does not pass through
            the gathering of torch 2.13's FSDP2.
    """
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
    if float8:
        _to_float8(model, float8)
    if compile:
        for layer in model.layers:
            # One graph for all lengths; without `dynamic` the second length compiles again.
            layer.compile(dynamic=True, backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
    if activation_checkpointing:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    if world.mesh is not None and world.size > 1:
        training.shard_model(
            model,
            [training.get_shard_conditions],
            cpu_offload=cpu_offload,
            reshard_after_forward=reshard_after_forward,
            dp_mesh=world.mesh,
        )
    else:
        cpu_offload = False
    model.to_empty(device="cpu" if cpu_offload else world.device)
    with training.set_default_dtype(dtype), world.device:
        for module in model.modules():
            if rope_init := getattr(module, "rope_init", None):  # no checkpoint holds its buffers
                rope_init()
    return model


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


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that checkpoints use."""
    wrapper = "_checkpoint_wrapped_module."
    return {name.replace(wrapper, ""): p for name, p in model.named_parameters()}


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters (LoRA, DoRA); none for a model without."""
    wrapper = "_checkpoint_wrapped_module."
    return {name.replace(wrapper, "") for name in get_adapter_params(model)}


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
def fill(model: nn.Module, values: Iterable[tuple[str, Any]]) -> None:
    """Copy this rank's parts of whole parameters into the model; NF4 parameters are quantised.

    ``values``: name → a tensor of the parameter's shape, or what can be sliced like one.
    """
    parameters, quantized = named_parameters(model), {}
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


def total_norm(model: nn.Module) -> Tensor:
    """The norm of the whole gradient, the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradient(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradient to a norm of at most ``max_norm``; the norm before, on every rank."""
    limit = float("inf") if max_norm is None else max_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def folded_gradient(
    model: nn.Module, dimensions: int | None, seed: int = 0, rank: int = 0
) -> Tensor:
    """This rank's part of the gradient as one vector, [D], fp32; whole if ``dimensions`` is None.

    Else folded to that many: coordinate i goes to i mod ``dimensions`` with a random sign, the
    same at each call. E over signs of an inner product is that of the whole vectors, with a
    relative error of about sqrt(2 / dimensions) for a squared norm.
    """
    parts = []
    for name, parameter in named_parameters(model).items():
        if parameter.grad is None:
            continue
        grad = parameter.grad
        flat = (grad.to_local() if isinstance(grad, DTensor) else grad).detach().flatten().float()
        if dimensions is not None:
            generator = keyed_generator(seed, "signs", name, rank)
            signs = torch.randint(2, flat.shape, generator=generator, dtype=torch.int8) * 2 - 1
            flat = flat * signs.to(flat.device)
            flat = F.pad(flat, (0, -len(flat) % dimensions)).view(-1, dimensions).sum(0)
        parts.append(flat)
    return torch.cat(parts) if dimensions is None else torch.stack(parts).sum(0)
