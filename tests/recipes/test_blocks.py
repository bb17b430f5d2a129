"""A model that writes block by block in every recipe: any split, stopped and resumed, compiled."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, scalars
from tests.recipes.test_dpo import DPO, pairs
from tests.recipes.test_full_finetune import TWO_RANKS, assert_same, curves
from tests.recipes.test_grpo import GRPO, SHORT
from tests.recipes.test_lora_finetune import LORA

__all__ = ["pairs"]  # the fixture
BLOCKS = ("model.block_length=4", "masking=mdm_plugin.masking.Complement")
PPOTS = (
    "timesteps._component_=mdm_plugin.timesteps.ParetoOptimal",
    *("timesteps.grid=5", "timesteps.rows=4", "timesteps.masks=2"),
)
WAYS = {
    "a t of each block, rows filled with EOS": (),
    "one t, grouped": (
        *("blocks_share_t=True", "batch_layout=grouped", "train_eos_padding=False"),
        "loss.normalize=tokens",
    ),
    "a schedule, Adaptive": (
        *("block_schedule=[[0.0,2],[0.3,8],[0.8,4]]", "train_eos_padding=False"),
        *("timesteps=mdm_plugin.timesteps.Adaptive", "masking=mdm_plugin.masking.Mirror"),
    ),
    "P-POTS of gradients, shifted": (*PPOTS, "timesteps.target=gradient", "model.shift=True"),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_is_two_ranks_with_accumulation(way, tune, tmp_path):
    common = (*BLOCKS, *WAYS[way])
    tune(*common, out="one")
    halves = ("batch_size=2", "gradient_accumulation_steps=2")
    tune(*common, *halves, launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-5)


def test_a_run_that_was_stopped_in_a_schedule_goes_on_bit_equal(tune, tmp_path):
    common = (*BLOCKS, "save_every_n_steps=10", "block_schedule=[[0.0,1],[0.4,2],[0.6,4]]")
    common += ("timesteps=mdm_plugin.timesteps.Adaptive",)
    tune(*common, out="whole")
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "whole/step_10", tmp_path / "part/step_10")
    done = tune(*common, out="part")
    assert "step_10, step 10 of 20" in done.stdout
    whole, part = (
        load_file(tmp_path / f"{x}/step_20/model.safetensors") for x in ("whole", "part")
    )
    assert all(torch.equal(part[name], x) for name, x in whole.items())


def test_what_is_learnt_is_read_measured_written_and_replayed(tune, command, data_dir, tmp_path):
    """Adapters, then the figures of what was saved: on two ranks, with the cache and without."""
    tune(
        *(*BLOCKS, *LORA, "max_steps_per_epoch=4"),
        *("dataset_val._component_=mdm_plugin.data.chat_dataset",),
        *(f"dataset_val.source={data_dir}/val.jsonl", "run_val_every_n_steps=2"),
        *("val_draws=15", "sample_rows=2", "sample_new_tokens=9", "sample_steps=5"),
        recipe="mdm_lora_finetune",
    )
    nats = scalars(tmp_path / "out")["val/nelbo_nats_per_token"]
    assert len(nats) == 3 and nats[-1] < nats[0]
    model = {
        "tokenizer": {"_component_": "mdm_plugin.models.ChatTokenizer", "path": str(data_dir)},
        "model": {
            "_component_": "mdm_plugin.models.llada",
            **{"vocab_size": 320, "num_layers": 2, "num_heads": 2, "embed_dim": 32},
            **{"intermediate_dim": 64, "max_seq_len": 96, "block_length": 4},
        },
        "checkpointer": {
            "_component_": "mdm_plugin.training.Checkpointer",
            "checkpoint_dir": str(tmp_path / "out/step_4"),
            "output_dir": str(tmp_path / "none"),
        },
        "decoding": {"_component_": "mdm_plugin.generation.Decoding", "cache": "prefix"},
        "sampler": {"_component_": "mdm_plugin.generation.Remasking"},
        **{"max_new_tokens": 9, "batch_size": 16, "device": "cpu", "dtype": "fp32"},
    }
    tasks = {
        "dataset": {
            "_component_": "mdm_plugin.data.chat_dataset",
            "source": f"{data_dir}/val.jsonl",
        },
        "rows": f"{data_dir}/val.jsonl",
        "verifier": {"_component_": "mdm_plugin.quickstart.verifier"},
        **{"tasks": ["nelbo", "exact_match"], "draws": 15},
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(model | tasks))
    (tmp_path / "generate.yaml").write_text(json.dumps(model))
    for out, launch, given in (
        ("one", (), ()),
        ("two", TWO_RANKS, ("decoding.cache=null", "data_parallel_shard_dim=-1", "batch_size=4")),
    ):
        words = ("mdm_eval", "--config", "eval.yaml", f"output_dir={tmp_path / out}", *given)
        command("tune", "run", *launch, *words)
    one, two = (
        json.loads((tmp_path / x / "results.json").read_text())["tasks"] for x in ("one", "two")
    )
    # 15 draws are all masks of 4 tokens: as validated, without an error.
    assert one["nelbo"]["nats_per_token"] == pytest.approx(nats[-1], rel=1e-5)
    assert one["nelbo"]["nats_per_token_low"] == one["nelbo"]["nats_per_token_high"]
    assert two["nelbo"] == pytest.approx(one["nelbo"], rel=1e-5)
    assert two["exact_match"] == one["exact_match"]
    texts = []
    for cache in ("prefix", "null"):
        words = ("mdm_generate", "--config", "generate.yaml", f"decoding.cache={cache}")
        done = command(
            *("tune", "run", *words, "prompt=7 - 2 + 9 =", "decoding.temperature=1.0"),
            *("decoding.block_length=2", f"replay={tmp_path / cache}.html"),
        )
        texts.append(done.stdout.splitlines()[-1])
        assert (tmp_path / f"{cache}.html").stat().st_size > 1000
    assert texts[0] == texts[1] and json.loads(texts[0])["prompt"] == "7 - 2 + 9 ="


def test_preferences_on_two_ranks_are_those_of_one_and_begin_level(tune, pairs, tmp_path):
    def dpo(*overrides, **kwargs):
        given = (*DPO, f"dataset.source={pairs}", *BLOCKS, "draws=4", "max_steps_per_epoch=20")
        tune(*given, *overrides, recipe="mdm_dpo", **kwargs)

    dpo("reference=precompute", out="one")
    halves = ("batch_size=2", "gradient_accumulation_steps=2", "reference=model")
    dpo(*halves, "batch_layout=packed", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-5)
    shown = scalars(tmp_path / "one")
    assert shown["rewards/margin"][0] == 0 and shown["rewards/margin"][-1] > 0


def test_answers_of_a_policy_are_learnt_from_on_two_ranks_as_on_one(tune, data_dir, tmp_path):
    def grpo(*overrides, **kwargs):
        given = [x.replace("{data}", str(data_dir)) for x in (*GRPO, *SHORT)]
        given += [*BLOCKS, "decoding.cache=prefix", "max_new_tokens=10", "decoding.steps=5"]
        return tune(*given, "max_steps_per_epoch=2", *overrides, recipe="mdm_grpo", **kwargs)

    done = grpo(out="one")
    assert "cache_gap" not in done.stdout  # the cache is exact
    halves = ("batch_size=1", "gradient_accumulation_steps=2", "decoding.cache=null")
    grpo(*halves, launch=TWO_RANKS, out="two")
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert one["reward/groups_that_differ"][0] > 0
    for name in ("reward/mean", "rollout/length", "reward/advantage_deviation"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)  # the same answers
    for name in ("train/loss", "train/grad_norm", "policy/bound_per_token", "policy/ratio"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    assert one["policy/ratio"][1] != 1  # a mean over the updates; the first step's rate is 0


def test_mdm_variance_measures_a_model_in_blocks_on_two_ranks_as_on_one(
    command, data_dir, tmp_path
):
    words = [
        *("mdm_variance", "--config", "quickstart_block_variance", "prepare=null"),
        *(f"data_dir={data_dir}", "checkpointer.checkpoint_dir=null", "batches=4"),
        *("batches_per_round=2", "model.num_layers=1", "model.embed_dim=16"),
        *("model.num_heads=2", "model.intermediate_dim=32"),
    ]
    tables = []
    for out, launch, rows in (("one", (), 4), ("two", TWO_RANKS, 2)):
        given = (f"output_dir={tmp_path / out}", f"batch_size={rows}")
        command("tune", "run", *launch, *words, *given)
        tables.append(json.loads((tmp_path / out / "variance.json").read_text()))
    for one, two in zip(*(x["estimators"] for x in tables), strict=True):
        assert one["name"] == two["name"]
        for kind in ("loss", "gradient"):
            value, other = (x[kind]["variance"]["value"] for x in (one, two))
            assert value > 0 and other == pytest.approx(value, rel=1e-4), one["name"]


def test_compiled_is_the_same_run_and_graphs_are_made_in_the_first_steps_alone(
    tmp_path, data_dir, command, tune
):
    """Lengths vary, and the views and blocks that are predicted with them."""
    varying = (*BLOCKS, "batch_size=2", "train_eos_padding=False")
    tune(*varying, out="eager")
    script = f"""
import sys
from torch._dynamo.utils import counters
import mdm_full_finetune as recipe
graphs, widths = [], []
train_step = recipe.MDMFinetune.train_step
def counted(self, step):
    train_step(self, step)
    widths.append(self.batches.micro_batches(step)[0].tokens.shape[1])
    graphs.append(counters["stats"]["unique_graphs"])
recipe.MDMFinetune.train_step = counted
sys.argv = ["x", "--config", {str(TINY)!r}, "data_dir={data_dir}",
            "output_dir={tmp_path / "compiled"}", "compile=True", *{varying}]
recipe.main()
assert len(set(widths)) >= 3, widths
assert graphs[3] > 0 and graphs[3] == graphs[-1], graphs
"""
    command(sys.executable, "-c", script, TORCH_COMPILE_BACKEND="aot_eager")
    assert_same(curves(tmp_path, "compiled"), curves(tmp_path, "eager"), 1e-4)
