import pytest
import torch

from mdm_plugin.generation import generate
from mdm_plugin.models import llada

MASK, PAD = 95, 94


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return llada(
        vocab_size=96, num_layers=2, num_heads=2, embed_dim=32, intermediate_dim=64, max_seq_len=64
    ).eval()


def reference(model, prompt, length, steps, shift=False):
    """The plain loop for one prompt: LLaDA's low-confidence remasking, without padding."""
    x = torch.cat((prompt, torch.full((length,), MASK)))
    for step in range(steps):
        with torch.no_grad():
            logits = model(x[None])[0]
        if shift:
            logits = torch.cat((logits[:1], logits[:-1]))
        logits[:, MASK] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        confidence[x != MASK] = -1
        for i in confidence.argsort(descending=True)[: length // steps + (step < length % steps)]:
            x[i] = best[i]
    return x[len(prompt) :]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("length", "steps"), [(8, 8), (8, 4), (7, 3), (5, 1)])
def test_equals_the_plain_loop_for_prompts_of_different_lengths(model, length, steps, shift):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(90, (n,), generator=generator) for n in (3, 9, 5, 12)]
    ids = {"mask_id": MASK, "pad_id": PAD}
    written = generate(model, prompts, max_new_tokens=length, steps=steps, shift=shift, **ids)
    for prompt, row in zip(prompts, written, strict=True):
        assert row.tolist() == reference(model, prompt, length, steps, shift).tolist()


def test_no_mask_token_is_left_or_predicted(model):
    written = generate(
        model, [torch.arange(4)], mask_id=MASK, pad_id=PAD, max_new_tokens=20, steps=7
    )
    assert (written != MASK).all()


@pytest.mark.parametrize("steps", [0, 9])
def test_impossible_steps_are_refused(model, steps):
    with pytest.raises(ValueError, match="steps is"):
        generate(model, [torch.arange(4)], mask_id=MASK, pad_id=PAD, max_new_tokens=8, steps=steps)
