"""Dream (Qwen2.5 with full attention) for ``torchtitan.train --module mdm_plugin.titan.dream``."""

from typing import Any

from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec

from mdm_plugin.models.dream import DREAM_7B
from mdm_plugin.titan import llada
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.titan.trainer import MDMTrainer

FLAVORS: dict[str, dict[str, Any]] = {
    "debugmodel": llada.FLAVORS["debugmodel"] | {"num_kv_heads": 2, "norm_eps": 1e-6},
    "7B": DREAM_7B,
}


def model_registry(
    flavor: str, converters: list[ModelConfigConverter.Config] | None = None
) -> ModelSpec:
    """A flavor: debugmodel or 7B; converters as of ``mdm_plugin.titan.model``."""
    shape = {"rope_base": 1_000_000.0, "qkv_bias": True, **FLAVORS[flavor]}
    return llada.model_spec("Dream", flavor, converters, **shape)


def dream_debugmodel() -> MDMTrainer.Config:
    """The quickstart's fine-tuning of a small model of Dream's shape."""
    config = llada.llada_debugmodel_sft()
    config.model_spec = model_registry("debugmodel")
    config.loss = MaskedLoss.Config(shift=True)
    return config


def dream_7b_sft() -> MDMTrainer.Config:
    """Fine-tuning Dream-v0-Instruct-7B, by ``llada_8b_sft``'s settings."""
    config = llada.llada_8b_sft()
    config.model_spec = model_registry("7B")
    config.hf_assets_path = "./assets/hf/Dream-v0-Instruct-7B"
    config.loss = MaskedLoss.Config(shift=True, chunk_size=2048)
    return config
