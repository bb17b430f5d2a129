"""Names of tensors: Hugging Face's and torchtune's, both ways."""

import re

# torchtune's modules of a layer, and what the families' checkpoints call them.
_LLAMA = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_LLADA = {
    "attn.q_proj": "q_proj",
    "attn.k_proj": "k_proj",
    "attn.v_proj": "v_proj",
    "attn.output_proj": "attn_out",
    "mlp.w1": "ff_proj",
    "mlp.w2": "ff_out",
    "mlp.w3": "up_proj",
    "sa_norm": "attn_norm",
    "mlp_norm": "ff_norm",
}
# The rest of the model, and what precedes a layer's number.
_LLAMA_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LLADA_TOP = {
    "tok_embeddings": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "output": "model.transformer.ff_out",
}
ADAPTERS = {  # an adapter's tensors, and PEFT's names of them
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_OURS = re.compile(
    r"(?:layers\.(\d+)\.)?(.+?)\.(weight|bias|scale|lora_a\.weight|lora_b\.weight|magnitude)"
)


class Naming:
    """The names of one family of Hugging Face checkpoints.

    Args:
        layers: what precedes a layer's number, with its dot.
        inner: torchtune's modules of a layer → theirs.
        outer: the other modules → theirs.
    """

    def __init__(self, layers: str, inner: dict[str, str], outer: dict[str, str]) -> None:
        self.layers, self.inner, self.outer = layers, inner, outer

    def module(self, ours: str) -> str:
        """Last part of their name of a module of torchtune's, e.g. ``o_proj`` for output_proj."""
        found = {k.rpartition(".")[2]: v for k, v in (self.inner | self.outer).items()}
        return found[ours].rpartition(".")[2]

    def to_hf(self, name: str) -> str:
        """Their name of a parameter of torchtune's.

        Raises:
            KeyError: if the family has no such parameter.
        """
        match = _OURS.fullmatch(name)
        if match is None:
            raise KeyError(name)
        layer, module, kind = match.groups()
        kind = "weight" if kind == "scale" else ADAPTERS.get(kind, kind)
        if layer is None:
            return f"{self.outer[module]}.{kind}"
        return f"{self.layers}{layer}.{self.inner[module]}.{kind}"


_LIKE_LLAMA = Naming("model.layers.", _LLAMA, _LLAMA_TOP)
# By the model_type of config.json.
FAMILIES = {
    "llada": Naming("model.transformer.blocks.", _LLADA, _LLADA_TOP),
    "Dream": _LIKE_LLAMA,
    "llama": _LIKE_LLAMA,
    "qwen2": _LIKE_LLAMA,
    "qwen3": _LIKE_LLAMA,
    "sdar": _LIKE_LLAMA,
    "Fast_dLLM_Qwen": _LIKE_LLAMA,
}
# What their config.json calls the tokens of a block: SDAR's, Fast-dLLM's.
BLOCK_LENGTH = ("block_size", "bd_size")
