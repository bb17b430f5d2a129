"""mdm_grpo as users run it: any split, stopped and resumed, rewards that fail, what it refuses."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import scalars
from tests.recipes.test_dpo import refused
from tests.recipes.test_full_finetune import TWO_RANKS
from tests.recipes.test_lora_finetune import LORA

REWARDS = "mdm_plugin.alignment.rewards"
GRPO = (
    "prompts={data}/val.jsonl",
    "loss._component_=mdm_plugin.alignment.policy.PolicyLoss",
    "bound._component_=mdm_plugin.loss.MDMLoss",
    "masking=mdm_plugin.masking.Complement",
    "decoding._component_=mdm_plugin.generation.Decoding",
    "decoding.temperature=1.0",
    "decoding.steps=4",
    "sampler._component_=mdm_plugin.generation.Remasking",
    *("max_new_tokens=8", "group_size=4", "batch_size=4", "updates=2", "dataset=null"),
)


SHORT = (f"rewards.short._component_={REWARDS}.brevity", "rewards.short.characters=40")
NEVER = (f"rewards.never._component_={REWARDS}.matches", "rewards.never.pattern=x")


@pytest.fixture
def grpo(tune, data_dir):
    def run(*overrides, steps=3, rewards=SHORT, **kwargs):
        common = [x.replace("{data}", str(data_dir)) for x in (*GRPO, *rewards)]
        size = f"max_steps_per_epoch={steps}"
        return tune(*common, size, *overrides, recipe="mdm_grpo", **kwargs)

    return run


def test_two_ranks_and_accumulation_are_the_run_of_one_rank(grpo, tmp_path):
    grpo(out="one")
    grpo("batch_size=1", "gradient_accumulation_steps=2", launch=TWO_RANKS, out="two")
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert len(one["reward/mean"]) == 3 and one["reward/groups_that_differ"][0] > 0
    for name in ("reward/mean", "rollout/length", "reward/advantage_deviation"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)  # the same answers
    for name in ("train/loss", "train/grad_norm", "policy/bound_per_token", "policy/ratio"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


def test_with_a_cache_the_gap_to_the_model_is_shown_and_is_nothing_where_all_is_fresh(
    grpo, tmp_path
):
    """On two ranks as on one; without a cache there is nothing to show."""
    blocks = ("decoding.cache=dual", "decoding.block_length=4", "decoding.steps=8")
    kinds = {
        "none": (),
        "fresh": (*blocks, "decoding.refresh_every=1"),
        "kept": blocks,
        "ranks": (*blocks, "batch_size=2"),
    }
    shown = {}
    for name, given in kinds.items():
        launch = TWO_RANKS if name == "ranks" else ()
        done = grpo(*given, out=name, launch=launch, steps=2)
        assert ("rollout/cache_gap shows how near it is" in done.stdout) == (name != "none")
        shown[name] = scalars(tmp_path / name)
    assert "rollout/cache_gap" not in shown["none"]
    assert max(shown["fresh"]["rollout/cache_gap"]) < 1e-6
    assert min(shown["kept"]["rollout/cache_gap"]) > 1e-5
    for name in ("rollout/cache_gap", "reward/mean"):
        assert shown["ranks"][name] == pytest.approx(shown["kept"][name], rel=1e-4)


def test_later_updates_move_the_policy_away_from_the_one_that_answered(grpo, tmp_path):
    grpo("updates=3", "updates_share_noise=False", out="three")
    shown = scalars(tmp_path / "three")
    assert all(x != 1.0 for x in shown["policy/ratio"][1:])
    assert len(shown["rollout/share_of_step"]) == 3
    assert all(0 < x < 1 for x in shown["rollout/share_of_step"])


def test_a_stopped_run_samples_the_same_answers_and_is_bit_equal(grpo, tmp_path):
    common = ("save_every_n_steps=2",)
    grpo(*common, steps=4, out="run")
    before = load_file(tmp_path / "run/step_4/model.safetensors")
    (tmp_path / "run/step_4").rename(tmp_path / "whole")
    again = grpo(*common, steps=4, out="run")
    assert "resuming from" in again.stdout
    after = load_file(tmp_path / "run/step_4/model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_adapters_learn_beside_a_reference_that_is_the_model_without_them(grpo, tmp_path):
    kl = ("loss.kl=k2", "loss.kl_weight=0.1", "optimizer.lr=1e-2")
    for kind in ("adapters_off", "model"):
        grpo(*LORA, *kl, f"reference={kind}", out=kind)
    one, two = (scalars(tmp_path / kind) for kind in ("adapters_off", "model"))
    assert one["policy/kl_to_reference"][-1] > 0
    for name in ("train/loss", "policy/kl_to_reference"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


def test_answers_that_are_all_as_good_teach_nothing_and_the_run_goes_on(grpo, tmp_path):
    done = grpo(rewards=NEVER, out="run")
    assert "saved" in done.stdout
    shown = scalars(tmp_path / "run")
    assert shown["reward/groups_that_differ"] == [0.0] * 3 and "train/grad_norm" not in shown
    grpo("updates=1", steps=1, rewards=NEVER, out="short")
    grpo(
        "equal_groups=skip",
        "loss.kl=k2",
        "loss.kl_weight=0.1",
        "reference=model",
        rewards=NEVER,
        steps=1,
        out="skipped",
    )
    assert "train/grad_norm" not in scalars(tmp_path / "skipped")
    first = load_file(tmp_path / "short/step_1/model.safetensors")
    last = load_file(tmp_path / "run/step_3/model.safetensors")
    assert all(torch.equal(first[key], last[key]) for key in first)


FEW = (f"rewards.few._component_={REWARDS}.matches", "rewards.few.pattern=.*a.*")


def test_skipped_groups_leave_the_loss_the_mean_over_the_others(grpo, tmp_path):
    """By plain arithmetic: at the first update the others' answers have an advantage of 0, so the
    gradient is that of keeping them, times (all groups)/(groups that differ). And on two ranks."""
    plain = ("updates=1", "optimizer=torch.optim.SGD", "optimizer.lr=0.1", "clip_grad_norm=null")
    skip = ("equal_groups=skip", *plain)
    grpo(*plain, rewards=FEW, steps=1, out="keep")
    grpo(*skip, rewards=FEW, steps=1, out="skip")
    keep, one = scalars(tmp_path / "keep"), scalars(tmp_path / "skip")
    share = keep["reward/groups_that_differ"][0]
    assert share in (0.25, 0.5, 0.75) and one["reward/groups_that_differ"] == [share]
    assert one["train/grad_norm"][0] == pytest.approx(keep["train/grad_norm"][0] / share, rel=1e-5)
    assert one["policy/ratio"] == [1.0]  # a mean over those that count
    few = ("batch_size=1", "gradient_accumulation_steps=2")
    more = ("updates=2", "loss.kl=k2", "loss.kl_weight=0.1", "reference=model")
    shown = []
    for name, given, launch in (("whole", (), ()), ("ranks", few, TWO_RANKS)):
        grpo(*skip, *more, *given, rewards=FEW, launch=launch, out=name)
        shown.append(scalars(tmp_path / name))
    assert 0 < min(shown[0]["reward/groups_that_differ"]) < 0.5
    assert shown[0]["policy/kl_to_reference"][-1] > 0
    for name in shown[0]:
        if name.startswith(("train/loss", "train/grad_norm", "policy/", "reward/")):
            assert shown[1][name] == pytest.approx(shown[0][name], rel=1e-5, abs=1e-7), name


def test_rewards_that_fail_cost_their_answers_and_too_many_end_the_run(grpo, tmp_path):
    (tmp_path / "own_rewards.py").write_text(
        "def some():\n"
        "    def reward(completion, row):\n"
        "        if len(completion) % 3 == 0: raise KeyError('unit')\n"
        "        return len(completion)\n"
        "    return reward\n"
        "def none():\n"
        "    return lambda completion, row: float('nan')\n"
    )
    own, kwargs = "allow_components=[own_rewards]", {"PYTHONPATH": str(tmp_path), "steps": 2}
    done = grpo(own, rewards=["rewards.some._component_=own_rewards.some"], out="some", **kwargs)
    assert "an answer has no reward: " in done.stdout and "rewards.some: 'unit'" in done.stdout
    assert 0 < scalars(tmp_path / "some")["reward/failed"][0] < 0.5
    none = ["rewards.none._component_=own_rewards.none"]
    ended = grpo(own, rewards=none, out="none", check=False, **kwargs)
    assert "max_failed_rewards: 100% of step 0's answers have no reward" in refused(ended)


WRONG = {
    "one answer": (["group_size=1"], "group_size: 1: an answer is judged beside the others"),
    "answers alike": (["decoding.temperature=0"], "decoding.temperature: 0 gives all answers"),
    "half a pair": (["draws=3"], "draws: 3: Complement has 2 views, so use a multiple of 2"),
    "rows to learn": (
        ["dataset._component_=mdm_plugin.data.chat_dataset", "dataset.source=x.jsonl"],
        "dataset: the model writes the rows that it learns from",
    ),
    "nodes for other draws": (
        ["timesteps._component_=mdm_plugin.alignment.estimates.GaussQuadrature", "draws=4"],
        "draws: GaussQuadrature has 3 nodes, and there are 2 draws",
    ),
    "exploding ratios": (["loss.ratio=token"], "loss.ratio: token with Complement"),
    "no updates": (["updates=0"], "updates: 0: use 1 or more"),
    "another objective": (
        ["objective._component_=mdm_plugin.objectives.Window", "objective.low=0.4"],
        "objective: a policy is judged by bounds of the likelihood",
    ),
    "a sampler that learns": (
        ["timesteps._component_=mdm_plugin.timesteps.ParetoOptimal"],
        "timesteps: ParetoOptimal learns from a data set",
    ),
    "another bound": (["bound.normalize=tokens"], "bound.normalize: a bound is of each answer"),
    "a divergence from nothing": (
        ["loss.kl=k2", "loss.kl_weight=0.1"],
        "reference: None with loss.kl k2: give both, or neither",
    ),
    "a reference for nothing": (["reference=model"], "reference: model with loss.kl None"),
    "bounds of answers to come": (
        ["loss.kl=k2", "loss.kl_weight=0.1", "reference=precompute"],
        "reference: precompute: answers are not known before",
    ),
    "a loss that is none": (["loss=torchtune.rlhf.loss.DPOLoss"], "loss: DPOLoss is no PolicyLoss"),
    "packed answers": (["batch_layout=packed"], "batch_layout: packed"),
    "no room for answers": (["max_new_tokens=90"], "max_new_tokens: 90 after a prompt of"),
    "no prompts": (["prompts=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "no questions": (["run_val_every_n_steps=1"], "run_val_every_n_steps: set, and there are no"),
    "groups to be": (["equal_groups=drop"], "equal_groups: drop: use keep or skip"),
    "no patience": (["reward_timeout=0"], "reward_timeout, max_failed_rewards: use more than 0"),
}


def test_each_wrong_option_is_one_line(grpo, tmp_path):
    for name, (overrides, words) in WRONG.items():
        line = refused(grpo(*overrides, out="wrong", check=False))
        assert line.startswith("error: ") and words in line, (name, line)
        assert not list((tmp_path / "wrong").glob("step_*"))
    none = grpo(rewards=["rewards={}"], out="wrong", check=False)
    assert "rewards: name at least one" in refused(none)


def test_what_is_rewarded_becomes_more_frequent(grpo, tmp_path, data_dir):
    lines = (f"questions={data_dir}/val.jsonl", "max_questions=4", "run_val_every_n_steps=10")
    verifier = ("verifier._component_=mdm_plugin.quickstart.verifier", "sample_new_tokens=8")
    learn = ("optimizer.lr=1e-2", "lr_scheduler=null", "batch_size=8", "group_size=8")
    done = grpo(*lines, *verifier, *learn, steps=20, out="run")
    assert done.stdout.count("val/exact_match") == 3
    rewards = scalars(tmp_path / "run")["reward/mean"]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
