"""What ``mdm_variance`` writes of a policy's gradient: parts, table, JSON, CSV and a figure."""

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from mdm_plugin.alignment.looks import interval, table, write_rows
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation.variance_report import stack
from mdm_plugin.variance import Estimate, quotient


class Seen(NamedTuple):
    """What an estimator saw of G batches, each with two sets of answers.

    means: [G, 2, D], the gradient in the mean over looks, this rank's part. own_noise: [G, 2], its
    variance. noise: [G, 2], that of a single look. masks: [G, 2], of that what masks alone do.
    change: [G, 2], variance of Δ, the mean over ratios. clipped: [G, 2], their clipped share.
    """

    means: Tensor
    own_noise: Tensor
    noise: Tensor
    masks: Tensor
    change: Tensor
    clipped: Tensor


class Parts(NamedTuple):
    """What each batch contributes, [G], fp64; estimates are means.

    noise: A + B. masks: A. answers: S. prompts: C. signal: the squared length of the mean over
    noise, given the answers. common: its inner product with the first estimator's.
    """

    noise: Tensor
    masks: Tensor
    answers: Tensor
    prompts: Tensor
    signal: Tensor
    common: Tensor


def parts(seen: Seen, first: Seen, world: World) -> Parts:
    """The parts of the variance of an estimator, and what it has in common with another, whose
    noise has nothing to do with its own; ``seen`` itself may be given."""
    means, own = seen.means.double(), seen.own_noise.mean(1)
    count = len(means)
    apart = (means[:, 0] - means[:, 1]).square().sum(1) / 2
    centred = means - means.mean(0)
    together = centred.prod(1).sum(1) * count / (count - 1)
    length = means.square().sum(2).mean(1)
    common = (means * first.means.double()).sum(2).mean(1)
    apart, together, length, common = (
        world.sum(x).cpu() for x in (apart, together, length, common)
    )
    signal = length - own
    return Parts(
        noise=seen.noise.mean(1),
        masks=seen.masks.mean(1),
        answers=apart - own,
        prompts=together,
        signal=signal,
        common=signal if seen is first else common,
    )


def record(own: Parts, first: Parts, forwards: float) -> dict[str, Any]:
    """An estimator's figures; ``forwards``: how many it has for one of the first's.

    ``bias``: ‖E f − E f_first‖ by ‖E f_first‖, given the answers; negative where the noise leaves
    less than nothing of it: the root has the sign of what it is taken of. What is by the
    estimator's own signal is None where that is not seen above its noise.
    """
    heard = quotient([own.signal], [first.signal]).low > 0
    gap = quotient([own.signal + first.signal - 2 * own.common], [first.signal])
    angle = quotient([own.common, own.common], [own.signal, first.signal])
    return {
        "noise": float(own.noise.mean()),
        "masks_A": float(own.masks.mean()),
        "rates_B": float((own.noise - own.masks).mean()),
        "answers_S": float(own.answers.mean()),
        "prompts_C": float(own.prompts.mean()),
        "signal": float(own.signal.mean()),
        "noise_ratio": quotient([own.noise], [first.noise]),
        "equal_forwards": quotient([forwards * own.noise], [first.noise]),
        "equal_forwards_by_signal": quotient(
            [forwards * own.noise, first.signal], [first.noise, own.signal]
        )
        if heard
        else None,
        "bias": Estimate(*(_root(x) for x in gap)),
        "direction": Estimate(*(_root(x) for x in angle)) if heard else None,
    }


def _root(x: float) -> float:
    return float(torch.tensor(x).abs().sqrt()) * (1 if x >= 0 else -1)


def write_policy(
    seen: dict[str, Seen], forwards: dict[str, int], cfg: DictConfig, world: World
) -> str:
    """Write policy.json, policy.csv and policy.png on the first rank; give the table.

    Called on every rank. seen, forwards: by the estimators' names, the first of which is the unit.
    """
    names, own = list(seen), cfg.policy
    found = {x: parts(seen[x], seen[names[0]], world) for x in names}
    first = found[names[0]]
    rows: list[dict[str, Any]] = []
    for name in names:
        figures = record(found[name], first, forwards[name] / forwards[names[0]])
        if own.step:
            figures["ratio_deviation"] = float(seen[name].change.mean().sqrt())
            figures["clipped"] = float(seen[name].clipped.mean())
        rows.append({"estimator": name, "forwards": forwards[name], **figures})
    if world.rank != 0:
        return ""
    keys = ("group_size", "repeats", "step")
    facts = {"batches": cfg.batches, "prompts": cfg.batch_size * world.size}
    directory = write_rows(rows, facts | {key: own[key] for key in keys}, cfg, "policy")
    draw(rows).savefig(directory / "policy.png", dpi=120)
    unit = rows[0]["noise"]
    head = ["estimator", "forwards", "A", "B", "S", "C", "A + B, equal forwards", "by its signal"]
    head += ["direction", "bias"] + (["deviation of Δ", "clipped"] if own.step else [])
    lines = []
    for r in rows:
        kinds = ("masks_A", "rates_B", "answers_S", "prompts_C")
        line = [r["estimator"], str(r["forwards"]), *(f"{r[x] / unit:.2f}" for x in kinds)]
        ratios = ("equal_forwards", "equal_forwards_by_signal", "direction", "bias")
        line += [interval(r[x]) if r[x] else "not seen" for x in ratios]
        line += [f"{r['ratio_deviation']:.3g}", f"{r['clipped']:.1%}"] if own.step else []
        lines.append(line)
    return (
        f"\n{table(head, lines)}\n\nA, B, S, C: {names[0]}'s A + B is 1; {cfg.batches} batches of "
        f"{facts['prompts']} prompts with {own.group_size} answers. {directory}"
    )


def draw(rows: list[dict[str, Any]]) -> Any:
    """Bars of the parts at equal forwards, and the noise's interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(rows) + 1.6), layout="constrained")
    axis, unit = figure.subplots(), rows[0]["noise"] * rows[0]["forwards"]
    bars = []
    for key, label, colour in (
        ("masks_A", "A masks", "#4878cf"),
        ("rates_B", "B rates", "#ee854a"),
    ):
        bars.append((label, colour, [r[key] * r["forwards"] / unit for r in rows]))
    names = [f"{r['estimator']} ({r['forwards']})" for r in rows]
    stack(axis, names, bars, [r["equal_forwards"] for r in rows])
    axis.set(xlabel=f"noise of the policy's gradient at equal forwards, {rows[0]['estimator']} = 1")
    axis.legend(fontsize=8)
    return figure
