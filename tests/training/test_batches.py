"""dataset_val of a config: a share of dataset, a data set of its own, or none; and wrong ones."""

import sys

import pytest
import yaml
from omegaconf import OmegaConf

from mdm_plugin.config.loading import find_config, load_config
from mdm_plugin.config.options import Options
from mdm_plugin.data import chat_dataset
from mdm_plugin.training.batches import read_datasets
from mdm_plugin.training.plan import plan
from tests.conftest import TINY, scalars
from tests.recipes.test_full_finetune import TWO_RANKS

SHARED = ["dataset_val.split=0.1", "run_val_every_n_steps=10"]


@pytest.fixture
def read(tmp_path, data_dir, tokenizer):
    """The rows of tiny.yaml with ``dataset_val: {split: 0.02, max_rows: 3}``, and overrides."""
    config = yaml.safe_load(TINY.read_text())
    config |= {"dataset_val": {"split": 0.02, "max_rows": 3}, "run_val_every_n_steps": 10}
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(config))

    def run(*overrides, name=None):
        where = [f"data_dir={data_dir}", f"output_dir={tmp_path}"]
        cfg = load_config(str(name or tmp_path / "shared.yaml"), [*where, *overrides], Options)
        return read_datasets(cfg, tokenizer)

    return run


def sizes(found):
    return [len(rows) if rows is not None else None for rows in found]


def test_dataset_val_is_a_share_of_the_rows_a_data_set_of_its_own_or_nothing(
    read, data_dir, tokenizer, write_jsonl, capsys
):
    whole = chat_dataset(tokenizer, source=str(data_dir / "val.jsonl"))
    assert sizes(read()) == [197, 3]  # of 200
    assert sizes(read("~dataset_val.max_rows")) == [196, 4]
    assert sizes(read("dataset_val.split=0.25", "dataset_val.max_rows=null")) == [150, 50]
    assert sizes(read(*SHARED, name=TINY)) == [180, 20]
    assert not capsys.readouterr().out
    for nothing in ("dataset_val=null", "~dataset_val"):
        alone, none = read(nothing)
        assert none is None and alone.facts == whole.facts
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    file = write_jsonl({"messages": turns}, {"messages": turns})
    own = ["dataset_val._component_=mdm_plugin.data.chat_dataset", f"dataset_val.source={file}"]
    alone, validation = read(*own)
    assert alone.facts == whole.facts and len(validation) == 2
    words = "left out: mdm_plugin.data.chat_dataset is in its place"
    assert capsys.readouterr().out == "".join(
        f"dataset_val.{name}: {words}\n" for name in ("max_rows", "split")
    )


def test_the_seed_decides_what_is_held_out_and_another_share_is_other_data(read):
    given = [read(), read("dataset_val.max_rows=2"), read("seed=8"), read("dataset_val=null")]
    prints = [training.facts.fingerprint for training, _ in given]
    assert len(set(prints)) == 4
    assert read("batch_size=4", "epochs=3")[0].facts == given[0][0].facts
    assert "held out of dataset's 200" in str(given[0][1]) and "held out" not in str(given[0][0])


# Overrides of tiny.yaml with validation switched on, and what the line must say.
WRONG = {
    "none of them": (["split=0"], "dataset_val.split: 0: use the share of"),
    "all of them": (["split=1"], "dataset_val.split: 1: use the share of"),
    "also all of them": (["split=1.0"], "dataset_val.split: 1.0: use the share of"),
    "more than all": (["split=1.5"], "dataset_val.split: 1.5: use the share of"),
    "not a number": (["split=abc"], "dataset_val.split: 'abc': use the share of"),
    "no number": (["split=.nan"], "dataset_val.split: nan: use the share of"),
    "yes": (["split=true"], "dataset_val.split: True: use the share of"),
    "nothing": (["split=null"], "dataset_val.split: None: use the share of"),
    "an unknown key": (["split=0.1", "source=a"], "dataset_val.source: unknown: beside split"),
    "no rows at most": (["split=0.1", "max_rows=0"], "dataset_val.max_rows: 0: use 1 or more"),
    "many at most": (["split=0.1", "max_rows=x"], "dataset_val.max_rows: 'x': use 1 or more"),
    "a number of rows alone": (["max_rows=9"], "dataset_val._component_: missing"),
    "a share of another data set": (
        ["_component_=mdm_plugin.data.chat_dataset", "source=${data_dir}/val.jsonl", "split=0.1"],
        "split: 0.1: a data set's split is a name",
    ),
}


@pytest.fixture
def refused(tmp_path, data_dir, monkeypatch, capfd):
    """The line on which the recipe ends, called here as its command would be."""
    import mdm_full_finetune

    def run(*overrides):
        paths = [f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["x", "--config", str(TINY), *paths, *overrides])
        monkeypatch.delenv("MDM_TRACEBACK", raising=False)
        with pytest.raises(SystemExit) as end:
            mdm_full_finetune.main()
        error = capfd.readouterr().err
        assert end.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_share_is_one_line(case, refused):
    overrides, expected = WRONG[case]
    validation = [f"dataset_val.{x}" for x in overrides]
    assert expected in refused(*validation, "run_val_every_n_steps=1")


def test_rows_are_not_held_out_for_nothing_nor_beyond_what_a_batch_needs(refused):
    assert "run_val_every_n_steps is not set" in refused("dataset_val.split=0.1")
    assert "180 rows do not fill one global batch" in refused(*SHARED, "batch_size=200")


@pytest.mark.slow
def test_a_dry_run_counts_the_steps_of_the_rows_that_are_trained_on(data_dir):
    given = [f"data_dir={data_dir}", "output_dir=x", "max_steps_per_epoch=null", "dry_run=True"]
    for overrides, steps in (([], 25), (SHARED, 22)):  # of 200 and of 180 rows, 8 a step
        text = plan(load_config(str(TINY), [*given, *overrides], Options), False)
        assert f"Steps: {steps} (1 epochs of {steps})" in text


def test_a_run_validates_on_what_it_holds_out_and_goes_on_with_no_other_share(tune, tmp_path):
    """On one rank and on two alike."""
    short = [*SHARED, "max_steps_per_epoch=2", "sample_rows=1", "sample_new_tokens=2"]
    done = tune(*short, out="one")
    lines = [x for x in done.stdout.splitlines() if x.startswith("dataset")]
    assert lines[0].startswith("dataset: 180 rows, ")
    assert lines[1].startswith("dataset_val: 20 rows, ")
    assert lines[1].endswith(" tokens; held out of dataset's 200")
    tokens = [int(x.split(" rows, ")[1].split(" ")[0]) for x in lines]
    tune(*short, "batch_size=4", launch=TWO_RANKS, out="two")
    one, two = (scalars(tmp_path / x)["val/nelbo_nats_per_token"] for x in ("one", "two"))
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-5)
    refused = tune(
        *short, "dataset_val.split=0.2", "resume_from_checkpoint=True", check=False, out="one"
    )
    assert refused.returncode == 2 and "was written with data" in refused.stderr
    whole = tune(*short[2:], out="whole").stdout
    assert f"dataset: 200 rows, {sum(tokens)} tokens" in whole and "dataset_val" not in whole


@pytest.mark.parametrize(
    "name", [f"{x}_{y}" for x in ("llada/8B", "dream/7B") for y in ("full", "lora", "qlora")]
)
def test_every_large_config_holds_out_rows_and_validates_on_them(name):
    """Of its user's own file, without another; at a cost of a few percent."""
    cfg = OmegaConf.load(find_config(name))
    assert cfg.dataset_val.split == 0.02 and "_component_" not in cfg.dataset_val
    forwards = cfg.dataset_val.max_rows * cfg.val_draws
    # A step of a row costs about four forwards: forward, again in checkpointing, backward.
    training = 4 * cfg.run_val_every_n_steps * cfg.global_batch_size
    assert forwards < 0.05 * training
