"""What a recipe does at a validation."""

from omegaconf import DictConfig

from mdm_plugin.data.rows import Rows
from mdm_plugin.evaluation import NELBO, nelbo
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.training.distributed import World


def validate(
    model: MDMTransformer,
    rows: Rows,
    tokenizer: ChatTokenizer,
    world: World,
    cfg: DictConfig,
    *,
    shift: bool = False,
) -> tuple[NELBO, str]:
    """NELBO of ``rows``, and completions of the first ones as Markdown. Called on every rank.

    Args:
        cfg: for batch_size, val_draws, sample_rows, sample_new_tokens and sample_steps.
        model, rows, tokenizer, world, shift: as in ``mdm_plugin.evaluation.nelbo``.
    """
    was_training = model.training
    model.eval()
    ids = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    result = nelbo(
        model,
        rows,
        batch_size=cfg.batch_size,
        device=world.device,
        draws=cfg.val_draws,
        shift=shift,
        rank=world.rank,
        ranks=world.size,
        **ids,
    )
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
    return result, "\n\n---\n\n".join(samples)
