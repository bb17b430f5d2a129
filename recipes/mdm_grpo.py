"""Reinforcement of masked diffusion language models: rewards in, a better model out.

    tune run mdm_grpo --config quickstart_grpo
    tune run --nproc_per_node 8 mdm_grpo --config llada/8B_lora_grpo prompts=questions.jsonl

A step samples ``group_size`` answers to each of its prompts, has them rewarded, and makes
``updates`` optimizer steps by how much better each answer is than the others to its prompt. What a
policy needs, the log-probability of an answer, is a bound here, estimated from ``draws`` forwards
by any ``timesteps`` and ``masking``: the methods of the field are choices of these
(docs/reinforcement.md). Old, new and reference model have the same noise.

All parameters are trained, or a model's adapters. A stopped run goes on at a step's beginning, with
the same answers. Every option: ``GRPOOptions`` in ``mdm_plugin/config/options.py``.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from mdm_full_finetune import MDMFinetune, run
from omegaconf import DictConfig
from torch import Tensor

from mdm_plugin.alignment import Drawn, DrawPlan, add_gradient, drawn
from mdm_plugin.alignment.bounds import check_draws, sharing, token_bounds
from mdm_plugin.alignment.estimates import check_order
from mdm_plugin.alignment.policy import PolicyLoss, check_ratio
from mdm_plugin.alignment.reference import Live, check_reference, live_reference
from mdm_plugin.alignment.rewards import advantages, check_advantages, read_rewards
from mdm_plugin.alignment.rollouts import (
    Rollout,
    Writing,
    approximate,
    asked,
    chosen_rows,
    rewarded,
    roll_out,
)
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import GRPOOptions
from mdm_plugin.contract import Estimator
from mdm_plugin.data import Rows
from mdm_plugin.data.prompts import Prompt, read_prompts
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.exact_match import exact_match
from mdm_plugin.evaluation.inference import check_writing, read_decoding
from mdm_plugin.evaluation.validation import read_questions
from mdm_plugin.generation import Decoding
from mdm_plugin.noise import seed_of
from mdm_plugin.training.estimators import derived
from mdm_plugin.training.metrics import TensorBoardLogger


class Judged(NamedTuple):
    """A micro-batch of R answers of L tokens, by what the policy is to learn from them.

    draws: the noise. new, old, reference: [R, L], what each place adds to the bounds. gains: [R],
    advantages. counts: [R], bool, those that are in the loss. eligible: [R, L], the answers.
    """

    draws: Drawn
    new: Tensor
    old: Tensor
    reference: Tensor | None
    gains: Tensor
    counts: Tensor
    eligible: Tensor


class MDMReinforcement(MDMFinetune):
    """Fine-tuning whose rows are the model's own answers, weighed by their rewards."""

    def _setup_estimator(self) -> None:
        """The estimator of the bounds, their loss, the rewards, and how answers are written."""
        super()._setup_estimator()
        cfg = self.cfg
        self.loss = derived("loss", instantiate(cfg, "loss"), PolicyLoss)
        check_options(cfg, self.estimator, self.loss)
        share = cfg.group_size if cfg.share_noise else 1
        self.draws = DrawPlan(cfg.draws // self.estimator.masking.views, cfg.seed, share)
        self.rewards = read_rewards(cfg)
        self.shown = ""  # some of the last answers, as text
        self.decoding: Decoding = read_decoding(cfg)
        if not self.decoding.temperature:
            raise UserError(
                "decoding.temperature: 0 gives all answers to a prompt alike: set it, as to 0.9"
            )

    def _setup_data(self, accumulation: int) -> None:
        """Prompts, and the batches that they make up."""
        cfg = self.cfg
        self.prompts: list[Prompt] = read_prompts(self.tokenizer, prompts=cfg.prompts)
        self.rows = Rows((x.ids, [True] * len(x.ids)) for x in self.prompts)
        whole = [self.rows.facts.fingerprint, *(x.row for x in self.prompts)]  # with answers
        name = f"{seed_of(json.dumps(whole, sort_keys=True, default=str)):016x}"
        self.rows.facts = self.rows.facts._replace(fingerprint=name)
        self.rows_val = None
        self.questions = read_questions(cfg, self.tokenizer)
        if cfg.run_val_every_n_steps and self.questions is None:
            raise UserError("run_val_every_n_steps: set, and there are no questions: give them")
        self.say(f"prompts: {len(self.rows)}, {cfg.group_size} answers to each in a step")
        self._setup_batches(accumulation)

    def _setup_model(self, checkpoint: Path | None) -> None:
        super()._setup_model(checkpoint)
        cfg, longest = self.cfg, self.rows.facts.longest
        check_writing(self.model, self.decoding, cfg.max_new_tokens)
        if longest + cfg.max_new_tokens > self.model.max_seq_len:
            raise UserError(
                f"max_new_tokens: {cfg.max_new_tokens} after a prompt of {longest} tokens are more "
                f"than the model takes, {self.model.max_seq_len}"
            )
        check_order(self.estimator.masking, self.model, self.decoding)
        if approximate(self.model, self.decoding):
            self.say(
                f"decoding.cache: {self.decoding.cache}: answers are sampled by an approximation "
                "of the model that their bounds are of: rollout/cache_gap shows how near it is"
            )
        self.reference: Live | None = None
        if self.loss.kl is not None:
            check_reference(cfg, self.model, sampler_moves=False)
            loss = self.estimator.loss
            self.reference = live_reference(cfg, self.model, self.checkpointer, loss, self.world)

    def train_step(self, step: int) -> None:
        """Answers, and what is learnt from them."""
        start = time.perf_counter()
        rollout = self.answers(step)
        self.learn(step, rollout)
        seconds = time.perf_counter() - start
        self.metrics.show({"rollout/share_of_step": rollout.seconds / seconds})

    def learn(self, step: int, rollout: Rollout) -> None:
        """Rewards of a step's answers, and the optimizer's steps that follow from them."""
        cfg = self.cfg
        gains, differs, figures = self.judge(step, rollout)
        skips = cfg.equal_groups == "skip"
        if not differs.any() and (skips or self.reference is None):
            self.metrics.step([], None, figures)  # every answer was as good as its others
            return
        counts = differs.repeat_interleave(cfg.group_size) if skips else torch.ones_like(gains) > 0
        batches = [chosen_rows(x, counts) for x in rollout.batches]
        noise = [
            [drawn(x, self.estimator, self.draws, ("policy", step, j)) for x in batches]
            for j in range(1 if cfg.updates_share_noise else cfg.updates)
        ]
        old = [self.token_bounds(x, step, j) for j, x in enumerate(noise)]
        base = [self.reference.token_bounds(x) for x in noise] if self.reference else None
        for j in range(cfg.updates):
            k = 0 if cfg.updates_share_noise else j
            new = old[k] if j == 0 else self.token_bounds(noise[k], step, k)
            judged = [
                Judged(
                    draws=draws,
                    new=new[i],
                    old=old[k][i],
                    reference=base[k][i] if base else None,
                    gains=gains[draws.places],
                    counts=counts[draws.places],
                    eligible=batches[i].eligible,
                )
                for i, draws in enumerate(noise[k])
            ]
            self.policy_step(step, j, judged, int(counts.sum()), figures if j == 0 else {})

    def answers(self, step: int) -> Rollout:
        """This rank's share of the step's answers, by the model as it is now."""
        cfg, place = self.cfg, self.place(step)
        return roll_out(
            self.model,
            self.tokenizer,
            asked(self.prompts, self.batches, place),
            Writing(cfg.group_size, self.decoding, cfg.max_new_tokens),
            self.batches.padding,
            self.world,
            (cfg.seed, "rollout", step),
        )

    def judge(self, step: int, rollout: Rollout) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Of all ranks, by place: the advantage of each answer, [S]; whether the rewards of a
        group differ, [S/G]; and what is shown of them."""
        cfg, world, size = self.cfg, self.world, self.batches.size * self.cfg.group_size
        total, parts, failures = rewarded(rollout, self.rewards, cfg.reward_timeout, size, world)
        if failures:
            more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
            self.say(f"step {step}: an answer has no reward: {failures[0]}{more}")
        self.shown = rollout.markdown(total)
        missing = float(total.isnan().double().mean())
        if missing > cfg.max_failed_rewards:
            raise UserError(
                f"max_failed_rewards: {missing:.0%} of step {step}'s answers have no reward, the "
                f"first by {failures[0]}: the last checkpoint is good"
            )
        gains, differs = advantages(
            total,
            cfg.group_size,
            baseline=cfg.baseline,
            by_deviation=cfg.by_deviation,
        )
        figures = {
            "reward/mean": float(total.nanmean()),
            "reward/groups_that_differ": float(differs.double().mean()),
            "reward/failed": missing,
            "reward/advantage_deviation": float(gains.std()),
            **{f"reward_parts/{name}": float(part.nanmean()) for name, part in parts.items()},
            **rollout.figures(size, world),
        }
        return gains, differs, figures

    def token_bounds(self, micro_batches: list[Drawn], step: int, update: int) -> list[Tensor]:
        """What each place adds to the bounds of this rank's answers. [R, L] each."""
        loss, world = self.estimator.loss, self.world
        return [
            token_bounds(self.model, loss, x, world, self.torch_key(step, update, i))
            for i, x in enumerate(micro_batches)
        ]

    def torch_key(self, step: int, update: int, micro_batch: int) -> tuple[int | str, ...]:
        """Of torch's generators: all passes of a micro-batch drop out the same."""
        return self.cfg.seed, "torch", step, update, self.world.rank, micro_batch

    def policy_step(
        self, step: int, update: int, judged: list[Judged], size: int, shown: dict[str, float]
    ) -> None:
        """One optimizer step on this rank's judged answers, and on those of the others.

        size: how many of all ranks' answers count. shown: figures of the answers.
        """
        cfg, world = self.cfg, self.world
        noise = 0 if cfg.updates_share_noise else update
        results, sums = [], torch.zeros(5, dtype=torch.float64)
        for i, x in enumerate(judged):
            new, own = x.new.clone().requires_grad_(), x.counts
            base = None if x.reference is None else x.reference[own]
            with torch.enable_grad():
                terms = self.loss(new[own], x.old[own], base, x.gains[own], x.eligible[own])
            (slopes,) = torch.autograd.grad(terms.loss / size, new)
            bounds = (x.new.sum(1) / x.eligible.sum(1))[own]
            parts = terms.clipped, terms.ratio, terms.kl, bounds
            sums += torch.stack([terms.loss.detach(), *(part.sum() for part in parts)])
            results += add_gradient(
                self.model,
                self.estimator.loss,
                x.draws,
                slopes,
                world,
                self.torch_key(step, noise, i),
                self.offloading,
            )
        loss, clipped, ratio, kl, bound = (world.sum(sums).cpu() / size).tolist()
        results = sharing(results, loss, world)
        figures = {
            **shown,
            "policy/clipped": clipped,
            "policy/ratio": ratio,
            "policy/bound_per_token": bound,
        }
        if self.reference:
            figures["policy/kl_to_reference"] = kl
        prompts = self.batches.row_indices(self.place(step)).repeat_interleave(cfg.group_size)
        self.update(step, results, prompts, figures)

    def validate(self, step: int) -> None:
        """The share of held-out questions that are answered right, and the step's own answers."""
        cfg = self.cfg
        assert self.questions is not None
        was_training = self.model.training
        with self.ema.applied() if self.ema else nullcontext():
            answered = exact_match(
                self.model,
                self.tokenizer,
                self.questions,
                self.world,
                max_new_tokens=cfg.max_new_tokens,
                batch_size=cfg.batch_size * cfg.group_size,
                decoding=replace(self.decoding, temperature=0.0, top_p=None, top_k=None),
            )
        self.model.train(was_training)
        self.metric_logger.log_dict({"val/exact_match": answered.accuracy}, step)
        self.validated = {step: -answered.accuracy}  # keep_best_n keeps the lowest
        if isinstance(self.metric_logger, TensorBoardLogger) and self.shown:
            self.metric_logger.log_text("answers", self.shown, step)
        low, high = answered.interval()
        self.say(
            f"step {step}/{self.total_steps}: val/exact_match {answered.accuracy:.4f} "
            f"({low:.3f} to {high:.3f})"
        )


def check_options(cfg: DictConfig, estimator: Estimator, loss: PolicyLoss) -> None:
    """Refuse what answers cannot be judged or learnt by.

    Raises:
        UserError: naming the key.
    """
    sampler = type(estimator.timesteps).__name__
    for key in ("group_size", "max_new_tokens", "updates"):
        if cfg[key] < 1:
            raise UserError(f"{key}: {cfg[key]}: use 1 or more")
    check_advantages(cfg.baseline, cfg.by_deviation, cfg.group_size)
    check_draws(estimator, cfg.draws)
    check_ratio(loss, estimator.masking, "loss")
    for key in ("dataset", "dataset_val"):
        if cfg[key] is not None:
            raise UserError(f"{key}: the model writes the rows that it learns from: set {key}=null")
    if cfg.objective is not None:
        raise UserError("objective: a policy is judged by bounds of the likelihood: leave it out")
    if estimator.loss.normalize != "response":
        raise UserError("bound.normalize: a bound is of each answer by itself: leave it out")
    if estimator.timesteps.learns or estimator.timesteps.probe_plan(estimator.w):
        raise UserError(
            f"timesteps: {sampler} learns from a data set, and the answers are not there yet: use "
            "Stratified or Uniform"
        )
    if cfg.equal_groups not in ("keep", "skip"):
        raise UserError(f"equal_groups: {cfg.equal_groups}: use keep or skip")
    if cfg.equal_groups == "skip" and cfg.baseline == "none":
        raise UserError("equal_groups: skip: without a baseline they teach too: use keep")
    if cfg.batch_layout != "padded":
        raise UserError(f"batch_layout: {cfg.batch_layout}: answers are padded: leave it out")
    if cfg.train_eos_padding:
        raise UserError("train_eos_padding: answers end where the model ends them: leave it out")
    if cfg.optimizer_in_bwd:
        raise UserError("optimizer_in_bwd: a step has a backward pass for each draw: leave it out")
    if (loss.kl is None) != (cfg.reference is None):
        raise UserError(f"reference: {cfg.reference} with loss.kl {loss.kl}: give both, or neither")
    if cfg.reference == "precompute":
        raise UserError("reference: precompute: answers are not known before: use model")
    if cfg.reward_timeout <= 0 or not 0 <= cfg.max_failed_rewards <= 1:
        raise UserError("reward_timeout, max_failed_rewards: use more than 0 s, and a share")


@parse(GRPOOptions)
def main(cfg: DictConfig) -> None:
    """Train a masked diffusion language model by rewards for its answers."""
    run(cfg, adapters=None, kind=MDMReinforcement)


if __name__ == "__main__":
    main()
