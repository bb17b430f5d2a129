"""Full fine-tuning and pretraining of masked diffusion language models.

    tune run mdm_full_finetune --config quickstart
    tune run --nproc_per_node 8 mdm_full_finetune --config my.yaml batch_size=2

Every option with its default: ``mdm_plugin/training/options.py``.
One code path for one process and for many (FSDP2, HSDP), on CPU and CUDA.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from signal import Signals

from omegaconf import DictConfig
from torchtune import training
from tqdm import tqdm

from mdm_plugin.training import checks
from mdm_plugin.training.config import instantiate, parse
from mdm_plugin.training.data import global_batches
from mdm_plugin.training.distributed import World, build_model, clip_gradient, distributed
from mdm_plugin.training.guard import Guard
from mdm_plugin.training.in_backward import StepInBackward
from mdm_plugin.training.interruption import Stop, is_restart
from mdm_plugin.training.metrics import StepMetrics, progress_bar
from mdm_plugin.training.options import Options
from mdm_plugin.training.plan import dry_run
from mdm_plugin.training.probe import fit, keep_fit, probe, probe_due
from mdm_plugin.training.step import backward, draw, global_normalizer, pack
from mdm_plugin.training.validation import read_questions, validate


class MDMFinetune:
    """Set up, train, save, clean up."""

    def __init__(self, cfg: DictConfig, world: World, adapters: bool = False) -> None:
        self.cfg, self.world, self.adapters = cfg, world, adapters

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        dtype = training.get_dtype(cfg.dtype, device=world.device)
        accumulation = checks.check_sizes(cfg, world)

        # Cheap parts first: whatever is wrong in a config or a file stops the run here.
        self.checkpointer = instantiate(
            cfg,
            "checkpointer",
            keep_last_n=cfg.keep_last_n,
            keep_best_n=cfg.keep_best_n,
            asynchronous=cfg.enable_async_checkpointing,
        )
        restart = is_restart(world, self.checkpointer.output_dir) and self.checkpointer.steps()
        checkpoint = self.checkpointer.to_resume(cfg.resume_from_checkpoint or bool(restart), world)
        self.loss = instantiate(cfg, "loss")
        self.timesteps = instantiate(cfg, "timesteps")
        self.masking = instantiate(cfg, "masking")
        self.tokenizer = instantiate(cfg, "tokenizer")
        self.rows = instantiate(cfg, "dataset", self.tokenizer)
        self.rows_val = instantiate(cfg, "dataset_val", self.tokenizer)
        self.questions = read_questions(cfg, self.tokenizer)
        for name, rows in (("dataset", self.rows), ("dataset_val", self.rows_val)):
            if rows is not None:
                self.say(f"{name}: {rows}")
        self.batches = global_batches(cfg, self.rows, self.tokenizer, world, accumulation)
        whole_epoch = self.batches.steps_per_epoch
        self.steps_per_epoch = min(whole_epoch, cfg.max_steps_per_epoch or whole_epoch)
        self.total_steps = cfg.epochs * self.steps_per_epoch

        # The model: built without storage, sharded, then filled.
        self.model = build_model(
            lambda: instantiate(cfg, "model"),
            world,
            dtype=dtype,
            compile=cfg.compile,
            float8=cfg.fp8_recipe_name if cfg.enable_fp8_training else None,
            activation_checkpointing=cfg.enable_activation_checkpointing,
            cpu_offload=cfg.fsdp_cpu_offload,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
        )
        if cfg.compile and hasattr(self.loss, "compile_chunks"):
            self.loss.compile_chunks()
        checks.check_adapters(self.model, self.adapters)
        checks.check_checkpoint(self.checkpointer.weights, self.model, self.tokenizer)
        checks.check_data(self.model, self.tokenizer, self.rows, self.rows_val)
        checks.check_estimator(self.timesteps, self.masking, self.loss, self.model)
        self.offloading = training.get_act_offloading_ctx_manager(
            self.model, cfg.enable_activation_offloading
        )
        if not checkpoint and self.checkpointer.weights is None:
            self.say("no checkpoint_dir: starting from random weights")
        self.checkpointer.load_weights(self.model, cfg.seed, checkpoint)
        self.ema = instantiate(cfg, "ema", self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = instantiate(cfg, "optimizer", trained)
        self.in_backward = StepInBackward(self.optimizer) if cfg.optimizer_in_bwd else None
        self.lr_scheduler = None
        if cfg.lr_scheduler is not None:
            self.lr_scheduler = instantiate(
                cfg, "lr_scheduler", self.optimizer, num_training_steps=self.total_steps
            )

        # What a resumed run must have in common with the one it goes on from.
        self.identity = {
            "seed": cfg.seed,
            "global_batch_size": self.batches.size,
            "data": self.rows.fingerprint(),
            "steps_per_epoch": self.steps_per_epoch,
        }
        self.first_step = 0
        if checkpoint:
            state = self.checkpointer.load_state(checkpoint)
            checks.check_resume(state, self.identity, checkpoint)
            parts = (self.model, self.optimizer, self.lr_scheduler, self.ema, self.timesteps)
            self.checkpointer.load_rest(world, checkpoint, state, *parts)
            self.first_step = state["step"]
            self.say(f"resuming from {checkpoint}, step {self.first_step} of {self.total_steps}")
        elif world.rank == 0 and (aside := self.checkpointer.set_aside()):
            self.say(f"an earlier run's checkpoints are now in {aside}")

        self.metric_logger = instantiate(cfg, "metric_logger")
        self.metric_logger.log_config(cfg)
        self.metrics = StepMetrics(world)
        self.guard = Guard(world, cfg, state["skipped_steps"] if checkpoint else 0)
        self.validated: dict[int, float] = {}  # of the last validated step
        self.profiler = training.DummyProfiler()
        if cfg.profiler is not None:
            self.profiler, _ = instantiate(cfg, "profiler")
        size = sum(p.numel() for p in self.model.parameters())
        of = f"{sum(p.numel() for p in trained):,} of " if self.adapters else ""
        self.say(
            f"{of}{size:,} parameters on {world.size} x {world.device.type}; {self.total_steps} "
            f"steps of {self.batches.size} rows, {self.steps_per_epoch} per epoch"
        )

    def train(self) -> None:
        cfg, world = self.cfg, self.world
        self.model.train()
        if cfg.run_val_every_n_steps and self.first_step == 0:
            self.validate(0)
        bar = progress_bar(world, total=self.total_steps, initial=self.first_step)
        with self.profiler, bar, Stop(world) as stop:
            for step in range(self.first_step, self.total_steps):
                if probe_due(self.timesteps, step):
                    self.fit_timesteps(step)
                self.train_step(step)
                done = step + 1
                bar.update()
                self.profiler.step()

                if done % cfg.log_every_n_steps == 0 or done == self.total_steps:
                    figures = self.metrics.report()
                    bar.set_postfix_str(
                        f"loss {figures.get('train/loss', math.nan):.4f}", refresh=False
                    )
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
        # Under max_steps_per_epoch each epoch still begins with its own order of all rows.
        epoch, within = divmod(step, self.steps_per_epoch)
        place = epoch * self.batches.steps_per_epoch + within
        how = (self.timesteps, self.masking, self.loss, self.tokenizer.mask_id)
        micro_batches, importance = draw(self.batches, place, *how)
        if cfg.batch_layout == "packed":
            to = (self.model, world.device, cfg.pad_to_multiple_of)
            micro_batches = [pack(batch, *to) for batch in micro_batches]
        normalizer = global_normalizer(micro_batches, world)
        results, grad_norm = [], None
        for batch in micro_batches:
            with self.in_backward.active() if self.in_backward else nullcontext():
                parts = (normalizer, world, self.offloading)
                results.append((batch, *backward(self.model, self.loss, batch, *parts)))
        if not self.in_backward:
            grad_norm = clip_gradient(self.model, cfg.clip_grad_norm).to(world.device)
        if self.guard.passes(step, results, grad_norm, self.batches.row_indices(place)):
            if hasattr(self.timesteps, "tally"):
                tally = sum(self.timesteps.tally(batch.t, x.cpu()) for batch, _, x in results)
                self.timesteps.update(world.sum(tally).cpu())
            if not self.in_backward:
                self.optimizer.step()
            if self.ema:
                self.ema.update(step)
            self.metrics.step(results, grad_norm, importance)
        self.optimizer.zero_grad(set_to_none=True)

    def fit_timesteps(self, step: int) -> None:
        """P-POTS: probe the model, and fit the density of t to what it shows."""
        start = time.perf_counter()
        measured = probe(
            self.model,
            self.loss,
            self.timesteps,
            self.masking,
            self.batches,
            self.tokenizer.mask_id,
            self.world,
            step,
            self.offloading,
        )
        report = fit(self.timesteps, measured, self.world)
        if self.world.rank == 0:
            keep_fit(report, Path(self.cfg.output_dir), self.metric_logger, step)
        self.say(
            f"step {step}/{self.total_steps}: fitted the density of t to {measured.forwards} "
            f"forwards, KL {report['kl']:.4f} (uniform {report['kl_uniform']:.4f}), "
            f"{time.perf_counter() - start:.1f} s"
        )

    def validate(self, step: int) -> None:
        """NELBO and completions of the validation rows, by the averaged weights under EMA."""
        cfg, start = self.cfg, time.perf_counter()
        with self.ema.applied() if self.ema else nullcontext():
            data = (self.rows_val, self.questions, self.tokenizer)
            figures, samples = validate(self.model, *data, self.world, cfg, self.loss.shift)
        self.metric_logger.log_dict(figures, step)
        self.validated = {step: figures["val/nelbo_nats_per_token"]}
        if samples and hasattr(self.metric_logger, "log_text"):
            self.metric_logger.log_text("samples", samples, step)
        found = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.say(f"step {step}/{self.total_steps}: {found} ({time.perf_counter() - start:.1f} s)")

    def save_checkpoint(self, step: int) -> None:
        state = {
            **self.identity,
            "epoch": step // self.steps_per_epoch,
            "total_steps": self.total_steps,
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
            "timesteps": getattr(self.timesteps, "state_dict", dict)(),
            "skipped_steps": self.guard.skipped,
            "val_nelbo": self.validated.get(step),
        }
        path = self.checkpointer.save(
            self.world, self.model, self.optimizer, step, state, self.cfg, self.tokenizer, self.ema
        )
        self.say(f"step {step}/{self.total_steps}: saved {path}")

    def cleanup(self) -> None:
        if hasattr(self, "metric_logger"):
            self.metric_logger.close()

    def say(self, line: str) -> None:
        """A line on the console, on rank 0, above the progress bar."""
        if self.world.rank == 0:
            tqdm.write(line)


def run(cfg: DictConfig, adapters: bool = False) -> None:
    """Train by ``cfg``: all parameters, or a model's adapters alone."""
    if cfg.dry_run:
        return dry_run(cfg, adapters)
    instantiate(cfg, "prepare")
    layout = (cfg.data_parallel_shard_dim, cfg.data_parallel_replicate_dim)
    with distributed(cfg.device, *layout, cfg.timeout_minutes) as world:
        recipe = MDMFinetune(cfg, world, adapters)
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
