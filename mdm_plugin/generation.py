"""Writing text with a masked diffusion model: masked positions are filled in step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    mask_id: int,
    pad_id: int,
    max_new_tokens: int,
    steps: int | None = None,
    shift: bool = False,
) -> Tensor:
    """The model's responses, by low-confidence remasking at temperature 0.

    Each step predicts all masked positions and keeps the predictions of highest probability;
    the others stay masked (LLaDA, arXiv 2502.09992, Algorithm 5). Every step fills the same
    number of positions, the first ones one more where it does not divide.

    Args:
        model: an ``MDMTransformer``, in eval mode.
        prompts: token ids, [N_b] each; lengths may differ.
        mask_id, pad_id: token ids.
        max_new_tokens: length of every response.
        steps: number of forwards; None for ``max_new_tokens``: one position at a time.
        shift: the model predicts the token at i from position i − 1 (Dream).

    Returns:
        [B, max_new_tokens], long, on the model's device; text ends at the first EOS.

    Raises:
        ValueError: unless 1 ≤ ``steps`` ≤ ``max_new_tokens``.
    """
    steps = max_new_tokens if steps is None else steps
    if not 1 <= steps <= max_new_tokens:
        raise ValueError(f"steps is {steps}: use 1 to max_new_tokens, {max_new_tokens}")
    device = next(model.parameters()).device
    rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
    length = longest + max_new_tokens
    tokens = torch.full((rows, length), pad_id, device=device)
    attend = torch.zeros(rows, 1, length, dtype=torch.bool, device=device)
    place = torch.empty(rows, max_new_tokens, dtype=torch.long, device=device)
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        tokens[i, :n] = prompt.to(device)
        tokens[i, n : n + max_new_tokens] = mask_id
        attend[i, 0, : n + max_new_tokens] = True
        place[i] = torch.arange(n, n + max_new_tokens)
    source = (place - 1).clamp(min=0) if shift else place
    row = torch.arange(rows, device=device)[:, None]

    for step in range(steps):
        logits = model(tokens, mask=attend, head=lambda head, h: head(h[row, source]).float())
        logits[..., mask_id] = -torch.inf  # the mask token is no prediction
        confidence, prediction = logits.softmax(-1).max(-1)
        response = tokens[row, place]
        masked = response == mask_id
        confidence = confidence.masked_fill(~masked, -torch.inf)
        count = max_new_tokens // steps + (step < max_new_tokens % steps)
        chosen = confidence.topk(count, dim=1).indices
        response = response.scatter(1, chosen, prediction.gather(1, chosen))
        tokens[row, place] = response
    return tokens[row, place]
