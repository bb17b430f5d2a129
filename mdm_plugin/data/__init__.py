"""Rows of tokens, from files and data sets, and the batches of a training run.

May import: errors, noise, models.
"""

from mdm_plugin.data.batches import Batch, GlobalBatches, Padding, Split
from mdm_plugin.data.datasets import chat_dataset, instruct_dataset, text_dataset
from mdm_plugin.data.preferences import preference_dataset
from mdm_plugin.data.rows import Row, Rows

__all__ = [
    "Batch",
    "GlobalBatches",
    "Padding",
    "Row",
    "Rows",
    "Split",
    "chat_dataset",
    "instruct_dataset",
    "preference_dataset",
    "text_dataset",
]
