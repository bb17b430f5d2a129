"""Preferences for masked diffusion language models: DPO on bounds whose noise is under control.

    tune run mdm_dpo --config quickstart_dpo
    tune run --nproc_per_node 8 mdm_dpo --config llada/8B_lora_dpo dataset.source=pairs.jsonl

Each preference is two answers to one prompt. The loss compares four bounds of log-likelihoods: of
the chosen and the rejected answer, by the model and by the reference, which is the model that
training starts from. A bound is estimated from ``draws`` forwards; policy and reference have the
same noise. What a bound is, and why memory does not grow with the draws: ``alignment/bounds.py``.

All parameters are trained, or a model's adapters, which have it as in mdm_lora_finetune. All else
is as in mdm_full_finetune. Every option: ``DPOOptions`` in ``mdm_plugin/config/options.py``.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mdm_full_finetune import MDMFinetune, run
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mdm_plugin.alignment import Drawn, Draws, add_gradient, bounds, drawn
from mdm_plugin.alignment.bounds import everywhere, packed
from mdm_plugin.alignment.preferences import Compared, check_loss, compare
from mdm_plugin.alignment.reference import (
    AdaptersOff,
    Reference,
    Stored,
    check_reference,
    fingerprint,
    frozen_copy,
)
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import DPOOptions
from mdm_plugin.contract import Estimator
from mdm_plugin.data import GlobalBatches, Split
from mdm_plugin.data.batches import Batch
from mdm_plugin.errors import UserError
from mdm_plugin.training.step import Result


class MDMPreferences(MDMFinetune):
    """Fine-tuning whose step compares answers two by two."""

    together = 2

    def _setup_estimator(self) -> None:
        """The estimator of the bounds, and the loss of them."""
        super()._setup_estimator()
        cfg = self.cfg
        check_options(cfg, self.estimator)
        self.loss = check_loss(instantiate(cfg, "loss"))
        share = 2 if cfg.share_noise else 1
        self.draws = Draws(cfg.draws // self.estimator.masking.views, cfg.seed, share)

    def _setup_data(self, accumulation: int) -> None:
        super()._setup_data(accumulation)
        self.batches_val: GlobalBatches | None = None
        self.chosen_val = None
        if self.rows_val is not None:
            pairs = len(self.rows_val) // 2
            if pairs < self.world.size:
                raise UserError(
                    f"dataset_val: {pairs} preferences, and {self.world.size} ranks: give each one"
                )
            # Bounds are compared on all ranks at once: each has as many pairs as the others.
            size = min(self.cfg.batch_size, pairs // self.world.size)
            self.batches_val = GlobalBatches(
                self.rows_val,
                Split(2 * size, self.world.size, self.world.rank),
                self.batches.padding,
                seed=self.cfg.seed,
                shuffle=False,
            )
            self.chosen_val = self.rows_val.choose(torch.arange(0, 2 * pairs, 2))

    def _setup_model(self, checkpoint: Path | None) -> None:
        super()._setup_model(checkpoint)
        cfg, world = self.cfg, self.world
        sampler = self.estimator.timesteps
        plan = sampler.probe_plan(self.estimator.w)
        check_reference(cfg, self.model, sampler.learns or bool(plan and plan.every_n_steps))
        self.reference: Reference | None = None  # stored bounds are known later
        self.reference_val: Reference | None = None
        if cfg.reference == "model":
            self.reference = frozen_copy(cfg, self.checkpointer, self.estimator.loss, world)
        elif cfg.reference == "adapters_off":
            self.reference = AdaptersOff(self.model, self.estimator.loss, world)
        self.reference_val = self.reference

    def _setup_state(self, checkpoint: Path | None) -> None:
        super()._setup_state(checkpoint)
        if self.cfg.reference == "precompute" and self.first_step:
            self.reference, self.reference_val = self.stored()
            if self.reference.missing() or (self.reference_val and self.reference_val.missing()):
                raise UserError(
                    f"reference: {self.reference.file.parent} lacks bounds, and the model has been "
                    "trained since: start a new run with another output_dir"
                )
            was = self.checkpointer.load_state(checkpoint)["reference"] if checkpoint else ""
            if self.reference.model != was:
                raise UserError(
                    f"reference: {self.reference.file} is of another model than this run's: "
                    "restore it, or start a new run with another output_dir"
                )
            self.identity["reference"] = was

    def begin(self) -> None:
        """The probe; then the reference's bounds, while the model still is the reference."""
        super().begin()
        if self.cfg.reference != "precompute":
            return
        start = time.perf_counter()
        self.identity["reference"] = fingerprint(self.model)
        self.reference, self.reference_val = self.stored(self.identity["reference"])
        steps = len(self.reference.missing())
        self.reference.fill(self.own_bounds, self.micro_batches)
        if self.reference_val:
            self.reference_val.fill(self.own_bounds, self.micro_batches_val)
        self.say(
            f"the reference's bounds of {steps} steps: {time.perf_counter() - start:.1f} s, "
            f"{self.reference.file}"
        )

    def stored(self, model: str | None = None) -> tuple[Stored, Stored | None]:
        """The files of the reference's bounds; ``model``: its fingerprint, where it is known."""
        cfg, place = self.cfg, Path(self.cfg.output_dir).expanduser() / "reference"
        identity = {
            "seed": cfg.seed,
            "dtype": cfg.dtype,
            "draws": cfg.draws,
            "share_noise": cfg.share_noise,
            "timesteps": OmegaConf.to_container(cfg.timesteps),
            "masking": OmegaConf.to_container(cfg.masking),
            **({} if model is None else {"model": model}),
        }
        rows = {key: self.identity[key] for key in ("global_batch_size", "data", "steps_per_epoch")}
        training = {**rows, **identity, "steps": self.total_steps}
        shape = (self.total_steps, self.batches.size, self.draws.number)
        found = Stored(place / "train.npy", training, shape, self.world)
        if self.batches_val is None or self.rows_val is None:
            return found, None
        size, steps = self.batches_val.size, self.batches_val.steps_per_epoch
        identity |= {"data": self.rows_val.facts.fingerprint, "global_batch_size": size}
        shape = (steps, size, self.draws.number)
        return found, Stored(place / "val.npy", identity, shape, self.world)

    def micro_batches(self, step: int) -> list[Drawn]:
        """This rank's micro-batches of a step, each corrupted ``draws`` times."""
        place = self.place(step)
        return [self.drawn(x, ("mask", place)) for x in self.batches.micro_batches(place)]

    def micro_batches_val(self, step: int) -> list[Drawn]:
        """The same of validation, whose noise is another, and the same each time."""
        assert self.batches_val is not None
        return [self.drawn(x, ("val", step)) for x in self.batches_val.micro_batches(step)]

    def drawn(self, batch: Batch, key: tuple[int | str, ...]) -> Drawn:
        found = drawn(batch, self.estimator, self.draws, key)
        if self.cfg.batch_layout != "packed":
            return found
        return packed(found, self.model, self.world.device, self.cfg.pad_to_multiple_of)

    def own_bounds(self, micro_batches: list[Drawn], step: int = 0) -> list[Tensor]:
        """B_d by the model as it is now, of each of this rank's micro-batches. [R, D] each."""
        loss, world = self.estimator.loss, self.world
        return [
            bounds(self.model, loss, x, world, self.torch_key(step, i))
            for i, x in enumerate(micro_batches)
        ]

    def torch_key(self, step: int, micro_batch: int) -> tuple[int | str, ...]:
        """Of torch's generators: both passes of a micro-batch drop out the same."""
        return self.cfg.seed, "torch", step, self.world.rank, micro_batch

    def compared(
        self, micro_batches: list[Drawn], policy: list[Tensor], reference: list[Tensor], size: int
    ) -> Compared:
        """The loss of a global batch of ``size`` answers, the same on every rank."""
        cfg, world = self.cfg, self.world
        places = [x.places for x in micro_batches]
        n = everywhere([x.n for x in micro_batches], places, size, world)
        return compare(
            self.loss,
            everywhere(policy, places, size, world),
            everywhere(reference, places, size, world),
            n,
            sft_weight=cfg.sft_weight,
            per_token=cfg.normalize == "mean",
        )

    def train_step(self, step: int) -> None:
        """One optimizer step over the global batch: bounds, slopes, and then gradients."""
        assert self.reference is not None
        micro_batches = self.micro_batches(step)
        policy = self.own_bounds(micro_batches, step)
        reference = self.reference.bounds(step, micro_batches)
        found = self.compared(micro_batches, policy, reference, self.batches.size)
        results: list[Result] = []
        for i, batch in enumerate(micro_batches):
            results += add_gradient(
                self.model,
                self.estimator.loss,
                batch,
                found.slopes[batch.places],
                self.world,
                self.torch_key(step, i),
                self.offloading,
            )
        # What is logged and guarded is the loss itself, of which each of these has a share.
        share = torch.tensor(found.loss / (len(results) * self.world.size))
        results = [x._replace(loss=share.to(self.world.device)) for x in results]
        preferences = self.batches.row_indices(self.place(step)) // 2
        self.update(step, results, preferences, found.figures)

    def validate(self, step: int) -> None:
        """Held-out preferences told apart; and the bound and the samples of the chosen answers."""
        pairs, self.rows_val = self.rows_val, self.chosen_val
        super().validate(step)
        self.rows_val = pairs
        assert self.batches_val is not None and self.reference_val is not None
        sums: dict[str, float] = {}
        steps = self.batches_val.steps_per_epoch
        self.model.eval()
        for part in range(steps):
            batch = self.micro_batches_val(part)
            with self.ema.applied() if self.ema else nullcontext():
                policy = self.own_bounds(batch)
            reference = self.reference_val.bounds(part, batch)
            found = self.compared(batch, policy, reference, self.batches_val.size)
            for name, value in found.figures.items():
                sums[name] = sums.get(name, 0.0) + value / steps
        self.model.train()
        figures: dict[str, Any] = {f"val_{name}": value for name, value in sums.items()}
        self.metric_logger.log_dict(figures, step)
        self.say(
            f"step {step}/{self.total_steps}: held-out preferences: accuracy "
            f"{sums['rewards/accuracy']:.3f}, margin {sums['rewards/margin']:.3f}"
        )


def check_options(cfg: DictConfig, estimator: Estimator) -> None:
    """Refuse what bounds cannot be compared with.

    Raises:
        UserError: naming the key.
    """
    masking, sampler, views = estimator.masking, estimator.timesteps, estimator.masking.views
    name = type(masking).__name__
    if cfg.draws < 1 or cfg.draws % views:
        raise UserError(
            f"draws: {cfg.draws}: {name} has {views} views, so use a multiple of {views}"
            if views > 1
            else f"draws: {cfg.draws}: use 1 or more"
        )
    if cfg.objective is not None:
        raise UserError("objective: preferences compare bounds of the likelihood: leave it out")
    if estimator.loss.normalize != "response":
        raise UserError(
            f"bound.normalize: {estimator.loss.normalize}: a bound is of each answer by itself: "
            "leave it out"
        )
    if cfg.normalize not in ("sum", "mean"):
        raise UserError(f"normalize: {cfg.normalize}: use sum or mean")
    if cfg.train_eos_padding:
        raise UserError(
            "train_eos_padding: it fills an answer to the longest of its batch, and a bound is to "
            "depend on its answer alone: leave it out"
        )
    if cfg.optimizer_in_bwd:
        raise UserError(
            "optimizer_in_bwd: a step has a backward pass for each draw, whose gradients it would "
            "not sum: leave it out"
        )
    if cfg.sft_weight < 0:
        raise UserError(f"sft_weight: {cfg.sft_weight}: use 0 or more")
    if sampler.learns and sampler.learns_from == "gradient":
        raise UserError(
            f"timesteps: {type(sampler).__name__} learns from the gradients of a fine-tuning loss, "
            "which these are not: set timesteps.target: loss, or use ParetoOptimal"
        )


@parse(DPOOptions)
def main(cfg: DictConfig) -> None:
    """Train a masked diffusion language model on preferences: all of it, or its adapters."""
    run(cfg, adapters=None, kind=MDMPreferences)


if __name__ == "__main__":
    main()
