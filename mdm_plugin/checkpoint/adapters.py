"""Adapters (LoRA, DoRA) in PEFT's files, and merged into the weights."""

import json
import re
from collections.abc import Iterator, Mapping
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
    read_json,
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
from mdm_plugin.models.naming import ADAPTERS, Naming

_PREFIX = "base_model.model."


def save_adapters(
    model: nn.Module,
    world: World,
    directory: Path,
    source: Weights | None,
    instead: Mapping[str, Tensor] | None = None,
) -> Iterator[Write]:
    """Write the adapters as PEFT does. Iterated on every rank, as ``save_weights``.

    ``instead``: tensors to write for the parameters of their names.

    PEFT finds the modules by a pattern of their whole names, because the last parts are not
    unique in LLaDA (ff_out is in each layer, and the head).
    """
    naming = source.naming if source else None
    tensors, values = {}, {**named_parameters(model), **(instead or {})}
    for name in sorted(adapter_names(model)):
        tensor = full(values[name])
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
def load_adapters(
    model: nn.Module,
    directory: Path,
    source: Weights | None,
    into: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill the adapters from PEFT's files; each rank reads its own shards only.

    ``into``: tensors to fill in the place of the model's adapters, by their names.

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
        fill(model, slices.items(), into)


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


def merged(model: nn.Module, values: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter in whole, its adapter merged if it has one; in the dtype of the parameter.

    ``values``: the parameters by name, or what is to be taken in their place.
    """
    weight = full(values[name])
    module_name = name.removesuffix(".weight")
    if f"{module_name}.lora_a.weight" not in values:
        return weight
    module = dict(_adapted_modules(model))[module_name]
    rank, factor, _ = low_rank(module)
    keys = [f"{module_name}.{x}" for x in module.adapter_params()]
    state = {key: full(values[key]).float() for key in keys}
    state[name] = weight.float().clone()
    return get_merged_lora_ckpt(state, rank, factor * rank)[name].to(weight.dtype)


class StoredAdapters:
    """Adapters in PEFT's files, to be merged into the weights that they belong to.

    Args:
        directory: with adapter_model.safetensors and adapter_config.json.
        naming: of the weights; None for our own names.

    Raises:
        UserError: if a file is missing, or the adapters are of a kind that is not read.
    """

    def __init__(self, directory: Path, naming: Naming | None) -> None:
        self.file, config = directory / ADAPTER, directory / ADAPTER_CONFIG
        for file in (self.file, config):
            if not file.is_file():
                raise UserError(f"checkpointer.adapter_checkpoint: {file} does not exist")
        self.parts = {ours: ours if naming is None else theirs for ours, theirs in ADAPTERS.items()}
        stated = read_json(config)
        for key in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if stated.get(key):
                raise UserError(f"{config}: {key}: such adapters are not read")
        self.rank, self.alpha = int(stated["r"]), float(stated["lora_alpha"])
        self.names = set(read_header(self.file))
        self.left = set(self.names)  # that no weight has asked for yet

    def of(self, name: str) -> dict[str, str]:
        """The tensors of the adapter of a weight, by their names here; none if it has none.

        name: that the weight is stored by.
        """
        module = f"{_PREFIX}{name.removesuffix('.weight')}"
        keys = {part: f"{module}.{theirs}" for part, theirs in self.parts.items()}
        return {part: key for part, key in keys.items() if key in self.names}

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """A weight that has an adapter, [out, in], with it: W + (α/r)·B·A, or DoRA's; in fp32."""
        own = self.of(name)
        self.left -= set(own.values())
        with safe_open(self.file, framework="pt") as opened:
            state = {f"w.{part}": opened.get_tensor(key).float() for part, key in own.items()}
        shapes = {part: list(x.shape) for part, x in state.items()}
        out, inner = weight.shape
        wanted = {"w.lora_a.weight": [self.rank, inner], "w.lora_b.weight": [out, self.rank]}
        if {part: shapes.get(part) for part in wanted} != wanted:
            raise UserError(f"{self.file}: the adapter of {name} does not fit its {[out, inner]}")
        state["w.weight"] = weight.float().clone()
        return get_merged_lora_ckpt(state, self.rank, self.alpha)["w.weight"]

    def check_all_used(self) -> None:
        """Raises:
        UserError: if there is an adapter that no weight has asked for.
        """
        if self.left:
            raise UserError(f"{self.file}: has unknown tensors: {some(self.left)}")


@torch.no_grad()
def merge_adapters(model: nn.Module, directory: Path, source: Weights) -> None:
    """Merge adapters into the parameters that ``source`` has filled. Called on every rank.

    Raises:
        UserError: if they do not belong to these weights.
    """
    adapters = StoredAdapters(directory, source.naming)

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in named_parameters(model):
            stored = hf_name(source.naming, name)
            if adapters.of(stored):
                with safe_open(source.where[stored], framework="pt") as opened:
                    yield name, adapters.merge(stored, opened.get_tensor(stored))

    fill(model, values())
    adapters.check_all_used()
