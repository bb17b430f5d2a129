"""Rows of so many tokens each, and a tokenizer that counts them: a word is a token."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

MASK, END = "<|mdm_mask|>", "<|end|>"
ROLES = [f"<|{x}|>" for x in ("system", "user", "assistant")]
TEMPLATE = (
    "{% for x in messages %}<|{{ x.role }}|> {{ x.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
FRAME = 4  # tokens of a chat of two turns that are none of their words


def write_tokenizer(directory: Path, words: int) -> None:
    """tokenizer.json and tokenizer_config.json of ``words`` words."""
    names = ["<|unknown|>", *(f"w{i}" for i in range(words))]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(x, special=True) for x in (MASK, END, *ROLES)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"mask_token": MASK, "eos_token": END, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(directory: Path, lengths: list[int], words: int) -> None:
    """rows.jsonl, pairs.jsonl and prompts.jsonl: chats, preferences and prompts of such lengths.

    lengths: tokens of each row, half of them prompt. A preference's answers are both as long.
    """
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(count))

    chats, pairs, prompts = [], [], []
    for length in lengths:
        asked = (length - FRAME) // 2
        answered = length - FRAME - asked
        prompt, one, other = text(asked), text(answered), text(answered)
        turns = zip(("user", "assistant"), (prompt, one), strict=True)
        chats.append({"messages": [{"role": role, "content": x} for role, x in turns]})
        pairs.append({"prompt": prompt, "chosen": one, "rejected": other})
        prompts.append({"prompt": prompt})
    for name, rows in (("rows", chats), ("pairs", pairs), ("prompts", prompts)):
        lines = "".join(json.dumps(x) + "\n" for x in rows)
        (directory / f"{name}.jsonl").write_text(lines)


def mixed(count: int, mean: int, most: int) -> list[int]:
    """Log-normal lengths: ``count`` quantiles in a random order, about ``mean`` on average."""
    import torch

    normal = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    found = (mean * (normal - 0.5).exp()).clamp(2 * FRAME, most).long().tolist()
    random.Random(1).shuffle(found)
    return found
