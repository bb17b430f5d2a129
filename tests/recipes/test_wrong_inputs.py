"""Each wrong input: one line with the place, exit code 2, no traceback, nothing saved is lost."""

import json
import shutil

import pytest

from mdm_plugin import cli
from mdm_plugin.errors import UserError
from tests.conftest import TINY

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
EMPTY = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}'

LORA = ("model.lora_attn_modules=[q_proj]", "model.lora_rank=4", "model.lora_alpha=8")

# (overrides, what the line must say); {tmp} is a directory with the files below
WRONG = {
    "unknown key": (["batchsize=4"], "batchsize: unknown key: did you mean batch_size?"),
    "unknown argument": (
        ["model.num_layer=4"],
        "model.num_layer: mdm_plugin.models.llada",
    ),
    "unknown component": (
        ["masking=mdm_plugin.masking.Mirorr"],
        "masking._component_: mdm_plugin.masking.Mirorr cannot be imported",
    ),
    "wrong type": (["batch_size=many"], "batch_size: Value 'many'"),
    "value out of range": (["loss.normalize=rows"], "loss: normalize is 'rows'"),
    "objective that is none": (
        ["objective._component_=mdm_plugin.timesteps.Uniform"],
        "objective: Uniform is no Objective: derive it from mdm_plugin.contract.Objective",
    ),
    "window without width": (
        ["objective._component_=mdm_plugin.objectives.Window", "objective.low=1"],
        "objective: low and high 1 and 1.0: use 0 <= low < high <= 1",
    ),
    "missing file": (["dataset.source=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "bad JSON line": (["dataset.source={tmp}/bad.jsonl"], "bad.jsonl:2: not valid JSON"),
    "row without a response": (["dataset.source={tmp}/empty.jsonl"], "empty.jsonl:2: an assistant"),
    "mask id outside the vocabulary": (
        ["model.vocab_size=1"],
        "mask_id, 1, is outside the model",
    ),
    "token outside the vocabulary": (
        ["model.vocab_size=50"],
        "the model's vocabulary of 50",
    ),
    "batch larger than the data": (["batch_size=500"], "200 rows do not fill one global batch"),
    "batch not divisible": (["global_batch_size=12"], "global_batch_size: 12 is not a multiple"),
    "rows longer than the model": (["model.max_seq_len=16"], "tokenizer.max_seq_len: a row has"),
    "nothing to resume": (["resume_from_checkpoint=True"], "holds no checkpoint to resume from"),
    "missing checkpoint": (
        ["checkpointer.checkpoint_dir={tmp}/nowhere"],
        "checkpointer.checkpoint_dir: ",
    ),
    "truncated weights": (["checkpointer.checkpoint_dir={tmp}"], "cannot be read as safetensors"),
    "sharding of one process": (["data_parallel_replicate_dim=2"], "this is a single process"),
    "no validation data": (["run_val_every_n_steps=5"], "there is no dataset_val"),
    "parameters offloaded on CPU": (["fsdp_cpu_offload=True"], "works on CUDA only"),
    "offloading on CPU": (["enable_activation_offloading=True"], "works on CUDA only"),
    "no such device": (["device=cuda:7"], "device: "),
    "no GPU here": (["device=cuda"], "device: cuda: there is none here (mdm doctor says why)"),
    "a name without its path": (
        ["timesteps=Uniform"],
        "timesteps._component_: Uniform: write its dotted path, such as mdm_plugin.timesteps.",
    ),
    "a hub's name as a directory": (
        ["checkpointer.checkpoint_dir=GSAI-ML/LLaDA-8B-Instruct"],
        "GSAI-ML/LLaDA-8B-Instruct does not exist: fetch it by tune download GSAI-ML/LLaDA-8B",
    ),
    "a checkpoint of another step": (
        ["checkpointer.checkpoint_dir={tmp}/run/step_7"],
        "run/step_7 does not exist (there are step_4)",
    ),
    "pickled weights": (
        ["checkpointer.checkpoint_dir={tmp}/pickled"],
        "pytorch_model.bin is a pickle, which can run code: convert it",
    ),
    "no tokenizer there": (["tokenizer.path={tmp}/nowhere"], "tokenizer.path: "),
    "no mask token": (
        ["tokenizer.path={tmp}/unmasked"],
        "tokenizer.mask_token: not given, and ",
    ),
    "pairs for a chat": (
        ["dataset.source={tmp}/pairs.jsonl"],
        "no list 'messages' (columns: input, output); pairs of texts go by instruct_dataset",
    ),
    "adapters for the full recipe": (
        ["model=mdm_plugin.models.lora_llada", *LORA],
        "model: it has adapters: use the recipe mdm_lora_finetune",
    ),
    "a space in place of =": (
        ["dataset.source", "my.jsonl"],
        "command line: dataset.source: write overrides as key=value",
    ),
    "output nowhere": (["output_dir=/proc/nowhere"], "output_dir: /proc/nowhere cannot be written"),
    "unknown layout": (["batch_layout=sorted"], "batch_layout: sorted: use padded"),
    "packing of filled rows": (["batch_layout=packed"], "set train_eos_padding=False"),
    "best without validation": (["keep_best_n=1"], "run_val_every_n_steps is not set"),
    "no patience": (["timeout_minutes=0"], "timeout_minutes: 0.0: use more than 0"),
    "skip none": (["max_skipped_steps=0"], "max_skipped_steps: 0: use 1 or more"),
    "questions without a verifier": (
        ["questions=x.jsonl"],
        "questions: give questions and verifier",
    ),
    "bad rows beyond the limit": (
        ["dataset.source={tmp}/bad.jsonl", "dataset.on_bad_row=skip", "dataset.max_bad_rows=0"],
        "bad.jsonl:2: not valid JSON",
    ),
    "report of bad rows nowhere": (
        ["dataset.on_bad_row=skip", "dataset.bad_rows_file=/proc/nowhere/bad.jsonl"],
        "bad_rows_file: /proc/nowhere",
    ),
    "half precision without a scaler": (["dtype=fp16"], "dtype: fp16: use bf16 or fp32"),
    "an option in the wrong place": (
        ["checkpointer.keep_last_n=3"],
        "checkpointer.keep_last_n: set keep_last_n at the config's top level",
    ),
    "another one": (
        ["checkpointer.asynchronous=True"],
        "checkpointer.asynchronous: set enable_async_checkpointing at",
    ),
    "zero epochs": (["epochs=0"], "epochs: 0: use 1 or more"),
    "override without =": (["batch_size"], "command line: "),
    "flag": (["--batch_size=4"], "write overrides as key=value"),
}


@pytest.fixture
def files(tmp_path, data_dir):
    (tmp_path / "bad.jsonl").write_text(f"{CHAT}\n{{broken\n")
    (tmp_path / "empty.jsonl").write_text(f"{CHAT}\n{EMPTY}\n")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00")
    (tmp_path / "pairs.jsonl").write_text('{"input": "a", "output": "b"}\n')
    (tmp_path / "run/step_4").mkdir(parents=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    settings = json.loads((data_dir / "tokenizer_config.json").read_text())
    (tmp_path / "unmasked").mkdir()
    shutil.copy(data_dir / "tokenizer.json", tmp_path / "unmasked")
    del settings["mask_token"]
    (tmp_path / "unmasked/tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_with_the_place(case, files, data_dir, monkeypatch, capfd):
    """In this process: the command of the recipe itself, without starting Python again."""
    import mdm_full_finetune

    overrides, expected = WRONG[case]
    arguments = ["--config", str(TINY), f"data_dir={data_dir}", f"output_dir={files / 'out'}"]
    arguments += [o.format(tmp=files) for o in overrides]
    monkeypatch.setattr("sys.argv", ["mdm_full_finetune", *arguments])
    monkeypatch.delenv("MDM_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        mdm_full_finetune.main()
    assert end.value.code == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ") and expected in errors[0], errors
    assert not list(files.glob("out/step_*"))


def last_line(recipe, arguments, monkeypatch, capfd):
    """What a recipe's own command says, in this process, where it ends with exit code 2."""
    monkeypatch.setattr("sys.argv", [recipe, *arguments])
    with pytest.raises(SystemExit) as end:
        __import__(recipe).main()
    assert end.value.code == 2
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("recipe", "config", "line"),
    [
        ("mdm_generate", "quickstart", "prepare: is for another recipe: mdm ls says for which"),
        ("mdm_full_finetune", "quickstart_eval", "tasks: is for another recipe: mdm ls says"),
        ("mdm_full_finetune", "llada/8B_ful", "did you mean llada/8B_full?"),
    ],
)
def test_a_config_for_another_recipe_is_said_to_be_one(recipe, config, line, monkeypatch, capfd):
    assert line in last_line(recipe, ["--config", config], monkeypatch, capfd)


def test_more_ranks_than_gpus_and_no_such_recipe_are_one_line_each(monkeypatch, capfd):
    from mdm_plugin.distributed import world

    def too_many(device):  # what torchtune says on a machine with GPUs
        raise RuntimeError("The local rank is larger than the number of available CUDAs.")

    monkeypatch.setattr(world, "get_device", too_many)
    with pytest.raises(UserError, match=r"CUDAs\.: --nproc_per_node is more than there are$"):
        world.distributed("cuda").__enter__()

    monkeypatch.setattr("sys.argv", ["mdm", "run", "mdm_ful_finetune", "--config", "quickstart"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    line = "error: mdm run mdm_ful_finetune: no such recipe: did you mean mdm_full_finetune?\n"
    assert end.value.code == 2 and capfd.readouterr().err.endswith(line)


def test_through_tune_with_exit_code_and_traceback_on_request(tune):
    done = tune("batchsize=4", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    asked = tune("batchsize=4", check=False, MDM_TRACEBACK="1")
    assert asked.returncode != 0 and "Traceback" in asked.stderr


def test_wrong_config_files_are_named(command, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1,\n")
    (tmp_path / "reference.yaml").write_text("output_dir: ${nowhere}/x\n")
    (tmp_path / "short.yaml").write_text("output_dir: x\n")
    for name, expected in {
        "broken.yaml": "broken.yaml:3: not valid YAML",
        "reference.yaml": "output_dir: Interpolation key 'nowhere' not found",
        "short.yaml": "tokenizer: missing",
        "quickstrat": "did you mean quickstart?",
    }.items():
        done = command("tune", "run", "mdm_full_finetune", "--config", name, check=False)
        assert done.returncode == 2
        assert expected in done.stderr.strip().splitlines()[-1]


def test_resuming_as_another_run_is_refused_and_loses_nothing(tune, tmp_path):
    tune("max_steps_per_epoch=2")
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    for override, key in (("seed=8", "seed 7"), ("batch_size=4", "global_batch_size 8")):
        again = ("max_steps_per_epoch=2", "resume_from_checkpoint=True", override)
        done = tune(*again, check=False)
        assert done.returncode == 2
        assert f"was written with {key}" in done.stderr.strip().splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before


def test_weights_that_do_not_fit_are_named(tune, tmp_path):
    tune("max_steps_per_epoch=1", out="first")
    start = f"checkpointer.checkpoint_dir={tmp_path / 'first/step_1'}"
    for override, expected in (
        ("model.num_layers=3", "the checkpoint lacks layers.2."),
        ("model.num_layers=1", "the checkpoint has unknown tensors: layers.1."),
        ("model.intermediate_dim=48", "has shape (64, 32), and the config's model (48, 32)"),
    ):
        done = tune(start, override, check=False, out="second")
        assert done.returncode == 2
        assert expected in done.stderr.strip().splitlines()[-1]


def test_two_ranks_say_an_error_once(tune):
    done = tune("batch_size=500", launch=("--nproc_per_node", "2"), check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size: 200 rows") == 1


def test_what_only_another_rank_has_met_is_said_by_it(tune, data_dir, tmp_path):
    (tmp_path / "rows_0.jsonl").write_text((data_dir / "val.jsonl").read_text())
    rows = f"dataset.source={tmp_path}/rows_${{oc.env:RANK}}.jsonl"
    done = tune(rows, launch=("--nproc_per_node", "2"), check=False, timeout=120)
    assert done.returncode != 0
    (line,) = [x for x in done.stderr.splitlines() if "error: " in x and "rows_" in x]
    assert "error: rank 1: " in line and "rows_1.jsonl" in line
