"""How noisy is each estimator of the training objective, and where does the noise come from?

    tune run mdm_variance --config quickstart_variance
    tune run --nproc_per_node 8 mdm_variance --config my.yaml projection=8192

For a model, a data set and a list of estimators: the variance of the loss and of the gradient,
split into A (masking pattern), B (masking rate) and C (data), with 95 % intervals
(``mdm_plugin/variance.py``). Ctrl-C ends it with what has been measured so far. With
``preferences``, of the score and the gradient that mdm_dpo estimates
(``mdm_plugin/alignment/score_variance.py``); with ``policy``, of the gradient that mdm_grpo
estimates from the model's own answers (``mdm_plugin/alignment/policy_variance.py``).

Every option with its default: ``VarianceOptions`` in ``mdm_plugin/config/options.py``.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from mdm_plugin.alignment.policy_variance import PolicyVariance
from mdm_plugin.alignment.score_variance import PreferenceVariance
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import VarianceOptions
from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.distributed.gradients import folded_gradient
from mdm_plugin.distributed.world import World, distributed
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.inference import measured_model
from mdm_plugin.evaluation.variance_report import Measured, write_report
from mdm_plugin.masking import NextToken
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training.blocks import check_sampler
from mdm_plugin.training.checks import check_data
from mdm_plugin.training.corruption import corrupt, first_blocks
from mdm_plugin.training.estimators import (
    as_estimator,
    check_estimator,
    is_causal,
    read_objective,
)
from mdm_plugin.training.metrics import TensorBoardLogger
from mdm_plugin.training.probe import fit, fit_line, plot_fit, probe, probe_due, write_fit
from mdm_plugin.training.step import Result, backward, global_normalizer, learn, wants_norms
from mdm_plugin.variance import Draws, contributions, signal

# Of each batch b: (rows, t, masks) of the four draws that mdm_plugin.variance explains.
DRAWS = {"first": (0, 0, 0), "remasked": (0, 0, 1), "redrawn": (0, 1, 2), "apart": (1, 2, 3)}


@dataclass
class Candidate:
    """An estimator on a model, and what has been measured of it."""

    name: str
    estimator: Estimator
    model: MDMTransformer
    parts: dict[str, list[Tensor]] = field(
        default_factory=lambda: {"loss": [], "gradient": [], "signal": []}
    )
    seconds: list[float] = field(default_factory=list)


class Estimate(NamedTuple):
    """One estimate on a batch: its loss, and this rank's part of the gradient [D]."""

    result: Result
    loss: Tensor
    gradient: Tensor


class MDMVariance:
    """Set up, measure in rounds, report."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.output_dir = Path(cfg.output_dir).expanduser()
        self.metric_logger: Any = None

    def setup(self) -> None:
        self._check_sizes()
        self._setup_data()
        self._setup_candidates()
        self._setup_autoregressive()
        self.metric_logger = instantiate(self.cfg, "metric_logger")
        cfg, world = self.cfg, self.world
        size = sum(p.numel() for p in self.candidates[0].model.parameters())
        exact = f"folded to {cfg.projection} dimensions" if cfg.projection else "exact"
        self.say(
            f"{size:,} parameters on {world.size} x {world.device.type}; gradients {exact}; "
            f"{len(self.candidates)} estimators x {cfg.batches} batches of {self.batches.size} rows"
        )

    def _check_sizes(self) -> None:
        cfg = self.cfg
        if cfg.dataset is None:
            raise UserError("dataset: missing: name the rows to measure on")
        if not 0 <= cfg.progress <= 1:
            raise UserError(f"progress: {cfg.progress}: use 0, the start of training, up to 1")
        for key in ("batch_size", "batches", "projection"):
            if cfg[key] is not None and cfg[key] < 1:
                raise UserError(f"{key}: {cfg[key]}: use 1 or more")
        if cfg.batches_per_round < 2 or cfg.batches < cfg.batches_per_round:
            raise UserError(
                f"batches_per_round: {cfg.batches_per_round}: use 2 up to batches, {cfg.batches}"
            )

    def _setup_data(self) -> None:
        cfg, world = self.cfg, self.world
        self.tokenizer = instantiate(cfg, "tokenizer")
        rows = instantiate(cfg, "dataset", self.tokenizer)
        self.say(f"dataset: {rows}")
        eos = self.tokenizer.eos_id if cfg.train_eos_padding else None
        self.batches = GlobalBatches(
            rows,
            Split(cfg.batch_size, world.size, world.rank),
            Padding(self.tokenizer.pad_id, eos, max_len=self.tokenizer.max_seq_len),
            seed=cfg.seed,
        )

    def _setup_candidates(self) -> None:
        """The estimators, each on the same model."""
        cfg, mask_id = self.cfg, self.tokenizer.mask_id
        loss, model = instantiate(cfg, "loss"), self.load_model(cfg, "")
        check_data(model, self.tokenizer, self.batches.rows)
        w = read_objective(cfg)(cfg.progress)
        self.batches.padding = self.batches.padding._replace(multiple=model.block_length or 1)
        self.candidates = []
        for name, parts in cfg.estimators.items():
            where = f"estimators.{name}."
            given = {key for key, x in parts.items() if x} if isinstance(parts, DictConfig) else {}
            one_t = "blocks_share_t" in given
            if {*given, "blocks_share_t"} != {"timesteps", "masking", "blocks_share_t"}:
                raise UserError(f"{where[:-1]}: give it timesteps and masking, both, and no more")
            if one_t and not model.block_length:
                raise UserError(f"{where}blocks_share_t: the model has no blocks: leave it out")
            blocks = Blocks(model.block_length, one_t) if model.block_length else None
            timesteps = instantiate(parts, "timesteps", where=where)
            masking = instantiate(parts, "masking", where=where)
            estimator = as_estimator(timesteps, masking, loss, mask_id, where)
            estimator = estimator._replace(w=w, blocks=blocks)
            check_estimator(estimator, is_causal(model), where)
            if blocks:
                check_sampler(estimator, where)
            self.candidates.append(Candidate(name, estimator, model))
        if not self.candidates:
            raise UserError("estimators: name at least one")

    def _setup_autoregressive(self) -> None:
        """The line to compare with: next tokens, which have no mask to be drawn."""
        cfg = self.cfg
        if cfg.autoregressive is None:
            return
        model = self.load_model(cfg.autoregressive, "autoregressive.")
        loss, mask_id = self.candidates[0].estimator.loss, self.tokenizer.mask_id
        estimator = Estimator(Uniform(), NextToken(), loss, mask_id)
        check_estimator(estimator, is_causal(model), "autoregressive.")
        self.candidates.append(Candidate("Autoregressive", estimator, model))

    def load_model(self, cfg: DictConfig, where: str) -> MDMTransformer:
        """The model of a part of the config, with the weights of its checkpointer."""
        checkpointer = instantiate(cfg, "checkpointer", where=where)
        if checkpointer.weights is None:
            self.say(f"{where}checkpointer: no checkpoint_dir: random weights")
        build = partial(instantiate, cfg, "model", where=where)
        return measured_model(self.cfg, build, checkpointer, self.world).train()

    def fit_samplers(self) -> None:
        """Teach the samplers that learn from the model: by a probe, and by some losses."""
        for candidate in self.candidates:
            sampler = candidate.estimator.timesteps
            if plan := probe_due(candidate.estimator, 0):
                measured = probe(
                    candidate.model, candidate.estimator, plan, self.batches, self.world, step=0
                )
                report = fit(candidate.estimator, plan, measured, self.world)
                self.say(f"{candidate.name}: {fit_line(report)}")
                if self.world.rank == 0:
                    stem = re.sub(r"\W+", "_", candidate.name).strip("_")
                    write_fit(report, self.output_dir / f"timesteps_{stem}.json")
                    plot_fit(report).savefig(self.output_dir / f"timesteps_{stem}.png", dpi=120)
            if sampler.learns:
                for batch in range(self.cfg.warmup_batches):
                    key = ("warm-up", batch)
                    found = self.estimate(candidate, key, key, key)
                    result = found.result
                    learn(sampler, [result.shown(sampler)], self.world)

    def estimate(
        self,
        candidate: Candidate,
        rows: tuple[str | int, ...],
        t: tuple[str | int, ...],
        masks: tuple[str | int, ...],
    ) -> Estimate:
        """One estimate on a batch; its rows, t and masks are keyed by what it is to share with
        others."""
        seed, size, rank = self.cfg.seed, self.batches.size, self.world.rank
        pick = keyed_generator(seed, "rows", *rows)
        indices = torch.randint(len(self.batches.rows), (size,), generator=pick)
        places = torch.arange(rank * self.cfg.batch_size, (rank + 1) * self.cfg.batch_size)
        longest = int(self.batches.rows.lengths_of(indices).max())
        batch = self.batches.collate(indices[places], places, ("variance", *masks), longest)
        estimator, model = candidate.estimator, candidate.model
        first = first_blocks(self.batches, indices, estimator.blocks)
        count = size if first is None else int(first[-1])
        times = estimator.timesteps(count, keyed_generator(seed, "t", *t), estimator.w)
        noisy = corrupt(batch.numbered(first), times, estimator)
        normalizer = global_normalizer([noisy], self.world)
        norms = wants_norms(estimator.timesteps)
        result = backward(model, estimator.loss, noisy, normalizer, self.world, norms=norms)
        gradient = folded_gradient(model, self.cfg.projection, seed, rank)
        model.zero_grad(set_to_none=True)
        return Estimate(result, self.world.sum(result.loss), gradient)

    def measure(self) -> None:
        cfg = self.cfg
        rounds = cfg.batches // cfg.batches_per_round
        total = rounds * len(self.candidates) * cfg.batches_per_round
        quiet = self.world.rank != 0
        with tqdm(total=total, unit="batch", desc="Measuring", disable=quiet, mininterval=1) as bar:
            for number in range(rounds):
                for candidate in self.candidates:
                    self.measure_round(candidate, number, bar)
                self.report(final=number == rounds - 1)

    def measure_round(self, candidate: Candidate, number: int, bar: tqdm) -> None:
        """The four draws of each batch of a round; only what they contribute is kept."""
        losses: dict[str, list[Tensor]] = {name: [] for name in DRAWS}
        gradients: dict[str, list[Tensor]] = {name: [] for name in DRAWS}
        each = self.cfg.batches_per_round
        for batch in range(number * each, (number + 1) * each):
            start = time.perf_counter()
            for name, (rows, t, masks) in DRAWS.items():
                found = self.estimate(candidate, (batch, rows), (batch, t), (batch, masks))
                losses[name].append(found.loss.reshape(1))
                gradients[name].append(found.gradient)
            candidate.seconds.append((time.perf_counter() - start) / len(DRAWS))
            bar.update()
        loss, gradient = (
            Draws(**{name: torch.stack(values) for name, values in drawn.items()})
            for drawn in (losses, gradients)
        )
        rows = self.batches.size
        candidate.parts["loss"].append(contributions(loss, rows).cpu())
        # Each rank has other coordinates of the gradient; all have the whole loss.
        for kind, part in (
            ("gradient", contributions(gradient, rows)),
            ("signal", signal(gradient)),
        ):
            candidate.parts[kind].append(self.world.sum(part).cpu())

    def report(self, final: bool = True) -> None:
        """Write the table, JSON, CSV, figures and TensorBoard, from the whole rounds so far."""
        rounds = min(len(x.parts["gradient"]) for x in self.candidates)
        if not rounds or self.world.rank != 0:
            return
        measured = [
            Measured(
                x.name,
                x.estimator.masking.views,
                sorted(x.seconds)[len(x.seconds) // 2],
                torch.cat(x.parts["loss"][:rounds]),
                torch.cat(x.parts["gradient"][:rounds]),
                torch.cat(x.parts["signal"][:rounds]),
            )
            for x in self.candidates
        ]
        table, figures, scalars = write_report(measured, self.cfg, self.output_dir)
        if self.metric_logger is not None:
            batches = rounds * self.cfg.batches_per_round
            self.metric_logger.log_dict(scalars, batches)
            if isinstance(self.metric_logger, TensorBoardLogger):
                for name, figure in figures.items():
                    self.metric_logger.log_figure(name, figure, batches)
        if final:
            self.say(f"\n{table}\n\nWritten to {self.output_dir}")

    def cleanup(self) -> None:
        if self.metric_logger is not None:
            self.metric_logger.close()

    def say(self, line: str) -> None:
        if self.world.rank == 0:
            tqdm.write(line)


@contextmanager
def reporting_on_interrupt(recipe: MDMVariance) -> Iterator[None]:
    """Ctrl-C ends the measuring, and what there is by then is reported."""
    try:
        yield
    except KeyboardInterrupt:
        recipe.say("interrupted: reporting what has been measured")
        recipe.report()


@parse(VarianceOptions)
def main(cfg: DictConfig) -> None:
    """Measure the variance of estimators of the masked diffusion objective."""
    instantiate(cfg, "prepare")
    with distributed(cfg.device, cfg.data_parallel_shard_dim) as world:
        if cfg.preferences is not None and cfg.policy is not None:
            raise UserError("preferences, policy: measure one of them at a time")
        if cfg.preferences is not None or cfg.policy is not None:
            kind = PreferenceVariance if cfg.policy is None else PolicyVariance
            of_answers = kind(cfg, world)
            of_answers.setup()
            return of_answers.measure()
        recipe = MDMVariance(cfg, world)
        recipe.setup()
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            recipe.fit_samplers()
            with reporting_on_interrupt(recipe):
                recipe.measure()
        finally:
            recipe.cleanup()


if __name__ == "__main__":
    main()
