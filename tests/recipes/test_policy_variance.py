"""mdm_variance of a policy's gradient as users run it: packaged config, two ranks, a step on."""

import csv
import json

import pytest

from tests.recipes.test_dpo import refused
from tests.recipes.test_full_finetune import TWO_RANKS

REWARDS = "policy.rewards.right"
CUT = (
    *("prepare=null", "tokenizer.max_seq_len=96", "batch_size=4", "batches=3"),
    *("model.num_layers=2", "model.num_heads=2", "model.embed_dim=32"),
    *("model.intermediate_dim=64", "model.max_seq_len=96"),
    *("policy.prompts={data}/val.jsonl", "policy.group_size=4", "policy.max_new_tokens=8"),
    *("model.shift=False", "model.block_length=null", "policy.decoding.cache=null"),
    *("policy.sampler._component_=mdm_plugin.generation.Remasking", "~policy.sampler.threshold"),
    *("policy.decoding.steps=4", "policy.repeats=2"),
    *(f"{REWARDS}._component_=mdm_plugin.alignment.rewards.brevity", f"~{REWARDS}.verifier"),
    *(f"{REWARDS}.characters=40",),
)


@pytest.fixture(scope="module")
def policies():
    """What one test has trained, for those after it."""
    return {}


@pytest.fixture
def variance(command, tune, data_dir, tmp_path, policies):
    if "weights" not in policies:
        tune("max_steps_per_epoch=2", out="policy")
        policies["weights"] = tmp_path / "policy/step_2"

    def run(*overrides, out="variance", launch=(), **kwargs):
        return command(
            *("tune", "run", *launch, "mdm_variance", "--config", "quickstart_grpo_variance"),
            *(x.format(data=data_dir) for x in CUT),
            *(f"data_dir={data_dir}", f"checkpointer.checkpoint_dir={policies['weights']}"),
            *(f"output_dir={tmp_path / out}", *overrides),
            **kwargs,
        )

    return run


def rows(directory):
    return json.loads((directory / "policy.json").read_text())["rows"]


def test_the_noise_of_each_estimate_is_measured_on_the_same_answers(variance, tmp_path):
    done = variance("~estimators.GDPO")
    found = {x["estimator"]: x for x in rows(tmp_path / "variance")}
    first, *_ = found.values()
    assert first["estimator"] == "even counts, Complement" and first["noise"] > 0
    assert first["equal_forwards"] == [1, 1, 1] and first["bias"] == [0, 0, 0]
    for x in found.values():
        assert x["masks_A"] + x["rates_B"] == pytest.approx(x["noise"])
    assert first["noise"] < found["independent counts"]["noise"]
    assert all(found[x]["rates_B"] == 0 for x in ("diffu-GRPO", "diffu-GRPO, 4 draws"))  # no t
    one, four = found["diffu-GRPO"], found["diffu-GRPO, 4 draws"]
    assert one["forwards"] == 1 and 2 < one["noise"] / four["noise"] < 8
    assert "| even counts, Complement | 4 |" in done.stdout and "deviation" not in done.stdout
    with (tmp_path / "variance/policy.csv").open() as file:
        assert [x["estimator"] for x in csv.DictReader(file)] == list(found)
    assert (tmp_path / "variance/policy.png").stat().st_size > 1000


def test_two_ranks_measure_what_one_does(variance, tmp_path):
    fewer = ["~estimators.even counts", "~estimators.coupled-GRPO", "~estimators.GDPO"]
    variance(*fewer, out="one")
    variance(*fewer, "batch_size=2", launch=TWO_RANKS, out="two")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("noise", "masks_A", "answers_S", "prompts_C", "signal"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3 * a["noise"]), key


def test_a_step_on_the_ratios_have_noise_and_are_clipped_by_the_loss(variance, tmp_path):
    fewer = ["~estimators.even counts", "~estimators.GDPO"]
    tight = ["policy.loss.clip_low=0.001", "policy.loss.clip_high=0.001"]
    done = variance(*fewer, *tight, "policy.step=0.3")
    found = {x["estimator"]: x for x in rows(tmp_path / "variance")}
    assert "deviation of Δ" in done.stdout
    ours, independent = found["even counts, Complement"], found["independent counts"]
    assert 0 < ours["ratio_deviation"] < independent["ratio_deviation"]
    assert ours["clipped"] > 0.1


WRONG = {
    "two at once": (
        [
            "preferences.loss._component_=torchtune.rlhf.loss.DPOLoss",
            "preferences.reference._component_=mdm_plugin.training.Checkpointer",
        ],
        "preferences, policy: measure one of them at a time",
    ),
    "rows": (
        ["dataset._component_=mdm_plugin.data.chat_dataset", "dataset.source=x.jsonl"],
        "dataset: the model writes the rows of a policy",
    ),
    "an objective": (
        ["objective._component_=mdm_plugin.objectives.Window", "objective.low=0.4"],
        "objective: is of no use with policy: leave it out",
    ),
    "rounds": (["batches_per_round=8"], "batches_per_round: is of no use with policy"),
    "an unknown key": (["policy.groups=8"], "policy.groups"),
    "no prompts": (["policy.prompts=null"], "policy.prompts"),
    "one look": (["policy.repeats=1"], "policy.repeats: 1: use 2 or more"),
    "one batch": (["batches=1"], "batches: 1: intervals are over batches: use 2 or more"),
    "too many batches": (["batches=99"], "batches: 99: there are 50 of 4 prompts"),
    "one answer": (["policy.group_size=0"], "policy.group_size: 0: use 1 or more"),
    "a step back": (["policy.step=-1"], "policy.step: -1.0: use 0 or more"),
    "answers alike": (["policy.decoding.temperature=0"], "policy.decoding.temperature: 0 gives"),
    "no rewards": (["policy.rewards=null"], "policy.rewards"),
    "a reward that is none": (
        [f"{REWARDS}.characters=0"],
        "policy.rewards.right: characters is 0: use 1 or more",
    ),
    "half a pair": (
        ["policy.draws=3"],
        "estimators.even counts, Complement.draws: 3: Complement has 2 views",
    ),
    "nodes for other draws": (
        ["estimators.GDPO.draws=4"],
        "estimators.GDPO.draws: GaussQuadrature has 3 nodes, and there are 4 draws",
    ),
    "draws that are no number": (["estimators.GDPO.draws=x"], "estimators.GDPO.draws: x: use a"),
    "noise of preferences": (
        ["estimators.GDPO.noise=apart"],
        "estimators.GDPO.noise: apart: use own or answers",
    ),
    "a sampler that learns": (
        ["estimators.GDPO.timesteps._component_=mdm_plugin.timesteps.ParetoOptimal"],
        "estimators.GDPO.timesteps: ParetoOptimal learns from a data set",
    ),
    "exploding ratios": (["policy.loss.ratio=token"], "policy.loss.ratio: token with Complement"),
    "a divergence": (
        ["policy.loss.kl=k2", "policy.loss.kl_weight=0.1"],
        "policy.loss.kl: k2: there is no reference here",
    ),
    "no weights": (["checkpointer.checkpoint_dir=null"], "checkpointer.checkpoint_dir: missing"),
    "no room for answers": (
        ["policy.max_new_tokens=90"],
        "policy.max_new_tokens: 90 after a prompt of",
    ),
    "answers all as good": (
        [f"{REWARDS}.weight=0", "policy.repeats=2"],
        "policy.rewards: all answers to each prompt were worth the same",
    ),
}


def test_each_wrong_option_is_one_line(variance, tmp_path):
    for name, (overrides, words) in WRONG.items():
        line = refused(variance(*overrides, out="wrong", check=False))
        assert line.startswith("error: ") and words in line, (name, line)
        assert not (tmp_path / "wrong/policy.json").exists()
