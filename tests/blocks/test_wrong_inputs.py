"""What does not go with blocks: one line with the place, exit code 2, before any training."""

import json

import pytest

from tests.conftest import TINY
from tests.recipes.test_dpo import DPO
from tests.recipes.test_grpo import GRPO, SHORT
from tests.recipes.test_wrong_inputs import last_line

BLOCKS = "model.block_length=4"
PADDED = "train_eos_padding=False"
MALFORMED = "use [share of training, length] each, from 0.0 on, ascending"
# (overrides of tests/tiny.yaml, what the line must say)
WRONG = {
    "no block": (["model.block_length=0"], "model: block_length is 0: use 1 or more"),
    "a block that does not divide": (
        ["model.block_length=5"],
        "model: max_seq_len is 96: use a multiple of block_length, 5",
    ),
    "a causal model": ([BLOCKS, "model.causal=True"], "use 1 or more, and not with causal"),
    "packed and filled": (
        [BLOCKS, PADDED, "batch_layout=packed", "pad_to_multiple_of=8"],
        "pad_to_multiple_of: rows in blocks are packed as they are",
    ),
    "next tokens": (
        [BLOCKS, "masking=mdm_plugin.masking.NextToken", "timesteps=mdm_plugin.timesteps.Uniform"],
        "masking: NextToken with a bidirectional model",
    ),
    "gradients of rows": (
        [BLOCKS, "timesteps._component_=mdm_plugin.timesteps.ParetoStream"],
        "timesteps: ParetoStream learns from rows' gradients, which blocks do not have apart",
    ),
    "a schedule without blocks": (
        ["block_schedule=[[0.0,4]]"],
        "block_schedule: the model has no blocks: set model.block_length",
    ),
    "one t without blocks": (["blocks_share_t=True"], "blocks_share_t: the model has no blocks"),
    "no list": ([BLOCKS, "block_schedule=4"], MALFORMED),
    "an empty list": ([BLOCKS, "block_schedule=[]"], MALFORMED),
    "lengths alone": ([BLOCKS, "block_schedule=[2,4]"], MALFORMED),
    "words": ([BLOCKS, "block_schedule=[[early,2],[late,4]]"], MALFORMED),
    "half a length": ([BLOCKS, "block_schedule=[[0.0,2.5],[0.5,4]]"], MALFORMED),
    "no beginning": ([BLOCKS, "block_schedule=[[0.1,2],[0.5,4]]"], MALFORMED),
    "to and fro": ([BLOCKS, "block_schedule=[[0.0,1],[0.7,2],[0.5,4]]"], MALFORMED),
    "steps in place of shares": ([BLOCKS, "block_schedule=[[0,2],[100,4]]"], MALFORMED),
    "three numbers": ([BLOCKS, "block_schedule=[[0.0,2,1],[0.5,4,1]]"], MALFORMED),
    "blocks of no token": (
        [BLOCKS, "block_schedule=[[0.0,0],[0.5,4]]"],
        "block_schedule: [[0.0, 0], [0.5, 4]]: a block has 1 token or more",
    ),
    "another end": (
        [BLOCKS, "block_schedule=[[0.0,4],[0.5,8]]"],
        "block_schedule: it ends at blocks of 8, and text is written in blocks of",
    ),
    "lengths with no common rows": (
        [BLOCKS, "block_schedule=[[0.0,5],[0.5,4]]"],
        "block_schedule: model.max_seq_len, 96, is no multiple of all lengths",
    ),
    "an adapter of no module": (
        [
            *("model=mdm_plugin.models.lora_qwen3", "model.lora_attn_modules=[w1]", BLOCKS),
            *("model.num_kv_heads=1", "model.head_dim=16", "model.lora_rank=4"),
        ],
        "model: lora_attn_modules is ['w1']: use of ['k_proj', 'output_proj', 'q_proj', 'v_proj']",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_blocks_are_one_line(case, data_dir, tmp_path, monkeypatch, capfd):
    overrides, expected = WRONG[case]
    recipe = "mdm_lora_finetune" if "adapter" in case else "mdm_full_finetune"
    arguments = ["--config", str(TINY), f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}"]
    said = last_line(recipe, [*arguments, *overrides], monkeypatch, capfd)
    assert said.startswith("error: ") and expected in said, said
    assert not list(tmp_path.glob("out/step_*"))


@pytest.mark.parametrize("case", [x for x in WRONG if "multiple" in str(WRONG[x])])
def test_a_dry_run_says_the_same(case, data_dir, tmp_path, monkeypatch, capfd):
    overrides, expected = WRONG[case]
    arguments = ["--config", str(TINY), f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}"]
    given = [*arguments, *overrides, "dry_run=True"]
    assert expected in last_line("mdm_full_finetune", given, monkeypatch, capfd)


def test_answers_of_preferences_and_policies(data_dir, tmp_path, write_jsonl, monkeypatch, capfd):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    dpo = [
        *DPO,
        f"dataset.source={write_jsonl(*[pair] * 8)}",
        "batch_layout=packed",
        "pad_to_multiple_of=8",
    ]
    grpo = [x.replace("{data}", str(data_dir)) for x in (*GRPO, *SHORT)]
    arguments = ["--config", str(TINY), f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}"]
    for recipe, given, expected in (
        ("mdm_dpo", dpo, "pad_to_multiple_of: rows in blocks are packed as they are"),
        ("mdm_grpo", [*grpo, "batch_layout=packed"], "batch_layout: packed"),
        ("mdm_grpo", [*grpo, "decoding.cfg_scale=1"], "decoding: cfg_scale: not for a model that"),
        ("mdm_grpo", [*grpo, "decoding.block_length=3"], "decoding: block_length 3 does not divi"),
    ):
        said = last_line(recipe, [*arguments, *given, BLOCKS], monkeypatch, capfd)
        assert expected in said, said


WRITING = {
    "guidance": (["decoding.cfg_scale=1"], "decoding: cfg_scale: not for a model that writes"),
    "dual": (["decoding.cache=dual"], "decoding: cache dual: not for a model that writes"),
    "renewal": (
        ["decoding.cache=prefix", "decoding.refresh_every=2"],
        "decoding: refresh_every: not for a model",
    ),
    "parts": (["decoding.block_length=3"], "decoding: block_length 3 does not divide the model's"),
    "steps": (["decoding.steps=10"], "decoding: steps is 10: use 1 to the response's 9 tokens"),
    "length": (["max_new_tokens=95"], "tokens and max_new_tokens 95 are more than the model takes"),
    "blocks": (["model.block_length=5"], "model: max_seq_len is 96: use a multiple of"),
}


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory):
    """mdm_generate's, of weights that cannot be read: what is wrong is said before they are."""
    place = tmp_path_factory.mktemp("weights")
    (place / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    given = {
        "tokenizer": {"_component_": "mdm_plugin.models.ChatTokenizer", "path": str(data_dir)},
        "model": {
            "_component_": "mdm_plugin.models.llada",
            **{"vocab_size": 320, "num_layers": 1, "num_heads": 2, "embed_dim": 32},
            **{"intermediate_dim": 64, "max_seq_len": 96, "block_length": 4},
        },
        "checkpointer": {
            "_component_": "mdm_plugin.training.Checkpointer",
            **{"checkpoint_dir": str(place), "output_dir": str(place)},
        },
        "decoding": {"_component_": "mdm_plugin.generation.Decoding"},
        "sampler": {"_component_": "mdm_plugin.generation.Remasking"},
        **{"max_new_tokens": 9, "device": "cpu", "dtype": "fp32", "prompt": "7 - 2 ="},
    }
    file = place / "generate.yaml"
    file.write_text(json.dumps(given))
    return file


@pytest.mark.parametrize("case", WRITING)
def test_what_cannot_be_written_is_one_line_before_weights_are_read(
    case, config, monkeypatch, capfd
):
    overrides, expected = WRITING[case]
    said = last_line("mdm_generate", ["--config", str(config), *overrides], monkeypatch, capfd)
    assert said.startswith("error: ") and expected in said, said


def test_weights_that_cannot_be_read_are_what_is_said_else(config, monkeypatch, capfd):
    said = last_line("mdm_generate", ["--config", str(config)], monkeypatch, capfd)
    assert "the checkpoint lacks" in said


VARIANCE = {
    "one t without blocks": (
        ["model.block_length=null"],
        "estimators.One t a row.blocks_share_t: the model has no blocks: leave it out",
    ),
    "gradients of rows": (
        ["estimators.Stratified.timesteps._component_=mdm_plugin.timesteps.ParetoStream"],
        "estimators.Stratified.timesteps: ParetoStream learns from rows' gradients",
    ),
}


@pytest.mark.parametrize("case", VARIANCE)
def test_what_cannot_be_measured_is_one_line(case, data_dir, tmp_path, monkeypatch, capfd):
    overrides, expected = VARIANCE[case]
    given = [
        *("--config", "quickstart_block_variance", "prepare=null", f"data_dir={data_dir}"),
        *(f"output_dir={tmp_path}", "checkpointer.checkpoint_dir=null", *overrides),
    ]
    assert expected in last_line("mdm_variance", given, monkeypatch, capfd)
