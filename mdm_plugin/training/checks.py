"""What can be known to be wrong before any training time is spent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torchtune.modules import TiedLinear

from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.data.rows import Rows
from mdm_plugin.distributed.parameters import adapter_names
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.models.naming import BLOCK_LENGTH
from mdm_plugin.models.transformer import HalvesRotary
from mdm_plugin.training.precision import FLOAT8_CAPABILITY, check_precision

T = TypeVar("T")


def _check_output(directory: Path, rank: int) -> None:
    """Now, and not when the first checkpoint is due."""
    probe = directory / f".writable_{rank}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"yes")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: {directory} cannot be written: {error.strerror}") from error


# Arguments that the recipe gives its checkpointer, and the options that they are.
_CHECKPOINTERS = {
    "keep_last_n": "keep_last_n",
    "keep_best_n": "keep_best_n",
    "asynchronous": "enable_async_checkpointing",
}


_POSITIVE = (
    "batch_size gradient_accumulation_steps global_batch_size epochs max_steps_per_epoch "
    "pad_to_multiple_of log_every_n_steps save_every_n_epochs save_every_n_steps keep_last_n "
    "keep_best_n run_val_every_n_steps val_draws sample_new_tokens sample_steps max_questions "
    "max_skipped_steps"
)


def check_sizes(cfg: DictConfig, world: World) -> int:
    """Check the config's numbers and options; the accumulation steps that they come to.

    Raises:
        UserError: naming the key.
    """
    _check_output(Path(cfg.output_dir).expanduser(), world.rank)
    for key in _POSITIVE.split():
        if cfg[key] is not None and cfg[key] < 1:
            raise UserError(f"{key}: {cfg[key]}: use 1 or more")
    _check_options(cfg)
    _check_device(cfg, world.device)
    accumulation = _accumulation(cfg, world)
    if cfg.optimizer_in_bwd and accumulation > 1:
        raise UserError(
            f"optimizer_in_bwd: a step has {accumulation} micro-batches, whose gradients it would "
            "not sum: leave it out, or make batch_size × ranks the whole batch"
        )
    return accumulation


def _check_options(cfg: DictConfig) -> None:
    if cfg.batch_layout not in ("padded", "grouped", "packed"):
        raise UserError(f"batch_layout: {cfg.batch_layout}: use padded, grouped or packed")
    if cfg.batch_layout != "padded" and cfg.train_eos_padding:
        raise UserError(
            f"batch_layout: {cfg.batch_layout}, but train_eos_padding makes all rows one length: "
            "set train_eos_padding=False, or leave batch_layout out"
        )
    check_precision(cfg)
    for key, here in _CHECKPOINTERS.items():
        if key in cfg.checkpointer:
            raise UserError(f"checkpointer.{key}: set {here} at the config's top level instead")
    if cfg.timeout_minutes <= 0:
        raise UserError(f"timeout_minutes: {cfg.timeout_minutes}: use more than 0")
    if cfg.keep_best_n and not cfg.run_val_every_n_steps:
        raise UserError("keep_best_n: the best by validation, and run_val_every_n_steps is not set")
    if cfg.clip_grad_norm is not None and cfg.clip_grad_norm <= 0:
        raise UserError(f"clip_grad_norm: {cfg.clip_grad_norm}: use more than 0, or null")
    if cfg.run_val_every_n_steps and cfg.dataset_val is None and "prompts" not in cfg:
        raise UserError("run_val_every_n_steps: set, but there is no dataset_val: give one")
    if cfg.optimizer_in_bwd and cfg.clip_grad_norm is not None:
        raise UserError(
            "optimizer_in_bwd: the norm of the whole gradient is never known: set "
            "clip_grad_norm: null, or leave it out"
        )


def _check_device(cfg: DictConfig, device: torch.device) -> None:
    if cfg.fsdp_cpu_offload and device.type != "cuda":
        raise UserError(
            f"fsdp_cpu_offload: works on CUDA only, and the device is {device}: leave it out"
        )
    if cfg.enable_activation_offloading and device.type != "cuda":
        raise UserError(
            f"enable_activation_offloading: works on CUDA only, and the device is {device}"
        )
    if cfg.enable_activation_offloading and not cfg.enable_activation_checkpointing:
        raise UserError(
            "enable_activation_offloading: needs enable_activation_checkpointing: True as well"
        )
    if cfg.optimizer.get("capturable") and device.type != "cuda":
        raise UserError(f"optimizer.capturable: works on CUDA only, and the device is {device}")
    if cfg.enable_fp8_training and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY
    ):
        raise UserError(
            f"enable_fp8_training: {device} has no float8 products: it takes a CUDA device "
            "of compute capability 8.9 or more (H100, L40S)"
        )


def _accumulation(cfg: DictConfig, world: World) -> int:
    if cfg.global_batch_size is None:
        return int(cfg.gradient_accumulation_steps)
    if cfg.gradient_accumulation_steps != 1:
        raise UserError(
            "global_batch_size: gradient_accumulation_steps follows from it: leave that at 1"
        )
    accumulation, rest = divmod(cfg.global_batch_size, cfg.batch_size * world.size)
    if rest or not accumulation:
        raise UserError(
            f"global_batch_size: {cfg.global_batch_size} is not a multiple of batch_size "
            f"{cfg.batch_size} × {world.size} ranks"
        )
    return int(accumulation)


def check_adapters(model: MDMTransformer, wanted: bool | None) -> bool:
    """Whether the model has adapters; check that it has them where they are to be trained, and only
    there, unless ``wanted`` is None.

    Raises:
        UserError: if not.
    """
    there = bool(adapter_names(model))
    if wanted is not None and there != wanted:
        raise UserError(
            "model: it has no adapters: use a builder such as mdm_plugin.models.lora_llada_8b, or "
            "the recipe mdm_full_finetune"
            if wanted
            else "model: it has adapters: use the recipe mdm_lora_finetune, or a builder without"
        )
    return there


def _rope_base(model: MDMTransformer) -> Any:
    rotary = model.layers[0].attn.pos_embeddings
    return rotary.angles.base if isinstance(rotary, HalvesRotary) else None


# What a tensor's shape does not show: the value of a model, and config.json's names of it.
_SETTINGS: dict[str, tuple[Callable[[MDMTransformer], Any], tuple[str, ...]]] = {
    "num_heads": (lambda m: m.layers[0].attn.num_heads, ("num_attention_heads", "n_heads")),
    "num_kv_heads": (
        lambda m: m.layers[0].attn.num_kv_heads,
        ("num_key_value_heads", "n_kv_heads"),
    ),
    "tie_word_embeddings": (lambda m: isinstance(m.output, TiedLinear), ("tie_word_embeddings",)),
    "norm_eps": (lambda m: m.norm.eps, ("rms_norm_eps",)),
    "rope_base": (_rope_base, ("rope_theta", "rope_parameters.rope_theta")),
}


def check_checkpoint(
    weights: Weights | None, model: MDMTransformer, tokenizer: ChatTokenizer
) -> None:
    """Check what a checkpoint's config.json says against the model, and its mask token.

    Shapes of tensors are checked when they are read; this is what they do not show.

    Raises:
        UserError: naming the key.
    """
    if weights is None:
        return
    stated, file = weights.config, weights.directory / "config.json"
    for name, (value, keys) in _SETTINGS.items():
        for key in keys:
            found: Any = stated
            for part in key.split("."):
                found = found.get(part) if isinstance(found, Mapping) else None
            if found is not None and value(model) is not None and found != value(model):
                raise UserError(f"model.{name}: {value(model)}, and {file} says {key} {found}")
    stated_mask = stated.get("mask_token_id")
    if stated_mask is not None and stated_mask != tokenizer.mask_id:
        raise UserError(
            f"tokenizer.mask_token: its id is {tokenizer.mask_id}, and {file} says mask_token_id "
            f"{stated_mask}"
        )


def check_block_length(weights: Weights, model: MDMTransformer) -> None:
    """Check that a model writes in blocks as long as those that its weights learnt.

    Raises:
        UserError: if config.json says another length.
    """
    for key in BLOCK_LENGTH:
        if weights.config.get(key, model.block_length) != model.block_length:
            raise UserError(
                f"model.block_length: {model.block_length}, and "
                f"{weights.directory / 'config.json'} says {key} {weights.config[key]}"
            )


def check_examples(together: int, *data: Rows | None) -> None:
    """Check that rows come as a recipe wants them: by themselves, or two by two.

    Raises:
        UserError: naming the recipe for the data.
    """
    for key, rows in zip(("dataset", "dataset_val"), data, strict=True):
        if rows is not None and rows.facts.together != together:
            raise UserError(
                f"{key}: rows of single answers, and this recipe compares two: use "
                "mdm_plugin.data.preference_dataset, or the recipe mdm_full_finetune"
                if together == 2
                else f"{key}: preferences, of which half are answers not to be learnt: use the "
                "recipe mdm_dpo, or a data set of single answers"
            )


def check_data(model: MDMTransformer, tokenizer: ChatTokenizer, *data: Rows | None) -> None:
    """Check that the model can take the tokens.

    Raises:
        UserError: if a token id is outside its vocabulary, or a row longer than it can take.
    """
    vocabulary = model.tok_embeddings.num_embeddings
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    for name, value in ids.items():
        if value >= vocabulary:
            raise UserError(
                f"model.vocab_size: the tokenizer's {name}, {value}, is outside the model's "
                f"vocabulary of {vocabulary}"
            )
    for rows in data:
        if rows is None:
            continue
        if rows.facts.max_token >= vocabulary:
            raise UserError(
                f"model.vocab_size: the data has token id {rows.facts.max_token}, outside the "
                f"model's vocabulary of {vocabulary}"
            )
        longest = rows.facts.longest
        if longest > model.max_seq_len:
            raise UserError(
                f"tokenizer.max_seq_len: a row has {longest} tokens, and the model takes "
                f"{model.max_seq_len}: set it to that, or raise model.max_seq_len"
            )
