"""Whether a text is the one that a model would write."""

from collections.abc import Sequence

import torch

from mdm_plugin.generation.blocks import BlockRows, write_blocks
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.masked import MaskedRows, SpecialTokens, TokenIds
from mdm_plugin.models import MDMTransformer


@torch.no_grad()
def is_greedy(
    model: MDMTransformer,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Sequence[int]]],
    special: SpecialTokens,
) -> list[list[bool]]:
    """Whether each text is what the model writes after its prompt, one token a step.

    That is what ``generate`` writes by default, in as many steps as tokens: each fills in the
    position that the model is surest of with the likeliest token. Texts of one prompt are followed
    together, and a prompt is done with the first token that none of them has: most are after a
    forward or two.

    Args:
        model: in eval mode.
        prompts: token ids, one or more each.
        texts: of each prompt, token ids, all as long as each other. EOS is a token like any other.
        special: the tokenizer, or ``TokenIds``.
    """
    if model.block_length:
        return _written_in_blocks(model, prompts, texts, special)
    rows = [
        torch.tensor([*prompt, *[special.mask_id] * len(of_prompt[0])])
        for prompt, of_prompt in zip(prompts, texts, strict=True)
    ]
    references = [torch.tensor(of_prompt) for of_prompt in texts]
    same = [torch.ones(len(x), dtype=torch.bool) for x in references]
    left = list(range(len(rows)))
    while left:
        batch = MaskedRows.of(model, [rows[b] for b in left], special)
        logits = batch.logits(slice(0, batch.places.shape[1]), Decoding(), None, fresh=True)
        likeliest = logits.softmax(-1).max(-1)
        surest = likeliest.values.masked_fill(~batch.valid, -1).argmax(1, keepdim=True)
        places, tokens = (x.gather(1, surest)[:, 0] for x in (batch.places, likeliest.indices))
        for b, place, token in zip(left, places.tolist(), tokens.tolist(), strict=True):
            rows[b][place] = token
            same[b] &= references[b][:, place - len(prompts[b])] == token
        left = [b for b in left if same[b].any() and (rows[b] == special.mask_id).any()]
    return [x.tolist() for x in same]


def _written_in_blocks(
    model: MDMTransformer,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Sequence[int]]],
    special: SpecialTokens,
) -> list[list[bool]]:
    """The same of a model that writes block by block: what it writes, beside the texts."""
    endless = TokenIds(special.mask_id, special.pad_id)
    found: list[list[bool]] = [[] for _ in prompts]
    lengths = [len(of_prompt[0]) for of_prompt in texts]
    for length in sorted(set(lengths)):
        own = [i for i, n in enumerate(lengths) if n == length]
        rows = BlockRows(model, [torch.tensor(prompts[i]) for i in own], length, endless)
        written = write_blocks(rows, Decoding(cache="prefix"), range(len(own)), None).tokens
        for i, tokens in zip(own, written.tolist(), strict=True):
            found[i] = [list(text) == tokens for text in texts[i]]
    return found
