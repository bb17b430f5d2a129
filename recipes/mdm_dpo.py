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

import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from mdm_full_finetune import MDMFinetune, run
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mdm_plugin.alignment import Drawn, DrawPlan, add_gradient, bounds, drawn
from mdm_plugin.alignment.bounds import check_draws, everywhere, packed, sharing
from mdm_plugin.alignment.preferences import Compared, check_loss, compare
from mdm_plugin.alignment.reference import (
    Reference,
    Stored,
    check_reference,
    fingerprint,
    live_reference,
)
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import DPOOptions
from mdm_plugin.contract import Estimator
from mdm_plugin.data import Rows
from mdm_plugin.data.batches import Batch
from mdm_plugin.errors import UserError
from mdm_plugin.noise import seed_of
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
        self.draws = DrawPlan(cfg.draws // self.estimator.masking.views, cfg.seed, share)

    def _setup_data(self, accumulation: int) -> None:
        super()._setup_data(accumulation)
        self.chosen_val: Rows | None = None
        if self.rows_val is not None:
            self.chosen_val = self.rows_val.choose(torch.arange(0, len(self.rows_val), 2))

    def _setup_model(self, checkpoint: Path | None) -> None:
        super()._setup_model(checkpoint)
        cfg, world = self.cfg, self.world
        sampler = self.estimator.timesteps
        plan = sampler.probe_plan(self.estimator.w)
        check_reference(cfg, self.model, sampler.learns or bool(plan and plan.every_n_steps))
        self.reference: Reference | None = None  # stored bounds are known later
        if cfg.reference != "precompute":
            loss = self.estimator.loss
            self.reference = live_reference(cfg, self.model, self.checkpointer, loss, world)
        self.reference_val: Reference | None = self.reference

    def _setup_state(self, checkpoint: Path | None) -> None:
        super()._setup_state(checkpoint)
        if self.cfg.reference == "precompute" and self.first_step:
            assert checkpoint is not None
            self.identity["reference"] = self.checkpointer.load_state(checkpoint)["reference"]
            self.reference, self.reference_val = self.stored(new=False)

    def begin(self) -> None:
        """The probe; then the reference's bounds, while the model still is the reference."""
        super().begin()
        if self.cfg.reference != "precompute":
            return
        start = time.perf_counter()
        self.identity["reference"] = fingerprint(self.model)
        self.reference, self.reference_val = self.stored(new=True)
        steps = len(self.reference.missing())
        self.model.eval()  # what a reference gives is without dropout
        self.reference.fill(self.own_bounds, self.micro_batches)
        if self.reference_val:
            self.reference_val.fill(self.own_bounds, lambda _: self.micro_batches_val())
        self.model.train()
        self.say(
            f"the reference's bounds of {steps} steps: {time.perf_counter() - start:.1f} s, "
            f"{self.reference.file}"
        )

    def stored(self, new: bool) -> tuple[Stored, Stored | None]:
        """The files of the reference's bounds, to be made or there already."""
        cfg, place = self.cfg, Path(self.cfg.output_dir).expanduser() / "reference"
        identity = {
            "model": self.identity["reference"],
            "seed": cfg.seed,
            "dtype": cfg.dtype,
            "draws": cfg.draws,
            "share_noise": cfg.share_noise,
            "timesteps": OmegaConf.to_container(cfg.timesteps),
            "density": seed_of(json.dumps(self.estimator.timesteps.state_dict())),  # of a probe
            "masking": OmegaConf.to_container(cfg.masking),
        }
        rows = {key: self.identity[key] for key in ("global_batch_size", "data", "steps_per_epoch")}
        training = {**identity, **rows, "steps": self.total_steps}
        shape = (self.total_steps, self.batches.size, self.draws.number)
        found = Stored(place / "train.npy", training, shape, self.world, new)
        if self.rows_val is None:
            return found, None
        identity["data"] = self.rows_val.facts.fingerprint
        shape = (1, len(self.rows_val), self.draws.number)
        return found, Stored(place / "val.npy", identity, shape, self.world, new)

    def micro_batches(self, step: int) -> list[Drawn]:
        """This rank's micro-batches of a step, each corrupted ``draws`` times."""
        place = self.place(step)
        return [self.drawn(x, ("mask", place)) for x in self.batches.micro_batches(place)]

    def micro_batches_val(self) -> list[Drawn]:
        """This rank's share of the held-out preferences: as many micro-batches on each rank.

        Their noise is a function of their numbers, and the same at each validation. A rank without
        a preference of its own does another's once more.
        """
        assert self.rows_val is not None
        pairs, world, found = len(self.rows_val) // 2, self.world, []
        batches = self.batches.of(self.rows_val)
        own = torch.arange(-(-pairs // world.size)) * world.size + world.rank
        for part in (own % pairs).split(self.cfg.batch_size):
            rows = (2 * part[:, None] + torch.arange(2)).flatten()
            longest = int(self.rows_val.lengths_of(rows).max())
            batch = batches.collate(rows, rows, ("val",), longest)
            found.append(self.drawn(batch, ("val",)))
        return found

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
        results = sharing(results, found.loss, self.world)
        preferences = self.batches.row_indices(self.place(step)) // 2
        self.update(step, results, preferences, found.figures)

    def validate(self, step: int) -> None:
        """Held-out preferences told apart; and the bound and the samples of the chosen answers."""
        pairs, self.rows_val = self.rows_val, self.chosen_val
        super().validate(step)
        self.rows_val = pairs
        assert self.rows_val is not None and self.reference_val is not None
        batches = self.micro_batches_val()
        self.model.eval()
        with self.ema.applied() if self.ema else nullcontext():
            policy = self.own_bounds(batches)
        reference = self.reference_val.bounds(0, batches)
        self.model.train()
        found = self.compared(batches, policy, reference, len(self.rows_val))
        shown = found.figures
        figures = {f"val_{name.removeprefix('train/')}": value for name, value in shown.items()}
        self.metric_logger.log_dict(figures, step)
        self.validated = {step: found.figures["train/loss_preferences"]}  # of keep_best_n
        accuracy, margin = (found.figures[f"rewards/{x}"] for x in ("accuracy", "margin"))
        self.say(
            f"step {step}/{self.total_steps}: held-out preferences: accuracy {accuracy:.3f}, "
            f"margin {margin:.3f}"
        )


def check_options(cfg: DictConfig, estimator: Estimator) -> None:
    """Refuse what bounds cannot be compared with.

    Raises:
        UserError: naming the key.
    """
    sampler = estimator.timesteps
    check_draws(estimator, cfg.draws)
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
