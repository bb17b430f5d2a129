"""The quickstart: its data, tokenizer and pretrained model, made here when missing; and the demo.

May import: everything but titan.
"""

from mdm_plugin.quickstart.data import (
    prepare,
    prepare_apprentice,
    prepare_autoregressive,
    prepare_data,
    prepare_preferences,
    prepare_two_ways,
    verifier,
)

__all__ = [
    "prepare",
    "prepare_apprentice",
    "prepare_autoregressive",
    "prepare_data",
    "prepare_preferences",
    "prepare_two_ways",
    "verifier",
]
