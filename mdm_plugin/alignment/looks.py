"""What ``mdm_variance`` does alike for preferences and for a policy.

Both look several times at the same answers by each estimator, with other noise each time. What a
gradient does over the looks is noise of the estimate, and has a variance: the trace of its
covariance.
"""

import csv
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mdm_plugin.alignment.bounds import check_draws
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.options import VarianceOptions
from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.inference import measured_model
from mdm_plugin.models import MDMTransformer
from mdm_plugin.training.estimators import as_estimator, check_estimator, is_causal
from mdm_plugin.variance import Estimate

# Options of mdm_variance that are of the training objective's noise alone.
ELSEWHERE = (
    "objective",
    "progress",
    "autoregressive",
    "metric_logger",
    "batches_per_round",
    "warmup_batches",
    "train_eos_padding",
)


class Spread:
    """The mean of vectors that come one after another, and their variance (Welford's): no two of
    them need be kept."""

    def __init__(self) -> None:
        self.count, self.mean = 0, torch.zeros(())
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, vector: Tensor) -> None:
        """One more, of the same shape."""
        self.count += 1
        change = vector - self.mean
        self.mean = self.mean + change / self.count
        self.squares += (change * (vector - self.mean)).double().sum().cpu()

    def variance(self, world: World) -> Tensor:
        """Summed over coordinates, and over the ranks that have others of them. Scalar, fp64."""
        return world.sum(self.squares).cpu() / (self.count - 1)


def check_options(cfg: DictConfig, kind: str, part: DictConfig) -> None:
    """Refuse what the measurement of ``kind``, whose keys are ``part``, would not look at.

    Raises:
        UserError: naming the key.
    """
    plain = OmegaConf.structured(VarianceOptions)
    for key in ELSEWHERE:
        if cfg[key] != plain[key]:
            raise UserError(f"{key}: is of no use with {kind}: leave it out")
    for key in ("batch_size", "batches", "projection"):
        if cfg[key] is not None and cfg[key] < 1:
            raise UserError(f"{key}: {cfg[key]}: use 1 or more")
    if cfg.batches < 2:
        raise UserError(f"batches: {cfg.batches}: intervals are over batches: use 2 or more")
    if part.repeats < 2:
        raise UserError(f"{kind}.repeats: {part.repeats}: use 2 or more")
    if not cfg.estimators:
        raise UserError("estimators: name at least one")


def load(cfg: DictConfig, world: World, checkpointer: Any) -> MDMTransformer:
    """The config's model, filled by ``checkpointer``."""
    return measured_model(cfg, partial(instantiate, cfg, "model"), checkpointer, world)


def read_estimator(
    cfg: DictConfig, name: str, more: Iterable[str], draws: int, mask_id: int, model: MDMTransformer
) -> tuple[Estimator, int]:
    """An entry of ``cfg.estimators``, and how many forwards it has: its own, or ``draws``.

    more: keys that it may have besides.

    Raises:
        UserError: if it has others, or what they say does not go together.
    """
    where, parts, keys = f"estimators.{name}.", cfg.estimators[name], ("timesteps", "masking")
    may = [*keys, "draws", *more]
    mapping = isinstance(parts, DictConfig)
    given = {key for key, x in parts.items() if x is not None} if mapping else set()
    if given - set(may) or not given >= set(keys):
        raise UserError(
            f"{where[:-1]}: give it timesteps and masking, and of {may[2:]} what differs"
        )
    timesteps = instantiate(parts, "timesteps", where=where)
    masking = instantiate(parts, "masking", where=where)
    estimator = as_estimator(timesteps, masking, instantiate(cfg, "loss"), mask_id, where)
    if model.block_length:
        estimator = estimator._replace(blocks=Blocks(model.block_length))
    check_estimator(estimator, is_causal(model), where)
    forwards = parts.get("draws", draws)
    if not isinstance(forwards, int):
        raise UserError(f"{where}draws: {forwards}: use a number")
    try:
        check_draws(estimator, forwards)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    return estimator, forwards


def write_rows(
    rows: list[dict[str, Any]], facts: dict[str, Any], cfg: DictConfig, name: str
) -> Path:
    """Write NAME.json, with the facts and the config's estimators, and NAME.csv; where they are."""
    directory = Path(cfg.output_dir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    facts = {**facts, "estimators": OmegaConf.to_container(cfg.estimators), "rows": rows}
    (directory / f"{name}.json").write_text(json.dumps(facts, indent=2))
    with (directory / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return directory


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(x)} |" for x in rows)


def interval(value: Estimate) -> str:
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"
