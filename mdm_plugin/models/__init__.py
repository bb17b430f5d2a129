"""Models with bidirectional attention, on torchtune's transformer layers, and their tokenizers.

May import: errors, torchtune_internals, and of the maths the loss (a head that it knows).
"""

from mdm_plugin.models.autoregressive import from_autoregressive
from mdm_plugin.models.dream import (
    dream,
    dream_7b,
    fast_dllm_7b,
    lora_dream,
    lora_dream_7b,
    lora_fast_dllm_7b,
    qlora_dream_7b,
)
from mdm_plugin.models.llada import llada, llada_8b, lora_llada, lora_llada_8b, qlora_llada_8b
from mdm_plugin.models.qwen3 import lora_qwen3, lora_sdar_4b, qwen3, sdar_4b
from mdm_plugin.models.tokenizer import ChatTokenizer
from mdm_plugin.models.transformer import MDMTransformer, bidirectional

__all__ = [
    "ChatTokenizer",
    "MDMTransformer",
    "bidirectional",
    "dream",
    "dream_7b",
    "fast_dllm_7b",
    "from_autoregressive",
    "llada",
    "llada_8b",
    "lora_dream",
    "lora_dream_7b",
    "lora_fast_dllm_7b",
    "lora_llada",
    "lora_llada_8b",
    "lora_qwen3",
    "lora_sdar_4b",
    "qlora_dream_7b",
    "qlora_llada_8b",
    "qwen3",
    "sdar_4b",
]
