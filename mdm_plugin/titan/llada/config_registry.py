"""Configs for ``torchtitan.train --module mdm_plugin.titan.llada --config NAME``.

Each is a function that gives a config; options of the command line change it, as in torchtitan:
``--dataloader.masking mdm_plugin.masking.Mirror --training.steps 100``.
"""

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.quantization import Float8LinearConverter, MXFP8LinearConverter
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model import ModelConfigConverter

from mdm_plugin.titan.debug import attention_backend, quickstart_data
from mdm_plugin.titan.data import MaskedLoader
from mdm_plugin.titan.llada import model_registry
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.titan.trainer import MaskedValidator, MDMTrainer

PARETO = 'mdm_plugin.timesteps.ParetoOptimal={"grid": 20}'
COUNTS = "mdm_plugin.masking.FixedCount"


def llada_debugmodel() -> MDMTrainer.Config:
    """The quickstart's model, pretrained on its text: a minute on a CPU."""
    home = quickstart_data()
    return MDMTrainer.Config(
        model_spec=model_registry("debugmodel", attention_backend()),
        hf_assets_path=str(home),
        loss=MaskedLoss.Config(normalize="tokens"),
        dataloader=MaskedLoader.Config(
            dataset='mdm_plugin.data.text_dataset={"packed": true}',
            dataset_path=str(home / "pretrain.jsonl"),
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
            mixed_precision_param=_precision(),
            disable_cuda_graphs=True,
        ),
        metrics=MetricsProcessor.Config(log_freq=5, enable_tensorboard=True),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=25, last_save_model_only=False
        ),
        activation_checkpoint=FullAC.Config(),
    )


def llada_debugmodel_sft() -> MDMTrainer.Config:
    """The quickstart's fine-tuning: P-POTS over counts, validated by the NELBO."""
    config = llada_debugmodel()
    home = quickstart_data()
    config.loss = MaskedLoss.Config(normalize="response")
    config.dataloader = MaskedLoader.Config(
        dataset_path=str(home / "train.jsonl"), timesteps=PARETO, masking=COUNTS
    )
    config.validator = MaskedValidator.Config(
        enable=True, freq=25, dataset_path=str(home / "val.jsonl")
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
        model_spec=model_registry("8B", converters=converters),
        hf_assets_path="./assets/hf/LLaDA-8B-Base",
        loss=MaskedLoss.Config(normalize="tokens", chunk_size=2048),
        dataloader=MaskedLoader.Config(
            dataset='mdm_plugin.data.text_dataset={"packed": true}',
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
    """``llada_8b`` with the layers' products in MXFP8 (Blackwell and newer)."""
    return llada_8b([MXFP8LinearConverter.Config(model_compile_enabled=True)])


def _precision() -> str:
    return "float32" if attention_backend() == "sdpa" else "bfloat16"
