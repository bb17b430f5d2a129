"""Weights written as they were read: the same files, names and index, for Hugging Face's tools."""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mdm_plugin.checkpoint.adapters import merged
from mdm_plugin.checkpoint.files import (
    ADAPTER_CONFIG,
    INDEX,
    WEIGHTS,
    Write,
    hf_name,
    read_json,
    write_file,
)
from mdm_plugin.checkpoint.manifest import MANIFEST
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.parameters import adapter_names, named_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.models import MDMTransformer
from mdm_plugin.models.naming import BLOCK_LENGTH

# What goes with the weights into an export: configuration, tokenizer and the model's own code,
# which is carried along as text and never run here.
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


def save_weights(
    model: nn.Module,
    world: World,
    directory: Path,
    source: Weights | None,
    copy: bool = False,
    instead: Mapping[str, Tensor] | None = None,
) -> Iterator[Write]:
    """Write all parameters, adapters merged, laid out as ``source`` is. Iterated on every rank.

    ``instead``: tensors to write for the parameters of their names.

    Gives one function per file. On rank 0 it writes the file; on the other ranks it does nothing,
    but each rank gets as many. Call each before you ask for the next: then rank 0 never holds more
    than the largest file. With ``copy``, none refers to the model's memory: call them at any time.
    """
    adapters = adapter_names(model)
    values = {**named_parameters(model), **(instead or {})}
    names = [name for name in values if name not in adapters]
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
            tensor = merged(model, values, stored[name])
            if world.rank == 0:
                tensors[name] = tensor.detach().to("cpu", copy=copy).contiguous()
                total += tensors[name].nbytes
        yield partial(write_file, tensors, directory / file) if world.rank == 0 else _nothing
        del tensors
    if world.rank != 0 or source is None or naming is None:
        return
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, members in files.items() for name in members},
    }
    config = _config(source.config, model, values["tok_embeddings.weight"])

    def beside() -> None:
        if len(files) > 1:
            (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        for pattern in BESIDE:
            for path in source.directory.glob(pattern):
                if path.name not in (INDEX, ADAPTER_CONFIG, MANIFEST, "config.json", "state.json"):
                    shutil.copyfile(path, directory / path.name)
        (directory / "config.json").write_text(json.dumps(config, indent=2))

    yield beside


def _config(stated: Mapping[str, Any], model: nn.Module, embeddings: Tensor) -> dict[str, Any]:
    """A checkpoint's config.json, of the model as it is now."""
    now: dict[str, Any] = {
        **dict.fromkeys(("vocab_size", "embedding_size"), embeddings.shape[0]),
        **dict.fromkeys(("torch_dtype", "dtype"), str(embeddings.dtype).removeprefix("torch.")),
    }
    if isinstance(model, MDMTransformer):
        now |= dict.fromkeys(BLOCK_LENGTH, model.block_length)
    return {name: now.get(name, value) for name, value in stated.items()}


def _nothing() -> None:
    pass


def set_config(directory: Path, **values: Any) -> None:
    """Set keys of the config.json of an export, if it has one."""
    file = directory / "config.json"
    if file.is_file():
        file.write_text(json.dumps({**read_json(file), **values}, indent=2))
