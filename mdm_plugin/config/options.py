"""The options of the training recipes."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Options:
    """The config's top-level keys, their types and defaults. Names are torchtune's."""

    # Components: {_component_: dotted.path, argument: value, …}
    tokenizer: dict[str, Any] = MISSING  # text to tokens: ids, mask token, chat template
    model: dict[str, Any] = MISSING  # its builder, with sizes
    dataset: dict[str, Any] | None = MISSING  # the rows that are learnt
    optimizer: dict[str, Any] = MISSING  # torch.optim, torchao.optim, or Muon
    loss: dict[str, Any] = MISSING  # MDMLoss: how the loss is normalised
    timesteps: dict[str, Any] = MISSING  # the sampler of t: the masking rates
    masking: dict[str, Any] = MISSING  # the masks at a rate, or at a count
    objective: dict[str, Any] | None = None  # which t are to count how much; None: the ELBO
    checkpointer: dict[str, Any] = MISSING  # where weights come from and go to
    metric_logger: dict[str, Any] = MISSING  # TensorBoardLogger, or one of torchtune's
    lr_scheduler: dict[str, Any] | None = None  # of steps: a warm-up, then linear or cosine
    ema: dict[str, Any] | None = None  # weights averaged over steps, for validation and export
    dataset_val: dict[str, Any] | None = None  # or {split: 0.02, max_rows: 200}, out of dataset
    profiler: dict[str, Any] | None = None  # torchtune's, of torch.profiler
    prepare: dict[str, Any] | None = None  # called once before anything else

    # Where and how
    output_dir: str = MISSING  # checkpoints, logs, config
    device: str = "cuda"  # cuda or cpu
    dtype: str = "bf16"  # what the model computes in: bf16 or fp32
    master_dtype: str = "fp32"  # of what is trained, and of its gradients; bf16: half the memory
    stochastic_rounding: bool = True  # of bf16 masters, so that small steps count in the mean
    seed: int = 0  # of the order of the rows, their noise, and new weights
    dry_run: Any = False  # True, or {ranks: 64, device_gib: 80}: say what the run needs, and end
    # auto: the newest whole checkpoint in output_dir, if it is of this config; else a start.
    # True: the newest, of a config that has changed too. Or a step_N directory; False: a start.
    resume_from_checkpoint: Any = "auto"

    # Steps and batches
    batch_size: int = MISSING  # rows per rank and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    global_batch_size: int | None = None  # if set, gradient_accumulation_steps follows from it
    epochs: int = 1  # passes over the rows
    max_steps_per_epoch: int | None = None  # None: all rows
    shuffle: bool = True  # another order of the rows in each epoch
    train_eos_padding: bool = True  # LLaDA: EOS fills the batch and is learnt; else it is ignored
    pad_to_multiple_of: int = 1  # lengths are rounded up to it
    batch_layout: str = "padded"  # grouped: by length; packed: rows in one sequence, no padding
    blocks_share_t: bool = False  # block diffusion: a row's blocks have one t; else each its own
    block_schedule: Any = None  # [[0.0, 4], [0.5, 32]]: other block lengths during training
    clip_grad_norm: float | None = None  # longest gradient that is taken whole; None: any

    # Memory and speed
    compile: bool = False  # torch.compile, of the layers and the loss
    enable_activation_checkpointing: bool = False  # layers are computed again in the backward pass
    enable_activation_offloading: bool = False  # what is kept for it goes to CPU memory
    optimizer_in_bwd: bool = False  # each gradient is used and freed as it comes
    enable_fp8_training: bool = (
        False  # the layers' matrix products in float8; compute capability 8.9
    )
    fp8_recipe_name: str = "tensorwise"  # torchao's: tensorwise, rowwise, rowwise_with_gw_hp
    fsdp_cpu_offload: bool = False  # parameters, gradients and optimizer state rest in CPU memory
    fsdp_reshard_after_forward: bool = True  # False: gathered until the backward pass
    data_parallel_shard_dim: int = -1  # ranks that share one copy of the model; −1: all
    data_parallel_replicate_dim: int = 1  # copies of the model (HSDP)
    timeout_minutes: float = 30  # a rank that waits longer for another ends the run

    # What is shown and kept
    log_every_n_steps: int = 1  # means since the last time
    save_every_n_epochs: int = 1  # and at the end
    save_every_n_steps: int | None = None  # besides the ends of epochs
    keep_last_n: int | None = None  # checkpoints, the newest; None: all of them
    keep_best_n: int | None = None  # besides: of those validated, the ones of the lowest NELBO
    enable_async_checkpointing: bool = False  # write while training goes on
    max_skipped_steps: int | None = 10  # steps that are not finite, in a row; null: take them
    loss_spike_z: float | None = 6.0  # report a loss so many deviations above the recent ones
    run_val_every_n_steps: int | None = None  # and before the first and after the last step
    val_draws: int = 8  # forwards per validation row
    sample_rows: int = 4  # validation prompts that the model completes at each validation
    sample_new_tokens: int = 64  # the longest completion of them
    sample_steps: int = 32  # forwards of each
    questions: str | None = None  # file of rows to answer at each validation; needs a verifier
    max_questions: int = 64  # the first ones of questions
    verifier: dict[str, Any] | None = None  # gives a function of (completion, row): is it right?


@dataclass
class DPOOptions(Options):
    """What mdm_dpo has besides, and what is another there."""

    loss: dict[str, Any] = MISSING  # of preferences: torchtune.rlhf.loss.DPOLoss
    bound: dict[str, Any] = MISSING  # MDMLoss: what an answer's bound is computed by
    draws: int = 8  # forwards that each bound is estimated from; a multiple of the mask's views
    share_noise: bool = False  # one noise for both answers of a preference
    # precompute: the reference's bounds, once and before training, into output_dir/reference.
    # model: a frozen copy. adapters_off: the model without its adapters.
    reference: str = "precompute"
    sft_weight: float = 0.05  # of the fine-tuning loss of the chosen answers
    normalize: str = "sum"  # a bound is the sum over its answer's tokens; mean: beta is per token
    batch_size: int = MISSING  # preferences per rank and micro-batch
    train_eos_padding: bool = False  # True is refused: a bound depends on its own answer alone


@dataclass
class GRPOOptions(Options):
    """What mdm_grpo has besides, and what is another there."""

    prompts: str = MISSING  # a file of them, as mdm_generate's
    rewards: dict[str, Any] = MISSING  # name: {component of a function (completion, row), weight}
    loss: dict[str, Any] = MISSING  # mdm_plugin.alignment.policy.PolicyLoss
    bound: dict[str, Any] = MISSING  # MDMLoss: what an answer's bound is computed by
    dataset: dict[str, Any] | None = None  # none: the model writes the rows that it learns from

    # Answers
    group_size: int = 8  # answers to each prompt
    max_new_tokens: int = 256  # the longest answer
    decoding: dict[str, Any] = MISSING  # Decoding, with a temperature
    sampler: dict[str, Any] = MISSING  # Remasking, Threshold or Stable
    reward_timeout: float = 10.0  # seconds that a reward may take for an answer
    max_failed_rewards: float = 0.5  # a larger share of a step's answers without one ends the run

    # Updates
    batch_size: int = MISSING  # prompts per rank and micro-batch, each with group_size answers
    updates: int = 1  # optimizer steps on the answers of a step
    draws: int = 2  # forwards that each bound is estimated from; a multiple of the mask's views
    share_noise: bool = False  # one noise for all answers to a prompt; else each has its own
    updates_share_noise: bool = True  # one noise for all updates of a step; else each has its own
    by_deviation: bool = False  # divide advantages by their group's standard deviation
    baseline: str = "mean"  # of a prompt's answers; leave_one_out: of the others; none: 0
    equal_groups: str = "keep"  # whose answers are all worth the same: keep or skip, in the loss
    reference: str | None = None  # adapters_off or model, where the loss has a KL divergence
    train_eos_padding: bool = False  # True is refused: answers end where the model ends them


@dataclass
class PreferenceNoise:
    """mdm_variance's ``preferences``: the score and the gradient that mdm_dpo estimates."""

    loss: dict[str, Any] = MISSING  # of preferences: torchtune.rlhf.loss.DPOLoss
    reference: dict[str, Any] = MISSING  # a checkpointer: the model that training started from
    sft_weight: float = 0.05  # of the fine-tuning loss of the chosen answers
    draws: int = 8  # forwards that each bound is estimated from; estimators may have their own
    repeats: int = 8  # looks at each batch by each estimator, with other noise


@dataclass
class PolicyNoise:
    """mdm_variance's ``policy``: the gradient that mdm_grpo estimates from the model's answers."""

    prompts: str = MISSING  # a file of them, as mdm_grpo's
    rewards: dict[str, Any] = MISSING  # name: {component of a function (completion, row), weight}
    loss: dict[str, Any] = MISSING  # PolicyLoss; estimators may have their own
    decoding: dict[str, Any] = MISSING  # Decoding, with a temperature
    sampler: dict[str, Any] = MISSING  # Remasking, Threshold or Stable
    group_size: int = 8  # answers to each prompt
    max_new_tokens: int = 256  # the longest answer
    reward_timeout: float = 10.0  # seconds that a reward may take for an answer
    by_deviation: bool = False  # divide advantages by their group's standard deviation
    baseline: str = "mean"  # of a prompt's answers; leave_one_out: of the others; none: 0
    draws: int = 4  # forwards that each bound is estimated from; estimators may have their own
    repeats: int = 3  # pairs of looks at the same answers by each estimator, with other noise
    # The model has made a step so long along the first estimator's gradient since it answered, and
    # its ratios are not 1; 0: the first update after the answers.
    step: float = 0.0


@dataclass
class VarianceOptions:
    """mdm_variance's top-level keys, their types and defaults."""

    tokenizer: dict[str, Any] = MISSING  # the one of training
    model: dict[str, Any] = MISSING  # its builder
    dataset: dict[str, Any] | None = None  # rows to measure on; a policy writes its own
    loss: dict[str, Any] = MISSING  # MDMLoss
    checkpointer: dict[str, Any] = MISSING  # whose weights are measured
    # name: {timesteps: component, masking: component}; the first is what others are compared with.
    # Of preferences they may have draws and noise besides, of a policy draws and loss.
    estimators: dict[str, Any] = MISSING
    objective: dict[str, Any] | None = None  # what all of them estimate; None: the ELBO
    progress: float = 0.0  # the moment of training, 0 to 1, of an objective that moves
    preferences: PreferenceNoise | None = None  # measure mdm_dpo's score and gradient in its place
    policy: PolicyNoise | None = None  # measure mdm_grpo's gradient in its place
    # {model: component, checkpointer: component}: its variance is the line to compare with
    autoregressive: dict[str, Any] | None = None
    metric_logger: dict[str, Any] | None = None  # the same figures, in TensorBoard
    prepare: dict[str, Any] | None = None  # called once before anything else

    output_dir: str = MISSING  # table, figures, variance.json
    device: str = "cuda"  # cuda or cpu
    dtype: str = "fp32"  # what is computed in: fp32 or bf16
    seed: int = 0  # of rows, noise and folding
    batch_size: int = MISSING  # rows per rank; those of all ranks draw t together
    batches: int = 96  # how many batches of rows; every estimator has four draws of each
    batches_per_round: int = 16  # figures are renewed after each round
    projection: int | None = None  # dimensions that gradients are folded to; None: exact
    warmup_batches: int = 50  # of losses that an Adaptive sampler sees first
    train_eos_padding: bool = True  # as the training that is asked about
    compile: bool = False  # torch.compile, of the layers and the loss
    enable_activation_checkpointing: bool = False  # layers are computed again in the backward pass
    fsdp_cpu_offload: bool = False  # parameters rest in CPU memory
    fsdp_reshard_after_forward: bool = True  # False: gathered until the backward pass
    data_parallel_shard_dim: int = -1  # ranks that share one copy of the model; −1: all


@dataclass
class InferenceOptions:
    """What mdm_generate and mdm_eval have in common."""

    tokenizer: dict[str, Any] = MISSING  # as in training
    model: dict[str, Any] = MISSING  # its builder
    checkpointer: dict[str, Any] = MISSING  # whose weights are used
    decoding: dict[str, Any] = MISSING  # Decoding: blocks, temperature, guidance, caches
    sampler: dict[str, Any] = MISSING  # Remasking, Threshold or Stable: which tokens come next
    max_new_tokens: int = 256  # the longest completion

    device: str = "cuda"  # cuda or cpu
    dtype: str = "bf16"  # what is computed in: bf16 or fp32
    compile: bool = False  # torch.compile, of the layers
    data_parallel_shard_dim: int = 1  # ranks that hold one model together, by FSDP2; −1: all
    batch_size: int = 8  # prompts or rows per forward of a rank
    seed: int = 0  # a text's is seed + its number; of further samples, of that and theirs


@dataclass
class GenerateOptions(InferenceOptions):
    """mdm_generate's top-level keys, their types and defaults."""

    # prompt and system_prompt are for the command line: taken as typed, ${…} included.
    prompt: str | None = field(default=None, metadata={"verbatim": True})  # one, taken as typed
    system_prompt: str | None = field(default=None, metadata={"verbatim": True})  # before it
    prompts: str | None = None  # a file of them, or - for stdin
    chat: bool = True  # a prompt is a user's turn; False: text to be continued
    samples: int = 1  # texts for each prompt; several want a temperature
    verifier: dict[str, Any] | None = None  # gives a function of (completion, row): is it right?
    pairs: str | None = None  # JSON lines: a right answer and a wrong one, for mdm_dpo
    output: str | None = None  # JSON lines; None for stdout
    replay: str | None = None  # a page (HTML) that plays how each text was unmasked
    overwrite: bool = False  # output and replay may be there already
    live: bool | None = None  # show the text as it is unmasked; None: on a terminal


@dataclass
class EvalOptions(InferenceOptions):
    """mdm_eval's top-level keys, their types and defaults."""

    output_dir: str = MISSING  # each row's result, and the summary
    tasks: list[str] = MISSING  # nelbo, exact_match, reasoning_gym/NAME, names of lm-eval's tasks
    dataset: dict[str, Any] | None = None  # of nelbo
    draws: int = 32  # of nelbo: forwards per row
    rows: str | None = None  # of exact_match: a file of conversations, the last turn the reference
    verifier: dict[str, Any] | None = None  # of exact_match: gives a function of (completion, row)
    reasoning_gym: dict[str, Any] | None = None  # size, seed and settings of its tasks
    lm_eval: dict[str, Any] | None = None  # include_path, and arguments of lm_eval.simple_evaluate


ALL_OPTIONS = (Options, DPOOptions, GRPOOptions, VarianceOptions, GenerateOptions, EvalOptions)
"""Of each recipe's config."""
