"""Adapters by the recipe: the same run for any number of ranks, across a kill, quantised."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import oracle, tensors, write
from tests.conftest import TINY, scalars
from tests.recipes.test_full_finetune import ANNOUNCED, TWO_RANKS, assert_same, curves, kill_at

LORA = (
    "model._component_=mdm_plugin.models.lora_llada",
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=True",
    "model.apply_lora_to_output=True",
    "model.lora_rank=4",
    "model.lora_alpha=8",
    "optimizer.lr=1e-2",
)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path, request):
    """A LLaDA-shaped checkpoint in shards, of tiny.yaml's sizes, or wider by a factor."""
    wider = getattr(request, "param", 1)
    truth = oracle(
        "llada",
        kv_heads=2,
        num_attention_heads=2,
        vocab_size=320,
        hidden_size=32 * wider,
        intermediate_size=64 * wider,
        num_hidden_layers=2,
    )
    write(truth, tmp_path / "base", "llada")
    return tmp_path / "base"


@pytest.fixture
def lora(tune, base):
    def run(*overrides, **kwargs):
        start = f"checkpointer.checkpoint_dir={base}"
        return tune(*LORA, start, *overrides, recipe="mdm_lora_finetune", **kwargs)

    return run


def test_one_rank_and_two_are_the_same_run_and_only_adapters_learn(lora, base, tmp_path):
    done = lora("batch_size=8", "checkpointer.save_adapter_weights_only=True", out="one")
    assert "5,248 of 46,368 parameters" in done.stdout + done.stderr
    lora("batch_size=4", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-5)
    loss = scalars(tmp_path / "one")["train/loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    one, two = (tmp_path / out / "step_20" for out in ("one", "two"))
    adapters = [load_file(x / ADAPTER) for x in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, x in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], x, rtol=1e-3, atol=1e-5)
    assert not list(one.glob("model*.safetensors"))
    # The merged export has the base's names and files; where there is no adapter, its bits.
    before, after = tensors(base), tensors(two)
    assert before.keys() == after.keys()
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    parts = ("q_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert changed == {name for name in before if any(part in name for part in parts)}
    assert json.loads((two / "config.json").read_text())["model_type"] == "llada"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_killed_run_resumes_to_bit_equal_adapters(lora, base, tmp_path, data_dir, kind):
    common = ["save_every_n_steps=5", f"model.use_dora={kind == 'dora'}"]
    lora(*common, out="whole")
    script = ANNOUNCED.replace(
        "recipe.main()", "import mdm_lora_finetune; mdm_lora_finetune.main()"
    )
    arguments = [
        *(sys.executable, "-c", script, "--config", str(TINY), f"data_dir={data_dir}"),
        *(f"output_dir={tmp_path / 'killed'}", f"checkpointer.checkpoint_dir={base}"),
        *(*LORA, *common),
    ]
    kill_at(12, arguments, tmp_path, tmp_path / "log")
    lora(*common, out="killed")  # the same command line
    whole, killed = (load_file(tmp_path / x / "step_20" / ADAPTER) for x in ("whole", "killed"))
    assert all(torch.equal(x, killed[name]) for name, x in whole.items())


def test_adapters_are_fp32_on_a_bf16_base_and_two_ranks_follow_one(lora, tmp_path):
    """One process casts them by autocast, two by FSDP2."""
    common = ("dtype=bf16", "save_every_n_steps=10", "ema._component_=mdm_plugin.training.EMA")
    lora(*common, "batch_size=8", out="one")
    lora(*common, "batch_size=4", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-2)
    for out in ("one", "two"):
        stored = load_file(tmp_path / out / "step_20" / ADAPTER)
        assert {x.dtype for x in stored.values()} == {torch.float32}
        assert {x.dtype for x in tensors(tmp_path / out / "step_20").values()} == {torch.bfloat16}
        (tmp_path / f"{out}_again").mkdir()
        (tmp_path / out / "step_10").rename(tmp_path / f"{out}_again/step_10")
        if out == "one":
            lora(*common, "batch_size=8", out="one_again")
        else:
            lora(*common, "batch_size=4", launch=TWO_RANKS, out="two_again")
        for place in (ADAPTER, f"ema/{ADAPTER}"):
            whole, again = (
                load_file(tmp_path / x / "step_20" / place) for x in (out, f"{out}_again")
            )
            assert all(torch.equal(x, again[name]) for name, x in whole.items())
            assert {x.dtype for x in whole.values()} == {torch.float32}


def test_dora_in_bf16_on_one_process_and_on_two(lora, tmp_path):
    common = ("dtype=bf16", "model.use_dora=True", "model.apply_lora_to_output=False")
    lora(*common, out="one")
    lora(*common, "batch_size=4", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-2)


WIDE = ("model.embed_dim=128", "model.intermediate_dim=256", "model.quantize_base=True")


@pytest.mark.parametrize("base", [4], indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_quantised_base_trains_its_adapters_and_resumes(lora, tmp_path, dtype):
    common = (*WIDE, f"dtype={dtype}", "save_every_n_steps=10")
    lora(*common, out="whole")
    loss = scalars(tmp_path / "whole")["train/loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    resume = f"resume_from_checkpoint={tmp_path / 'whole/step_10'}"
    lora(*common, resume, out="resumed")
    whole, resumed = (load_file(tmp_path / x / "step_20" / ADAPTER) for x in ("whole", "resumed"))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())


@pytest.mark.gpu
@pytest.mark.parametrize("base", [4], indirect=True)
def test_gpu_a_quantised_base_trains_its_adapters(lora, tmp_path):
    lora(*WIDE, "device=cuda", "dtype=bf16")
    loss = scalars(tmp_path / "out")["train/loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])


def test_what_cannot_be_quantised_is_refused(lora):
    done = lora("model.quantize_base=True", check=False)  # matrices too small
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: model: ")
    done = lora(*WIDE, "batch_size=4", launch=TWO_RANKS, check=False)
    assert done.returncode != 0 and "error: model.quantize_base: an NF4 base is not" in done.stderr


def test_each_recipe_refuses_the_other_s_model(tune, lora, tmp_path):
    done = tune(*LORA, check=False)
    assert done.returncode == 2 and "use the recipe mdm_lora_finetune" in done.stderr
    done = tune(recipe="mdm_lora_finetune", check=False)
    assert done.returncode == 2 and "has no adapters" in done.stderr
