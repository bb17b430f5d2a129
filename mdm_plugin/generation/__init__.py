"""Writing text: samplers, decoding, caches; a text that is being unmasked, live and as a page.

May import: errors, noise, models.
"""

from mdm_plugin.generation.cache_gap import Moments, cache_gap
from mdm_plugin.generation.caches import BlockCache
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.greedy import is_greedy
from mdm_plugin.generation.masked import SpecialTokens, TokenIds
from mdm_plugin.generation.samplers import (
    ORDERS,
    Candidates,
    Remasking,
    Sampler,
    Stable,
    Threshold,
)
from mdm_plugin.generation.writing import Generated, Step, check_lengths, generate, infill

__all__ = [
    "ORDERS",
    "BlockCache",
    "Candidates",
    "Decoding",
    "Generated",
    "Moments",
    "Remasking",
    "Sampler",
    "SpecialTokens",
    "Stable",
    "Step",
    "Threshold",
    "TokenIds",
    "cache_gap",
    "check_lengths",
    "generate",
    "infill",
    "is_greedy",
]
