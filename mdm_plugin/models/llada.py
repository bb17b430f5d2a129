"""LLaDA (arXiv 2502.09992): Llama with full attention, without biases, with an untied head."""

from torchtune.models.llama2 import llama2

from mdm_plugin.models.transformer import MDMTransformer, bidirectional


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
) -> MDMTransformer:
    """A model of LLaDA's shape.

    LLaDA-8B is vocab_size 126464, num_layers 32, num_heads 32, embed_dim 4096,
    intermediate_dim 12288.

    Args:
        vocab_size: number of token ids, the mask token among them.
        num_layers, num_heads, embed_dim, intermediate_dim: the transformer's sizes.
        max_seq_len: longest row, prompt and response, in tokens.
        num_kv_heads: heads of keys and values; None for ``num_heads``.
        attn_dropout: dropout on attention weights.
        norm_eps: epsilon of the RMS norms.
        rope_base: base of the rotary embeddings.
        causal: an autoregressive model of the same shape, to compare with (``masking.NextToken``).

    Raises:
        ValueError: if ``embed_dim`` is not ``num_heads`` even-sized heads, or ``num_heads``
            not a multiple of ``num_kv_heads``.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if embed_dim % (2 * num_heads):
        raise ValueError(
            f"embed_dim {embed_dim} does not split into {num_heads} heads of an even size"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
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
    )
