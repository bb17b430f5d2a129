"""From a downloaded directory to a served model, as the owner of an 8B model goes: sizes are cut,
CUDA is not there, and all else is as it is packaged."""

import json

import pytest
import torch

from mdm_plugin.checkpoint.export import export
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import GenerateOptions
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.models import ChatTokenizer
from tests.checkpoints import (
    as_llada,
    full_attention,
    opened_by_transformers,
    oracle,
    tensors,
    write,
    write_tokenizer,
)
from tests.forks import free_port
from tests.slurm import LAUNCH, Slurm, time_is_up

ALONE = World(0, 1, torch.device("cpu"), None)
FAMILIES = {
    "llada": ("llada/8B", "mdm_plugin.models.{}llada", "<|mdm_mask|>"),
    "Dream": ("dream/7B", "mdm_plugin.models.{}dream", "<|mask|>"),
}
SMALL = (
    *("model.vocab_size=640", "model.embed_dim=64", "model.intermediate_dim=160"),
    *("model.num_layers=3", "model.num_heads=4", "device=cpu"),
)
# Rows of 64 tokens in place of 4,096, and as many steps as a test has time for.
SHORT = (
    *("model.max_seq_len=160", "tokenizer.max_seq_len=160", "max_steps_per_epoch=4", "epochs=2"),
    *("save_every_n_steps=2", "run_val_every_n_steps=8", "sample_new_tokens=8", "sample_steps=8"),
    *(
        "global_batch_size=8",
        "batch_size=2",
        "timesteps.grid=5",
        "timesteps.rows=4",
        "timesteps.masks=4",
        "lr_scheduler.num_warmup_steps=2",
    ),
    *("timeout_minutes=1", "dataset_val.max_rows=8"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def downloaded(request, tmp_path_factory, data_dir):
    """A directory as ``tune download`` leaves it: bf16 weights in shards with their index, the
    tokenizer in the family's own files, and the model's code."""
    family, directory = request.param, tmp_path_factory.mktemp(request.param)
    write(oracle(family, dtype=torch.bfloat16, vocab_size=640), directory, family)
    rows = [json.loads(line) for line in (data_dir / "train.jsonl").open()]
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    write_tokenizer(directory, family, texts, data_dir)
    for name in (f"modeling_{family.lower()}.py", f"configuration_{family.lower()}.py"):
        (directory / name).write_text("raise SystemExit('not to be run')\n")
    (directory / "generation_config.json").write_text("{}")
    return family, directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_download_train_preempted_requeued_evaluate_generate_export_serve(
    downloaded, kind, command, data_dir, tmp_path
):
    family, base = downloaded
    config, builder, mask_token = FAMILIES[family]
    lora = kind == "lora"
    heads = ("model.num_kv_heads=4",) if family == "Dream" else ()
    run = tmp_path / "run"
    given = (f"checkpoint_dir={base}", *SMALL, *heads)
    queue = Slurm(
        tmp_path,
        free_port(),
        *(LAUNCH / "tune.sh", f"mdm_{kind}_finetune", "--config", f"{config}_{kind}"),
        *(f"output_dir={run}", f"dataset.source={data_dir / 'val.jsonl'}", *given, *SHORT),
        f"model={builder.format('lora_' if lora else '')}",
        # Tracing takes most of the time: one of the four is compiled, as all are packaged.
        *(() if (family, kind) == ("Dream", "full") else ("compile=False",)),
    )
    assert queue.submit((lambda: (run / "step_2").is_dir(), time_is_up)) != 0
    assert queue.requeued == 1 and not (run / "step_8").exists(), queue.log[-3000:]
    assert queue.submit() == 0, queue.log[-3000:]
    assert "resuming from" in queue.log and "loss" in queue.log
    last = run / "step_8"

    # Masters are fp32, and adapters; the base that adapters have been merged into is bf16.
    kept = {x.dtype for x in tensors(last).values()}
    assert kept == ({torch.bfloat16} if lora else {torch.float32})
    before, after = tensors(base), tensors(last)
    assert before.keys() == after.keys()
    changed = [
        name for name, x in before.items() if not torch.equal(x.float(), after[name].float())
    ]
    assert changed and (len(changed) == len(before)) != lora

    plain = (*(x for x in given if not x.startswith("checkpoint_dir")), "model.max_seq_len=160")
    plain += (f"model={builder.format('')}",)
    tokenizer = ChatTokenizer(str(last), mask_token=mask_token)
    prompt = tokenizer.prompt([{"role": "user", "content": "7 - 2 + 9 ="}])
    where = [(f"checkpoint_dir={last}", "merged")]
    if lora:  # the adapters alone, on the base
        where.append((f"checkpoint_dir={base} checkpointer.adapter_checkpoint={last}", "adapters"))
    nats = []
    for place, name in where:
        command(
            *("tune", "run", "--nproc_per_node", "2", "mdm_eval", "--config", f"{config}_eval"),
            *(*place.split(), *plain, f"dataset.source={data_dir / 'val.jsonl'}", "draws=2"),
            *("tokenizer.max_seq_len=160", f"output_dir={tmp_path / name}"),
        )
        figures = json.loads((tmp_path / name / "results.json").read_text())["tasks"]["nelbo"]
        nats.append(figures["nats_per_token"])
    assert nats == pytest.approx([nats[0]] * len(nats), rel=1e-6) and nats[0] < 7
    done = command(
        *("tune", "run", "mdm_generate", "--config", f"{config}_generate", "max_new_tokens=32"),
        *(f"checkpoint_dir={last}", *plain, "prompt=7 - 2 + 9 ="),
    )
    assert json.loads(done.stdout.splitlines()[-1])["prompt"] == "7 - 2 + 9 ="

    # What is exported opens in transformers, with our logits; and the adapters do in PEFT.
    export(last, tmp_path / "exported")
    stored = tensors(tmp_path / "exported")
    assert stored.keys() == before.keys() and {x.dtype for x in stored.values()} == {torch.bfloat16}
    names = {x.name for x in (tmp_path / "exported").iterdir()}
    assert {x.name for x in base.iterdir()} == names
    tokens = torch.tensor([prompt])
    model = opened_by_transformers(tmp_path / "exported", family, tmp_path / "copy", vocab_size=640)
    served = full_attention(model, tokens)
    shape = [x for x in plain if x.startswith("model")]
    cfg = load_config(f"{config}_generate", shape, GenerateOptions)
    ours = build_model(lambda: instantiate(cfg, "model"), ALONE, torch.float32)
    Weights(tmp_path / "exported").load(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), served, rtol=1e-4, atol=1e-4)
    if lora:
        from peft import PeftModel

        model = opened_by_transformers(base, family, tmp_path / "base", vocab_size=640)
        model = as_llada(model) if family == "llada" else model
        adapted = full_attention(PeftModel.from_pretrained(model, str(last)).eval(), tokens)
        near = (adapted - served).abs().max()  # merging rounds to bf16
        assert near < 0.02, near
