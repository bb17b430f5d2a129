"""LLaDA for ``torchtitan.train --module mdm_plugin.titan.llada --config NAME``.

Each config is a function; options of the command line change it, as in torchtitan:
``--dataloader.masking mdm_plugin.masking.Mirror --training.steps 100``.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.quantization import Float8LinearConverter, MXFP8LinearConverter
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models import llama3
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.utils import validate_converter_order
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec

from mdm_plugin.data.cache import home
from mdm_plugin.errors import UserError
from mdm_plugin.models.llada import LLADA_8B
from mdm_plugin.quickstart.data import prepare_data
from mdm_plugin.titan.compat import parallelize
from mdm_plugin.titan.data import MaskedLoader
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.titan.model import HuggingFaceNames, MaskedDecoder, MaskedSDPA
from mdm_plugin.titan.trainer import MaskedValidator, MDMTrainer

PARETO = 'mdm_plugin.timesteps.ParetoOptimal={"grid": 20}'
COUNTS = "mdm_plugin.masking.FixedCount"
PACKED_TEXT = 'mdm_plugin.data.text_dataset={"packed": true}'


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by the names that ``mdm_plugin.models`` has for them; ``qkv_bias`` for
    biases on q, k and v."""

    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    intermediate_dim: int
    num_kv_heads: int | None = None
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    qkv_bias: bool = False
    shift: bool = False


FLAVORS = {
    "debugmodel": Shape(320, 3, 4, 64, 256),  # the quickstart's
    "1B": Shape(126_464, 22, 32, 2048, 5632, num_kv_heads=4),
    "8B": Shape(**LLADA_8B),
}


def model_registry(
    flavor: str, converters: list[ModelConfigConverter.Config] | None = None
) -> ModelSpec:
    """A flavor: debugmodel, 1B or 8B; converters as of ``mdm_plugin.titan.model``."""
    return model_spec("llada", flavor, FLAVORS[flavor], converters)


def model_spec(
    family: str,
    flavor: str,
    shape: Shape,
    converters: list[ModelConfigConverter.Config] | None = None,
) -> ModelSpec:
    """A ModelSpec of a shape.

    family: model_type of its Hugging Face checkpoints. converters: torchtitan's own: float8, MXFP8.
    """
    table = {"weight": partial(nn.init.normal_, std=0.02)}
    layers, size = _layers(shape), shape.vocab_size
    config: Any = MaskedDecoder.Config(
        dim=shape.embed_dim,
        vocab_size=size,
        tok_embeddings=Embedding.Config(
            num_embeddings=size, embedding_dim=shape.embed_dim, param_init=table
        ),
        norm=replace(layers[0].ffn_norm),
        lm_head=Linear.Config(in_features=shape.embed_dim, out_features=size, param_init=table),
        layers=layers,
        shift=shape.shift,
    )
    validate_converter_order(converters or [])
    for converter in converters or []:
        config = converter.build().convert(config)
    return ModelSpec(
        name=family,
        flavor=flavor,
        model=config,
        parallelize_fn=parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=partial(HuggingFaceNames, family),
    )


def _layers(shape: Shape) -> list[Any]:
    """The configs of the layers."""
    rope = CosSinRoPE.Config(
        dim=shape.embed_dim // shape.num_heads, max_seq_len=1 << 17, theta=shape.rope_base
    )
    layers = llama3._build_llama3_layers(
        n_layers=shape.num_layers,
        dim=shape.embed_dim,
        n_heads=shape.num_heads,
        n_kv_heads=shape.num_kv_heads or shape.num_heads,
        hidden_dim=shape.intermediate_dim,
        rope=rope,
        fuse_qkv=False,
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention_norm.eps = layer.ffn_norm.eps = shape.norm_eps
        qkv = layer.attention.qkv_linear
        qkv.wq.bias = qkv.wkv.bias = shape.qkv_bias
        if not torch.cuda.is_available():
            layer.attention.inner_attention = MaskedSDPA.Config()
    return layers


def quickstart_data() -> Path:
    """The quickstart's directory, with its data and tokenizer made if missing."""
    directory = home() / "quickstart"
    prepare_data(str(directory))
    return directory


def llada_debugmodel() -> MDMTrainer.Config:
    """The quickstart's model, pretrained on its text: a minute on a CPU."""
    place = quickstart_data()
    return MDMTrainer.Config(
        model_spec=model_registry("debugmodel"),
        hf_assets_path=str(place),
        loss=MaskedLoss.Config(normalize="tokens"),
        dataloader=MaskedLoader.Config(
            dataset=PACKED_TEXT,
            dataset_path=str(place / "pretrain.jsonl"),
            train_eos_padding=False,
        ),
        optimizer=default_adamw(lr=4e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=10),
        training=TrainingConfig(
            local_batch_size=16,
            global_batch_size=32,
            seq_len=64,
            steps=50,
            max_norm=1.0,
            mixed_precision_param="bfloat16" if torch.cuda.is_available() else "float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        metrics=MetricsProcessor.Config(log_freq=5, enable_tensorboard=True),
        checkpoint=CheckpointManager.Config(enable=True, interval=25, last_save_model_only=False),
        activation_checkpoint=FullAC.Config(),
    )


def llada_debugmodel_sft() -> MDMTrainer.Config:
    """The quickstart's fine-tuning: P-POTS over counts, validated by the NELBO."""
    config = llada_debugmodel()
    place = quickstart_data()
    config.loss = MaskedLoss.Config(normalize="response")
    config.dataloader = MaskedLoader.Config(
        dataset_path=str(place / "train.jsonl"), timesteps=PARETO, masking=COUNTS
    )
    config.validator = MaskedValidator.Config(
        enable=True, freq=25, dataset_path=str(place / "val.jsonl")
    )
    return config


def llada_1b() -> MDMTrainer.Config:
    """Pretraining at the size of LLaDA's first model; name --dataloader.dataset_path."""
    config = llada_8b()
    config.model_spec = model_registry("1B")
    config.training.local_batch_size = 8
    return config


def llada_8b(converters: list[ModelConfigConverter.Config] | None = None) -> MDMTrainer.Config:
    """Pretraining of 8B at 4,096 tokens; name --dataloader.dataset_path and --hf_assets_path."""
    return MDMTrainer.Config(
        model_spec=model_registry("8B", converters),
        hf_assets_path="./assets/hf/LLaDA-8B-Base",
        loss=MaskedLoss.Config(normalize="tokens", chunk_size=2048),
        dataloader=MaskedLoader.Config(
            dataset=PACKED_TEXT,
            masking=COUNTS,
            train_eos_padding=False,
        ),
        optimizer=default_adamw(lr=4e-4),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=2000, decay_ratio=0.1, min_lr_factor=0.1
        ),
        training=TrainingConfig(
            local_batch_size=2, seq_len=4096, steps=100_000, disable_cuda_graphs=True
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        metrics=MetricsProcessor.Config(enable_tensorboard=True),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=500, async_mode="async_with_pinned_mem"
        ),
        activation_checkpoint=SelectiveAC.Config(),
        compile=CompileConfig(enable=True, components=["model", "loss"]),
    )


def llada_8b_sft() -> MDMTrainer.Config:
    """Fine-tuning LLaDA-8B-Instruct, by the paper's settings, with P-POTS over counts."""
    config = llada_8b()
    config.hf_assets_path = "./assets/hf/LLaDA-8B-Instruct"
    config.loss = MaskedLoss.Config(normalize="response", chunk_size=2048)
    config.dataloader = MaskedLoader.Config(timesteps=PARETO, masking=COUNTS)
    config.optimizer = default_adamw(lr=5e-5)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=50)
    config.training.steps = 1000
    config.checkpoint.initial_load_in_hf = True
    config.checkpoint.last_save_in_hf = True
    return config


def llada_8b_float8() -> MDMTrainer.Config:
    """``llada_8b`` with the layers' products in float8 (Hopper and newer)."""
    return llada_8b([Float8LinearConverter.Config(model_compile_enabled=True)])


def llada_8b_mxfp8() -> MDMTrainer.Config:
    """``llada_8b`` with the layers' products in MXFP8 (Blackwell and newer).

    Raises:
        UserError: where torchao is older than torchtitan's converter needs.
    """
    from torchtitan.components.quantization import mx

    if mx.MXFP8Linear is None:
        raise UserError(
            "llada_8b_mxfp8: torchtitan's converter needs a torchao newer than 0.15, and torchtune "
            "0.6.1 an older one: use llada_8b_float8"
        )
    return llada_8b([MXFP8LinearConverter.Config(model_compile_enabled=True)])
