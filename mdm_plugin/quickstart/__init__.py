"""The quickstart: its data, tokenizer and pretrained model, made here when missing; and the demo.

May import: everything but titan.
"""

from mdm_plugin.quickstart.data import (
    prepare,
    prepare_apprentice,
    prepare_autoregressive,
    prepare_block_apprentice,
    prepare_data,
    prepare_preferences,
    verifier,
)

__all__ = [
    "prepare",
    "prepare_apprentice",
    "prepare_autoregressive",
    "prepare_block_apprentice",
    "prepare_data",
    "prepare_preferences",
    "verifier",
]
