"""torchtune's transformer decoder with full attention, and the loss computed inside forward."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings, TransformerDecoder


class HalvesRotary(nn.Module):
    """Rotary embeddings of torchtune's Llama that turn dimension i together with i + d/2.

    torchtune's own turn 2i with 2i + 1, and it reorders the rows of Llama checkpoints' q and k to
    match. Hugging Face checkpoints are written for halves: with these no weight is reordered, so
    each rank can read its own rows of a file, and what is written is what was read.

    Args:
        angles: torchtune's module, which keeps the cosines and sines, [max_seq_len, d/2, 2].
    """

    def __init__(self, angles: nn.Module) -> None:
        super().__init__()
        self.angles = angles

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """x [B, L, H, d] turned by its positions, 0..L−1 or ``input_pos`` [B, L]; x's dtype."""
        cache = cast(Tensor, self.angles.cache)
        turn = cache[: x.shape[1]] if input_pos is None else cache[input_pos]
        cos, sin = turn.view(-1, x.shape[1], 1, x.shape[-1] // 2, 2).unbind(-1)
        first, second = x.float().chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, -1).type_as(x)


class MDMTransformer(TransformerDecoder):
    """A ``TransformerDecoder`` in which every position attends to every position.

    Build one with ``bidirectional``. Without ``head`` it gives logits; with it, it gives
    ``head(lm_head, hidden)``. The loss runs as the head, inside this forward, because FSDP2
    holds the LM head's weights gathered only while the root module's forward and backward run.
    """

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        head: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> Any:
        """Logits [B, L, V] in fp32, or whatever ``head`` returns.

        Args:
            tokens: [B, L], long.
            mask: which positions may be attended to, bool, [B, L, L] or [B, 1, L]; None for all.
            input_pos: [B, L], positions for rotary embeddings; None for 0..L−1.
            head: called with the LM head [*, D] → [*, V] and the hidden states [B, L, D].

        Raises:
            ValueError: if L exceeds the model's ``max_seq_len``.
        """
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens exceeds the model's "
                f"max_seq_len, {self.max_seq_len}"
            )
        if self.layers[0].attn.is_causal and mask is not None:
            # An explicit mask replaces the layers' own.
            length = tokens.shape[1]
            mask = mask & mask.new_ones(length, length).tril()
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        h = self.norm(h)
        return self.output(h).float() if head is None else head(self.output, h)


def bidirectional(decoder: TransformerDecoder, causal: bool = False) -> MDMTransformer:
    """Any torchtune decoder made an ``MDMTransformer``, with the same layers and parameters.

    Its parameters are laid out as in Hugging Face checkpoints (``HalvesRotary``). ``causal`` keeps
    each position from attending to later ones: an autoregressive model.
    """
    rotary = decoder.layers[0].attn.pos_embeddings
    if isinstance(rotary, RotaryPositionalEmbeddings | Llama3ScaledRoPE):
        rotary = HalvesRotary(rotary)
    for layer in decoder.layers:
        layer.attn.is_causal = causal
        layer.attn.pos_embeddings = rotary
    return MDMTransformer(
        tok_embeddings=decoder.tok_embeddings,
        layers=decoder.layers,
        max_seq_len=decoder.max_seq_len,
        num_heads=decoder.num_heads,
        head_dim=decoder.head_dim,
        norm=decoder.norm,
        output=decoder.output,
    )


def check_heads(embed_dim: int, num_heads: int, num_kv_heads: int | None) -> int:
    """The number of heads of keys and values; None for ``num_heads``.

    Raises:
        ValueError: if the heads do not fit each other or ``embed_dim``.
    """
    if embed_dim % (2 * num_heads):
        raise ValueError(
            f"embed_dim {embed_dim} does not split into {num_heads} heads of an even size"
        )
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    return num_kv_heads
