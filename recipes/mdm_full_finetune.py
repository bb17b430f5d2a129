"""Full fine-tuning and pretraining of masked diffusion language models.

    tune run mdm_full_finetune --config quickstart
    tune run --nproc_per_node 8 mdm_full_finetune --config my.yaml batch_size=2

Every option with its default: ``mdm_plugin/config/options.py``.
One code path for one process and for many (FSDP2, HSDP), on CPU and CUDA.
"""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from tqdm import tqdm

from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.checkpoint.parts import OptimizerState, Run, ScheduleState, check_states
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import Options
from mdm_plugin.contract import ProbePlan
from mdm_plugin.distributed.build import build_model, compile_backend
from mdm_plugin.distributed.gradients import clip_gradient
from mdm_plugin.distributed.parameters import named_parameters
from mdm_plugin.distributed.world import World, distributed
from mdm_plugin.evaluation.validation import read_questions, validate
from mdm_plugin.noise import seed_torch
from mdm_plugin.training import EMA, checks, metrics
from mdm_plugin.training.batches import global_batches, read_datasets
from mdm_plugin.training.blocks import read_blocks
from mdm_plugin.training.corruption import corrupted_step, pack
from mdm_plugin.training.estimators import check_throughout, read_estimator, read_objective
from mdm_plugin.training.guard import Guard
from mdm_plugin.training.in_backward import StepInBackward
from mdm_plugin.training.plan import dry_run
from mdm_plugin.training.precision import build_options, rounding
from mdm_plugin.training.probe import fit, fit_line, probe, probe_due
from mdm_plugin.training.resume import check_identity, find_checkpoint
from mdm_plugin.training.step import Result, backward, global_normalizer, learn, wants_norms
from mdm_plugin.training.stop import Stop


class MDMFinetune:
    """Set up, train, save, clean up. ``adapters``: is the model to have them? None for either."""

    together = 1  # rows of one example

    def __init__(self, cfg: DictConfig, world: World, adapters: bool | None = False) -> None:
        self.cfg, self.world, self.adapters = cfg, world, adapters
        self.metric_logger: Any = None
        self.validated: dict[int, float] = {}  # of the last validated step

    def setup(self) -> None:
        """Cheap parts first: whatever is wrong in a config or a file stops the run here."""
        accumulation = checks.check_sizes(self.cfg, self.world)
        checkpoint = self._setup_checkpointer()
        self._setup_estimator()
        self.say(metrics.first_line(self.cfg, self.world, self.estimator, self.objective))
        self._setup_data(accumulation)
        self._setup_model(checkpoint)
        self._setup_optimizer()
        self._setup_state(checkpoint)
        self._setup_logging()

    def _setup_checkpointer(self) -> Path | None:
        """The checkpointer, and the checkpoint that the run goes on from."""
        cfg, world = self.cfg, self.world
        self.checkpointer: Checkpointer = instantiate(
            cfg,
            "checkpointer",
            keep_last_n=cfg.keep_last_n,
            keep_best_n=cfg.keep_best_n,
            asynchronous=cfg.enable_async_checkpointing,
        )
        return find_checkpoint(cfg, self.checkpointer, world)

    def _setup_estimator(self) -> None:
        """What is minimised; and the sampler of t, the masks and the loss that estimate it."""
        self.tokenizer = instantiate(self.cfg, "tokenizer")
        self.objective = read_objective(self.cfg)
        estimator = read_estimator(self.cfg, self.tokenizer.mask_id)
        self.estimator = estimator._replace(w=self.objective(0.0))
        if self.cfg.compile:
            self.estimator.loss.compile_chunks(compile_backend())

    def _setup_data(self, accumulation: int) -> None:
        """Rows, and the batches that they make up."""
        cfg = self.cfg
        self.rows_val: Any  # None where there is no validation
        self.rows, self.rows_val = read_datasets(cfg, self.tokenizer)
        checks.check_examples(self.together, self.rows, self.rows_val)
        self.questions = read_questions(cfg, self.tokenizer)
        for name, rows in (("dataset", self.rows), ("dataset_val", self.rows_val)):
            if rows is not None:
                self.say(f"{name}: {rows}")
        self._setup_batches(accumulation)

    def _setup_batches(self, accumulation: int) -> None:
        cfg = self.cfg
        self.batches = global_batches(cfg, self.rows, self.tokenizer, self.world, accumulation)
        whole_epoch = self.batches.steps_per_epoch
        self.steps_per_epoch = min(whole_epoch, cfg.max_steps_per_epoch or whole_epoch)
        self.total_steps = cfg.epochs * self.steps_per_epoch

    def _setup_model(self, checkpoint: Path | None) -> None:
        """The model: built without storage, sharded, checked, and then filled."""
        cfg, world = self.cfg, self.world
        self.model = build_model(
            lambda: instantiate(cfg, "model"),
            world,
            training.get_dtype(cfg.dtype, device=world.device),
            build_options(cfg, world.device),
        )
        self.adapters = checks.check_adapters(self.model, self.adapters)
        checks.check_checkpoint(self.checkpointer.weights, self.model, self.tokenizer)
        checks.check_data(self.model, self.tokenizer, self.rows, self.rows_val)
        check_throughout(self.estimator, self.objective, self.model)
        self.blocks = read_blocks(cfg, self.model, self.estimator, self.batches)
        self.estimator = self.estimator._replace(blocks=self.blocks(0.0))
        self.offloading = training.get_act_offloading_ctx_manager(
            self.model, cfg.enable_activation_offloading
        )
        if not checkpoint and self.checkpointer.weights is None:
            self.say("no checkpoint_dir: starting from random weights")
        self.checkpointer.load_weights(self.model, cfg.seed, checkpoint)

    def _setup_optimizer(self) -> None:
        """The optimizer of what is trained, its schedule, and the average of the weights."""
        cfg = self.cfg
        self.ema: EMA | None = instantiate(cfg, "ema", self.model)
        trained = [(n, p) for n, p in named_parameters(self.model).items() if p.requires_grad]
        self.optimizer = instantiate(cfg, "optimizer", trained, **rounding(cfg))
        self.in_backward = StepInBackward(self.optimizer) if cfg.optimizer_in_bwd else None
        steps = {"num_training_steps": self.total_steps}
        self.lr_scheduler = instantiate(cfg, "lr_scheduler", self.optimizer, **steps)

    def _setup_state(self, checkpoint: Path | None) -> None:
        """All that a checkpoint holds, filled from ``checkpoint`` if the run goes on from one."""
        self.guard = Guard(self.world, self.cfg)
        parts: dict[str, Any] = {
            "optimizer": OptimizerState(self.model, self.optimizer),
            "timesteps": self.estimator.timesteps,
            "guard": self.guard,
        }
        if self.lr_scheduler:
            name = self.cfg.lr_scheduler._component_
            parts["lr_scheduler"] = ScheduleState(self.lr_scheduler, name)
        if self.ema:
            parts["ema"] = self.ema
        check_states(parts)
        self.state = Run(self.world, self.model, self.tokenizer, self.cfg, parts)
        # What a resumed run must have in common with the one it goes on from.
        self.identity = {
            "seed": self.cfg.seed,
            "global_batch_size": self.batches.size,
            "data": self.rows.facts.fingerprint,
            "steps_per_epoch": self.steps_per_epoch,
        }
        self.first_step = 0
        if checkpoint:
            stored = self.checkpointer.load_state(checkpoint)
            check_identity(stored, self.identity, checkpoint)
            self.checkpointer.load(self.state, checkpoint, stored)
            self.first_step = stored["step"]
            self.say(f"resuming from {checkpoint}, step {self.first_step} of {self.total_steps}")
            if self.first_step >= self.total_steps:
                self.say("the run is complete: for a new one name another output_dir")

    def _setup_logging(self) -> None:
        cfg, world = self.cfg, self.world
        self.metric_logger = instantiate(cfg, "metric_logger")
        self.metric_logger.log_config(cfg)
        self.metrics = metrics.StepMetrics(world)
        self.profiler = training.DummyProfiler()
        if cfg.profiler is not None:
            self.profiler, _ = instantiate(cfg, "profiler")
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        size, trained = sum(n for n, _ in sizes), sum(n for n, learnt in sizes if learnt)
        self.say(
            (f"{trained:,} of " if self.adapters else "")
            + f"{size:,} parameters; {self.total_steps} steps of {self.batches.size} rows, "
            f"{self.steps_per_epoch} per epoch"
        )

    def begin(self) -> None:
        """What a new run does before its first step."""
        if plan := probe_due(self.estimator, 0):
            self.fit_timesteps(plan, 0)

    def train(self) -> None:
        cfg, world = self.cfg, self.world
        self.model.train()
        if self.first_step == 0:
            self.begin()
        if cfg.run_val_every_n_steps and self.first_step == 0:
            self.validate(0)
        bar = metrics.progress_bar(world, total=self.total_steps, initial=self.first_step)
        with self.profiler, bar, Stop(world) as stop:
            for step in range(self.first_step, self.total_steps):
                progress = step / max(1, self.total_steps - 1)
                w, blocks = self.objective(progress), self.blocks(progress)
                self.estimator = self.estimator._replace(w=w, blocks=blocks)
                if step and (plan := probe_due(self.estimator, step)):
                    self.fit_timesteps(plan, step)
                self.train_step(step)
                done = step + 1
                bar.update()
                self.profiler.step()

                if done % cfg.log_every_n_steps == 0 or done == self.total_steps:
                    figures = self.metrics.report()
                    loss = figures.get("train/loss", math.nan)
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                    figures["train/skipped_steps"] = self.guard.skipped
                    figures["train/lr"] = self.optimizer.param_groups[0]["lr"]
                    self.metric_logger.log_dict(figures, done)
                if self.lr_scheduler:
                    self.lr_scheduler.step()
                if cfg.run_val_every_n_steps and (
                    done % cfg.run_val_every_n_steps == 0 or done == self.total_steps
                ):
                    self.validate(done)
                signal = stop.agreed()
                if (
                    signal
                    or done == self.total_steps
                    or done % (cfg.save_every_n_epochs * self.steps_per_epoch) == 0
                    or (cfg.save_every_n_steps and done % cfg.save_every_n_steps == 0)
                ):
                    self.save_checkpoint(done)
                if signal:
                    self.checkpointer.wait(world)
                    self.say(f"stopped by {Signals(signal).name} after step {done}: saved")
                    raise SystemExit(128 + signal)
        self.checkpointer.wait(world)

    def train_step(self, step: int) -> None:
        """One optimizer step over the global batch."""
        cfg, world = self.cfg, self.world
        seed_torch(cfg.seed, "torch", step, world.rank)
        place = self.place(step)
        micro_batches = corrupted_step(self.batches, place, self.estimator)
        if cfg.batch_layout == "packed":
            packed = partial(
                pack, model=self.model, device=world.device, multiple=cfg.pad_to_multiple_of
            )
            micro_batches = [packed(batch) for batch in micro_batches]
        normalizer, loss = global_normalizer(micro_batches, world), self.estimator.loss
        norms, results = wants_norms(self.estimator.timesteps), []
        for batch in micro_batches:
            with self.in_backward.active() if self.in_backward else nullcontext():
                results.append(
                    backward(self.model, loss, batch, normalizer, world, self.offloading, norms)
                )
        self.update(step, results, self.batches.row_indices(place))

    def place(self, step: int) -> int:
        """Of a step's global batch among those of all epochs: ``max_steps_per_epoch`` leaves some
        of them out, and each epoch still begins with its own order of all rows."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.batches.steps_per_epoch + within

    def update(
        self, step: int, results: list[Result], rows: Tensor, values: dict[str, float] | None = None
    ) -> None:
        """The optimizer's step, by gradients that are there, unless it would do harm.

        rows: [global batch], the data's row at each place. values: figures to be shown.
        """
        sampler, grad_norm = self.estimator.timesteps, None
        if not self.in_backward:
            grad_norm = clip_gradient(self.model, self.cfg.clip_grad_norm).to(self.world.device)
        if self.guard.passes(step, results, grad_norm, rows):
            learn(sampler, [x.shown(sampler) for x in results], self.world)
            if not self.in_backward:
                self.optimizer.step()
            if self.ema:
                self.ema.update(step)
            self.metrics.step(results, grad_norm, values)
        self.optimizer.zero_grad(set_to_none=True)

    def fit_timesteps(self, plan: ProbePlan, step: int) -> None:
        """Probe the model, and have the sampler of t take that in."""
        start, world, estimator = time.perf_counter(), self.world, self.estimator
        found = probe(self.model, estimator, plan, self.batches, world, step, self.offloading)
        report = fit(estimator, plan, found, world)
        metrics.show_fit(report, Path(self.cfg.output_dir), self.metric_logger, world, step)
        seconds = time.perf_counter() - start
        self.say(f"step {step}/{self.total_steps}: {fit_line(report)}, {seconds:.1f} s")

    def validate(self, step: int) -> None:
        """NELBO and completions of the validation rows, by the averaged weights under EMA."""
        cfg, start = self.cfg, time.perf_counter()
        with self.ema.applied() if self.ema else nullcontext():
            figures, samples = validate(
                self.model, self.rows_val, self.questions, self.tokenizer, self.world, cfg
            )
        self.metric_logger.log_dict(figures, step)
        self.validated = {step: figures["val/nelbo_nats_per_token"]}
        if samples and isinstance(self.metric_logger, metrics.TensorBoardLogger):
            self.metric_logger.log_text("samples", samples, step)
        found = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.say(f"step {step}/{self.total_steps}: {found} ({time.perf_counter() - start:.1f} s)")

    def save_checkpoint(self, step: int) -> None:
        facts = {**self.identity, "val_nelbo": self.validated.get(step)}
        path = self.checkpointer.save(self.state, step, facts)
        self.say(f"step {step}/{self.total_steps}: saved {path}")

    def cleanup(self) -> None:
        if self.metric_logger is not None:
            self.metric_logger.close()

    def say(self, line: str) -> None:
        """A line on the console, on rank 0, above the progress bar."""
        if self.world.rank == 0:
            tqdm.write(line)


def run(
    cfg: DictConfig, adapters: bool | None = False, kind: type[MDMFinetune] = MDMFinetune
) -> None:
    """Train by ``cfg``: all parameters, or a model's adapters alone, or, by None, what it has."""
    if cfg.dry_run:
        return dry_run(cfg, adapters, kind.together)
    instantiate(cfg, "prepare")
    shard, replicate = cfg.data_parallel_shard_dim, cfg.data_parallel_replicate_dim
    with distributed(cfg.device, shard, replicate, cfg.timeout_minutes) as world:
        recipe = kind(cfg, world, adapters)
        recipe.setup()
        try:
            recipe.train()
        finally:
            recipe.cleanup()


@parse(Options)
def main(cfg: DictConfig) -> None:
    """Fine-tune a masked diffusion language model; all of its parameters are trained."""
    run(cfg)


if __name__ == "__main__":
    main()
