"""Hugging Face checkpoints in and out; truth: transformers and PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdm_plugin.checkpoint.adapters import load_adapters, save_adapters
from mdm_plugin.checkpoint.saving import save_weights
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.parameters import adapter_names, initialize_parameters, named_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import (
    dream,
    from_autoregressive,
    llada,
    lora_dream,
    lora_llada,
    lora_qwen3,
    qwen3,
)
from mdm_plugin.training import Checkpointer
from tests.checkpoints import (
    HEAD_DIM,
    OURS,
    STATED,
    as_llada,
    full_attention,
    oracle,
    tensors,
    write,
)

ALONE = World(0, 1, torch.device("cpu"), None)
LORA = {"lora_rank": 4, "lora_alpha": 8, "apply_lora_to_mlp": True}
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]
TOKENS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(1))


def run(writes):
    for each in writes:
        each()


def ours(family, dtype=torch.float32, lora=None, **changes):
    """Our model of the family's small shape, its parameters not yet filled."""
    shape = {**OURS, "num_kv_heads": 4 if family == "llada" else 2, **changes}
    build = {"llada": (llada, lora_llada), "sdar": (qwen3, lora_qwen3)}
    build = build.get(family, (dream, lora_dream))
    if family in ("sdar", "Fast_dLLM_Qwen"):
        shape.setdefault("block_length", STATED[family].get("block_size", 8))
    if family == "sdar":
        shape["head_dim"] = HEAD_DIM
    return build_model(
        lambda: build[0](**shape) if lora is None else build[1](ALL, **shape, **LORA, **lora),
        ALONE,
        dtype=dtype,
    ).eval()


@pytest.fixture(params=["llada", "Dream", "sdar", "Fast_dLLM_Qwen"])
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, tmp_path):
    """The checkpoint's directory, and transformers' model that wrote it."""
    truth = oracle(family, kv_heads=4 if family == "llada" else 2)
    directory = tmp_path / "hf"
    write(truth, directory, family)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("raise SystemExit('run')")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory, truth


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)


def test_logits_equal_transformers_through_a_checkpoint(family, checkpoint):
    directory, truth = checkpoint
    model = ours(family)
    Weights(directory).load(model)
    assert (logits(model) - full_attention(truth, TOKENS)).abs().max() <= 1e-4
    half = ours(family, torch.bfloat16)
    Weights(directory).load(half)
    expected = full_attention(truth.to(torch.bfloat16), TOKENS)
    assert (logits(half) - expected).abs().max() <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_each_tensor_file_and_the_index(family, tmp_path, dtype):
    truth = oracle(family, kv_heads=4 if family == "llada" else 2, dtype=dtype)
    directory, out = tmp_path / "hf", tmp_path / "out"
    write(truth, directory, family)
    (directory / "tokenizer.json").write_text("{}")
    model, source = ours(family, dtype), Weights(directory)
    source.load(model)
    run(save_weights(model, ALONE, out, source))
    before, after = tensors(directory), tensors(out)
    assert before.keys() == after.keys()
    assert all(x.dtype == dtype and torch.equal(x, after[name]) for name, x in before.items())
    names = sorted(f.name for f in directory.glob("*.safetensors"))
    assert names == sorted(f.name for f in out.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    old, new = (json.loads((x / index).read_text()) for x in (directory, out))
    assert old["weight_map"] == new["weight_map"]
    assert new["metadata"]["total_size"] == sum(x.nbytes for x in after.values())
    assert (out / "tokenizer.json").is_file()
    old, new = (json.loads((x / "config.json").read_text()) for x in (directory, out))
    assert old == new and new["model_type"] == family
    again = ours(family, dtype)
    Weights(out).load(again)
    assert torch.equal(logits(again), logits(model))


def test_embeddings_that_are_the_head_too_are_stored_once(tmp_path):
    truth = oracle("sdar", kv_heads=2, tie_word_embeddings=True)
    directory, out = tmp_path / "hf", tmp_path / "out"
    write(truth, directory, "sdar")
    model, source = ours("sdar", tie_word_embeddings=True), Weights(directory)
    source.load(model)
    assert (logits(model) - full_attention(truth, TOKENS)).abs().max() <= 1e-4
    run(save_weights(model, ALONE, out, source))
    before, after = tensors(directory), tensors(out)
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    with pytest.raises(UserError, match=r"the checkpoint lacks lm_head\.weight"):
        source.load(ours("sdar"))


def test_what_is_saved_says_how_long_its_blocks_are(tmp_path):
    """A schedule may end at other blocks than those of the checkpoint that it began with."""
    for family, key in (("sdar", "block_size"), ("Fast_dLLM_Qwen", "bd_size")):
        directory, out = tmp_path / family, tmp_path / f"{family} out"
        write(oracle(family, kv_heads=2), directory, family)
        model, source = ours(family, block_length=16), Weights(directory)
        source.load(model)
        run(save_weights(model, ALONE, out, source))
        old, new = (json.loads((x / "config.json").read_text()) for x in (directory, out))
        assert new == {**old, key: 16}


def test_transformers_opens_a_dream_shaped_export(tmp_path):
    from transformers import Qwen2ForCausalLM

    directory, out = tmp_path / "hf", tmp_path / "out"
    write(oracle("Dream", kv_heads=2), directory, "Dream")
    model, source = ours("Dream"), Weights(directory)
    initialize_parameters(model, 5)
    run(save_weights(model, ALONE, out, source))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    opened = Qwen2ForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert (full_attention(opened, TOKENS) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_merged_unmerged_and_in_peft_give_the_same_logits(
    family, checkpoint, tmp_path, use_dora
):
    from peft import PeftModel

    directory, truth = checkpoint
    source, model = Weights(directory), ours(family, lora={"use_dora": use_dora})
    source.load(model)
    adapters = adapter_names(model)
    initialize_parameters(model, 0, only=adapters)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapters
    assert (logits(model) - full_attention(truth, TOKENS)).abs().max() <= 1e-4  # nothing yet
    generator = torch.Generator().manual_seed(2)
    for name, p in named_parameters(model).items():
        if name in adapters:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    changed = logits(model)
    assert (changed - full_attention(truth, TOKENS)).abs().max() > 0.05

    out = tmp_path / "out"
    run(save_weights(model, ALONE, out, source))
    run(save_adapters(model, ALONE, out, source))
    merged = ours(family)
    Weights(out).load(merged)
    assert (logits(merged) - changed).abs().max() <= 1e-4
    again = ours(family, lora={"use_dora": use_dora})
    source.load(again)
    load_adapters(again, out, source)
    assert torch.equal(logits(again), changed)
    for name in out.glob("model*.safetensors"):  # the adapters alone, on the base
        name.unlink()
    plain = ours(family)
    Checkpointer("x", str(directory), adapter_checkpoint=str(out)).load_weights(plain)
    assert (logits(plain) - changed).abs().max() <= 1e-4

    base = truth
    if family == "llada":  # PEFT on a model whose modules are called as LLaDA's own
        base = as_llada(truth)
    opened = PeftModel.from_pretrained(base, str(out)).eval()
    assert (full_attention(opened, TOKENS) - changed).abs().max() <= 1e-4


def test_adapters_alone_are_used_with_their_base_or_refused(family, checkpoint, tmp_path):
    directory, _ = checkpoint
    source, model = Weights(directory), ours(family, lora={})
    initialize_parameters(model, 0)
    out = tmp_path / "out"
    run(save_adapters(model, ALONE, out, source))
    with pytest.raises(UserError, match=r"holds adapters alone: name the weights .*adapter_check"):
        Checkpointer("x", str(out))
    with pytest.raises(UserError, match=r"adapter_checkpoint: .* has no adapter_model.safetensors"):
        Checkpointer("x", str(directory), adapter_checkpoint=str(directory))
    with pytest.raises(UserError, match="checkpoint_dir is not"):
        Checkpointer("x", adapter_checkpoint=str(out))
    run(save_weights(model, ALONE, out, source))
    with pytest.raises(UserError, match="adapters merged already"):
        Checkpointer("x", str(out), adapter_checkpoint=str(out))
    other = ours(family, embed_dim=32, lora={})  # adapters of another model
    initialize_parameters(other, 0)
    run(save_adapters(other, ALONE, tmp_path / "other", source))
    with pytest.raises(UserError, match="does not fit its"):
        Checkpointer("x", str(directory), adapter_checkpoint=str(tmp_path / "other")).load_weights(
            ours(family)
        )


@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_autoregressive_model_becomes_bidirectional(tmp_path, kind, new_tokens):
    truth = oracle(kind, kv_heads=2)
    write(truth, tmp_path / "hf", kind)
    shape = {**OURS, "num_kv_heads": 2, "norm_eps": 1e-6}
    family = "llama3" if kind == "llama" else "qwen2"
    builder = f"torchtune.models.{family}.{family}"
    model = build_model(
        lambda: from_autoregressive(builder, new_tokens, rope_base=1_000_000, **shape),
        ALONE,
        dtype=torch.float32,
    ).eval()
    source = Weights(tmp_path / "hf")
    source.load(model)
    mine, expected = logits(model), full_attention(truth, TOKENS)
    assert (mine[..., :97] - expected).abs().max() <= 1e-4
    assert mine.shape[-1] == 97 + new_tokens
    if new_tokens:  # a new token's logit is the mean of the others'
        assert (mine[..., 97:] - expected.mean(-1, keepdim=True)).abs().max() <= 1e-4
    run(save_weights(model, ALONE, tmp_path / "out", source))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 97 + new_tokens


def broken(case, directory):
    """Break a checkpoint; a part of the message that must come."""
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(directory.glob("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    # Copies: the file that they are mapped from is written over.
    first = {name: x.clone() for name, x in load_file(shards[0]).items()}
    name = next(iter(first))
    match case:
        case "truncated file":
            shards[0].write_bytes(shards[0].read_bytes()[:-100])
            return "cannot be read as safetensors"
        case "empty file":
            shards[0].write_bytes(b"")
            return "cannot be read as safetensors"
        case "header of garbage":
            shards[0].write_bytes(b"\xff" * 200)
            return "cannot be read as safetensors"
        case "missing shard with index":
            shards[1].unlink()
            return f"{shards[1]} does not exist"
        case "missing shard without index":
            index_file.unlink()
            shards[1].unlink()
            return f"{shards[1]} does not exist"
        case "wrong dtype":
            save_file({**first, name: first[name].to(torch.int8)}, shards[0])
            return f"{name} is I8"
        case "wrong shape":
            save_file({**first, name: first[name][:-1].contiguous()}, shards[0])
            return f"{name} has shape"
        case "missing tensor":
            del index["weight_map"][name], first[name]
            save_file(first, shards[0])
            index_file.write_text(json.dumps(index))
            return f"lacks {name}"
        case "unknown tensor":
            save_file({**first, "extra": torch.zeros(2)}, shards[0])
            index["weight_map"]["extra"] = shards[0].name
            index_file.write_text(json.dumps(index))
            return "unknown tensors: extra"
        case "tensor not in the index":
            save_file({**first, "extra": torch.zeros(2)}, shards[0])
            return "does not list extra"
        case "tensor in two files":
            other = {k: x.clone() for k, x in load_file(shards[1]).items()}
            save_file({**other, name: first[name]}, shards[1])
            return f"{name} is in {shards[0].name} too"
        case "index names an absent tensor":
            index["weight_map"]["ghost"] = shards[0].name
            index_file.write_text(json.dumps(index))
            return "ghost is not in"
        case "index leaves its directory":
            index["weight_map"][name] = "../other/model.safetensors"
            index_file.write_text(json.dumps(index))
            return "is no file beside it"
        case "index names a pickle":
            index["weight_map"][name] = "pytorch_model.bin"
            index_file.write_text(json.dumps(index))
            return "is no safetensors file"
        case "index is no JSON":
            index_file.write_text("{")
            return "not valid JSON"
        case "only pickles":
            index_file.unlink()
            for shard in shards:
                shard.unlink()
            (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
            return "pytorch_model.bin is a pickle"
        case "a pickle named safetensors":
            torch.save(first, shards[0])
            return "cannot be read as safetensors"
        case "unknown model_type":
            (directory / "config.json").write_text(json.dumps({**config, "model_type": "gpt9"}))
            return "model_type 'gpt9' is not known"
        case "another family's names":
            (directory / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
            return "lacks"
        case "config is a list":
            (directory / "config.json").write_text("[]")
            return "not a JSON object"
        case "no directory":
            index_file.unlink()
            for file in list(directory.iterdir()):
                file.unlink()
            directory.rmdir()
            return "does not exist"


CASES = [
    "truncated file",
    "empty file",
    "header of garbage",
    "missing shard with index",
    "missing shard without index",
    "wrong dtype",
    "wrong shape",
    "missing tensor",
    "unknown tensor",
    "tensor not in the index",
    "tensor in two files",
    "index names an absent tensor",
    "index leaves its directory",
    "index names a pickle",
    "index is no JSON",
    "only pickles",
    "a pickle named safetensors",
    "unknown model_type",
    "another family's names",
    "config is a list",
    "no directory",
]


@pytest.mark.parametrize("case", CASES)
def test_a_broken_checkpoint_is_one_line_that_names_the_place(case, tmp_path):
    directory = tmp_path / "hf"
    write(oracle("llada"), directory, "llada")
    expected = broken(case, directory)
    with pytest.raises(UserError) as error:
        Weights(directory).load(ours("llada"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
