"""How far a cache takes what is sampled from what the model would have sampled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.masked import MaskedRows, SpecialTokens
from mdm_plugin.generation.writing import Step
from mdm_plugin.models import MDMTransformer


class Moments:
    """When each token of B responses of n was written, and how likely it was to the sampler then.

    Its ``add`` is ``generate``'s on_step.

    steps: how many there were. number: [B, n], the step that has put a token; ``steps`` or more
    where none has, but an EOS before it. tokens: [B, n], what was put. log_p: [B, n], nats.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.number, self.tokens, self.log_p = (torch.empty(0) for _ in range(3))

    def add(self, step: Step) -> None:
        """Take in what a step has done."""
        if not self.steps:
            self.number = torch.full_like(step.response, torch.iinfo(torch.long).max)
            self.tokens = torch.zeros_like(step.response)
            self.log_p = torch.zeros_like(step.confidence)
        self.number[step.put] = self.steps
        self.tokens[step.put] = step.response[step.put]
        self.log_p[step.put] = step.confidence[step.put].clamp(min=1e-38).log()
        self.steps += 1

    def before(self, places: Tensor, mask_id: int) -> Tensor:
        """The responses as they were before the steps that put the tokens at ``places`` [B].
        [B, n], on the CPU. Of a token that was put, no EOS had yet been written over others."""
        at = self.number.gather(1, places.to(self.number.device)[:, None])
        return self.tokens.masked_fill(self.number >= at, mask_id).cpu()


@torch.no_grad()
def cache_gap(
    model: MDMTransformer,
    prompts: Sequence[Sequence[int]],
    moments: Moments,
    places: Tensor,
    decoding: Decoding,
    special: SpecialTokens,
) -> Tensor:
    """|log p by the sampler − log p by the model without a cache|, nats, of a token of each row.

    Both are of the same token in the same masked row, guided where the decoding is, and before
    temperature, top-p and top-k. It is one forward over the rows. [B], on the CPU. 0, to rounding,
    where the step had a whole forward.

    Args:
        model: as it was when it wrote, in eval mode.
        prompts: of the rows.
        moments: of their writing.
        places: [B], of tokens that were put; from 0 in the response.
        decoding: they were written by.
        special: the tokenizer, or ``TokenIds``.
    """
    states = moments.before(places, special.mask_id)
    rows = [torch.cat((torch.tensor(x), y)) for x, y in zip(prompts, states, strict=True)]
    lengths = torch.tensor([len(x) for x in prompts])
    where = (lengths + places)[:, None]
    batch = MaskedRows(model, rows, where, where >= 0, lengths, special)
    logits = batch.logits(slice(0, 1), decoding, None, fresh=True)
    device = logits.device
    tokens = moments.tokens.gather(1, places.to(device)[:, None])
    exact = logits[:, 0].log_softmax(-1).gather(1, tokens)
    return (moments.log_p.gather(1, places.to(device)[:, None]) - exact)[:, 0].abs().double().cpu()
