"""Qwen3's shape, and SDAR's models of it: queries and keys are normalised before they are turned.

torchtune 0.6.1 has no builder of it, and its attention normalises what is turned already.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear

from mdm_plugin.models.transformer import MDMTransformer, bidirectional, with_arguments_of
from mdm_plugin.torchtune_internals import attention_call

# SDAR-4B-Chat's config.json: Qwen3-4B, which writes blocks of 4 tokens.
SDAR_4B: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_layers": 36,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "embed_dim": 2560,
    "intermediate_dim": 9728,
}


class NormedAttention(MultiHeadAttention):
    """torchtune's attention in Qwen3's order: heads' queries and keys are normalised, then turned.

    Self-attention alone.
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Any = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; arguments as of torchtune's."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_norm(self.q_proj(x).view(heads)), self.k_norm(self.k_proj(x).view(heads))
        q, k = (self.pos_embeddings(part, input_pos=input_pos).transpose(1, 2) for part in (q, k))
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        each = self.num_heads // self.num_kv_heads
        if each > 1:
            k, v = (part.repeat_interleave(each, 1) for part in (k, v))
        found: Tensor = attention_call(self)(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        projected: Tensor = self.output_proj(found.transpose(1, 2).flatten(2))
        return projected


def qwen3(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    head_dim: int = 128,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
    shift: bool = False,
    block_length: int | None = None,
) -> MDMTransformer:
    """A model of Qwen3's shape.

    Args:
        vocab_size: number of token ids, the mask token among them.
        num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: the transformer's sizes.
        max_seq_len: longest row, prompt and response, in tokens.
        head_dim: width of a head; ``num_heads`` of them need not be ``embed_dim``.
        norm_eps: epsilon of the RMS norms.
        rope_base: base of the rotary embeddings.
        tie_word_embeddings: the head is the embeddings' matrix.
        shift, block_length: as in ``bidirectional``.

    Raises:
        ValueError: if ``num_heads`` is not a multiple of ``num_kv_heads``, or ``head_dim`` is odd.
    """
    if head_dim % 2 or num_heads % num_kv_heads:
        raise ValueError(
            f"head_dim {head_dim} is to be even, and num_heads {num_heads} a multiple of "
            f"num_kv_heads {num_kv_heads}"
        )
    rotary = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base)
    heads = num_heads, num_kv_heads, head_dim
    sizes = embed_dim, intermediate_dim, max_seq_len
    embeddings = nn.Embedding(vocab_size, embed_dim)
    head = nn.Linear(embed_dim, vocab_size, bias=False)
    decoder = TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(_layer(rotary, heads, sizes, norm_eps) for _ in range(num_layers)),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else head,
    )
    return bidirectional(decoder, shift=shift, block_length=block_length)


@with_arguments_of(qwen3)
def lora_qwen3(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    **arguments: Any,
) -> MDMTransformer:
    """``qwen3`` with low-rank adapters, which alone are trained.

    Args:
        lora_attn_modules: of ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``.
        apply_lora_to_mlp, lora_rank, lora_alpha, lora_dropout: as in ``lora_llada``.
        use_dora, quantize_base: likewise.
        arguments: ``qwen3``'s.

    Raises:
        ValueError: as ``qwen3``, and on an unknown module.
    """
    known = {"q_proj", "k_proj", "v_proj", "output_proj"}
    if not lora_attn_modules or set(lora_attn_modules) - known:
        raise ValueError(f"lora_attn_modules is {list(lora_attn_modules)}: use of {sorted(known)}")
    kind = DoRALinear if use_dora else LoRALinear
    model = qwen3(**arguments)
    for layer in model.layers:
        adapted = [(layer.attn, name) for name in lora_attn_modules]
        if apply_lora_to_mlp:
            adapted += [(layer.mlp, name) for name in ("w1", "w2", "w3")]
        for module, name in adapted:
            plain = module.get_submodule(name)
            width, out = plain.in_features, plain.out_features
            options = {"dropout": lora_dropout, "quantize_base": quantize_base}
            setattr(module, name, kind(width, out, lora_rank, lora_alpha, **options))
    return model


def _layer(
    rotary: nn.Module,
    heads: tuple[int, int, int],
    sizes: tuple[int, int, int],
    norm_eps: float,
) -> TransformerSelfAttentionLayer:
    """A layer. heads: num_heads, num_kv_heads, head_dim. sizes: embed_dim, intermediate_dim,
    max_seq_len."""
    (num_heads, num_kv_heads, head_dim), (embed_dim, hidden, max_seq_len) = heads, sizes
    linear = partial(nn.Linear, bias=False)
    attention = NormedAttention(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=linear(embed_dim, num_heads * head_dim),
        k_proj=linear(embed_dim, num_kv_heads * head_dim),
        v_proj=linear(embed_dim, num_kv_heads * head_dim),
        output_proj=linear(num_heads * head_dim, embed_dim),
        pos_embeddings=rotary,
        q_norm=RMSNorm(head_dim, norm_eps),
        k_norm=RMSNorm(head_dim, norm_eps),
        max_seq_len=max_seq_len,
    )
    mlp = FeedForward(
        gate_proj=linear(embed_dim, hidden),
        down_proj=linear(hidden, embed_dim),
        up_proj=linear(embed_dim, hidden),
    )
    before, between = RMSNorm(embed_dim, norm_eps), RMSNorm(embed_dim, norm_eps)
    return TransformerSelfAttentionLayer(attention, mlp, sa_norm=before, mlp_norm=between)


def sdar_4b(
    max_seq_len: int = 4096, block_length: int = 4, tie_word_embeddings: bool = False
) -> MDMTransformer:
    """SDAR-4B-Chat (JetAstra/SDAR): Qwen3-4B that writes blocks of 4 tokens."""
    return qwen3(
        **SDAR_4B,
        max_seq_len=max_seq_len,
        block_length=block_length,
        tie_word_embeddings=tie_word_embeddings,
    )


def lora_sdar_4b(
    lora_attn_modules: list[str],
    max_seq_len: int = 4096,
    block_length: int = 4,
    tie_word_embeddings: bool = False,
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> MDMTransformer:
    """``sdar_4b`` with adapters; arguments as of ``lora_qwen3``."""
    return lora_qwen3(
        lora_attn_modules,
        **SDAR_4B,
        max_seq_len=max_seq_len,
        block_length=block_length,
        tie_word_embeddings=tie_word_embeddings,
        apply_lora_to_mlp=apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
    )
