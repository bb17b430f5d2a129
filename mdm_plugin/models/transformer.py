"""torchtune's transformer decoder with full attention, and the loss computed inside forward."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from mdm_plugin.loss import LinearHead
from mdm_plugin.models.blocks import BlockAttention, PackedBlocks
from mdm_plugin.torchtune_internals import wrap_attention_call

# torchtune's rotary embeddings of text models: Llama's and others', Llama 3.1's, Qwen's and Phi's.
ROTARY = (
    RotaryPositionalEmbeddings,
    Llama3ScaledRoPE,
    Qwen2RotaryPositionalEmbeddings,
    Phi3RotaryPositionalEmbeddings,
)


InBlocks = BlockAttention | PackedBlocks


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


def segmented(call: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
    """torchtune's attention ``call``, for rows in one sequence too: a mask [S] of their lengths;
    and for rows in blocks (``BlockAttention``).

    Each row then attends to itself alone, by one call for each: the work is that of the rows, not
    of the square of the sequence. On CUDA a ``BlockMask`` does that (``row_mask``), by torchtune's
    call.
    """

    @torch.compiler.disable
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, dropout: float) -> Tensor:
        sizes = lengths.tolist()
        found = [
            F.scaled_dot_product_attention(a, b, c, dropout_p=dropout, is_causal=causal)
            for a, b, c in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
        ]
        return torch.cat(found, 2)

    @torch.compiler.disable
    def in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: InBlocks, dropout: float) -> Tensor:
        return mask(q, k, v, dropout)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float, is_causal: bool
    ) -> Tensor:
        if isinstance(mask, Tensor) and mask.dtype == torch.long:
            return attend(q, k, v, mask, dropout_p)
        if isinstance(mask, InBlocks):
            if mask.block_mask is None:
                return in_blocks(q, k, v, mask, dropout_p)
            mask = mask.block_mask
        return call(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)

    return attention


def row_mask(lengths: Tensor, device: torch.device, causal: bool = False) -> Any:
    """What keeps rows of these lengths, one after another in a sequence, apart.

    lengths [S], long, on the CPU. They themselves, but on CUDA flex attention's ``BlockMask``, for
    which their sum must be a multiple of 128.
    """
    return flex_row_mask(lengths, device, causal) if device.type == "cuda" else lengths


def flex_row_mask(lengths: Tensor, device: torch.device, causal: bool = False) -> Any:
    """The ``BlockMask`` of ``row_mask``, on any device; on a CPU it is made eagerly."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)

    def same(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = row[query] == row[key]
        return allowed & (query >= key) if causal else allowed

    total = int(lengths.sum())
    return create_block_mask(
        same, 1, None, total, total, device=str(device), _compile=device.type == "cuda"
    )


class LastLayer(TransformerSelfAttentionLayer):
    """A layer whose MLP runs where it is needed: after it, no position looks at another one."""

    def forward(
        self,
        x: Tensor,
        *,
        mask: Any = None,
        input_pos: Tensor | None = None,
        positions: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, L, D]; or [M, D], of ``positions`` [M] of the flattened [B · L]."""
        normed = self.sa_norm(x)
        h = self.sa_scale(self.attn(normed, normed, mask=mask, input_pos=input_pos)) + x
        if positions is not None:
            h = h.flatten(0, 1).index_select(0, positions)
        return h + self.mlp_scale(self.mlp(self.mlp_norm(h)))


class MDMTransformer(TransformerDecoder):
    """A ``TransformerDecoder`` in which every position attends to every position.

    Build one with ``bidirectional``. Without ``head`` it gives logits; with it, it gives
    ``head(lm_head, hidden)``. The loss runs as the head, inside this forward, because FSDP2
    holds the LM head's weights gathered only while the root module's forward and backward run.

    Attributes:
        shift: the weights predict the token at i from position i − 1, as autoregressive models and
            Dream do; a row's first token from its own position, as in Dream's released code.
        new_tokens: rows that the embeddings and the head have more than the checkpoint that they
            are filled from.
        block_length: S of block diffusion (``BlockAttention``): text is written block by block, and
            a block does not see later ones. None for a model without blocks.
    """

    shift: bool = False
    new_tokens: int = 0
    block_length: int | None = None

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Any = None,
        input_pos: Tensor | None = None,
        positions: Tensor | None = None,
        head: Callable[[Any, Tensor], Any] | None = None,
    ) -> Any:
        """Logits [B, L, V] in fp32, or whatever ``head`` returns.

        Args:
            tokens: [B, L], long.
            mask: which positions may be attended to, bool, [B, L, L] or [B, 1, L]; None for all;
                or, with B = 1, what ``row_mask`` gives for the rows that the sequence is made of;
                or the ``BlockAttention`` of rows in blocks.
            input_pos: [B, L], positions for rotary embeddings; None for 0..L−1.
            positions: [M], of the flattened [B · L], which are to be predicted: ``head`` gets the
                hidden states that the model predicts them from. None for all hidden states, each
                at its own place.
            head: called with the LM head [*, D] → [*, V] and the hidden states, [B, L, D], or
                [M, D] with ``positions``.

        Raises:
            ValueError: if L exceeds the model's ``max_seq_len``, where ``input_pos`` is None.
        """
        if input_pos is None and tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens exceeds the model's "
                f"max_seq_len, {self.max_seq_len}"
            )
        if self.layers[0].attn.is_causal and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            # An explicit mask replaces the layers' own.
            length = tokens.shape[1]
            mask = mask & mask.new_ones(length, length).tril()
        if positions is not None and self.shift:
            if isinstance(mask, InBlocks):
                positions = mask.before(positions)
            else:
                positions = positions - self._has_one_before(positions, tokens.shape[1], input_pos)
        h = self.tok_embeddings(tokens)
        *before, last = self.layers
        for layer in before:
            h = layer(h, mask=mask, input_pos=input_pos)
        h = last(h, mask=mask, input_pos=input_pos, positions=positions)
        if positions is not None and h.ndim == 3:
            h = h.flatten(0, 1).index_select(0, positions)
        h = self.norm(h)
        return self.output(h).float() if head is None else head(self.lm_head, h)

    @property
    def lm_head(self) -> nn.Module | LinearHead:
        """What turns hidden states into logits."""
        if isinstance(self.output, TiedLinear):
            return LinearHead(self.output.tied_module.weight)
        return self.output

    @staticmethod
    def _has_one_before(positions: Tensor, length: int, input_pos: Tensor | None) -> Tensor:
        """1 where a position is not the first of its row, else 0. [M], long."""
        place = positions % length if input_pos is None else input_pos.flatten()[positions]
        return (place > 0).long()


def bidirectional(
    decoder: TransformerDecoder,
    causal: bool = False,
    shift: bool = False,
    block_length: int | None = None,
) -> MDMTransformer:
    """Any torchtune decoder made an ``MDMTransformer``, with the same layers and parameters.

    Its parameters are laid out as in Hugging Face checkpoints (``HalvesRotary``). ``causal`` keeps
    each position from attending to later ones: an autoregressive model, whose predictions are
    shifted too. ``shift`` and ``block_length`` as in ``MDMTransformer``.

    Raises:
        ValueError: if ``block_length`` is below 1, given with ``causal``, or does not divide the
            longest row.
    """
    if block_length is not None and (block_length < 1 or causal):
        raise ValueError(f"block_length is {block_length}: use 1 or more, and not with causal")
    if block_length is not None and decoder.max_seq_len % block_length:
        raise ValueError(
            f"max_seq_len is {decoder.max_seq_len}: use a multiple of block_length, {block_length}"
        )
    last = decoder.layers[-1]
    decoder.layers[-1] = LastLayer(
        last.attn,
        last.mlp,
        sa_norm=last.sa_norm,
        mlp_norm=last.mlp_norm,
        sa_scale=last.sa_scale,
        mlp_scale=last.mlp_scale,
    )
    rotary = decoder.layers[0].attn.pos_embeddings
    if isinstance(rotary, RotaryPositionalEmbeddings | Llama3ScaledRoPE):
        rotary = HalvesRotary(rotary)
    for layer in decoder.layers:
        layer.attn.is_causal = causal
        layer.attn.pos_embeddings = rotary
        wrap_attention_call(layer.attn, partial(segmented, causal=causal))
    model = MDMTransformer(
        tok_embeddings=decoder.tok_embeddings,
        layers=decoder.layers,
        max_seq_len=decoder.max_seq_len,
        num_heads=decoder.num_heads,
        head_dim=decoder.head_dim,
        norm=decoder.norm,
        output=decoder.output,
    )
    model.shift = shift or causal
    model.block_length = block_length
    return model


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


def with_arguments_of(
    builder: Callable[..., Any],
) -> Callable[[Callable[..., MDMTransformer]], Callable[..., MDMTransformer]]:
    """Say, of a function that passes ``**arguments`` on to ``builder``, what these can be.

    Its signature then has ``builder``'s parameters too: so a config's key that is none of them is
    found before anything is built.
    """

    def decorate(function: Callable[..., MDMTransformer]) -> Callable[..., MDMTransformer]:
        own = dict(inspect.signature(function).parameters)
        own.popitem()  # **arguments
        passed = {
            name: p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(builder).parameters.items()
            if name not in own
        }
        signature = inspect.Signature([*own.values(), *passed.values()])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
