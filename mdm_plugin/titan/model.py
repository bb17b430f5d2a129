"""torchtitan's dense decoder with full attention, LLaDA's and Dream's shapes, and their names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention, get_document_mask_mod
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.utils import validate_converter_order
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from mdm_plugin.models.naming import FAMILIES

_NORMAL: dict[str, Callable[..., Any]] = {
    "weight": partial(nn.init.trunc_normal_, std=0.02),
    "bias": nn.init.zeros_,
}


class MaskedSDPA(Module):
    """Attention by ``scaled_dot_product_attention`` with a mask: where flex attention cannot be
    trained, on CPU."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **_: Any,
    ) -> Tensor:
        """[B, L, N, H] each; attention_masks: [B, 1, L, L], bool."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        return found.transpose(1, 2)


class MaskedDecoder(Llama3Model):
    """A decoder in which every position attends to all of its document, before and after it.

    A document begins where ``positions`` is 0: rows that share a sequence, and the padding of a
    row, are documents of their own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        pass

    def get_attention_masks(self, positions: Tensor) -> Any:
        """Flex attention's ``BlockMask``, or [B, 1, L, L], bool; positions [B, L]."""
        attention = self.config.first_attention
        if isinstance(attention.inner_attention, FlexAttention.Config):
            return self._create_flex_attention_mask(
                positions, attention, [get_document_mask_mod(positions)]
            )
        document = (positions == 0).cumsum(1)
        return document[:, None, :, None] == document[:, None, None, :]

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None
    ) -> Tensor:
        """Logits [B, L, V], or hidden states where the loss has the head; tokens [B, L]."""
        if attention_masks is None and positions is not None:
            attention_masks = self.get_attention_masks(positions)
        return super().forward(tokens, positions, attention_masks)


def decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    num_kv_heads: int | None = None,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    qkv_bias: bool = False,
    max_seq_len: int = 4096,
    attn_backend: str = "flex",
) -> MaskedDecoder.Config:
    """A config of the arguments that ``mdm_plugin.models`` takes for the same shape.

    Args:
        attn_backend: ``flex``, or ``sdpa`` where flex attention cannot be trained (CPU).

    Raises:
        ValueError: on another backend.
    """
    if attn_backend not in ("flex", "sdpa"):
        raise ValueError(f"attn_backend is {attn_backend!r}: use flex or sdpa")
    head_dim = embed_dim // num_heads

    def norm() -> RMSNorm.Config:
        init = {"weight": nn.init.ones_}
        return RMSNorm.Config(normalized_shape=embed_dim, eps=norm_eps, param_init=init)

    layers = []
    for i in range(num_layers):
        deep = {**_NORMAL, "weight": partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, i))}
        attention = make_gqa_config(
            dim=embed_dim,
            n_heads=num_heads,
            n_kv_heads=num_kv_heads or num_heads,
            wqkv_param_init=_NORMAL,
            wo_param_init=deep,
            inner_attention=(FlexAttention if attn_backend == "flex" else MaskedSDPA).Config(),
            rope=CosSinRoPE.Config(dim=head_dim, max_seq_len=max_seq_len, theta=rope_base),
        )
        attention.qkv_linear.wq.bias = attention.qkv_linear.wkv.bias = qkv_bias
        layers.append(
            Llama3TransformerBlock.Config(
                attention_norm=norm(),
                ffn_norm=norm(),
                attention=attention,
                feed_forward=make_ffn_config(
                    dim=embed_dim,
                    hidden_dim=intermediate_dim,
                    w1_param_init=_NORMAL,
                    w2w3_param_init=deep,
                ),
            )
        )
    return MaskedDecoder.Config(
        dim=embed_dim,
        vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=embed_dim, param_init=_NORMAL
        ),
        norm=norm(),
        lm_head=Linear.Config(in_features=embed_dim, out_features=vocab_size, param_init=_NORMAL),
        layers=layers,
    )


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


def hf_name(family: str, name: str) -> str:
    """Hugging Face's name of one of torchtitan's parameters, in a family of checkpoints."""
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, number, module = module.split(".", 2)
        prefix = f"layers.{number}."
    return FAMILIES[family].to_hf(f"{prefix}{_MODULES.get(module, module)}.{kind}")


class HuggingFaceNames(StateDictAdapter):
    """Names alone: the tensors are laid out as in Hugging Face's files (rotary by halves).

    ``family``: the model_type that the names are of.
    """

    family: str

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """{torchtitan's name: tensor} under Hugging Face's names."""
        return {hf_name(self.family, name): value for name, value in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The other way."""
        with torch.device("meta"):
            names = self.model_config.build().state_dict()
        ours = {hf_name(self.family, name): name for name in names}
        return {ours[name]: value for name, value in hf_state_dict.items()}


def spec(
    name: str,
    flavor: str,
    config: MaskedDecoder.Config,
    adapter: type[HuggingFaceNames],
    converters: list[ModelConfigConverter.Config] | None = None,
) -> ModelSpec:
    """torchtitan's ``ModelSpec`` of a config; ``converters`` as in its own models (float8, LoRA)."""
    if converters:
        validate_converter_order(converters)
        for converter in converters:
            config = converter.build().convert(config)
    return ModelSpec(
        name=name,
        flavor=flavor,
        model=config,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=adapter,
    )
