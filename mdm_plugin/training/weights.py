"""Weights in safetensors files: Hugging Face's layout or our own, read and written by all ranks.

A directory with a config.json is a Hugging Face checkpoint, whose model_type says how its tensors
are called (``mdm_plugin.models.naming``); one without has our own names in model.safetensors. What
is trained from a Hugging Face checkpoint is written as one: the same files, names and index, with
its configuration and tokenizer beside. Nothing here unpickles, or runs code from a checkpoint.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules import TiedLinear
from torchtune.modules.peft import get_merged_lora_ckpt

from mdm_plugin.errors import UserError
from mdm_plugin.models.naming import FAMILIES, Naming
from mdm_plugin.training.distributed import (
    World,
    adapter_names,
    dequantized,
    fill,
    local_part,
    named_parameters,
)
from mdm_plugin.training.manifest import MANIFEST

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_FLOATS = {"F64", "F32", "F16", "BF16"}
# What goes with the weights into an export: configuration, tokenizer and the model's own code,
# which is carried along as text and never run here.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
_PREFIX = "base_model.model."


class Weights:
    """A directory of safetensors files, checked by their headers.

    Args:
        directory: of the checkpoint.
        files: the names of its files; None for those of its index, else model.safetensors, else
            all that are no adapter.
        key: the config's key that named the directory, for messages.

    Attributes:
        where: stored name → file.
        config: config.json; empty for our own checkpoints.
        naming: of the family; None for our own names.

    Raises:
        UserError: naming the file and what is wrong with it.
    """

    def __init__(
        self, directory: Path, files: list[str] | None = None, key: str = "checkpoint_dir"
    ) -> None:
        if not directory.is_dir():
            raise UserError(f"checkpointer.{key}: {directory} does not exist")
        self.directory = directory
        self.config, self.naming = _config(directory / "config.json")
        listed: dict[str, str] = {}
        if files is None and (directory / INDEX).is_file():
            listed = _index(directory / INDEX)
            files = sorted(set(listed.values()))
        for name in files or []:
            if not (directory / name).is_file():
                by = INDEX if listed else "checkpointer.checkpoint_files"
                raise UserError(f"{by}: {directory / name} does not exist")
        found = files or _files(directory, key)
        self.where: dict[str, Path] = {}
        for file in (directory / name for name in found):
            for name in _header(file):
                if name in self.where:
                    raise UserError(f"{file}: {name} is in {self.where[name].name} too")
                self.where[name] = file
        for name, file_name in listed.items():
            if self.where.get(name, Path()).name != file_name:
                raise UserError(f"{directory / INDEX}: {name} is not in {file_name}")
        if listed and (extra := self.where.keys() - listed.keys()):
            raise UserError(f"{directory / INDEX}: does not list {_some(extra)}")

    def names(self, model: nn.Module) -> dict[str, str]:
        """Stored name → parameter, for all that the checkpoint has to hold of ``model``.

        Raises:
            UserError: if the family has no such parameter.
        """
        adapters = adapter_names(model)
        return {
            hf_name(self.naming, name): name
            for name in named_parameters(model)
            if name not in adapters
        }

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Fill the model's parameters, adapters apart; each rank reads its own shards only.

        Raises:
            UserError: if a tensor is missing, unknown, wrongly shaped, or no float.
        """
        names = self.names(model)
        tied = isinstance(getattr(model, "output", None), TiedLinear)
        output = hf_name(self.naming, "output.weight")
        stored = {
            name
            for name in self.where
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == output)
        }
        for kind, wrong in (
            ("lacks", names.keys() - stored),
            ("has unknown tensors:", stored - names.keys()),
        ):
            if wrong:
                raise UserError(f"{self.directory}: the checkpoint {kind} {_some(wrong)}")
        fill(model, self._values(model, names))

    def _values(self, model: nn.Module, names: dict[str, str]) -> Iterator[tuple[str, Any]]:
        """Each parameter with what is stored of it, file by file."""
        parameters = named_parameters(model)
        new_rows = getattr(model, "new_tokens", 0)
        for file in sorted(set(self.where.values())):
            with safe_open(file, framework="pt") as opened:
                for name in sorted(opened.keys() & names.keys()):
                    ours, slices = names[name], opened.get_slice(name)
                    shape, wanted = tuple(slices.get_shape()), tuple(parameters[ours].shape)
                    grows = new_rows and ours in ("tok_embeddings.weight", "output.weight")
                    if grows and shape == (wanted[0] - new_rows, *wanted[1:]):
                        _fill_grown(parameters[ours], slices, shape[0])
                    elif shape == wanted:
                        yield ours, slices
                    else:
                        raise UserError(
                            f"{file}: {name} has shape {shape}, and the config's model {wanted}"
                        )


def hf_name(naming: Naming | None, name: str) -> str:
    """The stored name of a parameter.

    Raises:
        UserError: if the family has no such parameter.
    """
    try:
        return name if naming is None else naming.to_hf(name)
    except KeyError:
        raise UserError(
            f"model: its parameter {name} has no place in this family of checkpoints: is "
            "model._component_ the builder for it?"
        ) from None


Write = Callable[[], Any]  # what rank 0 does to write a file; any thread may


def save_weights(
    model: nn.Module, world: World, directory: Path, source: Weights | None, copy: bool = False
) -> Iterator[Write]:
    """Write all parameters, adapters merged, laid out as ``source`` is. Iterated on every rank.

    Gives rank 0 what writes one file after another, and the others as many times nothing to do: if
    each is called before the next is asked for, rank 0 never holds more than the largest file. With
    ``copy``, none refers to the model's own memory, and all may be called later.
    """
    adapters = adapter_names(model)
    names = [name for name in named_parameters(model) if name not in adapters]
    naming = source.naming if source else None
    stored = {hf_name(naming, name): name for name in names}
    files: dict[str, list[str]] = {}
    for name in stored:
        file = source.where[name].name if source and source.naming and source.where else WEIGHTS
        files.setdefault(file, []).append(name)
    total = 0
    for file, members in files.items():
        tensors = {}
        for name in members:
            tensor = _merged(model, stored[name])
            if world.rank == 0:
                tensors[name] = tensor.detach().to("cpu", copy=copy).contiguous()
                total += tensors[name].nbytes
        yield partial(_save_file, tensors, directory / file) if world.rank == 0 else _nothing
        del tensors
    if world.rank != 0 or source is None or naming is None:
        return
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, members in files.items() for name in members},
    }
    embeddings = named_parameters(model)["tok_embeddings.weight"]
    config = dict(source.config)
    for name in ("vocab_size", "embedding_size"):
        if name in config:
            config[name] = embeddings.shape[0]
    for name in ("torch_dtype", "dtype"):
        if name in config:
            config[name] = str(embeddings.dtype).removeprefix("torch.")

    def beside() -> None:
        if len(files) > 1:
            (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        for pattern in _BESIDE:
            for path in source.directory.glob(pattern):
                if path.name not in (INDEX, ADAPTER_CONFIG, MANIFEST, "config.json", "state.json"):
                    shutil.copyfile(path, directory / path.name)
        (directory / "config.json").write_text(json.dumps(config, indent=2))

    yield beside


def _nothing() -> None:
    pass


def _save_file(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})


def set_config(directory: Path, **values: Any) -> None:
    """Set keys of the config.json of an export, if it has one."""
    file = directory / "config.json"
    if file.is_file():
        file.write_text(json.dumps({**_json(file), **values}, indent=2))


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
        tensor = _full(named_parameters(model)[name])
        tensors[_PREFIX + hf_name(naming, name)] = tensor.to("cpu", copy=True).contiguous()
    if world.rank != 0:
        return
    yield partial(_save_file, tensors, directory / ADAPTER)
    modules = [
        hf_name(naming, f"{name}.weight").removesuffix(".weight")
        for name, _ in _adapted_modules(model)
    ]
    pattern = "|".join(
        sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(m)) for m in modules})
    )
    _, module = next(_adapted_modules(model))
    rank, factor, dropout = _low_rank(module)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(source.directory) if source else None,
        "target_modules": pattern,
        "r": rank,
        "lora_alpha": factor * rank,
        "lora_dropout": dropout,
        "use_dora": hasattr(module, "magnitude"),
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
    stored = set(_header(file))
    for kind, wrong in (
        ("lacks", names.keys() - stored),
        ("has unknown tensors:", stored - names.keys()),
    ):
        if wrong:
            raise UserError(f"{file}: {kind} {_some(wrong)}")
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


def _adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "adapter_params"):
            yield name.replace("_checkpoint_wrapped_module.", ""), module


def _low_rank(module: Any) -> tuple[int, float, float]:
    """Rank, factor α/r and dropout of an adapter."""
    rank = module.lora_a.weight.shape[0]
    factor = module.scaling if hasattr(module, "scaling") else module.alpha / module.rank
    return rank, factor, getattr(module.dropout, "p", 0.0)


def _merged(model: nn.Module, name: str) -> Tensor:
    """A parameter in whole, its adapter merged if it has one."""
    parameters = named_parameters(model)
    weight = _full(parameters[name])
    module_name = name.removesuffix(".weight")
    if f"{module_name}.lora_a.weight" not in parameters:
        return weight
    module = dict(_adapted_modules(model))[module_name]
    rank, factor, _ = _low_rank(module)
    keys = [f"{module_name}.{x}" for x in module.adapter_params()]
    state = {key: _full(parameters[key]).float() for key in keys}
    state[name] = weight.float().clone()
    dtype = parameters[keys[0]].dtype
    return get_merged_lora_ckpt(state, rank, factor * rank)[name].to(dtype)


def _full(parameter: Tensor) -> Tensor:
    """A parameter in whole, of no quantised kind. Called on every rank."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    return dequantized(parameter)


def _fill_grown(parameter: Tensor, slices: Any, old: int, chunk: int = 8192) -> None:
    """Fill a matrix that has more rows than what is stored: the others get the rows' mean."""
    index, local = local_part(parameter)
    mean = torch.zeros(parameter.shape[1], dtype=torch.float64)
    for start in range(0, old, chunk):
        mean += slices[start : min(start + chunk, old)].double().sum(0) / old
    first, end = index[0].start, index[0].stop
    kept = max(0, min(end, old) - first)
    if kept:
        local[:kept] = slices[first : first + kept].to(local)
    local[kept:] = mean.to(local)


def _config(file: Path) -> tuple[dict[str, Any], Naming | None]:
    if not file.is_file():
        return {}, None
    config = _json(file)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{file}: model_type {kind!r} is not known (known: {', '.join(FAMILIES)})")
    return config, FAMILIES[kind]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def _index(file: Path) -> dict[str, str]:
    """The weight_map of an index; its files lie in the index's own directory."""
    weight_map = _json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map")
    for name, target in weight_map.items():
        if not isinstance(target, str) or Path(target).name != target:
            raise UserError(f"{file}: {name} points to {target!r}, which is no file beside it")
        if not target.endswith(".safetensors"):
            raise UserError(f"{file}: {target} is no safetensors file; others are not opened")
    return weight_map


def _files(directory: Path, key: str) -> list[str]:
    found = sorted(f.name for f in directory.glob("*.safetensors") if f.name != ADAPTER)
    if WEIGHTS in found:
        return [WEIGHTS]
    if not found:
        pickles = [f.name for x in ("*.bin", "*.pt", "*.pth") for f in directory.glob(x)]
        why = f": {pickles[0]} is a pickle, which can run code: convert it" if pickles else ""
        raise UserError(f"checkpointer.{key}: {directory} has no *.safetensors{why}")
    for name in found:
        if match := _SHARD.fullmatch(name):
            stem, _, count = match.groups()
            for number in range(1, int(count) + 1):
                shard = f"{stem}-{number:05d}-of-{count}.safetensors"
                if shard not in found:
                    raise UserError(f"{directory / shard} does not exist: a shard is missing")
    return found


def _header(file: Path) -> list[str]:
    """Names of a file's tensors.

    Raises:
        UserError: if it cannot be read, or holds something else than floats.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            kinds: Mapping[str, str] = {x: opened.get_slice(x).get_dtype() for x in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
    for name, kind in kinds.items():
        if kind not in _FLOATS:
            raise UserError(
                f"{file}: {name} is {kind}, and weights are floats (quantised checkpoints are not "
                "read; quantize_base quantises on loading)"
            )
    return names


def _some(names: Any) -> str:
    listed = sorted(names)
    return f"{', '.join(listed[:3])}{', …' if len(listed) > 3 else ''} ({len(listed)} in all)"
