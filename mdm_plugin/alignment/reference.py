"""The reference model of preferences and rewards: what the policy was before, and its bounds."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from mdm_plugin.alignment.bounds import Drawn, bounds, everywhere, token_bounds
from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.config.components import instantiate
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.parameters import adapter_names, named_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.models import MDMTransformer
from mdm_plugin.training.precision import build_options

KINDS = ("precompute", "model", "adapters_off")
_KEY = ("reference",)  # of torch's generators: a reference has no dropout that they would be for
_TRAINED = (
    "and the model has been trained since: restore the file and the options, or start a new run "
    "with another output_dir"
)
_ANEW = "name another output_dir, or remove the file to make it anew"


class Reference:
    """What gives the reference's bounds, by the policy's own noise."""

    def bounds(self, step: int, micro_batches: Sequence[Drawn]) -> list[Tensor]:
        """B_d of each sequence and draw of this rank's micro-batches of a step. [R, D] each."""
        raise NotImplementedError


class Live(Reference):
    """A reference that is there while the model is trained."""

    def __init__(self, model: MDMTransformer, loss: MDMLoss, world: World) -> None:
        self.model, self.loss, self.world = model, loss, world

    def use(self) -> AbstractContextManager[None]:
        """Within it, ``model`` is the reference."""
        raise NotImplementedError

    def bounds(self, step: int, micro_batches: Sequence[Drawn]) -> list[Tensor]:
        with self.use():
            return [bounds(self.model, self.loss, x, self.world, _KEY) for x in micro_batches]

    def token_bounds(self, micro_batches: Sequence[Drawn]) -> list[Tensor]:
        """What each place adds to the bounds of this rank's micro-batches. [R, L] each."""
        with self.use():
            return [token_bounds(self.model, self.loss, x, self.world, _KEY) for x in micro_batches]


class FrozenCopy(Live):
    """A second model, sharded as the first, which is not trained."""

    def use(self) -> AbstractContextManager[None]:
        return nullcontext()


class AdaptersOff(Live):
    """The model under its adapters: no copy at all."""

    @contextmanager
    def use(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with disable_adapter(self.model):
                yield
        finally:
            self.model.train(training)


class Stored(Reference):
    """Bounds that the model gave before it was trained, for the noise of every step, in a file.

    The noise is a function of (seed, step, place), so all that training will ask for is known
    before. The file is an .npy array [steps, size, D], fp64, NaN where nothing is known yet, with
    what it belongs to beside it, as .json. Making it can be interrupted, and goes on.

    Args:
        file: the array.
        identity: JSON of what the bounds depend on: the model, the data, the noise.
        shape: (steps, size, D): size sequences of a global batch.
        world: the ranks.
        new: whether what is missing can be computed; else all of it must be there.

    Raises:
        UserError: if the file is of another identity, lacks bounds, or cannot be read or written.
    """

    def __init__(
        self,
        file: Path,
        identity: Mapping[str, Any],
        shape: tuple[int, int, int],
        world: World,
        new: bool,
    ) -> None:
        self.file, self.shape, self.world = file, shape, world
        self.facts = file.with_suffix(".json")
        self._agree(self._open(identity, new) if world.rank == 0 else None)
        try:
            self.values = numpy.load(file, mmap_mode="r+" if world.rank == 0 else "r")
        except (OSError, ValueError) as error:
            self._agree(f"reference: {file} cannot be read on rank {world.rank}: {error}")
        else:
            self._agree(None)
        if not new and self.missing():
            raise UserError(f"reference: {file} lacks bounds, {_TRAINED}")

    def _agree(self, failure: str | None) -> None:
        """Stop on all ranks if one has failed."""
        for line in self.world.gather(failure):
            if line:
                raise UserError(line)

    def _open(self, identity: Mapping[str, Any], new: bool) -> str | None:
        """Make the file if it is not there and is to be, on rank 0; what is wrong, if anything."""
        try:
            if self.facts.is_file() and self.file.is_file():
                stored = json.loads(self.facts.read_text())
                for key, value in json.loads(json.dumps(identity)).items():
                    if stored.get(key) != value:
                        return (
                            f"reference: {self.file} was made with {key} {stored.get(key)}, and "
                            f"this run has {value}: "
                            + (_ANEW if new else "restore it, or start a new run elsewhere")
                        )
                found = numpy.load(self.file, mmap_mode="r")
                if found.shape != self.shape or found.dtype != numpy.float64:
                    return f"reference: {self.file} is damaged: {_ANEW if new else _TRAINED}"
                return None
            if not new:
                return f"reference: {self.file} is not there, {_TRAINED}"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            made = numpy.lib.format.open_memmap(self.file, "w+", numpy.float64, self.shape)
            made[:] = numpy.nan
            made.flush()
            self.facts.write_text(json.dumps(identity))
        except (OSError, ValueError) as error:
            return f"reference: {self.file} cannot be used: {error}"
        return None

    def missing(self) -> list[int]:
        """The steps that are not known yet, the same on every rank."""
        own = numpy.isnan(self.values).any((1, 2)).nonzero()[0].tolist()
        return list(self.world.gather(own)[0])

    def fill(
        self, given: Callable[[list[Drawn]], list[Tensor]], batches: Callable[[int], list[Drawn]]
    ) -> None:
        """Compute what is missing, on every rank. given: bounds of some micro-batches; batches:
        this rank's micro-batches of a step."""
        steps = self.missing()
        quiet = self.world.rank != 0 or len(steps) < 2
        for step in tqdm(steps, desc="Reference", unit="step", disable=quiet, leave=False):
            drawn = batches(step)
            places = [x.places for x in drawn]
            found = everywhere(given(drawn), places, self.shape[1], self.world)
            if not found.isfinite().all():
                raise UserError(f"reference: a bound of step {step} is not finite: a broken model")
            if self.world.rank == 0:
                self.values[step] = found.numpy()
        if self.world.rank == 0 and steps:
            self.values.flush()
            with self.file.open("rb") as written:
                os.fsync(written.fileno())
        self.world.gather(None)  # no rank reads before it is written
        self.values = numpy.load(self.file, mmap_mode="r+" if self.world.rank == 0 else "r")

    def bounds(self, step: int, micro_batches: Sequence[Drawn]) -> list[Tensor]:
        values = torch.from_numpy(numpy.array(self.values[step]))
        return [values[x.places] for x in micro_batches]


def live_reference(
    cfg: DictConfig, policy: MDMTransformer, checkpointer: Checkpointer, loss: MDMLoss, world: World
) -> Live:
    """``policy`` without its adapters, or by ``reference: model`` the model that ``cfg`` starts
    from, once more, whether the run goes on or starts."""
    if cfg.reference == "adapters_off":
        return AdaptersOff(policy, loss, world)
    model = build_model(
        lambda: instantiate(cfg, "model"),
        world,
        training.get_dtype(cfg.dtype, device=world.device),
        build_options(cfg, world.device)._replace(masters=None, activation_checkpointing=False),
    )
    checkpointer.load_weights(model, cfg.seed)
    model.requires_grad_(False)
    return FrozenCopy(model.eval(), loss, world)


def check_reference(cfg: DictConfig, model: MDMTransformer, sampler_moves: bool) -> None:
    """Check that ``cfg.reference`` can be had.

    sampler_moves: whether the sampler of t depends on the training.

    Raises:
        UserError: with the reason.
    """
    if cfg.reference not in KINDS:
        raise UserError(f"reference: {cfg.reference}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    adapters = bool(adapter_names(model))
    if cfg.reference == "adapters_off" and not adapters:
        raise UserError("reference: adapters_off, and the model has no adapters: use precompute")
    if cfg.reference == "adapters_off" and cfg.checkpointer.get("adapter_checkpoint"):
        raise UserError(
            "reference: adapters_off, and checkpointer.adapter_checkpoint has the run start from "
            "adapters that the reference would be without: use precompute or model"
        )
    if cfg.reference == "precompute" and sampler_moves:
        raise UserError(
            f"reference: precompute, and {cfg.timesteps._component_.rsplit('.', 1)[-1]} draws by "
            "what it learns while training: use reference=model, or a sampler that does not move"
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters, to the last bit; the same however they are sharded. On every rank.

    For each one the sum over its numbers of (bits · place), modulo 2^64.
    """
    digest = blake2b(digest_size=16)
    for name, parameter in named_parameters(model).items():
        total = torch.zeros((), dtype=torch.long)
        for start, part in _numbers(parameter.detach()):
            place = torch.arange(start + 1, start + 1 + len(part), device=part.device)
            total += (part * place).sum().cpu()
        digest.update(f"{name}={int(total)};".encode())
    return digest.hexdigest()


def _numbers(parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A parameter's bits as whole numbers, some at a time, each with its first one's place."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    if isinstance(whole, NF4Tensor):
        whole = whole.get_original_weight()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = whole.contiguous().view(kinds[whole.element_size()]).flatten()
    start = 0
    for part in flat.split(1 << 24):
        yield start, part.long()
        start += len(part)
