"""Packaged configs resolve, and a component named on the command line takes its own arguments."""

import pytest

from mdm_plugin.cli import recipe_of
from mdm_plugin.config.loading import config_names, load_config
from mdm_plugin.config.options import (
    DPOOptions,
    EvalOptions,
    GenerateOptions,
    GRPOOptions,
    Options,
    VarianceOptions,
)
from mdm_plugin.errors import UserError

OPTIONS = {
    "mdm_dpo": DPOOptions,
    "mdm_grpo": GRPOOptions,
    "mdm_variance": VarianceOptions,
    "mdm_generate": GenerateOptions,
    "mdm_eval": EvalOptions,
}


@pytest.mark.parametrize("name", config_names())
def test_every_packaged_config_is_valid_with_any_component_s_arguments_known(name):
    cfg = load_config(name, [], OPTIONS.get(recipe_of(name), Options))
    assert cfg.tokenizer._component_ == "mdm_plugin.models.ChatTokenizer"


def test_another_component_leaves_out_the_file_s_arguments_that_it_does_not_take(capsys):
    assert load_config("quickstart_lora", [], Options).timesteps.grid == 20
    for key in ("timesteps", "timesteps._component_"):
        cfg = load_config("quickstart_lora", [f"{key}=mdm_plugin.timesteps.Uniform"], Options)
        assert dict(cfg.timesteps) == {"_component_": "mdm_plugin.timesteps.Uniform"}
        assert "timesteps.grid: left out: mdm_plugin.timesteps.Uniform" in capsys.readouterr().out
    # What both take stays, and what the user gave is never left out.
    cfg = load_config("quickstart_lora", ["optimizer=torch.optim.SGD"], Options)
    assert cfg.optimizer.lr == 8e-3 and "betas" not in cfg.optimizer
    with pytest.raises(UserError, match=r"timesteps\.grid: mdm_plugin\.timesteps\.Uniform takes"):
        load_config(
            "quickstart_lora",
            ["timesteps=mdm_plugin.timesteps.Uniform", "timesteps.grid=9"],
            Options,
        )


def test_each_large_config_is_for_its_recipe():
    recipes = {
        "full": "mdm_full_finetune",
        "lora": "mdm_lora_finetune",
        "qlora": "mdm_lora_finetune",
        "lora_dpo": "mdm_dpo",
        "lora_grpo": "mdm_grpo",
        "eval": "mdm_eval",
        "generate": "mdm_generate",
    }
    large = [name for name in config_names() if "/" in name]
    both = {f"{x}_{y}" for x in ("llada/8B", "dream/7B") for y in recipes}
    in_blocks = {"sdar/4B_full", "sdar/4B_lora", "fast_dllm/7B_lora"}
    assert set(large) == {*both, "llada/8B_dpo", *in_blocks}
    recipes["dpo"] = "mdm_dpo"
    assert all(recipe_of(name) == recipes[name.partition("B_")[2]] for name in large)


def test_what_is_measured_of_blocks_is_kept_by_their_quickstart(data_dir):
    given = [f"data_dir={data_dir}", f"output_dir={data_dir}/block"]
    trained = load_config("quickstart_block", given, Options)
    rows = (data_dir / "train.jsonl").read_text().count("\n")
    epochs = [*range(0, trained.epochs, trained.save_every_n_epochs)[1:], trained.epochs]
    kept = [x * (rows // trained.batch_size) for x in epochs][-trained.keep_last_n :]
    cfg = load_config("quickstart_block_variance", given[:1], VarianceOptions)
    assert cfg.checkpointer.checkpoint_dir in [f"{trained.output_dir}/step_{x}" for x in kept]
    assert cfg.model == trained.model


def test_a_key_within_a_part_is_checked_too():
    name = "quickstart_grpo_variance"
    assert load_config(name, ["policy.repeats=7"], VarianceOptions).policy.group_size == 8
    for given, words in (
        ("policy.repeats=x", "policy.repeats: Value 'x'"),
        ("policy.repeat=7", "policy.repeat: Key 'repeat' not in 'PolicyNoise'"),
        ("~policy.prompts", "policy.prompts: missing: set it"),
    ):
        with pytest.raises(UserError) as error:
            load_config(name, [given], VarianceOptions)
        assert words in str(error.value)
