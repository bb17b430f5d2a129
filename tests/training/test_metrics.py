import pytest
import torch

from mdm_plugin.data import GlobalBatches, Rows
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, Mirror, masking_rate
from mdm_plugin.training.metrics import StepMetrics
from mdm_plugin.training.step import corrupt, row_losses

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("masking", [Bernoulli(), Mirror()], ids=["Bernoulli", "Mirror"])
def test_figures_are_what_their_names_say(masking):
    rows = Rows(([1] * 4 + [2] * n, [False] * 4 + [True] * n) for n in (6, 8, 9, 5))
    batches = GlobalBatches(rows, batch_size=2, accumulation=2, seed=0, pad_id=0, shuffle=False)
    loss = MDMLoss()
    t = torch.tensor([0.05, 0.55, 0.58, 0.99], dtype=torch.float64)
    importance = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    metrics = StepMetrics(ALONE)
    by_place, masked, tokens, results = {}, 0, 0, []
    for micro in batches.micro_batches(0):
        batch = corrupt(micro, t, importance, masking, loss, mask_id=7)
        ce = torch.arange(len(batch.targets.labels), dtype=torch.float32)
        views = len(batch.noisy) // 2
        for sequence in range(len(batch.noisy)):
            place = int(micro.places[sequence % 2])
            n, p = int(micro.eligible[sequence % 2].sum()), masking_rate(t[place]).item()
            total = ce[batch.targets.rows == sequence].sum().item()
            by_place.setdefault(place, []).append(total / n / p)
        masked += int((batch.noisy == 7).sum())
        tokens += batch.noisy.numel()
        results.append((batch, torch.tensor(0.25), row_losses(batch, ce)))
    metrics.step(results, torch.tensor(3.0), importance)
    figures = metrics.report()
    assert figures["train/loss"] == pytest.approx(0.5)
    assert figures["train/grad_norm"] == pytest.approx(3.0)
    assert figures["train/masked_fraction"] == pytest.approx(masked / 28 / views)
    assert figures["train/importance_weight_mean"] == pytest.approx(1.625)
    assert figures["train/importance_weight_max"] == 3.0
    ratio = figures["speed/masked_tokens_per_second"] / figures["speed/tokens_per_second"]
    assert ratio == pytest.approx(masked / tokens)
    bins = {"0.0-0.1": [0], "0.5-0.6": [1, 2], "0.9-1.0": [3]}
    for name, places in bins.items():
        values = [x for place in places for x in by_place[place]]
        truth = sum(values) / len(values)
        assert figures[f"train_loss_by_t/{name}"] == pytest.approx(truth, rel=1e-5)
    assert sum(name.startswith("train_loss_by_t/") for name in figures) == 3
