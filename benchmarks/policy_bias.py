"""The bias of estimates of a policy's gradient, exactly, on the quickstart's model.

    python benchmarks/policy_bias.py --output policy_bias.json

Answers are the model's own: right ones have the advantage ½, wrong ones −½. Of each the last tokens
are to be estimated (``--tokens``), and all before them are its prompt. So few tokens that all their
sets can be listed: a method's mean gradient is Σ over sets S of c(|S|) · ∇ΣCE(S), where c is the
mean weight that it gives a set of that size. What d1 hides of the prompt is drawn (``--hidden``).

Given are, for each method, ‖g − g*‖/‖g*‖ with g* the bound's gradient, the cosine of g and g*, and
‖g‖/‖g*‖, over batches of answers: the mean and the worst.
"""

import argparse
import json
from math import comb
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("bound", "GDPO", "coupled-GRPO", "diffu-GRPO")


def set_weights(method: str, n: int) -> Tensor:
    """c(l): E of a method's estimate of log p is −Σ_S c(|S|)·ΣCE(S). [n + 1], fp64."""
    found = torch.zeros(n + 1, dtype=torch.float64)
    if method == "bound":  # a count is as likely as another, weight n/l
        for count in range(1, n + 1):
            found[count] = 1 / (count * comb(n, count))
    elif method == "GDPO":  # three counts
        half = 0.5 * 0.6**0.5
        for node, share in ((0.5 - half, 5 / 18), (0.5, 8 / 18), (0.5 + half, 5 / 18)):
            count = max(1, int(node * n))
            found[count] += share * n / count / comb(n, count)
    elif (
        method == "coupled-GRPO"
    ):  # the mean over rates of r^l·(1 − r)^(n − l)/r, and a half of all
        nodes, shares = numpy.polynomial.legendre.leggauss(n + 4)
        rates = torch.tensor(0.5 + 0.3 * nodes)
        for count in range(1, n + 1):
            chance = rates ** (count - 1) * (1 - rates) ** (n - count)
            found[count] = (chance * torch.tensor(shares / 2)).sum()
        found[n] += 0.5
    else:
        found[n] = 1.0
    return found


def mean_gradient(
    model: nn.Module, rows: Tensor, places: list[list[int]], gains: Tensor, method: str, mask: int
) -> Tensor:
    """The mean gradient of −(1/R)·Σ_r A_r·(estimate of log p)/N_r over R rows. [D], fp64.

    rows: [H, R, L], tokens, H times the same but for what is hidden of prompts; a mean is taken.
    places: of each row, those that are estimated. gains: A, [R].
    """
    model.zero_grad()
    for r, where in enumerate(places):
        n, at = len(where), torch.tensor(where)
        weight = set_weights(method, n)
        codes = torch.arange(1, 2**n)
        sets = (codes[:, None] >> torch.arange(n) & 1).bool()
        sets = sets[weight[sets.sum(1)] > 0]
        for tokens in rows[:, r]:
            noisy = tokens.repeat(len(sets), 1)
            noisy[:, at] = torch.where(sets, mask, tokens[at])
            logits = model(noisy)[:, at].double()
            labels = tokens[at].repeat(len(sets), 1)
            ce = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            estimate = -(weight[sets.sum(1)][:, None] * sets * ce).sum()
            (-estimate * gains[r] / n / len(rows) / len(places)).backward()
    grads = [x.grad.flatten().double() for x in model.parameters() if x.grad is not None]
    return torch.cat(grads)


def hidden(rows: Tensor, answers: list[list[int]], count: int, rate: float, mask: int) -> Tensor:
    """[count, R, L]: tokens outside the answers masked at a rate, drawn anew each time."""
    generator = torch.Generator().manual_seed(0)
    gone = torch.rand(count, *rows.shape, generator=generator) < rate
    for r, where in enumerate(answers):
        gone[:, r, where] = False
    return torch.where(gone, mask, rows)


def main() -> None:
    """Measure on pairs of right and wrong answers of the quickstart's apprentice."""
    from quickstart_model import Quickstart  # benchmarks/ is where this runs

    from mdm_plugin.data import preference_dataset
    from mdm_plugin.quickstart import prepare_apprentice
    from mdm_plugin.quickstart.data import write_pairs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="of 8 right and 8 wrong answers")
    parser.add_argument("--hidden", type=int, default=64, help="prompts that d1 draws")
    given = parser.parse_args()
    quickstart = Quickstart()
    home = quickstart.home
    prepare_apprentice(str(home))
    write_pairs(str(home), "apprentice", "apprentice_pairs.jsonl", 3000)
    mask, answers = quickstart.tokenizer.mask_id, 16
    model = quickstart.model(home / "apprentice")
    pairs = preference_dataset(quickstart.tokenizer, source=str(home / "apprentice_pairs.jsonl"))
    gains = torch.tensor([0.5, -0.5]).repeat(answers // 2)
    found: dict[str, list[list[float]]] = {x: [] for x in METHODS}
    for batch in range(given.batches):
        tokens, places = [], []
        for i in range(batch * answers, (batch + 1) * answers):
            row = pairs[i]
            tokens.append(torch.as_tensor(row.tokens))
            places.append(torch.as_tensor(row.eligible).nonzero()[:, 0].tolist()[-given.tokens :])
        gradients = {}
        for method in METHODS:
            gradients[method] = sum(
                mean_gradient(
                    model,
                    hidden(x[None], [y], given.hidden, 0.15, mask)
                    if method == "diffu-GRPO"
                    else x[None, None],
                    [y],
                    gains[i : i + 1] / answers,
                    method,
                    mask,
                )
                for i, (x, y) in enumerate(zip(tokens, places, strict=True))
            )
        truth = gradients["bound"]
        for method, own in gradients.items():
            cosine = torch.dot(own, truth) / own.norm() / truth.norm()
            size = own.norm() / truth.norm()
            found[method].append(
                [float((own - truth).norm() / truth.norm()), float(cosine), float(size)]
            )
    lines = [
        "| method | relative bias | worst | cosine | worst | size |",
        "|---|---|---|---|---|---|",
    ]
    for method, values in found.items():
        bias, cosine, size = torch.tensor(values).unbind(1)
        lines.append(
            f"| {method} | {bias.mean():.2f} | {bias.max():.2f} | {cosine.mean():.2f} | "
            f"{cosine.min():.2f} | {size.mean():.2f} |"
        )
    given.output.write_text(json.dumps(found, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
