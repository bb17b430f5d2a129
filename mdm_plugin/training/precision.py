"""The precision of a run: of what it trains, and how its optimizer rounds.

bf16 has 8 bits of mantissa. A step of fine-tuning is often less than half of what the last bit of a
weight is worth, and rounded to the nearest it is nothing. So what is trained is kept in fp32
(masters) and computed with in bf16; or it is kept in bf16 and rounded at random, so that on average
a step counts.
"""

import inspect
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training

from mdm_plugin.config.components import find_component
from mdm_plugin.distributed.build import Build
from mdm_plugin.errors import UserError

FLOAT8_CAPABILITY = (8, 9)  # of a CUDA device whose matrix products can be in float8
_ROUNDING = "bf16_stochastic_round"  # torchao's optimizers take it


def check_precision(cfg: DictConfig) -> None:
    """Check the options of precision, and that the optimizer goes with them.

    Raises:
        UserError: naming the key.
    """
    if cfg.dtype not in ("fp32", "bf16"):
        raise UserError(
            f"dtype: {cfg.dtype}: use bf16 or fp32: fp16 would need its losses scaled, and nothing "
            "here does that"
        )
    if cfg.master_dtype not in ("fp32", "bf16"):
        raise UserError(f"master_dtype: {cfg.master_dtype}: use fp32 or bf16")
    if cfg.master_dtype == "bf16" and cfg.dtype == "fp32":
        raise UserError("master_dtype: bf16, and the model computes in fp32 (dtype): use fp32")
    if cfg.master_dtype == "fp32" and not cfg.stochastic_rounding:
        raise UserError("stochastic_rounding: False, and nothing is kept in bf16: leave it out")
    if _ROUNDING in cfg.optimizer:
        raise UserError(f"optimizer.{_ROUNDING}: set stochastic_rounding at the top level instead")
    if rounding(cfg) and cfg.data_parallel_replicate_dim > 1:
        raise UserError(
            "data_parallel_replicate_dim: copies of the model, rounded at random, drift apart: use "
            "1, or master_dtype=fp32"
        )


def master_dtype(cfg: DictConfig, device: torch.device) -> torch.dtype:
    """The dtype of what is trained, and of its gradients."""
    return training.get_dtype(cfg.master_dtype, device=device)


def rounding(cfg: DictConfig) -> dict[str, Any]:
    """The optimizer's argument by which it rounds bf16 parameters at random; none for fp32.

    Raises:
        UserError: if it rounds to the nearest alone, and the config does not say that it may.
    """
    if cfg.master_dtype != "bf16" or not cfg.stochastic_rounding:
        return {}
    if _ROUNDING not in inspect.signature(find_component(cfg, "optimizer")).parameters:
        raise UserError(
            f"optimizer: {cfg.optimizer._component_} rounds bf16 parameters to the nearest, which "
            "makes most small steps nothing: use torchao.optim.AdamW8bit, which rounds at random, "
            "or master_dtype=fp32, or stochastic_rounding=False"
        )
    return {_ROUNDING: True}


def build_options(cfg: DictConfig, device: torch.device) -> Build:
    """How ``cfg`` has its model built: what is compiled, kept, and in which precision."""
    return Build(
        compile=cfg.compile,
        float8=cfg.fp8_recipe_name if cfg.enable_fp8_training else None,
        activation_checkpointing=cfg.enable_activation_checkpointing,
        cpu_offload=cfg.fsdp_cpu_offload,
        reshard_after_forward=cfg.fsdp_reshard_after_forward,
        masters=master_dtype(cfg, device),
    )
