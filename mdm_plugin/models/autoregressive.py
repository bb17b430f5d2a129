"""Autoregressive models made masked diffusion models: full attention, and a mask token."""

from typing import Any

from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder

from mdm_plugin.models.transformer import MDMTransformer, bidirectional
from mdm_plugin.torchtune_internals import component_from_path


def from_autoregressive(
    builder: str,
    new_tokens: int = 0,
    shift: bool = False,
    block_length: int | None = None,
    **arguments: Any,
) -> MDMTransformer:
    """A torchtune Llama or Qwen model with full attention, to go on from its weights.

    As Dream was made from Qwen2.5, and dLLM's A2D makes others. Its logits at i were trained to
    predict the token at i + 1.

    Args:
        builder: dotted path of torchtune's builder, e.g. ``torchtune.models.qwen2_5.
            qwen2_5_0_5b`` or ``torchtune.models.llama3_2.lora_llama3_2_1b``.
        new_tokens: rows to add to the embeddings and to the head, where the vocabulary has no
            unused id for the mask token. They begin as the mean of the others.
        shift: True keeps that use of them; False has the model learn to predict in place.
        block_length: as in ``bidirectional``: full attention within blocks, and to earlier ones.
        arguments: the builder's own.

    Raises:
        ValueError: if ``new_tokens`` is below 0, or the model is no decoder, or its head
            has an adapter and cannot grow.
    """
    if new_tokens < 0:
        raise ValueError(f"new_tokens is {new_tokens}: use 0 or more")
    decoder = component_from_path(builder)(**arguments)
    if not isinstance(decoder, TransformerDecoder):
        raise ValueError(f"builder {builder} builds a {type(decoder).__name__}, not a decoder")
    if new_tokens:
        old = decoder.tok_embeddings
        size = old.num_embeddings + new_tokens
        decoder.tok_embeddings = nn.Embedding(size, old.embedding_dim)
        if isinstance(decoder.output, TiedLinear):
            decoder.output = TiedLinear(decoder.tok_embeddings)
        elif type(decoder.output) is nn.Linear:
            decoder.output = nn.Linear(old.embedding_dim, size, bias=False)
        else:
            raise ValueError("new_tokens: a head with an adapter cannot grow")
    model = bidirectional(decoder, shift=shift, block_length=block_length)
    model.new_tokens = new_tokens
    return model
