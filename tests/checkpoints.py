"""Hugging Face checkpoints of small random models, written by transformers, and those models."""

import json
import shutil
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

# transformers' model of each family's shape, and what its config.json says in the place of that's.
SHAPES = {
    **dict.fromkeys(("llada", "llama"), "Llama"),
    **dict.fromkeys(("Dream", "qwen2", "Fast_dLLM_Qwen"), "Qwen2"),
    "sdar": "Qwen3",
}
STATED = {
    "Dream": {"model_type": "Dream"},
    "sdar": {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4},
    "Fast_dLLM_Qwen": {
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "bd_size": 8,
    },
}
HEAD_DIM = 24  # of Qwen3's shape, in which heads need not make up the width

DREAM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
MASK_TOKENS = {"Dream": "<|mask|>", "sdar": "<|MASK|>", "Fast_dLLM_Qwen": "|<MASK>|"}
DREAM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def oracle(family: str, kv_heads: int = 4, dtype=torch.float32, **sizes):
    """transformers' model of the shape: Llama for LLaDA, Qwen2 for Dream, Qwen3 for SDAR."""
    import transformers

    kind = SHAPES[family]
    sizes = {"head_dim": HEAD_DIM, **sizes} if kind == "Qwen3" else sizes
    config = getattr(transformers, f"{kind}Config")(
        **{"tie_word_embeddings": False, **SIZES, **sizes},
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5 if family == "llada" else 1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500_000.0 if family == "llada" else 1_000_000.0,
        },
        max_position_embeddings=64,
        attn_implementation="eager",
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
    config |= STATED.get(family, {})
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


def write_tokenizer(directory: Path, family: str, texts: list[str], data_dir: Path) -> None:
    """The quickstart's tokenizer, as LLaDA's checkpoints have theirs; or one that is trained on
    ``texts``, as Dream's and those with blocks have it: vocab.json and merges.txt, code of its own,
    no tokenizer.json."""
    if family == "llada":
        settings = json.loads((data_dir / "tokenizer_config.json").read_text())
        del settings["mask_token"]  # the config names it
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        shutil.copy(data_dir / "tokenizer.json", directory)
        return
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=600)
    trained.save_model(str(directory))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(i): {"content": token, "special": True, **flags}
        for i, token in enumerate(
            [*DREAM_TOKENS[:-1], MASK_TOKENS[family]], trained.get_vocab_size()
        )
    }
    settings = {
        "added_tokens_decoder": dict(reversed(added.items())),
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": DREAM_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "mask_token": MASK_TOKENS[family],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenization_dream.py").write_text("raise SystemExit('not to be run')\n")


def as_llada(truth):
    """transformers' Llama with its modules under LLaDA's names, as its remote code has them."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.transformer = torch.nn.Module()
            self.model.transformer.blocks = torch.nn.ModuleList()
            for layer in truth.model.layers:
                block = torch.nn.Module()
                block.q_proj, block.k_proj = layer.self_attn.q_proj, layer.self_attn.k_proj
                block.v_proj, block.attn_out = layer.self_attn.v_proj, layer.self_attn.o_proj
                block.ff_proj, block.up_proj = layer.mlp.gate_proj, layer.mlp.up_proj
                block.ff_out = layer.mlp.down_proj
                self.model.transformer.blocks.append(block)
            self.model.transformer.ff_out = truth.lm_head
            self.config, self.dtype = truth.config, truth.dtype

        def forward(self, *args, **kwargs):
            for layer, block in zip(truth.model.layers, self.model.transformer.blocks, strict=True):
                attn, mlp = layer.self_attn, layer.mlp
                attn.q_proj, attn.k_proj = block.q_proj, block.k_proj
                attn.v_proj, attn.o_proj = block.v_proj, block.attn_out
                mlp.gate_proj, mlp.up_proj = block.ff_proj, block.up_proj
                mlp.down_proj = block.ff_out
            return truth(*args, **kwargs)

        def prepare_inputs_for_generation(self, *args, **kwargs):
            raise NotImplementedError

    return Named()


def opened_by_transformers(directory: Path, family: str, copy: Path, **sizes):
    """A checkpoint in transformers, fp32: Dream's as the Qwen2 that it is, SDAR's as Qwen3; LLaDA's
    in Llama, by the names of its tensors, as transformers has no model of it."""
    import transformers

    if family == "llada":
        model = oracle(family, **sizes)
        back = {rename(name): name for name in model.state_dict()}
        model.load_state_dict({back[name]: x.float() for name, x in tensors(directory).items()})
        return model
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    kind = SHAPES[family]
    (copy / "config.json").write_text(json.dumps({**config, "model_type": kind.lower()}))
    return (
        getattr(transformers, f"{kind}ForCausalLM")
        .from_pretrained(copy, attn_implementation="eager", dtype=torch.float32)
        .eval()
    )
