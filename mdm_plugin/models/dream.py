"""Dream (arXiv 2508.15487): Qwen2.5 made bidirectional; its logits are shifted by one.

The token at i is predicted from position i − 1: ``MDMTransformer.shift`` says so to all its users.
"""

from functools import partial
from typing import Any

from torchtune.models.qwen2 import lora_qwen2, qwen2

from mdm_plugin.models.transformer import (
    MDMTransformer,
    bidirectional,
    check_heads,
    with_arguments_of,
)

# Dream-v0 7B Base and Instruct: their config.json.
DREAM_7B: dict[str, Any] = {
    "vocab_size": 152_064,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "embed_dim": 3584,
    "intermediate_dim": 18_944,
    "norm_eps": 1e-6,
}


def dream(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    block_length: int | None = None,
) -> MDMTransformer:
    """A model of Dream's shape: grouped-query attention, biases on q, k and v, an untied head.

    Args:
        vocab_size: number of token ids, the mask token among them.
        num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: the transformer's sizes.
        max_seq_len: longest row, prompt and response, in tokens.
        attn_dropout: dropout on attention weights.
        norm_eps: epsilon of the RMS norms.
        rope_base: base of the rotary embeddings.
        block_length: as in ``bidirectional``: Fast-dLLM v2's models are of this shape with blocks.

    Raises:
        ValueError: if ``embed_dim`` is not ``num_heads`` even-sized heads, or ``num_heads``
            not a multiple of ``num_kv_heads``.
    """
    check_heads(embed_dim, num_heads, num_kv_heads)
    return bidirectional(
        qwen2(
            vocab_size=vocab_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            embed_dim=embed_dim,
            intermediate_dim=intermediate_dim,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
            norm_eps=norm_eps,
            rope_base=rope_base,
        ),
        shift=True,
        block_length=block_length,
    )


@with_arguments_of(lora_qwen2)
def lora_dream(
    lora_attn_modules: list[str],
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    block_length: int | None = None,
    **arguments: Any,
) -> MDMTransformer:
    """``dream`` with low-rank adapters, which alone are trained; arguments as of ``lora_llada``.

    Raises:
        ValueError: as ``dream``.
    """
    check_heads(arguments["embed_dim"], arguments["num_heads"], arguments["num_kv_heads"])
    decoder = lora_qwen2(
        list(lora_attn_modules), norm_eps=norm_eps, rope_base=rope_base, **arguments
    )
    return bidirectional(decoder, shift=True, block_length=block_length)


def dream_7b(max_seq_len: int = 2048) -> MDMTransformer:
    """Dream-v0 7B Base or Instruct: 7.62 B parameters, trained at 2,048 tokens."""
    return dream(**DREAM_7B, max_seq_len=max_seq_len)


def lora_dream_7b(
    lora_attn_modules: list[str], max_seq_len: int = 2048, **arguments: Any
) -> MDMTransformer:
    """``dream_7b`` with adapters; ``arguments`` are those of ``lora_dream``."""
    return lora_dream(lora_attn_modules, **DREAM_7B, max_seq_len=max_seq_len, **arguments)


qlora_dream_7b = partial(lora_dream_7b, quantize_base=True)
"""``lora_dream_7b`` on an NF4 base."""


# Fast_dLLM_v2_7B's config.json: Qwen2.5-7B-Instruct, which writes blocks of 32 tokens.
FAST_DLLM_7B: dict[str, Any] = {**DREAM_7B, "block_length": 32}


def fast_dllm_7b(max_seq_len: int = 2048) -> MDMTransformer:
    """Fast-dLLM v2 7B (arXiv 2509.26328): shifted as Dream is, in blocks of 32."""
    return dream(**FAST_DLLM_7B, max_seq_len=max_seq_len)


def lora_fast_dllm_7b(
    lora_attn_modules: list[str], max_seq_len: int = 2048, **arguments: Any
) -> MDMTransformer:
    """``fast_dllm_7b`` with adapters; ``arguments`` are those of ``lora_dream``."""
    return lora_dream(lora_attn_modules, **FAST_DLLM_7B, max_seq_len=max_seq_len, **arguments)
