"""The options of the training recipes."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Options:
    """The config's top-level keys, their types and defaults. Names are torchtune's."""

    # Components: {_component_: dotted.path, argument: value, …}
    tokenizer: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    dataset: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    timesteps: dict[str, Any] = MISSING
    masking: dict[str, Any] = MISSING
    checkpointer: dict[str, Any] = MISSING
    metric_logger: dict[str, Any] = MISSING
    lr_scheduler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    dataset_val: dict[str, Any] | None = None  # or {split: 0.02, max_rows: 200}, out of dataset
    profiler: dict[str, Any] | None = None
    prepare: dict[str, Any] | None = None  # called once before anything else

    # Where and how
    output_dir: str = MISSING
    device: str = "cuda"
    dtype: str = "bf16"  # what the model computes in: bf16 or fp32
    master_dtype: str = "fp32"  # of what is trained, and of its gradients; bf16: half the memory,
    stochastic_rounding: bool = True  # whose optimizer rounds at random, so that small steps count
    seed: int = 0
    dry_run: Any = False  # True, or {ranks: 64, device_gib: 80}: say what the run needs, and end
    # auto: the newest whole checkpoint in output_dir, if it is of this config; else a start.
    # True: the newest, of a config that has changed too. Or a step_N directory; False: a start.
    resume_from_checkpoint: Any = "auto"

    # Steps and batches
    batch_size: int = MISSING  # rows per rank and micro-batch
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None  # if set, gradient_accumulation_steps follows from it
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    shuffle: bool = True
    train_eos_padding: bool = True  # LLaDA: EOS fills the batch and is learnt; else it is ignored
    pad_to_multiple_of: int = 1
    batch_layout: str = "padded"  # grouped: by length; packed: rows in one sequence, no padding
    clip_grad_norm: float | None = None

    # Memory and speed
    compile: bool = False
    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    optimizer_in_bwd: bool = False  # each gradient is used and freed as it comes
    enable_fp8_training: bool = (
        False  # the layers' matrix products in float8; compute capability 8.9
    )
    fp8_recipe_name: str = "tensorwise"  # torchao's: tensorwise, rowwise, rowwise_with_gw_hp
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    data_parallel_shard_dim: int = -1
    data_parallel_replicate_dim: int = 1
    timeout_minutes: float = 30  # a rank that waits longer for another ends the run

    # What is shown and kept
    log_every_n_steps: int = 1
    save_every_n_epochs: int = 1  # and at the end
    save_every_n_steps: int | None = None  # besides
    keep_last_n: int | None = None
    keep_best_n: int | None = None  # besides: of those validated, the ones of the lowest NELBO
    enable_async_checkpointing: bool = False  # write while training goes on
    max_skipped_steps: int | None = 10  # steps that are not finite, in a row; null: take them
    loss_spike_z: float | None = 6.0  # report a loss so many deviations above the recent ones
    run_val_every_n_steps: int | None = None  # and before the first and after the last step
    val_draws: int = 8  # forwards per validation row
    sample_rows: int = 4  # validation prompts that the model completes at each validation
    sample_new_tokens: int = 64
    sample_steps: int = 32
    questions: str | None = None  # file of rows to answer at each validation; needs verifier
    max_questions: int = 64  # its first ones
    verifier: dict[str, Any] | None = None  # gives a function of (completion, row): is it right?


@dataclass
class VarianceOptions:
    """mdm_variance's top-level keys, their types and defaults."""

    tokenizer: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    dataset: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    checkpointer: dict[str, Any] = MISSING
    # name: {timesteps: component, masking: component}; the first is what others are compared with
    estimators: dict[str, Any] = MISSING
    # {model: component, checkpointer: component}: its variance is the line to compare with
    autoregressive: dict[str, Any] | None = None
    metric_logger: dict[str, Any] | None = None
    prepare: dict[str, Any] | None = None

    output_dir: str = MISSING
    device: str = "cuda"
    dtype: str = "fp32"
    seed: int = 0
    batch_size: int = MISSING  # rows per rank; those of all ranks draw t together
    batches: int = 96  # how many batches of rows; every estimator has four draws of each
    batches_per_round: int = 16  # figures are renewed after each round
    projection: int | None = None  # dimensions that gradients are folded to; None: exact
    warmup_batches: int = 50  # of losses that an Adaptive sampler sees first
    train_eos_padding: bool = True
    compile: bool = False
    enable_activation_checkpointing: bool = False
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    data_parallel_shard_dim: int = -1


@dataclass
class InferenceOptions:
    """What mdm_generate and mdm_eval have in common."""

    tokenizer: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    checkpointer: dict[str, Any] = MISSING
    decoding: dict[str, Any] = MISSING
    sampler: dict[str, Any] = MISSING
    max_new_tokens: int = 256

    device: str = "cuda"
    dtype: str = "bf16"
    compile: bool = False
    data_parallel_shard_dim: int = 1  # ranks that hold one model together, by FSDP2; −1: all
    batch_size: int = 8
    seed: int = 0


@dataclass
class GenerateOptions(InferenceOptions):
    """mdm_generate's top-level keys, their types and defaults."""

    # One, on the command line, where both are taken as they were typed, ${…} included.
    prompt: str | None = field(default=None, metadata={"verbatim": True})
    system_prompt: str | None = field(default=None, metadata={"verbatim": True})
    prompts: str | None = None  # a file of them, or - for stdin
    chat: bool = True  # a prompt is a user's turn; False: text to be continued
    output: str | None = None  # JSON lines; None for stdout
    overwrite: bool = False
    live: bool | None = None  # show the text as it is unmasked; None: on a terminal


@dataclass
class EvalOptions(InferenceOptions):
    """mdm_eval's top-level keys, their types and defaults."""

    output_dir: str = MISSING
    tasks: list[str] = MISSING  # nelbo, exact_match, reasoning_gym/NAME, names of lm-eval's tasks
    dataset: dict[str, Any] | None = None  # of nelbo
    draws: int = 32  # of nelbo: forwards per row
    rows: str | None = None  # of exact_match: a file of conversations, the last turn the reference
    verifier: dict[str, Any] | None = None  # of exact_match: gives a function of (completion, row)
    reasoning_gym: dict[str, Any] | None = None  # size, seed and settings of its tasks
    lm_eval: dict[str, Any] | None = None  # include_path, and arguments of lm_eval.simple_evaluate
