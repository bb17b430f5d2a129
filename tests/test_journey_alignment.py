"""Preferences and rewards as the owner of an 8B model has them: packaged configs, the checkpoint's
own layout, bf16, two ranks, stopped and started again; sizes are cut, and CUDA is not there."""

import json

import pytest
import torch

from tests.checkpoints import tensors
from tests.conftest import scalars
from tests.test_journey import FAMILIES, SMALL, downloaded

__all__ = ["downloaded"]  # the fixture
CONFIGS = {"llada": ["dpo", "lora_dpo", "lora_grpo"], "Dream": ["lora_dpo", "lora_grpo"]}
CASES = [(family, kind) for family, kinds in CONFIGS.items() for kind in kinds]
SHORT = (
    *("model.max_seq_len=160", "tokenizer.max_seq_len=160", "max_steps_per_epoch=4", "epochs=1"),
    *("save_every_n_steps=2", "lr_scheduler.num_warmup_steps=1", "optimizer.lr=1e-3"),
    *("compile=False", "timeout_minutes=1", "global_batch_size=4"),
)
KINDS = {
    "dpo": (
        "dataset_val.split=0.1",
        "dataset_val.max_rows=4",
        "run_val_every_n_steps=4",
        "sample_rows=0",
        "draws=2",
    ),
    "grpo": (
        *("max_new_tokens=16", "decoding.block_length=8", "decoding.steps=8", "updates=2"),
        *("draws=2", "group_size=4"),
    ),
}
REWARD = "mdm_plugin.alignment.rewards.brevity"


@pytest.mark.parametrize("kind", sorted({kind for _, kind in CASES}))
def test_packaged_configs_train_on_two_ranks_and_resume_bit_equal(
    downloaded, kind, command, data_dir, tmp_path
):
    family, base = downloaded
    if (family, kind) not in CASES:
        pytest.skip("no such config")
    config, builder, _ = FAMILIES[family]
    recipe, run = f"mdm_{kind.split('_')[-1]}", tmp_path / "run"
    rows = [json.loads(line)["messages"] for line in (data_dir / "val.jsonl").open()]
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        for turns in rows[:40]:
            text = turns[1]["content"]
            answers = {"chosen": text, "rejected": text.split("\n")[0]}
            out.write(json.dumps({"prompt": turns[0]["content"], **answers}) + "\n")
    key = "prompts" if recipe == "mdm_grpo" else "dataset.source"
    own = [
        f"rewards.right._component_={REWARD}",
        "~rewards.right.task",
        "rewards.right.characters=60",
    ]
    arguments = [
        *("tune", "run", "--nproc_per_node", "2", recipe, "--config", f"{config}_{kind}"),
        *(f"{key}={file}", f"output_dir={run}", f"checkpoint_dir={base}", *SMALL, *SHORT),
        *(("model.num_kv_heads=4",) if family == "Dream" else ()),
        f"model={builder.format('lora_' if 'lora' in kind else '')}",
        *KINDS[kind.split("_")[-1]],
        *(own if recipe == "mdm_grpo" else ()),
    ]
    first = command(*arguments)
    assert "2 ranks on cpu; bf16, masters in fp32" in first.stdout
    before = tensors(run / "step_4")
    (run / "step_4").rename(tmp_path / "whole")
    again = command(*arguments)
    assert "resuming from" in again.stdout
    after = tensors(run / "step_4")
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = tensors(base)
    assert before.keys() == start.keys()
    assert any(not torch.equal(before[name].float(), start[name].float()) for name in start)
    shown = scalars(run)
    name = "reward/mean" if recipe == "mdm_grpo" else "rewards/margin"
    assert len(shown[name]) >= 4 and all(x == x for x in shown[name])
