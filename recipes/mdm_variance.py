"""How noisy is each estimator of the training objective, and where does the noise come from?

    tune run mdm_variance --config quickstart_variance
    tune run --nproc_per_node 8 mdm_variance --config my.yaml projection=8192

For a model, a data set and a list of estimators: the variance of the loss and of the gradient,
split into A (masking pattern), B (masking rate) and C (data), with 95 % intervals
(``mdm_plugin/variance.py``). Ctrl-C ends it with what has been measured so far.

Every option with its default: ``VarianceOptions`` in ``mdm_plugin/training/options.py``.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from tqdm import tqdm

from mdm_plugin.data import GlobalBatches
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.variance_report import Measured, write_report
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import NextToken
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training.checks import check_data, check_estimator
from mdm_plugin.training.config import instantiate, parse
from mdm_plugin.training.distributed import (
    World,
    build_model,
    distributed,
    folded_gradient,
)
from mdm_plugin.training.options import VarianceOptions
from mdm_plugin.training.probe import draw_fit, fit, probe, probe_due, write_fit
from mdm_plugin.training.step import backward, corrupt, global_normalizer
from mdm_plugin.variance import Draws, contributions

# Of each batch b: (rows, t, masks) of the four draws that mdm_plugin.variance explains.
DRAWS = {"first": (0, 0, 0), "remasked": (0, 0, 1), "redrawn": (0, 1, 2), "apart": (1, 2, 3)}


@dataclass
class Estimator:
    """A sampler of t and one of masks, on a model, and what has been measured of it."""

    name: str
    timesteps: Any
    masking: Any
    model: MDMTransformer
    loss: MDMLoss
    views: int = 0
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {"loss": [], "gradient": []})
    seconds: list[float] = field(default_factory=list)


class MDMVariance:
    """Set up, measure in rounds, report."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.output_dir = Path(cfg.output_dir).expanduser()

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        for key in ("batch_size", "batches", "projection"):
            if cfg[key] is not None and cfg[key] < 1:
                raise UserError(f"{key}: {cfg[key]}: use 1 or more")
        if cfg.batches_per_round < 2 or cfg.batches < cfg.batches_per_round:
            raise UserError(
                f"batches_per_round: {cfg.batches_per_round}: use 2 up to batches, {cfg.batches}"
            )
        self.tokenizer = instantiate(cfg, "tokenizer")
        rows = instantiate(cfg, "dataset", self.tokenizer)
        self.say(f"dataset: {rows}")
        self.batches = GlobalBatches(
            rows,
            batch_size=cfg.batch_size,
            ranks=world.size,
            rank=world.rank,
            seed=cfg.seed,
            pad_id=self.tokenizer.pad_id,
            eos_padding_id=self.tokenizer.eos_id if cfg.train_eos_padding else None,
            max_len=self.tokenizer.max_seq_len,
        )
        loss = instantiate(cfg, "loss")
        model = self.load_model(cfg, "")
        check_data(model, self.tokenizer, rows)
        self.estimators = []
        for name, parts in cfg.estimators.items():
            where = f"estimators.{name}."
            given = {key for key, x in parts.items() if x} if isinstance(parts, DictConfig) else {}
            if given != {"timesteps", "masking"}:
                raise UserError(f"{where[:-1]}: give it timesteps and masking, both, and no more")
            timesteps = instantiate(parts, "timesteps", where=where)
            masking = instantiate(parts, "masking", where=where)
            check_estimator(timesteps, masking, loss, model, where)
            self.estimators.append(Estimator(name, timesteps, masking, model, loss))
        if not self.estimators:
            raise UserError("estimators: name at least one")
        if cfg.autoregressive is not None:
            shifted = MDMLoss(loss.normalize, loss.weight, shift=True, chunk_size=loss.chunk_size)
            other = self.load_model(cfg.autoregressive, "autoregressive.")
            check_estimator(Uniform(), NextToken(), shifted, other, "autoregressive.")
            self.estimators.append(
                Estimator("Autoregressive", Uniform(), NextToken(), other, shifted)
            )
        self.metric_logger = instantiate(cfg, "metric_logger")
        size = sum(p.numel() for p in model.parameters())
        exact = f"folded to {cfg.projection} dimensions" if cfg.projection else "exact"
        self.say(
            f"{size:,} parameters on {world.size} x {world.device.type}; gradients {exact}; "
            f"{len(self.estimators)} estimators x {cfg.batches} batches of {self.batches.size} rows"
        )

    def load_model(self, cfg: DictConfig, where: str) -> MDMTransformer:
        """The model of a part of the config, with the weights of its checkpointer."""
        options = self.cfg
        model = build_model(
            lambda: instantiate(cfg, "model", where=where),
            self.world,
            dtype=training.get_dtype(options.dtype, device=self.world.device),
            compile=options.compile,
            activation_checkpointing=options.enable_activation_checkpointing,
            cpu_offload=options.fsdp_cpu_offload,
            reshard_after_forward=options.fsdp_reshard_after_forward,
        )
        checkpointer = instantiate(cfg, "checkpointer", where=where)
        if checkpointer.weights is None:
            self.say(f"{where}checkpointer: no checkpoint_dir: random weights")
        checkpointer.load_weights(model, options.seed)
        return model.train()

    def fit_samplers(self) -> None:
        """Fit what learns from the model: P-POTS by its probe, Adaptive by some losses."""
        for estimator in self.estimators:
            sampler = estimator.timesteps
            if probe_due(sampler, 0):
                measured = probe(
                    *(estimator.model, estimator.loss, sampler, estimator.masking),
                    *(self.batches, self.tokenizer.mask_id, self.world),
                    step=0,
                )
                report = fit(sampler, measured, self.world)
                self.say(
                    f"{estimator.name}: fitted the density of t to {measured.forwards} forwards, "
                    f"KL {report['kl']:.4f} (uniform {report['kl_uniform']:.4f})"
                )
                if self.world.rank == 0:
                    stem = re.sub(r"\W+", "_", estimator.name).strip("_")
                    write_fit(report, self.output_dir / f"timesteps_{stem}.json")
                    draw_fit(report).savefig(self.output_dir / f"timesteps_{stem}.png", dpi=120)
            if hasattr(sampler, "tally"):
                for batch in range(self.cfg.warmup_batches):
                    draw = (("warm-up", batch),) * 3
                    _, _, losses, t = self.draw(estimator, *draw)
                    sampler.update(self.world.sum(sampler.tally(t, losses.cpu())).cpu())

    def draw(self, estimator: Estimator, rows: Any, t: Any, masks: Any) -> tuple[Any, ...]:
        """One estimate on a batch, keyed by what it is to share with others.

        Gives the loss, this rank's part of the gradient [D], its row losses [R] and their t.
        """
        seed, size, rank = self.cfg.seed, self.batches.size, self.world.rank
        pick = keyed_generator(seed, "rows", *rows)
        indices = torch.randint(len(self.batches.rows), (size,), generator=pick)
        places = torch.arange(rank * self.cfg.batch_size, (rank + 1) * self.cfg.batch_size)
        longest = int(self.batches.rows.lengths[indices].max())
        batch = self.batches.collate(indices[places], places, ("variance", *masks), longest)
        sampler = estimator.timesteps
        times, importance = sampler(size, keyed_generator(seed, "t", *t))
        density = getattr(sampler, "density", None)
        mask_id = self.tokenizer.mask_id
        noisy = corrupt(
            batch, times, importance, estimator.masking, estimator.loss, mask_id, density
        )
        estimator.views = len(noisy.noisy) // len(places)
        normalizer = global_normalizer([noisy], self.world)
        loss, losses = backward(estimator.model, estimator.loss, noisy, normalizer, self.world)
        gradient = folded_gradient(estimator.model, self.cfg.projection, seed, rank)
        estimator.model.zero_grad(set_to_none=True)
        return self.world.sum(loss), gradient, losses, noisy.t

    def measure(self) -> None:
        cfg = self.cfg
        rounds = cfg.batches // cfg.batches_per_round
        total = rounds * len(self.estimators) * cfg.batches_per_round
        quiet = self.world.rank != 0
        with tqdm(total=total, unit="batch", desc="Measuring", disable=quiet, mininterval=1) as bar:
            for number in range(rounds):
                for estimator in self.estimators:
                    self.measure_round(estimator, number, bar)
                self.report(final=number == rounds - 1)

    def measure_round(self, estimator: Estimator, number: int, bar: tqdm) -> None:
        """The four draws of each batch of a round; only what they contribute is kept."""
        losses: dict[str, list[Tensor]] = {name: [] for name in DRAWS}
        gradients: dict[str, list[Tensor]] = {name: [] for name in DRAWS}
        each = self.cfg.batches_per_round
        for batch in range(number * each, (number + 1) * each):
            start = time.perf_counter()
            for name, (rows, t, masks) in DRAWS.items():
                keys = ((batch, rows), (batch, t), (batch, masks))
                loss, gradient, *_ = self.draw(estimator, *keys)
                losses[name].append(loss.reshape(1))
                gradients[name].append(gradient)
            estimator.seconds.append((time.perf_counter() - start) / len(DRAWS))
            bar.update()
        for kind, drawn, shared in (("loss", losses, False), ("gradient", gradients, True)):
            part = contributions(
                Draws(**{name: torch.stack(values) for name, values in drawn.items()}),
                self.batches.size,
            )
            # Each rank has other coordinates of the gradient; all have the whole loss.
            estimator.parts[kind].append((self.world.sum(part) if shared else part).cpu())

    def report(self, final: bool = True) -> None:
        """Write the table, JSON, CSV, figures and TensorBoard, from the whole rounds so far."""
        rounds = min(len(e.parts["gradient"]) for e in self.estimators)
        if not rounds or self.world.rank != 0:
            return
        measured = [
            Measured(
                e.name,
                e.views,
                sorted(e.seconds)[len(e.seconds) // 2],
                torch.cat(e.parts["loss"][:rounds]),
                torch.cat(e.parts["gradient"][:rounds]),
            )
            for e in self.estimators
        ]
        table, figures, scalars = write_report(measured, self.cfg, self.output_dir)
        if self.metric_logger is not None:
            batches = rounds * self.cfg.batches_per_round
            self.metric_logger.log_dict(scalars, batches)
            if hasattr(self.metric_logger, "log_figure"):
                for name, figure in figures.items():
                    self.metric_logger.log_figure(name, figure, batches)
        if final:
            self.say(f"\n{table}\n\nWritten to {self.output_dir}")

    def cleanup(self) -> None:
        if getattr(self, "metric_logger", None) is not None:
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
