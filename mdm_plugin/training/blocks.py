"""Blocks during training: which length they have, and what goes with a model that has them."""

import math
import operator
from typing import NamedTuple

from omegaconf import DictConfig, ListConfig

from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.data import GlobalBatches
from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer


class BlockSchedule(NamedTuple):
    """Blocks of a length that may change during training.

    starts: (share of training, S) each, ascending; the first begins at 0. Empty: no blocks. one_t:
    as in ``Blocks``.
    """

    starts: tuple[tuple[float, int], ...] = ()
    one_t: bool = False

    def __call__(self, progress: float) -> Blocks | None:
        """progress: 0 at the first step, 1 at the last."""
        if not self.starts:
            return None
        length = [size for start, size in self.starts if start <= progress][-1]
        return Blocks(length, self.one_t)

    @property
    def multiple(self) -> int:
        """Tokens that are whole blocks at any time."""
        return math.lcm(*(length for _, length in self.starts))

    def shortest(self) -> Blocks | None:
        """The blocks of which a row has the most: those that need the most memory."""
        lengths = [length for _, length in self.starts]
        return Blocks(min(lengths), self.one_t) if lengths else None


def read_blocks(
    cfg: DictConfig, model: MDMTransformer, estimator: Estimator, batches: GlobalBatches
) -> BlockSchedule:
    """``block_schedule``; rows that are filled with EOS will end with a whole block.

    Raises:
        UserError: as ``block_schedule``.
    """
    schedule, padding = block_schedule(cfg, model, estimator), batches.padding
    batches.padding = padding._replace(multiple=math.lcm(padding.multiple, schedule.multiple))
    return schedule


def block_schedule(cfg: DictConfig, model: MDMTransformer, estimator: Estimator) -> BlockSchedule:
    """How long blocks are during training.

    ``cfg.block_schedule``: [[0.0, 4], [0.5, 32]] for blocks of 4 tokens up to half of training and
    of 32 from then on; the last one is the model's. None: the model's all the time.

    Raises:
        UserError: if something does not go with blocks, or blocks are asked for without any.
    """
    size = model.block_length
    if size is None:
        for key, unset in (("block_schedule", None), ("blocks_share_t", False)):
            if cfg[key] != unset:
                raise UserError(f"{key}: the model has no blocks: set model.block_length")
        return BlockSchedule()
    if cfg.batch_layout == "packed" and cfg.pad_to_multiple_of > 1:
        raise UserError(
            "pad_to_multiple_of: rows in blocks are packed as they are: leave it out, or set "
            "batch_layout=padded"
        )
    check_sampler(estimator)
    schedule = BlockSchedule(_starts(cfg.block_schedule, size), bool(cfg.blocks_share_t))
    if model.max_seq_len % schedule.multiple:
        raise UserError(
            f"block_schedule: model.max_seq_len, {model.max_seq_len}, is no multiple of all lengths"
        )
    return schedule


def check_sampler(estimator: Estimator, where: str = "") -> None:
    """Check that a sampler of t learns nothing that blocks do not show; ``where`` precedes its key.

    Raises:
        UserError: if it does.
    """
    sampler = estimator.timesteps
    if sampler.learns and sampler.learns_from == "gradient":
        raise UserError(
            f"{where}timesteps: {type(sampler).__name__} learns from rows' gradients, which blocks "
            "do not have apart: set its target to loss"
        )


def _starts(given: ListConfig | None, size: int) -> tuple[tuple[float, int], ...]:
    if given is None:
        return ((0.0, size),)
    line = f"block_schedule: {given}: use [share of training, length] each, from 0.0 on, ascending"
    try:
        starts = tuple((float(start), operator.index(length)) for start, length in given)
    except (TypeError, ValueError) as error:
        raise UserError(line) from error
    shares = [start for start, _ in starts]
    if not starts or shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] > 1:
        raise UserError(line)
    if min(length for _, length in starts) < 1:
        raise UserError(f"block_schedule: {given}: a block has 1 token or more")
    if starts[-1][1] != size:
        raise UserError(
            f"block_schedule: it ends at blocks of {starts[-1][1]}, and text is written in blocks "
            f"of model.block_length, {size}: let them be the same"
        )
    return starts
