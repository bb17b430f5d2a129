"""Weights in safetensors files: Hugging Face's layout or our own, read by all ranks.

A directory with a config.json is a Hugging Face checkpoint, whose model_type says how its tensors
are called (``mdm_plugin.models.naming``); one without has our own names in model.safetensors.
Nothing here unpickles, or runs code from a checkpoint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from mdm_plugin.checkpoint.files import (
    INDEX,
    hf_name,
    read_header,
    read_index,
    read_json,
    some,
    weight_files,
)
from mdm_plugin.distributed.parameters import (
    adapter_names,
    fill,
    local_part,
    named_parameters,
)
from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer
from mdm_plugin.models.naming import FAMILIES, Naming


def _hint(directory: Path) -> str:
    """What to do about a checkpoint that is not there."""
    saved = sorted(x.name for x in directory.parent.glob("step_*") if x.is_dir())
    if saved:
        return f" (there are {', '.join(saved)})"
    of_hub = len(directory.parts) == 2 and not directory.is_absolute()  # org/name
    if of_hub and not directory.parent.is_dir():
        return f": fetch it by tune download {directory} --output-dir DIR, and name DIR"
    return ": a run makes its step_N, tune download fetches a model"


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
            raise UserError(f"checkpointer.{key}: {directory} does not exist{_hint(directory)}")
        self.directory = directory
        self.config, self.naming = _config(directory / "config.json")
        listed: dict[str, str] = {}
        if files is None and (directory / INDEX).is_file():
            listed = read_index(directory / INDEX)
            files = sorted(set(listed.values()))
        for name in files or []:
            if not (directory / name).is_file():
                by = INDEX if listed else "checkpointer.checkpoint_files"
                raise UserError(f"{by}: {directory / name} does not exist")
        found = files or weight_files(directory, key)
        self.where: dict[str, Path] = {}
        for file in (directory / name for name in found):
            for name in read_header(file):
                if name in self.where:
                    raise UserError(f"{file}: {name} is in {self.where[name].name} too")
                self.where[name] = file
        for name, file_name in listed.items():
            if self.where.get(name, Path()).name != file_name:
                raise UserError(f"{directory / INDEX}: {name} is not in {file_name}")
        if listed and (extra := self.where.keys() - listed.keys()):
            raise UserError(f"{directory / INDEX}: does not list {some(extra)}")

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
    def load(self, model: MDMTransformer, into: Mapping[str, Tensor] | None = None) -> None:
        """Fill the model's parameters, adapters apart; each rank reads its own shards only.

        ``into``: tensors to fill in the place of all those parameters, by their names.

        Raises:
            UserError: if a tensor is missing, unknown, wrongly shaped, or no float.
        """
        names = self.names(model)
        tied = isinstance(model.output, TiedLinear)
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
                raise UserError(f"{self.directory}: the checkpoint {kind} {some(wrong)}")
        parameters = named_parameters(model) if into is None else into
        fill(model, self._values(model, parameters, names), parameters)

    def _values(
        self, model: MDMTransformer, parameters: Mapping[str, Tensor], names: dict[str, str]
    ) -> Iterator[tuple[str, Any]]:
        """Each parameter with what is stored of it, file by file."""
        new_rows = model.new_tokens
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
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{file}: model_type {kind!r} is not known (known: {', '.join(FAMILIES)})")
    return config, FAMILIES[kind]
