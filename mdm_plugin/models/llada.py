"""LLaDA (arXiv 2502.09992): Llama with full attention, without biases, with an untied head."""

from functools import partial
from typing import Any

from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.modules import RotaryPositionalEmbeddings

from mdm_plugin.models.transformer import (
    MDMTransformer,
    bidirectional,
    check_heads,
    with_arguments_of,
)

# LLaDA-8B Base and Instruct, and LLaDA 1.5: their config.json.
LLADA_8B: dict[str, Any] = {
    "vocab_size": 126_464,
    "num_layers": 32,
    "num_heads": 32,
    "embed_dim": 4096,
    "intermediate_dim": 12_288,
}


def llada(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    num_kv_heads: int | None = None,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    causal: bool = False,
    shift: bool = False,
    block_length: int | None = None,
) -> MDMTransformer:
    """A model of LLaDA's shape.

    Args:
        vocab_size: number of token ids, the mask token among them.
        num_layers, num_heads, embed_dim, intermediate_dim: the transformer's sizes.
        max_seq_len: longest row, prompt and response, in tokens.
        num_kv_heads: heads of keys and values; None for ``num_heads``.
        attn_dropout: dropout on attention weights.
        norm_eps: epsilon of the RMS norms.
        rope_base: base of the rotary embeddings.
        causal: an autoregressive model of the same shape, to compare with (``masking.NextToken``).
        shift, block_length: as in ``bidirectional``.

    Raises:
        ValueError: if ``embed_dim`` is not ``num_heads`` even-sized heads, or ``num_heads``
            not a multiple of ``num_kv_heads``.
    """
    num_kv_heads = check_heads(embed_dim, num_heads, num_kv_heads)
    return bidirectional(
        llama2(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            embed_dim=embed_dim,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
            intermediate_dim=intermediate_dim,
            norm_eps=norm_eps,
            rope_base=rope_base,
        ),
        causal,
        shift,
        block_length=block_length,
    )


@with_arguments_of(lora_llama2)
def lora_llada(
    lora_attn_modules: list[str],
    num_kv_heads: int | None = None,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    shift: bool = False,
    block_length: int | None = None,
    **arguments: Any,
) -> MDMTransformer:
    """``llada`` with low-rank adapters, which alone are trained.

    Args:
        lora_attn_modules: of ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``.
        num_kv_heads, norm_eps, rope_base, shift, block_length: as in ``llada``.
        arguments: ``llada``'s others, and torchtune's for adapters: ``apply_lora_to_mlp`` and
            ``apply_lora_to_output``; ``lora_rank``, ``lora_alpha`` and ``lora_dropout``: r, α (the
            adapter's factor is α/r) and dropout; ``use_dora``: a learnt magnitude per output;
            ``quantize_base``: QLoRA, the linear layers' own weights in NF4 (not the head's).

    Raises:
        ValueError: as ``llada``.
    """
    embed_dim, num_heads = arguments["embed_dim"], arguments["num_heads"]
    decoder = lora_llama2(
        list(lora_attn_modules),
        num_kv_heads=check_heads(embed_dim, num_heads, num_kv_heads),
        norm_eps=norm_eps,
        **arguments,
    )
    # lora_llama2 has no argument for the base.
    length = arguments["max_seq_len"]
    rotary = RotaryPositionalEmbeddings(embed_dim // num_heads, length, int(rope_base))
    for layer in decoder.layers:
        layer.attn.pos_embeddings = rotary
    return bidirectional(decoder, shift=shift, block_length=block_length)


def llada_8b(max_seq_len: int = 4096) -> MDMTransformer:
    """LLaDA-8B Base or Instruct, or LLaDA 1.5: 8.02 B parameters, trained at 4,096 tokens."""
    return llada(**LLADA_8B, max_seq_len=max_seq_len)


def lora_llada_8b(
    lora_attn_modules: list[str], max_seq_len: int = 4096, **arguments: Any
) -> MDMTransformer:
    """``llada_8b`` with adapters; ``arguments`` are those of ``lora_llada``."""
    return lora_llada(lora_attn_modules, **LLADA_8B, max_seq_len=max_seq_len, **arguments)


qlora_llada_8b = partial(lora_llada_8b, quantize_base=True)
"""``lora_llada_8b`` on an NF4 base."""
