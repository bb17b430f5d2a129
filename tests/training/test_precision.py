"""What small steps come to in fp32, in bf16 with fp32 masters, and in bf16 alone."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchao.optim import AdamW8bit

from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.build import Build, build_model
from mdm_plugin.distributed.parameters import fill, full, initialize_parameters, named_parameters
from mdm_plugin.distributed.world import distributed
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement
from mdm_plugin.models import llada, lora_llada
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training import EMA
from mdm_plugin.training.corruption import corrupted_step, pack
from mdm_plugin.training.precision import check_precision, rounding
from mdm_plugin.training.step import backward, global_normalizer

SHAPE = {
    **{"vocab_size": 64, "num_layers": 1, "num_heads": 2, "embed_dim": 64},
    **{"intermediate_dim": 64, "max_seq_len": 8},
}
LR, RATIO = 5e-5, 0.1  # the 8B configs' rate, and |m/sqrt(v)| in the midst of a run


def stepped(optimizer_of, masters):
    """The weights, of scale 0.02, before and after a step of LR · RATIO."""
    with distributed("cpu") as world:
        model = build_model(lambda: llada(**SHAPE), world, torch.bfloat16, Build(masters=masters))
        torch.manual_seed(0)
        name = "layers.0.mlp.w1.weight"
        fill(model, [(name, torch.randn(64, 64) * 0.02)])
        weight = named_parameters(model)[name]
        before = full(weight).float().clone()
        optimizer = optimizer_of([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()  # a first step is of m/sqrt(v) = 1
        return before, full(weight).float().clone()


def test_masters_take_every_small_step_and_bf16_rounds_most_of_them_away():
    def plain(weights):
        return torch.optim.AdamW(weights, lr=LR * RATIO, weight_decay=0)

    before, after = stepped(plain, torch.float32)
    torch.testing.assert_close(
        after - before, torch.full_like(before, -LR * RATIO), rtol=1e-3, atol=0
    )
    before, after = stepped(plain, torch.bfloat16)
    share = (before != after).float().mean()
    assert 0.04 < share < 0.12  # 8 %


def test_rounded_at_random_a_small_step_counts_on_average():
    """E of a rounded step is the step; its error is that of 4,096 weights."""

    def random(weights):
        return AdamW8bit(weights, lr=LR * RATIO, weight_decay=0, bf16_stochastic_round=True)

    with torch.compiler.set_stance("force_eager"):
        before, after = stepped(random, torch.bfloat16)
    moved = (after - before).double()
    assert moved.mean() / (-LR * RATIO) == pytest.approx(1, abs=4 * float(moved.std()) / 64 / 5e-6)
    assert moved.std() / 64 < LR * RATIO / 4  # or the line above would hold for no step at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_fp32_and_follows_a_drift_whatever_the_weights_are(dtype):
    """decay 0.999, 3,000 steps: in bf16 itself the average follows 0.3 % of it."""
    model = nn.Linear(64, 64, bias=False).to(dtype)
    start = model.weight.detach().double().clone()
    ema, truth = EMA(model, 0.999), start.clone()
    for step in range(3000):
        with torch.no_grad():
            model.weight.copy_(start + 1e-4 * (step + 1))
        ema.update(step)
        d = min(0.999, (1 + step) / (10 + step))
        truth += (1 - d) * (model.weight.detach().double() - truth)
    average = ema.weights()["weight"]
    assert average.dtype == torch.float32
    assert ((average.double() - truth) / (truth - start)).abs().max() < 0.01
    weight = model.weight.detach().clone()
    with ema.applied():
        assert model.weight.dtype == dtype
        torch.testing.assert_close(model.weight.detach(), average.to(dtype), rtol=0, atol=0)
    assert torch.equal(model.weight, weight) and torch.equal(ema.weights()["weight"], average)


def gradient(kind, dtype):
    """Of the tests' rows at given weights, in ``dtype`` with fp32 masters: padded, packed, in
    blocks of 4, or of adapters."""
    torch.manual_seed(0)
    rows = Rows((torch.randint(62, (n,)).tolist(), [False] * 4 + [True] * (n - 4)) for n in (24, 9))
    batches = GlobalBatches(rows, Split(2), Padding(62), seed=0)
    blocks = Blocks(4) if kind == "blocks" else None
    estimator = Estimator(Stratified(), Complement(), MDMLoss(), 63, blocks=blocks)
    shape = {**SHAPE, "max_seq_len": 32, "num_layers": 2}

    def build():
        if kind == "adapters":
            named = ["q_proj", "v_proj"]
            return lora_llada(named, **shape, apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8)
        return llada(**shape, block_length=4 if blocks else None)

    with distributed("cpu") as world:
        how = Build(masters=torch.float32)
        model = build_model(build, world, dtype, how)
        initialize_parameters(model, 0)
        trained = {k: p for k, p in named_parameters(model).items() if p.requires_grad}
        if kind == "adapters":  # else B's gradient alone is not 0
            torch.manual_seed(1)
            b = [k for k in trained if k.endswith("lora_b.weight")]
            fill(model, [(k, torch.randn(trained[k].shape) * 0.1) for k in b])
        (noisy,) = corrupted_step(batches, 0, estimator)
        if kind == "packed":
            noisy = pack(noisy, model, world.device)
        backward(model, estimator.loss, noisy, global_normalizer([noisy], world), world)
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        return {k: full(p.grad).double().flatten() for k, p in trained.items()}


@pytest.mark.parametrize("kind", ["padded", "packed", "blocks", "adapters"])
def test_the_gradient_of_masters_computed_in_bf16_is_nearly_fp32_s(kind):
    """By FSDP2's mixed precision; adapters by autocast. Angles and lengths, to bf16's 8 bits."""
    half, whole = gradient(kind, torch.bfloat16), gradient(kind, torch.float32)
    assert half.keys() == whole.keys()
    for name, truth in whole.items():
        found = half[name]
        assert torch.cosine_similarity(found, truth, dim=0) > 0.998, name
        assert found.norm() / truth.norm() == pytest.approx(1, abs=0.03), name
        assert not torch.equal(found, truth), name


def config(**changes):
    """The options of precision."""
    given = {"dtype": "bf16", "master_dtype": "fp32", "stochastic_rounding": True}
    given |= {"data_parallel_replicate_dim": 1}
    given |= {"optimizer": {"_component_": "torch.optim.AdamW"}, **changes}
    return OmegaConf.create(given)


EIGHT = {"_component_": "torchao.optim.AdamW8bit"}


def test_the_optimizer_rounds_at_random_where_parameters_are_bf16():
    assert rounding(config()) == {}
    assert rounding(config(master_dtype="bf16", stochastic_rounding=False)) == {}
    assert rounding(config(master_dtype="bf16", optimizer=EIGHT)) == {"bf16_stochastic_round": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "fp16"}, "dtype: fp16: use bf16 or fp32"),
        ({"master_dtype": "fp16"}, "master_dtype: fp16: use fp32 or bf16"),
        ({"dtype": "fp32", "master_dtype": "bf16"}, "master_dtype: bf16, .* in fp32 .*: use fp32"),
        ({"stochastic_rounding": False}, "stochastic_rounding: False, and nothing is kept in bf16"),
        (
            {"master_dtype": "bf16", "optimizer": EIGHT, "data_parallel_replicate_dim": 2},
            "data_parallel_replicate_dim: copies .* drift apart",
        ),
        ({"master_dtype": "bf16"}, "optimizer: torch.optim.AdamW rounds .*AdamW8bit"),
        ({"optimizer": {**EIGHT, "bf16_stochastic_round": True}}, "set stochastic_rounding at"),
    ],
)
def test_what_would_not_learn_is_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        check_precision(config(**changes))
