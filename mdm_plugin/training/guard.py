"""Steps that would do harm are left out, and said to be."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.training.step import Result

_DECAY, _LEAST, _NAMED = 0.98, 50, 5


class Guard:
    """Looks at each step's loss and gradient norm, the same on all ranks, before it is taken.

    A step with a NaN or an infinity is skipped on all ranks alike. One whose loss is far above the
    recent ones, by its z-score, is taken and reported. Both go to the console and to
    ``incidents.jsonl``, with the rows (numbers in the data set, from 0) and their t.

    Args:
        world: the ranks.
        cfg: for output_dir, where incidents.jsonl goes; max_skipped_steps, so many in a row end
            the run, None to take every step unseen; and loss_spike_z, the z-score from which a loss
            is reported, of about the last 50 steps, None for never.
    """

    def __init__(self, world: World, cfg: DictConfig) -> None:
        self.world, self.file = world, Path(cfg.output_dir).expanduser() / "incidents.jsonl"
        self.limit, self.spike_z, self.skipped = cfg.max_skipped_steps, cfg.loss_spike_z, 0
        self._in_a_row = 0
        self._seen, self._mean, self._variance = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """What has been skipped, and what is known of recent losses."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "seen": self._seen,
            "mean": self._mean,
            "variance": self._variance,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._seen, self._mean = state_dict["seen"], state_dict["mean"]
        self._variance = state_dict["variance"]

    def passes(
        self, step: int, results: Sequence[Result], norm: Tensor | None, rows: Tensor
    ) -> bool:
        """Whether to take the step. It waits for the device. Called on every rank.

        Args:
            step: for reports.
            results: of this rank's micro-batches.
            norm: of the whole gradient; None if the parameters are already updated.
            rows: [global batch], the data's row at each place.

        Raises:
            UserError: after ``max_skipped_steps`` in a row, or if it is too late to skip.
        """
        if self.limit is None:
            return True
        loss = self.world.sum(torch.stack([result.loss for result in results]).sum())
        value, size = torch.stack((loss, loss if norm is None else norm.to(loss))).tolist()
        if math.isfinite(value) and math.isfinite(size):
            self._in_a_row = 0
            self._watch(step, value, results, rows)
            return True
        self.skipped += 1
        self._in_a_row += 1
        what = f"loss {value}" + ("" if norm is None else f", gradient norm {size}")
        self._report(step, "not finite", what, results, rows)
        if norm is None:
            raise UserError(
                f"optimizer_in_bwd: step {step}: {what}: the parameters have taken part of it "
                "and it cannot be skipped: resume from the last checkpoint, with a smaller lr"
            )
        if self._in_a_row >= self.limit:
            raise UserError(
                f"max_skipped_steps: {self.limit} steps in a row, to step {step}, had a loss or a "
                f"gradient that is not finite ({self.file}): the last checkpoint is good; lower "
                "the learning rate, or look at the rows"
            )
        return False

    def _watch(self, step: int, loss: float, results: Sequence[Result], rows: Tensor) -> None:
        deviation = self._variance**0.5
        if self.spike_z is not None and self._seen >= _LEAST and deviation > 0:
            z = (loss - self._mean) / deviation
            if z > self.spike_z:
                self._report(step, "spike", f"loss {loss:.4g}, z-score {z:.1f}", results, rows)
        weight = max(1 - _DECAY, 1 / (self._seen + 1))
        change = loss - self._mean
        self._mean += weight * change
        self._variance = (1 - weight) * (self._variance + weight * change**2)
        self._seen += 1

    def _report(
        self, step: int, kind: str, what: str, results: Sequence[Result], rows: Tensor
    ) -> None:
        """Name the rows whose losses are not finite, or else are the largest."""
        own = [
            (float(loss), int(rows[place]), float(t))
            for x in results
            for loss, place, t in zip(x.row_losses.tolist(), x.batch.places, x.batch.t, strict=True)
        ]
        everyone: list[Any] = [own]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, own)
        found = sorted((x for part in everyone for x in part), key=lambda x: -x[0])
        if kind == "not finite":
            found = [x for x in found if not math.isfinite(x[0])]
        if self.world.rank != 0:
            return
        named = [{"row": row, "t": t, "loss": repr(loss)} for loss, row, t in found[:_NAMED]]
        text = "; ".join(f"row {x['row']} (t {x['t']:.3f}, loss {x['loss']})" for x in named)
        tqdm.write(f"step {step}: {what}: {text or 'the loss of each row is finite'}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "what": what, "rows": named}) + "\n")
