"""A run's batches, from its config."""

from omegaconf import DictConfig

from mdm_plugin.data import GlobalBatches, Rows
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.training.distributed import World


def global_batches(
    cfg: DictConfig, rows: Rows, tokenizer: ChatTokenizer, world: World, accumulation: int
) -> GlobalBatches:
    """This rank's share of the batches of ``rows``.

    Raises:
        UserError: if the rows do not fill one global batch.
    """
    return GlobalBatches(
        rows,
        batch_size=cfg.batch_size,
        ranks=world.size,
        rank=world.rank,
        accumulation=accumulation,
        seed=cfg.seed,
        shuffle=cfg.shuffle,
        pad_id=tokenizer.pad_id,
        eos_padding_id=tokenizer.eos_id if cfg.train_eos_padding else None,
        pad_to_multiple_of=cfg.pad_to_multiple_of,
        max_len=tokenizer.max_seq_len,
        layout=cfg.batch_layout,
    )
