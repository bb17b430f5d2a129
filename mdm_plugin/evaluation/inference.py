"""What mdm_generate, mdm_eval and the harness set up alike: a decoding, and a model to use."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import training

from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.config.components import instantiate
from mdm_plugin.data import Rows
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.build import Build, build_model
from mdm_plugin.distributed.parameters import adapter_names
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.generation import Decoding, check_lengths
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.training.checks import check_block_length, check_checkpoint, check_data


def read_decoding(cfg: DictConfig) -> Decoding:
    """``cfg.decoding`` with ``cfg.sampler``; ``check_writing`` looks at them beside a model.

    Raises:
        UserError: if they, ``cfg.max_new_tokens`` or ``cfg.batch_size`` do not make sense.
    """
    for key in ("batch_size", "max_new_tokens"):
        if cfg[key] < 1:
            raise UserError(f"{key}: {cfg[key]}: use 1 or more")
    decoding: Decoding = instantiate(cfg, "decoding", sampler=instantiate(cfg, "sampler"))
    return decoding


def check_writing(
    model: MDMTransformer, decoding: Decoding, n: int, prompts: Iterable[Prompt] = ()
) -> None:
    """Check that a model can write n tokens by a decoding, after each of some prompts.

    Raises:
        UserError: if their blocks and steps do not fit each other, or a prompt is too long.
    """
    try:
        check_lengths(model, decoding, n)
    except ValueError as error:
        raise UserError(f"decoding: {error}") from error
    for prompt in prompts:
        if len(prompt.ids) + n > model.max_seq_len:
            raise UserError(
                f"{prompt.place}: {len(prompt.ids)} tokens and max_new_tokens {n} are more than "
                f"the model takes, {model.max_seq_len}"
            )


def load_model(
    cfg: DictConfig,
    world: World,
    tokenizer: ChatTokenizer,
    decoding: Decoding,
    prompts: Iterable[Prompt] = (),
    rows: Rows | None = None,
    purpose: str = "use",
) -> tuple[MDMTransformer, list[Path]]:
    """A model in eval mode, and the files that it was filled from.

    Args:
        cfg: for model, checkpointer, dtype, compile, max_new_tokens and data_parallel_shard_dim:
            the model is whole on every rank (1), or sharded over the mesh of ``world``.
        decoding, prompts, rows: what it must be able to take.
        purpose: of the weights, for the message that none are given.

    Raises:
        UserError: if no weights are given, they do not fit, and as ``check_writing``.
    """
    checkpointer: Any = instantiate(cfg, "checkpointer")
    if checkpointer.weights is None:
        raise UserError(f"checkpointer.checkpoint_dir: not given: name the weights to {purpose}")
    model = build_model(
        lambda: instantiate(cfg, "model"),
        world.alone() if cfg.data_parallel_shard_dim == 1 else world,
        training.get_dtype(cfg.dtype, device=world.device),
        Build(compile=cfg.compile),
    ).eval()
    if adapter_names(model) and checkpointer.adapters is None:
        raise UserError(
            "checkpointer.adapter_checkpoint: not given, and the model has adapters: name a step_N "
            "with theirs, or the model's builder without lora_, for weights that have them merged"
        )
    check_checkpoint(checkpointer.weights, model, tokenizer)
    check_block_length(checkpointer.weights, model)
    check_data(model, tokenizer, rows)
    check_writing(model, decoding, cfg.max_new_tokens, prompts)
    checkpointer.load_weights(model)
    return model, checkpointer.source_files()


def measured_model(
    options: DictConfig,
    build: Callable[[], MDMTransformer],
    checkpointer: Checkpointer,
    world: World,
) -> MDMTransformer:
    """A model of ``mdm_variance``, as its options have it built, filled by ``checkpointer``."""
    model = build_model(
        build,
        world,
        training.get_dtype(options.dtype, device=world.device),
        Build(
            compile=options.compile,
            activation_checkpointing=options.enable_activation_checkpointing,
            cpu_offload=options.fsdp_cpu_offload,
            reshard_after_forward=options.fsdp_reshard_after_forward,
        ),
    )
    checkpointer.load_weights(model, options.seed)
    return model
