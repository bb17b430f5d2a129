"""How noisy is the policy's gradient, and where does the noise come from? For ``mdm_variance``.

To each of G batches of prompts the model writes answers twice. At both sets of answers, with their
advantages, each estimator looks K times, with other t each time, and twice at each t, with other
masks. The gradient f of a look has

    Var(f) = A + B + S + C
    A, masks:    E Var(f | prompts, answers, t)
    B, rates:    E Var(E[f | prompts, answers, t] | prompts, answers)
    S, answers:  E Var(E[f | prompts, answers] | prompts)
    C, prompts:  Var(E[f | prompts])

(traces of covariances), each estimated without bias: A by the two looks at the same t, B + A/2 by
the variance of their means over t, S by how far the two sets' means are apart, less their noise,
and C by their covariance over batches. A and B are the estimate's; S and C all estimates have.

An estimate that is biased has another mean, and so another scale: its noise can be small because
the gradient is. So the noise is also given by the squared length of the estimate's own mean, and
what that mean has in common with the first estimator's is its direction.
"""

from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from mdm_plugin.alignment.bounds import DrawPlan, add_gradient, drawn, token_bounds
from mdm_plugin.alignment.looks import Spread, check_options, load, read_estimator
from mdm_plugin.alignment.policy import PolicyLoss, check_ratio
from mdm_plugin.alignment.policy_report import Seen, write_policy
from mdm_plugin.alignment.rewards import advantages, check_advantages, read_rewards
from mdm_plugin.alignment.rollouts import Rollout, Writing, asked, rewarded, roll_out
from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.data.batches import Batch
from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.distributed.gradients import folded_gradient, total_norm
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.inference import check_writing, read_decoding
from mdm_plugin.training.checks import check_data
from mdm_plugin.training.estimators import derived

Key = tuple[int | str, ...]


class Candidate(NamedTuple):
    """An estimator, how many forwards it has, and the loss that it is used with. noise: ``own`` of
    each answer, or ``answers``: one for all answers to a prompt."""

    name: str
    estimator: Estimator
    draws: int
    loss: PolicyLoss
    noise: str


class Judged(NamedTuple):
    """Answers of the whole batch, this rank's share of them as rows, and all advantages [S]."""

    rows: list[Batch]
    gains: Tensor


class Look(NamedTuple):
    """A gradient, this rank's part [D], and of this rank's answers: Δ, [R, L] or [R, 1], and the
    clipped share [R]."""

    gradient: Tensor
    change: Tensor
    clipped: Tensor


class PolicyVariance:
    """Set up, measure, report."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world

    def setup(self) -> None:
        cfg, world, own = self.cfg, self.world, self.cfg.policy
        check_options(cfg, "policy", own)
        if cfg.dataset is not None:
            raise UserError("dataset: the model writes the rows of a policy: leave it out")
        for key, least in (("group_size", 1), ("reward_timeout", 1e-3), ("step", 0)):
            if own[key] < least:
                raise UserError(f"policy.{key}: {own[key]}: use {least} or more")
        check_advantages(own.baseline, own.by_deviation, own.group_size, "policy.")
        self.tokenizer = instantiate(cfg, "tokenizer")
        try:
            self.rewards = read_rewards(own)
            keys = ("decoding", "sampler", "max_new_tokens")
            writing = DictConfig({key: own[key] for key in keys} | {"batch_size": cfg.batch_size})
            self.decoding = read_decoding(writing)
        except UserError as error:
            raise UserError(f"policy.{error}") from error
        if not self.decoding.temperature:
            raise UserError("policy.decoding.temperature: 0 gives all answers alike: set it")
        self.prompts = read_prompts(self.tokenizer, prompts=own.prompts)
        rows = Rows((x.ids, [True] * len(x.ids)) for x in self.prompts)
        self.batches = GlobalBatches(
            rows,
            Split(cfg.batch_size, world.size, world.rank),
            Padding(self.tokenizer.pad_id, max_len=self.tokenizer.max_seq_len),
            seed=cfg.seed,
        )
        if cfg.batches > self.batches.steps_per_epoch:
            raise UserError(
                f"batches: {cfg.batches}: there are {self.batches.steps_per_epoch} of "
                f"{self.batches.size} prompts"
            )
        checkpointer = instantiate(cfg, "checkpointer")
        if checkpointer.weights is None:
            raise UserError("checkpointer.checkpoint_dir: missing: name the policy's weights")
        self.model = load(cfg, world, checkpointer).train()
        # The model that answered, where it is another than the one that is measured.
        self.old = load(cfg, world, checkpointer).train() if own.step else None
        check_data(self.model, self.tokenizer, rows)
        try:
            check_writing(self.model, self.decoding, own.max_new_tokens)
        except UserError as error:
            raise UserError(f"policy.{error}") from error
        if (longest := rows.facts.longest) + own.max_new_tokens > self.model.max_seq_len:
            raise UserError(
                f"policy.max_new_tokens: {own.max_new_tokens} after a prompt of {longest} tokens "
                f"are more than the model takes, {self.model.max_seq_len}"
            )
        self.size = self.batches.size * own.group_size
        self.candidates = [self._candidate(str(name)) for name in cfg.estimators]

    def _candidate(self, name: str) -> Candidate:
        cfg, mask_id, where = self.cfg, self.tokenizer.mask_id, f"estimators.{name}."
        estimator, draws = read_estimator(
            cfg, name, ["loss", "noise"], cfg.policy.draws, mask_id, self.model
        )
        own = cfg.estimators[name].get("loss") is not None
        part, where = (cfg.estimators[name], where) if own else (cfg.policy, "policy.")
        loss = derived(f"{where}loss", instantiate(part, "loss", where=where), PolicyLoss)
        check_ratio(loss, estimator.masking, f"{where}loss")
        if loss.kl is not None:
            raise UserError(f"{where}loss.kl: {loss.kl}: there is no reference here: leave it out")
        if estimator.timesteps.learns or estimator.timesteps.probe_plan(estimator.w):
            raise UserError(
                f"estimators.{name}.timesteps: {type(estimator.timesteps).__name__} learns from a "
                "data set, and the answers are not there yet: use Stratified or Uniform"
            )
        noise = cfg.estimators[name].get("noise", "own")
        if noise not in ("own", "answers"):
            raise UserError(f"estimators.{name}.noise: {noise}: use own or answers")
        return Candidate(name, estimator, draws, loss, noise)

    def measure(self) -> None:
        total = 2 * len(self.candidates) * self.cfg.batches
        seen: dict[str, list[Seen]] = {x.name: [] for x in self.candidates}
        with tqdm(total=total, unit="look", desc="Measuring", disable=self.world.rank != 0) as bar:
            for batch in range(self.cfg.batches):
                both: dict[str, list[Seen]] = {x.name: [] for x in self.candidates}
                for answers in (0, 1):
                    judged = self._judged((batch, answers))
                    self._move(judged, (batch, answers))
                    for number, candidate in enumerate(self.candidates):
                        found = self._looks(candidate, judged, (number, batch, answers))
                        both[candidate.name].append(found)
                        bar.update()
                    self._move_back()
                for name, sets in both.items():
                    seen[name].append(Seen(*(torch.stack(x) for x in zip(*sets, strict=True))))
        stacked = {
            name: Seen(*(torch.stack(x) for x in zip(*values, strict=True)))
            for name, values in seen.items()
        }
        if not any(x.noise.any() for x in stacked.values()):
            raise UserError(
                "policy.rewards: all answers to each prompt were worth the same, and there is no "
                "gradient: raise batches, batch_size or policy.decoding.temperature"
            )
        forwards = {x.name: x.draws for x in self.candidates}
        self.say(write_policy(stacked, forwards, self.cfg, self.world))

    def _judged(self, key: Key) -> Judged:
        """Answers to the prompts of a batch, and what they are worth beside each other."""
        own, world, batch = self.cfg.policy, self.world, int(key[0])
        rollout: Rollout = roll_out(
            self.model,
            self.tokenizer,
            asked(self.prompts, self.batches, batch),
            Writing(own.group_size, self.decoding, own.max_new_tokens),
            self.batches.padding,
            world,
            (self.cfg.seed, "rollout", *key),
        )
        total, _, failures = rewarded(rollout, self.rewards, own.reward_timeout, self.size, world)
        for line in failures[:1]:
            self.say(f"an answer has no reward: {line}")
        gains, _ = advantages(
            total, own.group_size, baseline=own.baseline, by_deviation=own.by_deviation
        )
        return Judged(rollout.batches, gains)

    def _move(self, judged: Judged, key: Key) -> None:
        """A step along the gradient of the first estimator, of the length that is asked for."""
        if self.old is None or not judged.gains.any():
            return
        self._add(self.candidates[0], judged, ("step", *key), None)
        scale = self.cfg.policy.step / float(total_norm(self.model))
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(scale * parameter.grad)
        self.model.zero_grad(set_to_none=True)

    def _move_back(self) -> None:
        if self.old is not None:
            with torch.no_grad():
                for own, old in zip(self.model.parameters(), self.old.parameters(), strict=True):
                    own.copy_(old)

    def _looks(self, candidate: Candidate, judged: Judged, key: Key) -> Seen:
        """Of one set of answers: the mean gradient of the looks, and the parts of their noise."""
        world, pairs, changes, clipped = self.world, Spread(), Spread(), []
        masks = torch.zeros((), dtype=torch.float64)
        repeats = self.cfg.policy.repeats
        for k in range(repeats):
            one = self._look(candidate, judged, ("look", *key, k), None)
            other = self._look(candidate, judged, ("look", *key, k), ("masks", *key, k))
            pairs.add((one.gradient + other.gradient) / 2)
            masks += (one.gradient - other.gradient).double().square().sum().cpu() / 2
            changes.add(one.change)
            clipped.append(one.clipped.mean())
        masks, between = world.sum(masks).cpu() / repeats, pairs.variance(world)
        noise = between + masks / 2
        count = world.sum(torch.tensor(float(self._terms(candidate, judged)))).cpu()
        return Seen(
            means=pairs.mean.cpu(),
            own_noise=between / repeats,
            noise=noise,
            masks=masks if candidate.estimator.masking.uses_t else noise,
            change=changes.variance(world) / count,
            clipped=world.sum(torch.stack(clipped).mean()).cpu() / world.size,
        )

    def _terms(self, candidate: Candidate, judged: Judged) -> int:
        """How many ratios this rank's answers have."""
        by_token = candidate.loss.by_token
        return sum(int(x.eligible.sum()) if by_token else len(x.tokens) for x in judged.rows)

    def _look(self, candidate: Candidate, judged: Judged, key: Key, masks: Key | None) -> Look:
        changes, clipped = self._add(candidate, judged, key, masks)
        gradient = folded_gradient(self.model, self.cfg.projection, self.cfg.seed, self.world.rank)
        self.model.zero_grad(set_to_none=True)
        return Look(gradient, changes, clipped)

    def _add(
        self, candidate: Candidate, judged: Judged, key: Key, masks: Key | None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the policy's loss to the model's, as mdm_grpo does; Δ of each
        answer's ratios, one after another, and the clipped share of each answer."""
        world, estimator, loss = self.world, candidate.estimator, candidate.loss
        share = self.cfg.policy.group_size if candidate.noise == "answers" else 1
        how = DrawPlan(candidate.draws // estimator.masking.views, self.cfg.seed, share)
        changes, clipped = [], []
        for rows in judged.rows:
            draws = drawn(rows, estimator, how, key, masks)
            if self.old is None:  # one model: Δ is 0, whatever the bounds are
                new = old = torch.zeros(rows.tokens.shape, dtype=torch.float64)
            else:
                new, old = (
                    token_bounds(x, estimator.loss, draws, world, ("k",))
                    for x in (self.model, self.old)
                )
            at = new.clone().requires_grad_()
            with torch.enable_grad():
                terms = loss(at, old, None, judged.gains[rows.places], rows.eligible)
            (slopes,) = torch.autograd.grad(terms.loss / self.size, at)
            add_gradient(self.model, estimator.loss, draws, slopes, world, ("k",))
            change, n = new - old, rows.eligible.sum(1)
            changes.append(change[rows.eligible] if loss.by_token else change.sum(1) / n)
            clipped.append(terms.clipped)
        return torch.cat(changes), torch.cat(clipped)

    def say(self, line: str) -> None:
        if self.world.rank == 0:
            tqdm.write(line)
