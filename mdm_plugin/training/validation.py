"""What a recipe does at a validation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from mdm_plugin.data.prompts import Prompt, read_prompts
from mdm_plugin.data.rows import Rows
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation import exact_match, nelbo
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.training.config import instantiate
from mdm_plugin.training.distributed import World


class Questions(NamedTuple):
    """Prompts to be answered at each validation, and what tells whether an answer is right."""

    prompts: list[Prompt]
    verify: Callable[[str, Mapping[str, Any]], bool]


def read_questions(cfg: DictConfig, tokenizer: ChatTokenizer) -> Questions | None:
    """``cfg.questions`` with ``cfg.verifier``; None where there are none, or no validation.

    Raises:
        UserError: if one is without the other, or the file is not right.
    """
    if (cfg.questions is None) != (cfg.verifier is None):
        raise UserError("questions: give questions and verifier together")
    if cfg.questions is None or not cfg.run_val_every_n_steps:
        return None
    verify = instantiate(cfg, "verifier")
    prompts = read_prompts(tokenizer, prompts=cfg.questions)[: cfg.max_questions]
    room = tokenizer.max_seq_len
    for prompt in prompts:
        if room and len(prompt.ids) + cfg.sample_new_tokens > room:
            raise UserError(
                f"{prompt.place}: {len(prompt.ids)} tokens and sample_new_tokens "
                f"{cfg.sample_new_tokens} are more than tokenizer.max_seq_len, {room}"
            )
    return Questions(prompts, verify)


def validate(
    model: MDMTransformer,
    rows: Rows,
    questions: Questions | None,
    tokenizer: ChatTokenizer,
    world: World,
    cfg: DictConfig,
    shift: bool = False,
) -> tuple[dict[str, float], str]:
    """NELBO of ``rows`` and the share of ``questions`` answered right, as scalars to be logged; and
    completions of the first rows as Markdown. Called on every rank.

    Args:
        cfg: for batch_size, val_draws, sample_rows, sample_new_tokens and sample_steps.
        questions: to be answered in ``sample_new_tokens`` tokens.
        model, rows, tokenizer, world, shift: as in ``mdm_plugin.evaluation.nelbo``.
    """
    was_training = model.training
    model.eval()
    result = nelbo(
        model,
        rows,
        batch_size=cfg.batch_size,
        device=world.device,
        draws=cfg.val_draws,
        shift=shift,
        rank=world.rank,
        ranks=world.size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
    )
    figures = {"val/nelbo_nats_per_token": result.nats}
    if questions:
        length = cfg.sample_new_tokens
        answered = exact_match(
            model,
            tokenizer,
            *questions,
            max_new_tokens=length,
            batch_size=cfg.batch_size,
            decoding=Decoding(steps=min(cfg.sample_steps, length), shift=shift),
        )
        figures["val/exact_match"] = answered.accuracy
    samples = []
    for i in range(min(cfg.sample_rows, len(rows))):
        prompt = rows[i].prompt
        # Plain text has no prompt: the model goes on from the row's first quarter.
        prompt = prompt if len(prompt) else rows[i].tokens[: len(rows[i].tokens) // 4 + 1]
        room = model.max_seq_len - len(prompt)
        if room < 1:
            continue
        length = min(cfg.sample_new_tokens, room)
        written = generate(
            model,
            [prompt],
            Decoding(steps=min(cfg.sample_steps, length), shift=shift),
            max_new_tokens=length,
            mask_id=tokenizer.mask_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
        )
        texts = (prompt, written.tokens[0], rows[i].tokens[len(prompt) :])
        labels = ("prompt", "model", "reference")
        samples.append(
            "\n\n".join(
                f"**{label}**\n\n    " + tokenizer.decode(text.tolist()).replace("\n", "\n    ")
                for label, text in zip(labels, texts, strict=True)
            )
        )
    model.train(was_training)
    return figures, "\n\n---\n\n".join(samples)
