"""torchtune's transformer decoder with full attention, and the loss computed inside forward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchtune.modules import TransformerDecoder


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

    ``causal`` keeps each position from attending to later ones: an autoregressive model.
    """
    for layer in decoder.layers:
        layer.attn.is_causal = causal
    return MDMTransformer(
        tok_embeddings=decoder.tok_embeddings,
        layers=decoder.layers,
        max_seq_len=decoder.max_seq_len,
        num_heads=decoder.num_heads,
        head_dim=decoder.head_dim,
        norm=decoder.norm,
        output=decoder.output,
    )
