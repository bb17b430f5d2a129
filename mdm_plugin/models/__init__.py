"""Models with bidirectional attention, on torchtune's transformer layers, and their tokenizers."""

from mdm_plugin.models.llada import llada
from mdm_plugin.models.tokenizer import ChatTokenizer
from mdm_plugin.models.transformer import MDMTransformer, bidirectional

__all__ = ["ChatTokenizer", "MDMTransformer", "bidirectional", "llada"]
