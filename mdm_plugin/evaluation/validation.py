"""What a recipe does at a validation."""

from omegaconf import DictConfig

from mdm_plugin.config.components import instantiate
from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.data.rows import Row, Rows
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.exact_match import Questions, exact_match
from mdm_plugin.evaluation.nelbo import BoundEstimator
from mdm_plugin.evaluation.sharing import in_shares, share
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer


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
) -> tuple[dict[str, float], str]:
    """NELBO of ``rows`` and the share of ``questions`` answered right, as scalars to be logged; and
    completions of the first rows as Markdown. Called on every rank; each does its share.

    Args:
        cfg: for batch_size, val_draws, sample_rows, sample_new_tokens and sample_steps.
        questions: to be answered in ``sample_new_tokens`` tokens.
    """
    was_training = model.training
    model.eval()
    estimator = BoundEstimator(tokenizer, world, cfg.batch_size, cfg.val_draws)
    figures = {"val/nelbo_nats_per_token": estimator.nelbo(model, rows).nats}
    if questions:
        answered = exact_match(
            model,
            tokenizer,
            questions,
            world,
            max_new_tokens=cfg.sample_new_tokens,
            batch_size=cfg.batch_size,
            decoding=_decoding(cfg, cfg.sample_new_tokens),
        )
        figures["val/exact_match"] = answered.accuracy
    one_by_one = share([0] * min(cfg.sample_rows, len(rows)), 1, world)
    samples = in_shares(
        lambda batch: [_sample(model, rows[i], tokenizer, cfg) for i in batch],
        one_by_one,
        model,
        world,
    )
    model.train(was_training)
    return figures, "\n\n---\n\n".join(x for x in samples if x)


def _decoding(cfg: DictConfig, length: int) -> Decoding:
    return Decoding(steps=min(cfg.sample_steps, length))


def _sample(model: MDMTransformer, row: Row, tokenizer: ChatTokenizer, cfg: DictConfig) -> str:
    """A row's prompt, what the model writes after it, and the reference, as Markdown; "" where the
    prompt leaves no room."""
    # Plain text has no prompt: the model goes on from the row's first quarter.
    prompt = row.prompt if len(row.prompt) else row.tokens[: len(row.tokens) // 4 + 1]
    room = model.max_seq_len - len(prompt)
    if room < 1:
        return ""
    length = min(cfg.sample_new_tokens, room)
    written = generate(
        model, [prompt], _decoding(cfg, length), special=tokenizer, max_new_tokens=length
    )
    texts = {
        "prompt": prompt,
        "model": written.tokens[0],
        "reference": row.tokens[len(prompt) :],
    }
    return "\n\n".join(
        f"**{label}**\n\n    " + tokenizer.decode(ids.tolist()).replace("\n", "\n    ")
        for label, ids in texts.items()
    )
