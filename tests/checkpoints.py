"""Hugging Face checkpoints of small random models, written by transformers, and those models."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
OURS = {
    "vocab_size": 97,
    "embed_dim": 64,
    "intermediate_dim": 160,
    "num_layers": 3,
    "num_heads": 4,
    "max_seq_len": 32,
}
TO_LLADA = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
}


def oracle(family: str, kv_heads: int = 4, dtype=torch.float32, **sizes):
    """transformers' model of the shape: Llama for LLaDA, Qwen2 for Dream."""
    import transformers

    kind = "Llama" if family in ("llada", "llama") else "Qwen2"
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, **sizes},
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5 if family == "llada" else 1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500_000.0 if family == "llada" else 1_000_000.0,
        },
        max_position_embeddings=64,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def full_attention(model, tokens):
    """transformers' logits without its causal mask."""
    length = tokens.shape[1]
    mask = torch.zeros(len(tokens), 1, length, length, dtype=model.dtype)
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits.float()


def write(model, directory: Path, family: str, shard_size="40KB") -> None:
    """Write ``model`` as a checkpoint of ``family``, in shards with an index."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    config = json.loads((directory / "config.json").read_text())
    if family == "Dream":
        config["model_type"] = "Dream"
    if family == "llada":
        # LLaDA's own names and keys; transformers has no LLaDA to write them.
        config = {
            "model_type": "llada",
            "vocab_size": config["vocab_size"],
            "embedding_size": config["vocab_size"],
            "d_model": config["hidden_size"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"],
            "n_layers": config["num_hidden_layers"],
            "mlp_hidden_size": config["intermediate_size"],
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
            "mask_token_id": 1,
            "torch_dtype": config["dtype"],
        }
        index_file = directory / "model.safetensors.index.json"
        for file in directory.glob("*.safetensors"):
            tensors = {rename(name): x.clone() for name, x in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        if index_file.is_file():
            index = json.loads(index_file.read_text())
            index["weight_map"] = {rename(k): v for k, v in index["weight_map"].items()}
            index_file.write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


def rename(name: str) -> str:
    for theirs, llada in TO_LLADA.items():
        name = name.replace(theirs, llada)
    return name


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, adapters apart."""
    files = (f for f in directory.glob("*.safetensors") if f.name != "adapter_model.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}
