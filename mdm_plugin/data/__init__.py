"""Rows of tokens, from files and data sets, and the batches of a training run."""

from mdm_plugin.data.batches import Batch, GlobalBatches
from mdm_plugin.data.datasets import chat_dataset, instruct_dataset, text_dataset
from mdm_plugin.data.rows import Row, Rows

__all__ = [
    "Batch",
    "GlobalBatches",
    "Row",
    "Rows",
    "chat_dataset",
    "instruct_dataset",
    "text_dataset",
]
