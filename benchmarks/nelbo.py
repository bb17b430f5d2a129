"""Width of the likelihood bound's interval, against LLaDA's estimator at the same forwards.

    python benchmarks/nelbo.py --output nelbo.json

LLaDA's script (eval/get_log_likelihood) spreads the counts of masked positions over each batch of
16 masks, draws each set anew and averages (N / l) · Σ CE. Both estimators see the quickstart's
held-out rows, under its pretrained and its fine-tuned model. Widths are of the sum over all rows,
by the spread of each row's estimates over seeds; "stated" is what `mdm_eval` reports.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from quickstart_model import WORLD, Quickstart, last_checkpoint
from torch import Tensor, nn
from tqdm import tqdm

from mdm_plugin.data import Rows
from mdm_plugin.evaluation import BoundEstimator
from mdm_plugin.models import ChatTokenizer


@torch.no_grad()
def plain(model: nn.Module, rows: Rows, tokenizer: ChatTokenizer, draws: int, seed: int) -> Tensor:
    """LLaDA's estimate of each row's bound, written out. [R], nats."""
    index = torch.arange(len(rows))
    tokens, eligible, real = rows.padded(index, rows.facts.longest, tokenizer.pad_id)
    n, generator = eligible.sum(1, keepdim=True), torch.Generator().manual_seed(seed)
    batch, estimates = min(16, draws), []
    for draw in range(draws):
        if draw % batch == 0:
            first = (torch.rand(n.shape, generator=generator) * n).long()
        count = (first + (draw % batch * n / batch).round().long()) % n + 1
        u = torch.rand(tokens.shape, generator=generator).masked_fill(~eligible, 2)
        mask = u.argsort(1).argsort(1) < count
        logits = model(torch.where(mask, tokenizer.mask_id, tokens), mask=real[:, None])
        ce = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        estimates.append((ce * mask).sum(1, keepdim=True) * n / count)
    return torch.cat(estimates, 1).double().mean(1)


def main() -> None:
    """Measure both models at 8 and 32 forwards a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    quickstart = Quickstart()
    tokenizer, rows = quickstart.tokenizer, quickstart.rows("test")
    models = {
        "pretrained": quickstart.model(quickstart.pretrained),
        "fine-tuned": quickstart.model(last_checkpoint(quickstart.run)),
    }
    cases = [(name, draws) for name in models for draws in (8, 32)]
    results = {}
    for name, draws in tqdm(cases, desc="Measuring"):
        model = models[name]
        ours = [
            BoundEstimator(tokenizer, WORLD, batch_size=1024, draws=draws, seed=seed).bounds(
                model, rows, torch.arange(len(rows))
            )
            for seed in range(given.seeds)
        ]
        theirs = torch.stack(
            [plain(model, rows, tokenizer, draws, seed) for seed in range(given.seeds)]
        )
        nats = torch.stack([x.nats for x in ours])
        width, other = (float(x.var(0).sum().sqrt()) for x in (nats, theirs))
        stated = float(torch.stack([x.variance for x in ours]).mean(0).sum().sqrt())
        results[f"{name}, {draws} forwards"] = {
            "mean": float(nats.mean(0).sum()),
            "mean_plain": float(theirs.mean(0).sum()),
            "error": width,
            "error_plain": other,
            "ratio": width / other,
            "stated": stated / width,
        }
        tqdm.write(
            f"{name:11} {draws:3} forwards: {width / other:.2f} of LLaDA's width; "
            f"stated {stated / width:.2f} of actual"
        )
    given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
