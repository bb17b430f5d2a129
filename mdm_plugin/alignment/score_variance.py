"""How noisy are the score and the gradient of preferences? For ``mdm_variance``.

A batch of P preferences is looked at K times by each estimator, with other noise each time. Over
the K looks the score of a preference has a variance, and the batch's gradient has one (the trace of
its covariance): all of it is noise of the bounds, as the answers stay the same.
"""

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from mdm_plugin.alignment.bounds import Drawn, DrawPlan, add_gradient, bounds, drawn, everywhere
from mdm_plugin.alignment.looks import (
    Spread,
    check_options,
    interval,
    load,
    read_estimator,
    table,
    write_rows,
)
from mdm_plugin.alignment.preferences import check_loss, compare
from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator, Times, TimestepSampler
from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.density import Density
from mdm_plugin.distributed.gradients import folded_gradient
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.training.checks import check_data, check_examples
from mdm_plugin.training.probe import fit, fit_line, probe, probe_due
from mdm_plugin.variance import quotient

NOISE = ("own", "answers", "apart")


class OneTime(TimestepSampler):
    """The same t for all draws of a sequence: one count and many masks, VRPO's other allocation."""

    weighted = False

    def __call__(self, n: int, generator: torch.Generator, w: Density) -> Times:
        u = torch.rand(1, generator=generator, dtype=torch.float64).expand(n)
        return Times(w.quantile(u), torch.ones(n, dtype=torch.float64))


class Candidate(NamedTuple):
    """An estimator of bounds. noise: ``own`` of each answer, the same for policy and reference;
    ``answers``: shared by both answers too; ``apart``: not even by policy and reference."""

    name: str
    estimator: Estimator
    draws: int
    noise: str


class Looks(NamedTuple):
    """What an estimator saw of G batches: scores [G, K, P], gradients' noise [G], losses [G, K]."""

    scores: Tensor
    gradient: Tensor
    losses: Tensor


class PreferenceVariance:
    """Set up, measure, report."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world

    def setup(self) -> None:
        cfg, world, own = self.cfg, self.world, self.cfg.preferences
        check_options(cfg, "preferences", own)
        if cfg.dataset is None:
            raise UserError("dataset: missing: name the preferences to measure on")
        self.loss: nn.Module = check_loss(instantiate(own, "loss", where="preferences."))
        tokenizer = instantiate(cfg, "tokenizer")
        rows = instantiate(cfg, "dataset", tokenizer)
        check_examples(2, rows, None)
        self.say(f"dataset: {rows}")
        self.batches = GlobalBatches(
            rows,
            Split(2 * cfg.batch_size, world.size, world.rank),
            Padding(tokenizer.pad_id, max_len=tokenizer.max_seq_len),
            seed=cfg.seed,
        )
        if cfg.batches > self.batches.steps_per_epoch:
            raise UserError(
                f"batches: {cfg.batches}: the data has {self.batches.steps_per_epoch} of "
                f"{self.batches.size // 2} preferences"
            )
        self.model = load(cfg, world, instantiate(cfg, "checkpointer"))
        reference = instantiate(own, "reference", where="preferences.")
        self.reference = load(cfg, world, reference).eval()
        check_data(self.model, tokenizer, rows)
        self.candidates = [self._candidate(str(name), tokenizer.mask_id) for name in cfg.estimators]

    def _candidate(self, name: str, mask_id: int) -> Candidate:
        cfg = self.cfg
        estimator, draws = read_estimator(
            cfg, name, ["noise"], cfg.preferences.draws, mask_id, self.model
        )
        noise = cfg.estimators[name].get("noise", "own")
        if noise not in NOISE:
            raise UserError(
                f"estimators.{name}.noise: {noise}: use {', '.join(NOISE[:-1])} or {NOISE[-1]}"
            )
        return Candidate(name, estimator, draws, noise)

    def measure(self) -> None:
        self.model.train()
        for candidate in self.candidates:
            if plan := probe_due(candidate.estimator, 0):
                found = probe(
                    self.model, candidate.estimator, plan, self.batches, self.world, step=0
                )
                report = fit(candidate.estimator, plan, found, self.world)
                self.say(f"{candidate.name}: {fit_line(report)}")
        total = len(self.candidates) * self.cfg.batches
        seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {x.name: [] for x in self.candidates}
        with tqdm(total=total, unit="batch", desc="Measuring", disable=self.world.rank != 0) as bar:
            for step in range(self.cfg.batches):
                for candidate in self.candidates:
                    seen[candidate.name].append(self._looks(candidate, step))
                    bar.update()
        looks = {
            name: Looks(*(torch.stack(x) for x in zip(*values, strict=True)))
            for name, values in seen.items()
        }
        if self.world.rank == 0:
            self.say(write_table(looks, self.candidates, self.loss, self.cfg))

    def _looks(self, candidate: Candidate, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one batch: scores [K, P], the noise of the gradient, losses [K]."""
        scores, losses, spread = [], [], Spread()
        for k in range(self.cfg.preferences.repeats):
            score, loss, gradient = self._look(candidate, step, k)
            scores.append(score)
            losses.append(loss)
            spread.add(gradient)
        return torch.stack(scores), spread.variance(self.world), torch.stack(losses)

    def _look(self, candidate: Candidate, step: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        cfg, world, loss = self.cfg, self.world, candidate.estimator.loss
        share = 2 if candidate.noise == "answers" else 1
        how = DrawPlan(candidate.draws // candidate.estimator.masking.views, cfg.seed, share)

        def draw(key: str) -> list[Drawn]:
            return [
                drawn(x, candidate.estimator, how, (key, step, k))
                for x in self.batches.micro_batches(step)
            ]

        own = draw("look")
        theirs = draw("apart") if candidate.noise == "apart" else own
        places, size = [x.places for x in own], self.batches.size
        policy, reference = (
            everywhere([bounds(model, loss, x, world, ("k",)) for x in parts], places, size, world)
            for model, parts in ((self.model, own), (self.reference, theirs))
        )
        n = everywhere([x.n for x in own], places, size, world)
        found = compare(self.loss, policy, reference, n, sft_weight=cfg.preferences.sft_weight)
        for x in own:
            add_gradient(self.model, loss, x, found.slopes[x.places], world, ("k",))
        gradient = folded_gradient(self.model, cfg.projection, cfg.seed, world.rank)
        self.model.zero_grad(set_to_none=True)
        change = (policy - reference).mean(1)
        score = change[0::2] - change[1::2]
        return score, torch.tensor(found.loss, dtype=torch.float64), gradient

    def say(self, line: str) -> None:
        if self.world.rank == 0:
            tqdm.write(line)


def write_table(
    looks: dict[str, Looks],
    candidates: list[Candidate],
    loss: nn.Module,
    cfg: DictConfig,
) -> str:
    """Write preferences.json and preferences.csv; give the table."""
    first = looks[candidates[0].name]
    # The best that is known of each score: the mean over all looks of those with shared noise.
    best = torch.cat([looks[x.name].scores for x in candidates if x.noise != "apart"], 1).mean(1)
    zero = torch.zeros_like(best)
    truth = loss(best.flatten(), zero.flatten(), zero.flatten(), zero.flatten())[0].mean()
    records: list[dict[str, Any]] = []
    for x in candidates:
        own = looks[x.name]
        score = own.scores.var(1).mean(1)
        flat = own.scores.flatten()
        noisy = loss(flat, *[torch.zeros_like(flat)] * 3)[0].mean()
        records.append(
            {
                "estimator": x.name,
                "forwards": x.draws,
                "score_variance": float(score.mean()),
                "score_ratio": quotient([score], [first.scores.var(1).mean(1)]),
                "gradient_variance": float(own.gradient.mean()),
                "gradient_ratio": quotient([own.gradient], [first.gradient]),
                "loss_bias": float(noisy - truth),
            }
        )
    facts = {"batches": cfg.batches, "preferences": cfg.batch_size, "loss": float(truth)}
    directory = write_rows(records, facts, cfg, "preferences")
    head = ["estimator", "forwards", "variance of the score", "relative"]
    lines = [
        [
            r["estimator"],
            str(r["forwards"]),
            f"{r['score_variance']:.3g}",
            interval(r["score_ratio"]),
            interval(r["gradient_ratio"]),
            f"{r['loss_bias']:+.4f}",
        ]
        for r in records
    ]
    text = table([*head, "of the gradient, relative", "bias of the loss"], lines)
    return f"\n{text}\n\nThe loss without noise: {float(truth):.4f}. {directory}"
