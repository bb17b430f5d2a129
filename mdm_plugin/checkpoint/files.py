"""Safetensors files, their index and the JSON beside them, read with their errors named."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdm_plugin.errors import UserError
from mdm_plugin.models.naming import Naming

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

Write = Callable[[], Any]  # what rank 0 does to write a file; any thread may
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

_FLOATS = {"F64", "F32", "F16", "BF16"}


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


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def read_index(file: Path) -> dict[str, str]:
    """The weight_map of an index; its files lie in the index's own directory."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map")
    for name, target in weight_map.items():
        if not isinstance(target, str) or Path(target).name != target:
            raise UserError(f"{file}: {name} points to {target!r}, which is no file beside it")
        if not target.endswith(".safetensors"):
            raise UserError(f"{file}: {target} is no safetensors file; others are not opened")
    return weight_map


def weight_files(directory: Path, key: str) -> list[str]:
    found = sorted(f.name for f in directory.glob("*.safetensors") if f.name != ADAPTER)
    if WEIGHTS in found:
        return [WEIGHTS]
    if not found and (directory / ADAPTER).is_file():
        raise UserError(
            f"checkpointer.{key}: {directory} holds adapters alone: name the weights that they "
            f"belong to, and {directory} as checkpointer.adapter_checkpoint"
        )
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


def read_header(file: Path) -> list[str]:
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


def some(names: Any) -> str:
    listed = sorted(names)
    return f"{', '.join(listed[:3])}{', …' if len(listed) > 3 else ''} ({len(listed)} in all)"
