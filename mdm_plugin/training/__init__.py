"""A training step and what a run does around it: checks, probe, guard, metrics, stop, dry run.

May import: errors, config, the maths, models, data, distributed, checkpoint.
"""

from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.training.ema import EMA
from mdm_plugin.training.metrics import TensorBoardLogger
from mdm_plugin.training.optimizers import Muon
from mdm_plugin.training.schedules import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

__all__ = [
    "EMA",
    "Checkpointer",
    "Muon",
    "TensorBoardLogger",
    "get_cosine_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
]
