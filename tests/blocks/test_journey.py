"""From a downloaded directory of SDAR or Fast-dLLM to an exported one: packaged configs, bf16, two
ranks, stopped and started again; sizes are cut, and CUDA is not there."""

import json

import pytest
import torch

from mdm_plugin.checkpoint.export import export
from tests.checkpoints import (
    HEAD_DIM,
    MASK_TOKENS,
    STATED,
    opened_by_transformers,
    oracle,
    tensors,
    write,
    write_tokenizer,
)
from tests.recipes.test_full_finetune import TWO_RANKS
from tests.test_journey import SHORT, SMALL

CONFIGS = {
    "sdar/4B_full": ("sdar", "qwen3", 4),
    "sdar/4B_lora": ("sdar", "lora_qwen3", 4),
    "fast_dllm/7B_lora": ("Fast_dLLM_Qwen", "lora_dream", 8),
}
CUT = [x for x in SHORT if not x.startswith("timesteps.")]
CUT += ["model.num_kv_heads=2", "compile=False", "epochs=1", "run_val_every_n_steps=4"]


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory, data_dir):
    """Directories as ``tune download`` leaves them: bf16 weights in shards with their index, the
    tokenizer in the family's own files, and the model's code."""
    rows = [json.loads(line) for line in (data_dir / "val.jsonl").open()]
    texts, found = [turn["content"] for row in rows for turn in row["messages"]], {}
    for family in STATED.keys() - {"Dream"}:
        directory = found[family] = tmp_path_factory.mktemp(family)
        model = oracle(family, kv_heads=2, dtype=torch.bfloat16, vocab_size=640)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        write(model, directory, family)
        write_tokenizer(directory, family, texts, data_dir)
        (directory / "modeling.py").write_text("raise SystemExit('not to be run')\n")
    return found


def in_blocks(model, tokens, size):
    """transformers' logits under the mask of blocks."""
    block = torch.arange(tokens.shape[1]) // size
    mask = torch.zeros(1, 1, len(block), len(block)).masked_fill(
        block[:, None] < block, torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits


@pytest.mark.parametrize("config", CONFIGS)
def test_download_train_on_two_ranks_stop_go_on_and_export(
    config, downloaded, command, data_dir, tmp_path
):
    family, builder, size = CONFIGS[config]
    base, run, lora = downloaded[family], tmp_path / "run", builder.startswith("lora")
    shape = (f"model.head_dim={HEAD_DIM}",) if family == "sdar" else ()
    recipe = "mdm_lora_finetune" if lora else "mdm_full_finetune"
    words = [
        *("tune", "run", *TWO_RANKS, recipe, "--config", config, f"checkpoint_dir={base}"),
        *(f"output_dir={run}", f"dataset.source={data_dir / 'val.jsonl'}", *SMALL, *CUT),
        *(f"model=mdm_plugin.models.{builder}", f"model.block_length={size}", *shape),
    ]
    first = command(*words)
    assert "2 ranks on cpu; bf16, masters in fp32" in first.stdout
    (run / "step_4").rename(tmp_path / "whole")
    again = command(*words)
    assert "resuming from" in again.stdout and "val/nelbo" in again.stdout
    before, after, start = tensors(tmp_path / "whole"), tensors(run / "step_4"), tensors(base)
    assert before.keys() == after.keys() == start.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert any(not torch.equal(x.float(), after[name].float()) for name, x in start.items())

    export(run / "step_4", tmp_path / "exported")
    names = {x.name for x in base.iterdir()}
    assert names == {x.name for x in (tmp_path / "exported").iterdir()}
    for name in ("config.json", "model.safetensors.index.json"):
        old, new = (json.loads((x / name).read_text()) for x in (base, tmp_path / "exported"))
        if "weight_map" in old:
            old, new = old["weight_map"], new["weight_map"]
        assert old == new, name
    stored = tensors(tmp_path / "exported")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}

    # What is exported is what transformers runs under the mask of blocks, and what we write with.
    theirs = opened_by_transformers(tmp_path / "exported", family, tmp_path / "copy")
    given = {
        "tokenizer": {
            "_component_": "mdm_plugin.models.ChatTokenizer",
            **{"path": str(tmp_path / "exported"), "mask_token": MASK_TOKENS[family]},
        },
        "model": {
            "_component_": f"mdm_plugin.models.{builder.removeprefix('lora_')}",
            **{"vocab_size": 640, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
            **{"embed_dim": 64, "intermediate_dim": 160, "max_seq_len": 160},
            **({"head_dim": HEAD_DIM} if family == "sdar" else {}),
            "block_length": size,
        },
        "checkpointer": {
            "_component_": "mdm_plugin.training.Checkpointer",
            **{"checkpoint_dir": str(tmp_path / "exported"), "output_dir": str(tmp_path / "x")},
        },
        "decoding": {"_component_": "mdm_plugin.generation.Decoding", "cache": "prefix"},
        "sampler": {"_component_": "mdm_plugin.generation.Remasking"},
        **{"max_new_tokens": 12, "device": "cpu", "dtype": "fp32"},
    }
    (tmp_path / "generate.yaml").write_text(json.dumps(given))
    words = ("mdm_generate", "--config", "generate.yaml", "prompt=7 - 2 + 9 =")
    done = command("tune", "run", *words)
    text = json.loads(done.stdout.splitlines()[-1])
    assert written_by(theirs, tmp_path / "exported", family, size) == text["completion"]
    other = command("tune", "run", *words, "model.block_length=2", check=False)
    said = other.stderr.strip().splitlines()[-1]
    assert other.returncode == 2 and f"config.json says {key_of(family)} {size}" in said


def key_of(family):
    return next(x for x in STATED[family] if x in ("block_size", "bd_size"))


def written_by(model, directory, family, size):
    """12 tokens of transformers' model after the prompt: a block at a time, the surest first."""
    from mdm_plugin.models import ChatTokenizer

    tokenizer = ChatTokenizer(str(directory), mask_token=MASK_TOKENS[family])
    prompt = tokenizer.prompt([{"role": "user", "content": "7 - 2 + 9 ="}])
    mask, eos = tokenizer.mask_id, tokenizer.eos_id
    length = -(-(len(prompt) + 12) // size) * size
    x = torch.tensor([*prompt, *[mask] * (length - len(prompt))])
    for start in range(0, length, size):
        while masked := [i for i in range(start, start + size) if x[i] == mask]:
            logits = in_blocks(model, x[None], size)[0]
            if family == "Fast_dLLM_Qwen":
                logits = torch.cat((logits[:1], logits[:-1]))
            logits[:, mask] = -torch.inf
            sure = logits.softmax(-1).max(-1)
            top = max(masked, key=lambda i: sure.values[i])
            x[top] = sure.indices[top]
    written = x[len(prompt) : len(prompt) + 12].tolist()
    written = written[: written.index(eos)] if eos in written else written
    return tokenizer.decode(written)


def test_untrained_weights_come_out_as_they_went_in(downloaded, command, data_dir, tmp_path):
    """Every tensor, bit by bit, after steps of no length."""
    family, builder, _ = CONFIGS["sdar/4B_full"]
    command(
        *("tune", "run", "mdm_full_finetune", "--config", "sdar/4B_full", *SMALL, *CUT),
        *(f"checkpoint_dir={downloaded[family]}", f"output_dir={tmp_path / 'run'}"),
        *(f"dataset.source={data_dir / 'val.jsonl'}", "optimizer.lr=0"),
        *("optimizer.weight_decay=0", f"model=mdm_plugin.models.{builder}"),
        *(f"model.head_dim={HEAD_DIM}", "max_steps_per_epoch=1", "dataset_val=null"),
        *("run_val_every_n_steps=null", "save_every_n_steps=null"),
    )
    export(tmp_path / "run/step_1", tmp_path / "exported")
    before, after = tensors(downloaded[family]), tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
