"""A run's batches, from its config."""

from omegaconf import DictConfig

from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.models import ChatTokenizer


def global_batches(
    cfg: DictConfig, rows: Rows, tokenizer: ChatTokenizer, world: World, accumulation: int
) -> GlobalBatches:
    """This rank's share of the batches of ``rows``.

    Raises:
        UserError: if the rows do not fill one global batch.
    """
    return GlobalBatches(
        rows,
        Split(cfg.batch_size, world.size, world.rank, accumulation),
        Padding(
            tokenizer.pad_id,
            tokenizer.eos_id if cfg.train_eos_padding else None,
            cfg.pad_to_multiple_of,
            tokenizer.max_seq_len,
        ),
        seed=cfg.seed,
        shuffle=cfg.shuffle,
        layout=cfg.batch_layout,
    )
