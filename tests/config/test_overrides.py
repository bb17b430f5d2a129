"""``key=value`` on the command line: split at the first "=", texts as they were typed."""

import pytest

from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import EvalOptions, GenerateOptions, Options, VarianceOptions
from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.errors import UserError

# Prompts of which YAML, OmegaConf or torchtune's own merging would make something else.
TEXTS = [
    "7 - 2 + 9 =",
    "a = b == c",
    "=",
    "[1, 2]",
    "3: 4",
    "{a: 1}",
    "007",
    "1e3",
    "0x10",
    "yes",
    "- one",
    "one # two",
    "'quoted'",
    '"quoted" and not',
    "*anchor",
    "!tag x",
    "% & @ `",
    " padded ",
    "two\nlines",
    "What is ${HOME}?",
    "${data_dir}",
    "${",
    r"a \${x} \\${y} \n",
    "???",
    r"\???",
    "~",
]


@pytest.mark.parametrize("key", ["prompt", "system_prompt"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_the_text_that_was_typed(key, text):
    cfg = load_config("quickstart_generate", [f"{key}={text}"], GenerateOptions)
    assert cfg[key] == text


@pytest.mark.parametrize("nothing", ["", "null", "None"])
def test_null_and_nothing_unset_a_text(nothing):
    given = ["prompt=a", "output=b", f"prompt={nothing}", f"output={nothing}"]
    cfg = load_config("quickstart_generate", given, GenerateOptions)
    assert cfg.prompt is None and cfg.output is None


def test_prompts_of_stdin_and_of_any_file_name(tokenizer):
    for name in ("-", "007", "my: file.txt", "a=b.txt"):
        cfg = load_config("quickstart_generate", [f"prompts={name}"], GenerateOptions)
        assert cfg.prompts == name
        if name != "-":
            with pytest.raises(UserError, match=f"prompts: {name} does not exist"):
                read_prompts(tokenizer, cfg.prompt, cfg.prompts)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("quickstart", Options),
        ("quickstart_variance", VarianceOptions),
        ("quickstart_generate", GenerateOptions),
        ("quickstart_eval", EvalOptions),
    ],
)
def test_every_command_splits_at_the_first_equals_sign(config, options):
    key = "output" if options is GenerateOptions else "output_dir"
    overrides = [f"{key}=lr=1e-4/seed=007", "tokenizer.path=x=[y]=z", "tokenizer.max_seq_len=0x10"]
    cfg = load_config(config, overrides, options)
    assert cfg[key] == "lr=1e-4/seed=007"
    assert cfg.tokenizer.path == "x=[y]=z"  # a component's argument is YAML: here a plain text
    assert cfg.tokenizer.max_seq_len == 16


def test_a_text_but_for_prompts_can_refer_to_other_keys():
    given = ["data_dir=/there", "output_dir=${data_dir}/a=b"]
    cfg = load_config("quickstart", given, Options)
    assert cfg.output_dir == "/there/a=b"
    assert cfg.metric_logger.log_dir == "/there/a=b/tensorboard"  # and others to it
    with pytest.raises(UserError, match="output_dir: Interpolation key 'nowhere' not found"):
        load_config("quickstart", ["output_dir=${nowhere}/x"], Options)


def test_torchtune_s_habits():
    overrides = [
        "timesteps=mdm_plugin.timesteps.Stratified",  # a component's path
        "objective=mdm_plugin.objectives.Window",  # of one that the file does not have, too
        "objective.low=0.3",
        "metric_logger._component_=torchtune.training.metric_logging.StdoutLogger",
        "dataset_val=null",
        "lr_scheduler=None",
        "optimizer.betas=[0.5, 0.6]",
        "batch_size=8",
        "batch_size=16",  # the last one counts
        "max_steps_per_epoch=None",
        "~clip_grad_norm",
        "~optimizer.weight_decay",
    ]
    cfg = load_config("quickstart", overrides, Options)
    assert dict(cfg.timesteps) == {"_component_": "mdm_plugin.timesteps.Stratified"}
    assert dict(cfg.objective) == {"_component_": "mdm_plugin.objectives.Window", "low": 0.3}
    assert cfg.metric_logger._component_.endswith("StdoutLogger")
    assert load_config("quickstart", ["ema=null"], Options).ema is None
    cfg = load_config("quickstart", overrides, Options)
    assert cfg.dataset_val is None and cfg.lr_scheduler is None and cfg.max_steps_per_epoch is None
    assert cfg.batch_size == 16 and list(cfg.optimizer.betas) == [0.5, 0.6]
    assert cfg.clip_grad_norm is None and "weight_decay" not in cfg.optimizer


def test_a_key_goes_with_what_it_leaves_empty(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: x\ntasks: [nelbo]\nlm_eval: {a: {b: 1}, c: 2}\n")
    for overrides, left in (
        (["~lm_eval.a.b"], {"c": 2}),
        (["~lm_eval.a.b", "~lm_eval.c"], None),
        (["~lm_eval"], None),
    ):
        components = [
            f"{key}={{_component_: mdm_plugin.models.ChatTokenizer, path: x}}"
            for key in ("tokenizer", "model", "checkpointer", "decoding", "sampler")
        ]
        cfg = load_config(str(tmp_path / "c.yaml"), [*overrides, *components], EvalOptions)
        assert cfg.lm_eval == left


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("batch_size", "command line: batch_size: write overrides as key=value"),
        ("=4", "command line: =4: write overrides as key=value"),
        ("optimizer.betas=[0.9, 1", "command line: optimizer.betas=[0.9, 1: not valid YAML: "),
        ("optimizer.betas=*x", "command line: optimizer.betas=*x: not valid YAML: "),
        ("optimizer.lr=${", "command line: optimizer.lr=${: "),
        ("seed.x=4", "seed: "),
        ("optimizer.betas[0]=0.5", "command line: optimizer.betas[0]=0.5: Cannot merge"),
        ("~batchsize", "command line: ~batchsize: the config has no such key"),
        ("~batch_size.x", "command line: ~batch_size.x: the config has no such key"),
        ("~timesteps", "command line: ~timesteps: a component cannot be taken away"),
        ("~timesteps._component_", "command line: ~timesteps._component_: a component cannot"),
        ("output_dir=null", "output_dir: "),
    ],
)
def test_a_wrong_argument_is_named(override, line):
    with pytest.raises(UserError) as error:
        load_config("quickstart", [override], Options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
