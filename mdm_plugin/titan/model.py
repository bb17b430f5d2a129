"""torchtitan's dense decoder with full attention, and the names of its parameters elsewhere."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models import llama3
from torchtitan.models.common.attention import FlexAttention, get_document_mask_mod
from torchtitan.protocols.module import Module
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from mdm_plugin.models.naming import FAMILIES

# torchtitan's modules, and torchtune's names of the same, which mdm_plugin.models.naming knows.
_MODULES = {
    "attention.qkv_linear.wq": "attn.q_proj",
    "attention.qkv_linear.wk": "attn.k_proj",
    "attention.qkv_linear.wv": "attn.v_proj",
    "attention.wo": "attn.output_proj",
    "feed_forward.w1": "mlp.w1",
    "feed_forward.w2": "mlp.w2",
    "feed_forward.w3": "mlp.w3",
    "attention_norm": "sa_norm",
    "ffn_norm": "mlp_norm",
    "lm_head": "output",
}


class MaskedSDPA(Module):
    """Attention by ``scaled_dot_product_attention`` and a mask: on CPU, where flex attention cannot
    be trained."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: Any, **more: Any
    ) -> Tensor:
        """[B, L, N, H] each; attention_masks: [B, 1, L, L], bool."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_masks, **more)
        return found.transpose(1, 2)


class MaskedDecoder(llama3.Llama3Model):
    """A decoder in which every position attends to all of its document, before and after it.

    A document begins where ``positions`` is 0: the padding of a row is one of its own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(llama3.Llama3Model.Config):
        shift: bool = False
        """As ``MDMTransformer.shift``: the weights predict a token from the position before it."""

    def get_attention_masks(self, positions: Tensor) -> Any:
        """Flex attention's ``BlockMask``, or [B, 1, L, L], bool; positions [B, L]."""
        attention = self.config.first_attention
        if isinstance(attention.inner_attention, FlexAttention.Config):
            same = [get_document_mask_mod(positions)]
            return self._create_flex_attention_mask(positions, attention, same)
        document = (positions == 0).cumsum(1)
        return document[:, None, :, None] == document[:, None, None, :]

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None
    ) -> Tensor:
        """Logits [B, L, V], or hidden states where the loss has the head; tokens [B, L]."""
        if attention_masks is None and positions is not None:
            attention_masks = self.get_attention_masks(positions)
        return super().forward(tokens, positions, attention_masks)


class HuggingFaceNames(StateDictAdapter):
    """Names alone: the tensors are laid out as in Hugging Face's files (rotary by halves)."""

    def __init__(self, family: str, model_config: Any, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        with torch.device("meta"):
            parameters = list(model_config.build().state_dict())
        self.names = {name: FAMILIES[family].to_hf(_torchtunes(name)) for name in parameters}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {self.names[name]: value for name, value in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        ours = {theirs: name for name, theirs in self.names.items()}
        return {ours[name]: value for name, value in hf_state_dict.items()}


def _torchtunes(name: str) -> str:
    for ours, theirs in _MODULES.items():
        name = name.replace(ours, theirs)
    return name
