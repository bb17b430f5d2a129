"""Dream (Qwen2.5 with full attention) for ``torchtitan.train --module mdm_plugin.titan.dream``."""

from dataclasses import replace
from typing import Any

from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec

from mdm_plugin.models.dream import DREAM_7B
from mdm_plugin.titan import llada
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.titan.trainer import MDMTrainer

DREAM: dict[str, Any] = {"rope_base": 1_000_000.0, "qkv_bias": True, "shift": True}
FLAVORS = {
    "debugmodel": replace(llada.FLAVORS["debugmodel"], num_kv_heads=2, norm_eps=1e-6, **DREAM),
    "7B": llada.Shape(**DREAM_7B, **DREAM),
}


def model_registry(
    flavor: str, converters: list[ModelConfigConverter.Config] | None = None
) -> ModelSpec:
    """A flavor: debugmodel or 7B; converters as of ``mdm_plugin.titan.llada.model_spec``."""
    return llada.model_spec("Dream", flavor, FLAVORS[flavor], converters)


def dream_debugmodel() -> MDMTrainer.Config:
    """The quickstart's fine-tuning of a small model of Dream's shape."""
    config = llada.llada_debugmodel_sft()
    config.model_spec = model_registry("debugmodel")
    return config


def dream_7b_sft() -> MDMTrainer.Config:
    """Fine-tuning Dream-v0-Instruct-7B, by ``llada_8b_sft``'s settings."""
    config = llada.llada_8b_sft()
    config.model_spec = model_registry("7B")
    config.hf_assets_path = "./assets/hf/Dream-v0-Instruct-7B"
    config.loss = MaskedLoss.Config(chunk_size=2048)
    return config
