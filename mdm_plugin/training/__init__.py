"""What the recipes share."""

from mdm_plugin.training.checkpoint import Checkpointer
from mdm_plugin.training.ema import EMA
from mdm_plugin.training.metrics import TensorBoardLogger
from mdm_plugin.training.schedules import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

__all__ = [
    "EMA",
    "Checkpointer",
    "TensorBoardLogger",
    "get_cosine_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
]
