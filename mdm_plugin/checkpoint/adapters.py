"""Adapters (LoRA, DoRA) in PEFT's files, and merged into the weights."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, LoRALinear, get_merged_lora_ckpt

from mdm_plugin.checkpoint.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    Write,
    hf_name,
    read_header,
    some,
    write_file,
)
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.parameters import (
    adapter_names,
    bare,
    fill,
    full,
    named_parameters,
)
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError

_PREFIX = "base_model.model."


def save_adapters(
    model: nn.Module, world: World, directory: Path, source: Weights | None
) -> Iterator[Write]:
    """Write the adapters as PEFT does. Iterated on every rank, as ``save_weights``.

    PEFT finds the modules by a pattern of their whole names, because the last parts are not
    unique in LLaDA (ff_out is in each layer, and the head).
    """
    naming = source.naming if source else None
    tensors = {}
    for name in sorted(adapter_names(model)):
        tensor = full(named_parameters(model)[name])
        tensors[_PREFIX + hf_name(naming, name)] = tensor.to("cpu", copy=True).contiguous()
    if world.rank != 0:
        return
    yield partial(write_file, tensors, directory / ADAPTER)
    modules = [
        hf_name(naming, f"{name}.weight").removesuffix(".weight")
        for name, _ in _adapted_modules(model)
    ]
    pattern = "|".join(
        sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(m)) for m in modules})
    )
    _, module = next(_adapted_modules(model))
    rank, factor, dropout = low_rank(module)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(source.directory) if source else None,
        "target_modules": pattern,
        "r": rank,
        "lora_alpha": factor * rank,
        "lora_dropout": dropout,
        "use_dora": isinstance(module, DoRALinear),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    yield partial((directory / ADAPTER_CONFIG).write_text, json.dumps(config, indent=2))


@torch.no_grad()
def load_adapters(model: nn.Module, directory: Path, source: Weights | None) -> None:
    """Fill the adapters from PEFT's files; each rank reads its own shards only.

    Raises:
        UserError: if a tensor is missing, unknown or wrongly shaped.
    """
    file = directory / ADAPTER
    if not file.is_file():
        raise UserError(f"{file} does not exist: that checkpoint has no adapters")
    naming = source.naming if source else None
    names = {_PREFIX + hf_name(naming, name): name for name in adapter_names(model)}
    stored = set(read_header(file))
    for kind, wrong in (
        ("lacks", names.keys() - stored),
        ("has unknown tensors:", stored - names.keys()),
    ):
        if wrong:
            raise UserError(f"{file}: {kind} {some(wrong)}")
    parameters = named_parameters(model)
    with safe_open(file, framework="pt") as opened:
        slices = {ours: opened.get_slice(name) for name, ours in names.items()}
        for name, ours in names.items():
            shape, wanted = tuple(slices[ours].get_shape()), tuple(parameters[ours].shape)
            if shape != wanted:
                raise UserError(
                    f"{file}: {name} has shape {shape}, and the config's model {wanted}: "
                    "lora_rank is another"
                )
        fill(model, slices.items())


Adapted = Any  # LoRALinear or DoRALinear; torchtune has no types


def _adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | DoRALinear):
            yield bare(name), module


def low_rank(module: Adapted) -> tuple[int, float, float]:
    """Rank, factor α/r and dropout of an adapter."""
    rank = module.lora_a.weight.shape[0]
    dora = isinstance(module, DoRALinear)
    factor = module.scaling if dora else module.alpha / module.rank
    return rank, factor, module.dropout.p if isinstance(module.dropout, nn.Dropout) else 0.0


def merged(model: nn.Module, name: str) -> Tensor:
    """A parameter in whole, its adapter merged if it has one."""
    parameters = named_parameters(model)
    weight = full(parameters[name])
    module_name = name.removesuffix(".weight")
    if f"{module_name}.lora_a.weight" not in parameters:
        return weight
    module = dict(_adapted_modules(model))[module_name]
    rank, factor, _ = low_rank(module)
    keys = [f"{module_name}.{x}" for x in module.adapter_params()]
    state = {key: full(parameters[key]).float() for key in keys}
    state[name] = weight.float().clone()
    dtype = parameters[keys[0]].dtype
    return get_merged_lora_ckpt(state, rank, factor * rank)[name].to(dtype)
