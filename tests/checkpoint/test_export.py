import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mdm_plugin.checkpoint.export import export
from mdm_plugin.checkpoint.parts import OptimizerState, Run
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.parameters import initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import llada, lora_llada
from mdm_plugin.training import Checkpointer
from tests.checkpoints import OURS, full_attention, oracle, tensors, write

ALONE = World(0, 1, torch.device("cpu"), None)
SHAPE = {
    **{"vocab_size": 97, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32},
    **{"intermediate_dim": 80, "max_seq_len": 64, "rope_base": 10_000.0, "norm_eps": 1e-6},
}
TOKENS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))


class Tokenizer:
    mask_token_added = False

    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


@pytest.fixture
def step(tmp_path):
    """A checkpoint of a run from random weights, and its model."""
    torch.manual_seed(0)
    model = llada(**SHAPE).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    cfg = OmegaConf.create({"model": {"_component_": "mdm_plugin.models.llada", **SHAPE}})
    run = Run(ALONE, model, Tokenizer(), cfg, {"optimizer": OptimizerState(model, optimizer)})
    path = Checkpointer(str(tmp_path)).save(run, 3, {})
    return path, model


def test_as_llama_transformers_has_the_same_logits(step, tmp_path):
    import transformers

    path, model = step
    export(path, tmp_path / "out", "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    with torch.no_grad():
        assert (full_attention(theirs, TOKENS) - model(TOKENS)).abs().max() < 1e-5
    assert not (tmp_path / "out/state.json").exists()
    assert (tmp_path / "out/tokenizer.json").exists()


def test_as_llada_it_comes_back_bit_equal_and_goes_out_again(step, tmp_path):
    path, model = step
    export(path, tmp_path / "out")
    stated = json.loads((tmp_path / "out/config.json").read_text())
    assert stated["n_kv_heads"] == 2 and stated["rope_theta"] == 10_000.0
    again = llada(**SHAPE)
    Weights(tmp_path / "out").load(again)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    # A run from it writes such a checkpoint itself; exporting that copies it.
    checkpointer = Checkpointer(str(tmp_path / "next"), str(tmp_path / "out"))
    optimizer = OptimizerState(again, torch.optim.AdamW(again.parameters()))
    run = Run(ALONE, again, Tokenizer(), OmegaConf.create({}), {"optimizer": optimizer})
    second = checkpointer.save(run, 1, {})
    export(second, tmp_path / "copied")
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "copied"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not (tmp_path / "copied/manifest.json").exists()


def test_the_dtype_is_the_run_s_or_the_one_that_is_asked_for(step, tmp_path):
    path, model = step
    for dtype, kept in ((None, torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / str(dtype)
        export(path, out, dtype=dtype)
        stored = load_file(out / "model.safetensors")
        assert {x.dtype for x in stored.values()} == {kept}
        stated = json.loads((out / "config.json").read_text())["torch_dtype"]
        assert stated == str(kept).removeprefix("torch.")
    head = stored["model.transformer.ff_out.weight"]
    assert torch.equal(head, model.output.weight.to(torch.bfloat16))
    with pytest.raises(UserError, match="--dtype fp16"):
        export(path, tmp_path / "out", dtype="fp16")


def test_adapters_alone_are_merged_into_their_base(tmp_path):
    base = tmp_path / "base"
    write(oracle("llada"), base, "llada")
    model = lora_llada(["q_proj"], **OURS, num_kv_heads=4, lora_rank=2, lora_alpha=4)
    initialize_parameters(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    optimizer = OptimizerState(model, torch.optim.AdamW(model.parameters()))
    run = Run(ALONE, model, Tokenizer(), OmegaConf.create({}), {"optimizer": optimizer})
    checkpointer = Checkpointer(str(tmp_path), str(base), save_adapter_weights_only=True)
    step = checkpointer.save(run, 1, {})
    export(step, tmp_path / "out")
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match=r"adapters alone, .* name their directory with --base"):
        export(step, tmp_path / "again")
    export(step, tmp_path / "again", base=tmp_path / "moved")
    before, after, again = (tensors(tmp_path / x) for x in ("moved", "out", "again"))
    assert before.keys() == after.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in after.items())
    parameters = dict(model.named_parameters())
    for name, x in before.items():
        if not name.endswith("q_proj.weight"):
            assert torch.equal(x, after[name])
            continue
        layer = f"layers.{name.split('.')[3]}.attn.q_proj"
        a, b = (parameters[f"{layer}.lora_{part}.weight"] for part in "ab")
        torch.testing.assert_close(after[name], x + 2 * b @ a, rtol=1e-5, atol=1e-6)
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert names == {x.name for x in (tmp_path / "moved").iterdir()}


def test_what_cannot_be_exported_is_one_line(step, tmp_path):
    path, _ = step
    with pytest.raises(UserError, match="had no ema"):
        export(path, tmp_path / "out", average=True)
    with pytest.raises(UserError, match="exists: name a new directory"):
        export(path, tmp_path)
    with pytest.raises(UserError, match="--family gpt"):
        export(path, tmp_path / "out", "gpt")
    (path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has 0 bytes"):
        export(path, tmp_path / "out")
