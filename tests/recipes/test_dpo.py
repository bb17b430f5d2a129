"""mdm_dpo as users run it: any reference, any split, stopped and resumed, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mdm_plugin.data import preference_dataset
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from tests.conftest import scalars
from tests.recipes.test_full_finetune import TWO_RANKS, assert_same, curves
from tests.recipes.test_lora_finetune import LORA

DPO = (
    "dataset._component_=mdm_plugin.data.preference_dataset",
    "loss._component_=torchtune.rlhf.loss.DPOLoss",
    "bound._component_=mdm_plugin.loss.MDMLoss",
    "masking=mdm_plugin.masking.FixedCount",
    "draws=2",
)


@pytest.fixture(scope="module")
def pairs(data_dir, tmp_path_factory):
    """Preferences of whole answers over their first lines."""
    rows = [json.loads(line)["messages"] for line in (data_dir / "val.jsonl").open()]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with file.open("w") as out:
        for prompt, answer in rows:
            answers = {"chosen": answer["content"], "rejected": answer["content"].split("\n")[0]}
            out.write(json.dumps({"prompt": prompt["content"], **answers}) + "\n")
    return file


@pytest.fixture
def dpo(tune, pairs):
    def run(*overrides, **kwargs):
        return tune(*DPO, f"dataset.source={pairs}", *overrides, recipe="mdm_dpo", **kwargs)

    return run


def test_two_ranks_and_accumulation_are_the_run_of_one_rank(dpo, tmp_path):
    one = dpo("batch_layout=packed", "draws=4", "masking=mdm_plugin.masking.Complement", out="one")
    assert "20 steps of 16 rows" in one.stdout and "reference's bounds of 20 steps" in one.stdout
    halves = ("batch_size=2", "gradient_accumulation_steps=2", "reference=model")
    complement = ("draws=4", "masking=mdm_plugin.masking.Complement")
    dpo(*complement, *halves, launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-5)
    shown = scalars(tmp_path / "one")
    assert shown["rewards/margin"][0] == 0 and shown["rewards/margin"][-1] > 0
    assert shown["train/loss_preferences"][0] == pytest.approx(torch.tensor(2.0).log().item())
    assert min(shown["score/variance"][2:]) > 0


def test_a_reference_is_stored_copied_or_under_the_adapters_and_the_run_is_one(dpo, tmp_path):
    lora = (*LORA, "max_steps_per_epoch=5", "optimizer.lr=1e-2")
    found = {}
    for kind in ("precompute", "model", "adapters_off"):
        dpo(*lora, f"reference={kind}", out=kind)
        found[kind] = torch.tensor(scalars(tmp_path / kind)["train/loss"])
        assert (tmp_path / kind / "step_5/adapter_model.safetensors").is_file()
    for kind in ("model", "adapters_off"):
        assert ((found[kind] - found["precompute"]).abs() / found["precompute"]).max() < 1e-6
    assert found["model"][-1] != found["model"][0]


def test_a_stopped_run_goes_on_bit_equal_and_not_by_bounds_of_another(dpo, tmp_path):
    common = ("save_every_n_steps=10", "timesteps._component_=mdm_plugin.timesteps.ParetoOptimal")
    common += ("timesteps.grid=5", "timesteps.rows=4", "timesteps.masks=2")
    common += ("dataset_val.split=0.1", "run_val_every_n_steps=10", "sample_rows=0")
    dpo(*common, out="run")
    stored = tmp_path / "run/reference/train.npy"
    before = load_file(tmp_path / "run/step_20/model.safetensors")
    (tmp_path / "run/step_20").rename(tmp_path / "whole")
    again = dpo(*common, out="run")
    assert "resuming from" in again.stdout and "reference's bounds" not in again.stdout
    after = load_file(tmp_path / "run/step_20/model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
    held_out = scalars(tmp_path / "run")
    assert held_out["val_rewards/margin"][0] == 0 and "val/nelbo_nats_per_token" in held_out

    (tmp_path / "run/step_20").rename(tmp_path / "again")
    whole = stored.read_bytes()
    stored.unlink()
    gone = dpo(*common, out="run", check=False)
    assert "is not there, and the model has been trained since" in refused(gone)
    assert not stored.exists()
    stored.write_bytes(whole[:-8])
    damaged = dpo(*common, out="run", check=False)
    assert damaged.returncode == 2 and "train.npy" in refused(damaged)
    stored.write_bytes(whole)
    facts = stored.with_suffix(".json")
    kept = facts.read_text()
    facts.write_text(kept.replace('"model": "', '"model": "0'))
    assert facts.read_text() != kept
    strange = dpo(*common, out="run", check=False)
    assert "was made with model 0" in refused(strange)
    facts.write_text(kept)
    other = dpo(*common, "draws=4", "resume_from_checkpoint=True", out="run", check=False)
    assert other.returncode == 2 and "was made with draws 2, and this run has 4" in other.stderr


def test_bounds_half_made_are_made_to_the_end_and_those_of_another_model_are_refused(dpo, tmp_path):
    import numpy

    short = ("max_steps_per_epoch=4",)
    dpo(*short, out="run")
    whole = load_file(tmp_path / "run/step_4/model.safetensors")
    (tmp_path / "run/step_4").rename(tmp_path / "whole")
    values = numpy.load(tmp_path / "run/reference/train.npy", mmap_mode="r+")
    values[2:] = numpy.nan  # as after a kill
    values.flush()
    done = dpo(*short, out="run")
    assert "the reference's bounds of 2 steps" in done.stdout
    after = load_file(tmp_path / "run/step_4/model.safetensors")
    assert all(torch.equal(after[key], whole[key]) for key in whole)
    (tmp_path / "run/step_4").rename(tmp_path / "twice")
    start = f"checkpointer.checkpoint_dir={tmp_path / 'twice'}"
    other = dpo(*short, start, out="run", check=False)
    line = other.stderr.strip().splitlines()[-1]
    assert other.returncode == 2 and "was made with model" in line and "output_dir" in line


ROW = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WRONG_ROWS = {
    "equal answers": ({**ROW, "rejected": "4"}, "chosen and rejected are the same answer"),
    "an empty answer": ({**ROW, "rejected": " "}, "an assistant turn is empty"),
    "no prompt": ({"chosen": "4", "rejected": "5"}, "no prompt in 'prompt'"),
    "no answer": ({"prompt": "a", "chosen": "4"}, "no conversation or text in 'rejected'"),
    "two prompts": (
        {"chosen": TURNS, "rejected": [{"role": "user", "content": "c"}, TURNS[1]]},
        "chosen and rejected differ before the last turn",
    ),
    "a turn that is none": ({"chosen": ["a"], "rejected": TURNS}, "chosen[0] is not"),
    "a user's last word": ({"chosen": TURNS[:1], "rejected": TURNS[:1]}, "are the same answer"),
    "alike where they are read": (
        {"prompt": "a", "chosen": "b " * 99 + "c", "rejected": "b " * 99 + "d"},
        "both answers are the same in the first 96 tokens",
    ),
}
WRONG = {
    "half a pair of views": (
        ["masking=mdm_plugin.masking.Complement", "draws=3"],
        "draws: 3: Complement has 2 views, so use a multiple of 2",
    ),
    "no draws": (["draws=0"], "draws: 0: use 1 or more"),
    "another objective": (
        ["objective._component_=mdm_plugin.objectives.Window", "objective.low=0.4"],
        "objective: preferences compare bounds of the likelihood",
    ),
    "a biased bound": (["bound.normalize=masked"], "bound.normalize: masked: a bound is of each"),
    "a loss of tokens": (["loss._component_=mdm_plugin.loss.MDMLoss"], "loss: MDMLoss takes no"),
    "an unknown reference": (["reference=copy"], "reference: copy: use precompute, model or"),
    "no adapters to turn off": (["reference=adapters_off"], "the model has no adapters"),
    "a sampler that moves": (
        ["timesteps._component_=mdm_plugin.timesteps.Adaptive"],
        "reference: precompute, and Adaptive draws by what it learns",
    ),
    "a sampler of other gradients": (
        ["timesteps._component_=mdm_plugin.timesteps.ParetoStream", "reference=model"],
        "timesteps: ParetoStream learns from the gradients",
    ),
    "filled answers": (["train_eos_padding=True"], "a bound is to depend on its answer alone"),
    "gradients in pieces": (["optimizer_in_bwd=True", "clip_grad_norm=null"], "optimizer_in_bwd:"),
    "unknown normalize": (["normalize=length"], "normalize: length: use sum or mean"),
    "a negative weight": (["sft_weight=-1"], "sft_weight: -1.0: use 0 or more"),
    "rows of single answers": (
        ["dataset._component_=mdm_plugin.data.chat_dataset", "dataset.source={data}/val.jsonl"],
        "dataset: rows of single answers, and this recipe compares two",
    ),
    "a column of another name": (
        ["dataset.column_map.worse=b"],
        "dataset: column_map has 'worse': use prompt, chosen and rejected",
    ),
}


def refused(done):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len([x for x in lines if "Traceback" in x]) == 0
    return lines[-1]


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_wrong_row_is_named_in_one_line(data_dir, write_jsonl, wrong):
    row, words = WRONG_ROWS[wrong]
    file = write_jsonl(ROW, row)
    short = ChatTokenizer(str(data_dir), max_seq_len=96)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: ") as found:
        preference_dataset(short, source=file)
    assert words in str(found.value)
    kept = preference_dataset(short, source=file, on_bad_row="skip")
    assert str(kept).startswith("1 preferences") and len(kept) == 2


def test_each_wrong_option_is_one_line(dpo, data_dir, tmp_path):
    for name, (overrides, words) in WRONG.items():
        given = [x.format(data=data_dir) for x in overrides]
        line = refused(dpo(*given, out="wrong", check=False))
        assert line.startswith("error: ") and words in line, (name, line)
        assert not list((tmp_path / "wrong").glob("step_*"))


def test_preferences_are_no_rows_to_fine_tune_on(tune, pairs):
    preferences = ("dataset._component_=mdm_plugin.data.preference_dataset",)
    done = tune(*preferences, f"dataset.source={pairs}", check=False)
    assert "preferences, of which half are answers not to be learnt" in refused(done)


def test_dry_run_counts_draws_and_the_reference_s_copy(dpo):
    plain, copy = (
        dpo("dry_run=True", "draws=8", f"reference={kind}").stdout
        for kind in ("precompute", "model")
    )
    assert "the reference's copy" in copy and "the reference's copy" not in plain
    rows = 2 * 8  # of a micro-batch; forwards: steps x rows x draws x passes
    assert f"a micro-batch: {rows} rows" in plain
    assert f"forwards: {20 * rows * 8 * 3:,}, 0 of them to probe" in plain


def test_an_answer_that_is_preferred_becomes_the_likelier_one(dpo, tmp_path):
    dpo("optimizer.lr=5e-3", "epochs=2", "draws=4", out="run")
    shown = scalars(tmp_path / "run")
    assert sum(shown["rewards/accuracy"][-10:]) / 10 > 0.9
    assert sum(shown["train/loss_preferences"][-10:]) / 10 < 0.3


def test_the_variance_of_preferences_is_measured_by_estimator(
    command, dpo, tmp_path, pairs, data_dir
):
    dpo("optimizer.lr=1e-3", "max_steps_per_epoch=10", out="policy")
    dpo("max_steps_per_epoch=1", "optimizer.lr=1e-9", out="start")
    base = tmp_path / "start/step_1"
    common = (
        *("tune", "run", "mdm_variance", "--config", "quickstart_dpo_variance"),
        *(f"data_dir={data_dir}", f"dataset.source={pairs}", "tokenizer.max_seq_len=96"),
        *("model.num_layers=2", "model.num_heads=2", "model.embed_dim=32", "batch_size=4"),
        *("model.intermediate_dim=64", "model.max_seq_len=96", "batches=4"),
        *(f"preferences.reference.checkpoint_dir={base}", "preferences.draws=4"),
        *(f"checkpointer.checkpoint_dir={tmp_path / 'policy/step_10'}", "preferences.repeats=6"),
        f"output_dir={tmp_path / 'variance'}",
    )
    done = command(*common)
    rows = json.loads((tmp_path / "variance/preferences.json").read_text())["rows"]
    assert rows[0]["score_ratio"] == [1.0] * 3 and rows[0]["gradient_ratio"] == [1.0] * 3
    found = {row["estimator"]: row["score_variance"] for row in rows}
    own, even = found["VRPO, independent counts"], found["even counts, Complement"]
    assert found["unshared noise"] > 2 * own and even < own < found["one count, many masks"]
    assert "| even counts, Complement | 4 |" in done.stdout
    for wrong, words in (
        ("preferences.draws=3", "draws: 3: Complement has 2 views, so use a multiple of 2"),
        ("progress=0.5", "progress: is of no use with preferences: leave it out"),
        ("train_eos_padding=False", "train_eos_padding: is of no use with preferences"),
        ("preferences.loss=null", "preferences.loss"),
        ("preferences.betas=1", "preferences.betas"),
        ("preferences.repeats=1", "preferences.repeats: 1: use 2 or more"),
        ("estimators.even counts.noise=none", "noise: none: use own, answers or apart"),
        ("batches=99", "batches: 99: the data has"),
    ):
        assert words in refused(command(*common, wrong, check=False))
