"""A run's rows and batches, from its config."""

from typing import Any

from omegaconf import DictConfig

from mdm_plugin.config.components import instantiate
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.data.holdout import hold_out
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer


def read_datasets(cfg: DictConfig, tokenizer: ChatTokenizer) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to validate on: none, a data set's, or held out of the first.

    ``cfg.dataset_val``: None; a component; or ``split``, the share of the rows of ``cfg.dataset``
    that are held out (``mdm_plugin.data.holdout``), with ``max_rows``, their largest number.

    Raises:
        UserError: if a value is out of range, or the rows are held out and never looked at; and as
            the data sets' components.
    """
    if cfg.dataset is None:
        raise UserError("dataset: null: name the rows that are to be learnt")
    own = cfg.dataset_val or {}
    if "_component_" in own or "split" not in own:
        return instantiate(cfg, "dataset", tokenizer), instantiate(cfg, "dataset_val", tokenizer)
    given: dict[str, Any] = {str(key): value for key, value in own.items()}
    share, most = given.pop("split"), given.pop("max_rows", None)
    if given:
        raise UserError(
            f"dataset_val.{sorted(given)[0]}: unknown: beside split, a share of dataset, use "
            "max_rows; a data set of your own has its _component_"
        )
    if not isinstance(share, float) or not 0 < share < 1:
        raise UserError(
            f"dataset_val.split: {share!r}: use the share of dataset's rows to hold out, between "
            "0 and 1"
        )
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"dataset_val.max_rows: {most!r}: use 1 or more, or null")
    if not cfg.run_val_every_n_steps:
        raise UserError(
            "dataset_val.split: rows would be held out, and run_val_every_n_steps is not set: set "
            "it, or dataset_val=null"
        )
    return hold_out(instantiate(cfg, "dataset", tokenizer), share, cfg.seed, most)


def global_batches(
    cfg: DictConfig, rows: Rows, tokenizer: ChatTokenizer, world: World, accumulation: int
) -> GlobalBatches:
    """This rank's share of the batches of ``rows``; ``cfg.batch_size`` counts examples.

    Raises:
        UserError: if the rows do not fill one global batch.
    """
    return GlobalBatches(
        rows,
        Split(cfg.batch_size * rows.facts.together, world.size, world.rank, accumulation),
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
