"""mdm_eval: any number of ranks, across kills, wrong inputs; and evaluations compared."""

import json
import sys

import pytest
import torch

from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.compare import compare, difference, plot
from mdm_plugin.evaluation.results import Parts
from tests.recipes.test_full_finetune import TWO_RANKS
from tests.recipes.test_generate import CONFIG

TASKS = """
dataset:
  _component_: mdm_plugin.data.chat_dataset
  source: ${data_dir}/val.jsonl
rows: ${data_dir}/val.jsonl
verifier: {_component_: mdm_plugin.quickstart.verifier}
tasks: [nelbo, exact_match, reasoning_gym/chain_sum]
reasoning_gym: {size: 5, max_digits: 1, min_digits: 1}
draws: 4
"""
CONFIG = CONFIG.replace("batch_size: 2", "batch_size: 32").replace(
    "max_new_tokens: 8", "max_new_tokens: 4"
)


@pytest.fixture
def config(tune, tmp_path, data_dir):
    tune("max_steps_per_epoch=1", out="run")
    paths = f"data_dir: {data_dir}\nrun: {tmp_path / 'run/step_1'}\n"
    (tmp_path / "eval.yaml").write_text(paths + CONFIG + TASKS)


@pytest.fixture
def evaluate(config, command, tmp_path):
    def run(*overrides, launch=(), out="e", **kwargs):
        where = f"output_dir={tmp_path / out}"
        command("tune", "run", *launch, "mdm_eval", "--config", "eval.yaml", where, *overrides)
        return json.loads((tmp_path / out / "results.json").read_text())["tasks"]

    return run


def test_two_ranks_a_sharded_model_and_a_killed_run_give_the_figures_of_one(evaluate, tmp_path):
    one = evaluate(out="one")
    assert one["nelbo"]["rows"] == one["exact_match"]["rows"] == 200
    assert one["reasoning_gym/chain_sum"]["rows"] == 5
    assert 4 < one["nelbo"]["nats_per_token"] < 8  # untrained: about log 320
    two = evaluate(out="two", launch=TWO_RANKS)
    sharded = evaluate("data_parallel_shard_dim=-1", out="sharded", launch=TWO_RANKS)
    for task, figures in one.items():
        assert two[task] == pytest.approx(figures, rel=1e-6)
        assert sharded[task] == pytest.approx(figures, rel=1e-6)
    texts = [Parts(tmp_path / x, "exact_match").read() for x in ("one", "two", "sharded")]
    assert texts[0] == texts[1] == texts[2]  # token for token
    # As a kill leaves it: some rows done, the last of them cut short, no results.
    (tmp_path / "one/results.json").unlink()
    file = tmp_path / "one/nelbo.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:50]) + lines[50][:20])
    (tmp_path / "one/exact_match.0.jsonl").unlink()
    again = evaluate(out="one")
    for task, figures in one.items():
        assert again[task] == pytest.approx(figures, rel=1e-6)
    assert file.read_text().startswith("".join(lines[:50]))  # what was done was not done again


def test_parts_survive_a_line_cut_short(tmp_path):
    parts = Parts(tmp_path, "a/b")
    parts.write([{"index": 3, "x": 1}, {"index": 1, "x": 2}])
    with (tmp_path / "a-b.0.jsonl").open("a") as file:
        file.write('{"index": 7, "x"')
    assert sorted(parts.read()) == [1, 3]
    Parts(tmp_path, "a/b", 1).write([{"index": 2, "x": 4}])
    parts.write([{"index": 7, "x": 5}])
    assert {i: r["x"] for i, r in parts.read().items()} == {1: 2, 2: 4, 3: 1, 7: 5}


WRONG = {
    "an unknown task": (["tasks=[mmlu_none]"], "tasks: mmlu_none is not one of"),
    "an unknown puzzle": (["tasks=[reasoning_gym/none]"], "tasks: reasoning_gym/none: "),
    "no rows": (["rows=null"], "exact_match needs rows"),
    "no data": (["dataset=null"], "nelbo needs dataset"),
    "one draw": (["draws=1"], "draws: 1"),
    "no tokens": (["max_new_tokens=0"], "max_new_tokens: 0"),
    "too long": (["max_new_tokens=90"], "are more than the model takes"),
    "no weights": (["checkpointer.checkpoint_dir=null"], "name the weights to evaluate"),
    "a block that does not divide": (["decoding.block_length=3"], "block_length 3"),
    "shards of one process": (["data_parallel_shard_dim=2"], "this is a single process"),
    "another evaluation's directory": (["output_dir=other"], "holds results of another config"),
}


def test_each_wrong_input_is_one_line(config, tmp_path, monkeypatch, capsys):
    import mdm_eval

    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/evaluation.json").write_text("{}")
    for case, (overrides, expected) in WRONG.items():
        arguments = ["x", "--config", "eval.yaml", "output_dir=e", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            mdm_eval.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2, case
        assert error.startswith("error: ") and expected in error, (case, error)
        assert error.count("\n") == 1, (case, error)


def test_a_paired_difference_covers_the_true_one_and_is_narrower_than_unpaired(tmp_path):
    """Rows that differ much among themselves, and a true difference of 0.1 nats per token."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        tokens = torch.randint(5, 30, (60,), generator=generator)
        level = 1 + 2 * torch.rand(60, generator=generator)
        found = []
        for shift in (0.0, 0.1):
            noise = 0.3 * torch.randn(60, generator=generator)
            nats = (level + shift + noise) * tokens
            found.append({i: {"nats": float(nats[i]), "tokens": int(tokens[i])} for i in range(60)})
        d = difference("nelbo", "b", *found)
        covered += d.low <= 0.1 <= d.high
    assert covered >= 0.9 * 200
    unpaired = 2 * 1.96 * float(level.std()) * 2**0.5 / 60**0.5
    assert d.high - d.low < unpaired / 1.3


def test_compare_reads_directories_and_draws(tmp_path):
    for name, right in (("a", [1, 0, 0, 1]), ("b", [1, 1, 0, 1])):
        (tmp_path / name).mkdir()
        parts = Parts(tmp_path / name, "exact_match")
        parts.write({"index": i, "correct": bool(x)} for i, x in enumerate(right))
        (tmp_path / name / "results.json").write_text('{"tasks": {"exact_match": {}}}')
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert found[0].value == pytest.approx(0.25) and found[0].rows == 4
    plot(found, "a", tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 3000
    with pytest.raises(UserError, match="does not exist"):
        compare([tmp_path / "a", tmp_path / "c"])


MULTIPLE_CHOICE = """
task: sums_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["9", "Answer: 9"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATION = """
task: sums_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "9"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_s_local_tasks_by_recipe_and_by_its_own_command(evaluate, command, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [json.dumps({"question": f"4 + {i} ="}) for i in range(6)]
    (tmp_path / "q.jsonl").write_text("\n".join(questions) + "\n")
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", MULTIPLE_CHOICE), ("generate", GENERATION)):
        text = text.replace("FILE", str(tmp_path / "q.jsonl"))
        (tmp_path / f"tasks/{name}.yaml").write_text(text)
    where = f"lm_eval.include_path={tmp_path / 'tasks'}"
    tasks = "tasks=[sums_choice,sums_generate]"
    one = evaluate(tasks, where, out="one")
    # A longer continuation has a lower likelihood by far, for a model that has learnt nothing.
    assert one["sums_choice"]["acc"] == 1.0 and one["sums_generate"]["exact_match"] == 0.0
    shards = "data_parallel_shard_dim=-1"
    assert evaluate(tasks, where, shards, out="two", launch=TWO_RANKS) == one
    done = command(
        *(sys.executable, "-m", "mdm_plugin.evaluation.harness", "--model", "mdm"),
        *("--model_args", "config=eval.yaml", "--tasks", "sums_choice"),
        *("--include_path", tmp_path / "tasks"),
    )
    assert "sums_choice" in done.stdout and "acc" in done.stdout
