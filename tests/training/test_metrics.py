import pytest
import torch
from omegaconf import OmegaConf

from mdm_plugin.config.options import Options
from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.density import Density
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, FixedCount, Mirror, masking_rate
from mdm_plugin.objectives import ELBO
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.metrics import StepMetrics, first_line
from mdm_plugin.training.step import Result, row_losses

ALONE = World(0, 1, torch.device("cpu"), None)


ADAMW = {"_component_": "torch.optim.AdamW"}
CHOSEN = "timesteps Uniform, masking Mirror, objective ELBO; optimizer"


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        ({"dtype": "fp32"}, 1, f"1 rank on cpu; fp32; {CHOSEN} AdamW"),
        ({"dtype": "bf16"}, 2, f"2 ranks on cpu; bf16, masters in fp32; {CHOSEN} AdamW"),
        (
            {"master_dtype": "bf16", "optimizer": {"_component_": "torchao.optim.AdamW8bit"}},
            8,
            f"8 ranks on cpu; bf16, masters too, rounded at random; {CHOSEN} AdamW8bit",
        ),
        (
            {"master_dtype": "bf16", "stochastic_rounding": False},
            1,
            f"1 rank on cpu; bf16, masters too, rounded to the nearest; {CHOSEN} AdamW",
        ),
        (
            {"enable_fp8_training": True},
            1,
            f"1 rank on cpu; bf16 with float8 (tensorwise), masters in fp32; {CHOSEN} AdamW",
        ),
    ],
)
def test_the_first_line_says_device_ranks_precision_estimator_and_optimizer(
    options, ranks, expected
):
    cfg = OmegaConf.merge(OmegaConf.structured(Options), {"optimizer": ADAMW, **options})
    estimator = Estimator(Uniform(), Mirror(), MDMLoss(), mask_id=7)
    world = World(0, ranks, torch.device("cpu"), None)
    assert first_line(cfg, world, estimator, ELBO()) == expected


@pytest.mark.parametrize("masking", [Bernoulli(), Mirror()], ids=["Bernoulli", "Mirror"])
def test_figures_are_what_their_names_say(masking):
    rows = Rows(([1] * 4 + [2] * n, [False] * 4 + [True] * n) for n in (6, 8, 9, 5))
    batches = GlobalBatches(rows, Split(2, accumulation=2), Padding(0), seed=0, shuffle=False)
    estimator = Estimator(Uniform(), masking, MDMLoss(), mask_id=7)
    t = torch.tensor([0.05, 0.55, 0.58, 0.99], dtype=torch.float64)
    importance = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    metrics = StepMetrics(ALONE)
    by_place, masked, tokens, results = {}, 0, 0, []
    for micro in batches.micro_batches(0):
        batch = corrupt(micro, Times(t, importance), estimator)
        ce = torch.arange(len(batch.targets.labels), dtype=torch.float32)
        views = len(batch.noisy) // 2
        for sequence in range(len(batch.noisy)):
            place = int(micro.places[sequence % 2])
            n, p = int(micro.eligible[sequence % 2].sum()), masking_rate(t[place]).item()
            total = ce[batch.targets.rows == sequence].sum().item()
            by_place.setdefault(place, []).append(total / n / p)
        masked += int((batch.noisy == 7).sum())
        tokens += batch.noisy.numel()
        results.append(Result(batch, torch.tensor(0.25), row_losses(batch, ce)))
    metrics.step(results, torch.tensor(3.0))
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


@pytest.mark.parametrize("masking", [Bernoulli(), FixedCount()], ids=["Bernoulli", "FixedCount"])
def test_the_weight_that_is_shown_is_the_weight_that_is_used(masking):
    """Of masks by count it is that of the count, not 1/h(t)."""
    rows = Rows(([1] * 2 + [2] * 6, [False] * 2 + [True] * 6) for _ in range(4))
    batches = GlobalBatches(rows, Split(4), Padding(0), seed=0)
    density = Density(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, 1.0, 0.5]))
    t = torch.tensor([0.02, 0.3, 0.6, 0.95], dtype=torch.float64)
    estimator = Estimator(Uniform(), masking, MDMLoss(), mask_id=7)
    batch = corrupt(batches.micro_batches(0)[0], Times(t, 1 / density(t), density), estimator)
    metrics = StepMetrics(ALONE)
    metrics.step([Result(batch, torch.tensor(0.0), torch.zeros(4))], None)
    figures = metrics.report()
    # What the loss used: a position's weight is that of its row · 1/p / N.
    per_row = torch.zeros(4, dtype=torch.float64)
    per_row[batch.targets.rows] = batch.targets.weights.double()
    used = (per_row / batch.row_scale.double())[per_row > 0]
    assert figures["train/importance_weight_max"] >= float(used.max()) * (1 - 1e-6)
    if masking.by_count:  # every row has a mask
        edges = torch.tensor([0.0, 1, 3, 5]).double() / 6
        truth = 1 / (6 * (density.cdf(edges + 1 / 6) - density.cdf(edges)))
        torch.testing.assert_close(used.sort().values, truth.sort().values, rtol=1e-5, atol=0)
        assert figures["train/importance_weight_max"] == pytest.approx(float(truth.max()))
        assert figures["train/importance_weight_mean"] == pytest.approx(float(truth.mean()))
    else:
        assert figures["train/importance_weight_mean"] == pytest.approx(
            float((1 / density(t)).mean())
        )
