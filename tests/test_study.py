"""The study's parts that its conclusions rest on: data, tuning, statistics, the report's bytes."""

import json
import random
import shutil
from math import comb

import pytest

from benchmarks.study import report
from benchmarks.study.methods import (
    CAUSES,
    METHODS,
    MOMENTA,
    RATES,
    SEEDS,
    STEPS,
    TUNED_ON,
    TUNING_SEEDS,
    overrides,
)
from benchmarks.study.runs import HERE, Run, best_rate, causes, final, tried, tuning
from benchmarks.study.tasks import LONGEST, SETTINGS, SIZES, prepare, verifier
from mdm_plugin.data import chat_dataset
from mdm_plugin.models import ChatTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    prepare(place)
    return place


def test_no_problem_occurs_twice_and_every_reference_is_right(home):
    lessons = {json.loads(x)["messages"][0]["content"] for x in (home / "pretrain.jsonl").open()}
    for task in SETTINGS:
        asked = []
        for split, size in SIZES.items():
            rows = [json.loads(x) for x in (home / task / f"{split}.jsonl").open()]
            assert len(rows) == size
            asked += [row["messages"][0]["content"] for row in rows]
            verify = verifier(task)
            assert all(verify(row["messages"][1]["content"], row) for row in rows)
            assert not verify("Answer: none", rows[0]) and not verify("", rows[0])
        assert len(set(asked)) == len(asked)
        assert not lessons & set(asked)


def test_answers_are_as_long_as_in_training(home):
    tokenizer = ChatTokenizer(str(home), max_seq_len=64)
    for task, longest in LONGEST.items():
        rows = chat_dataset(tokenizer, source=str(home / task / "train.jsonl"))
        assert max(int(row.eligible.sum()) for row in rows) == longest


def as_dict(given):
    """Of key=value; what ~key takes away is not there."""
    return dict(x.split("=", 1) for x in given if not x.startswith("~"))


def test_methods_take_as_many_steps_and_their_own_forwards():
    assert not set(SEEDS) & set(TUNING_SEEDS) and len(SEEDS) >= 5 and len(METHODS) >= 11
    for name, method in METHODS.items():
        for task, steps in STEPS.items():
            given = as_dict(overrides(name, task))
            assert int(given["epochs"]) * int(given["max_steps_per_epoch"]) == steps
        assert int(given["batch_size"]) == method.rows
        assert method.family in TUNED_ON
        mask = given.get("masking._component_", "").rpartition(".")[2]
        assert method.views == (2 if mask in ("Mirror", "Independent", "Complement") else 1)


def test_a_cause_is_one_change():
    assert not set(CAUSES) & set(METHODS)
    for name, cause in CAUSES.items():
        for task in cause.tasks:
            given, like = (as_dict(overrides(method, task)) for method in (name, cause.like))
            changed = {key for key in given if given[key] != like.get(key)}
            assert bool(changed) != bool(cause.rate)
            assert like.keys() - given.keys() <= {"timesteps.grid"}
            if cause.method.budget != 1:
                assert changed <= {"epochs", "max_steps_per_epoch"}
            steps = int(given["epochs"]) * int(given["max_steps_per_epoch"])
            assert steps == STEPS[task] * cause.method.budget
            assert len(changed - {"max_steps_per_epoch"}) <= 1


def test_what_was_tried_is_another_momentum_and_nothing_else():
    for chosen, momenta in MOMENTA.items():
        assert chosen in momenta.values() and METHODS[chosen].family in TUNED_ON
        own = as_dict(overrides(chosen, "legs"))
        for momentum, name in momenta.items():
            given = as_dict(overrides(name, "legs"))
            keys = {key for key in own.keys() | given.keys() if own.get(key) != given.get(key)}
            assert keys <= {"optimizer.momentum", "optimizer.betas"} and bool(keys) == (
                name != chosen
            )
            beta = given.get("optimizer.betas", "[0.9,0.98]").strip("[]").split(",")[0]
            muon = [given.get("optimizer.momentum", "0.95")] if "Muon" in str(given) else []
            assert momentum.split(", ") == [*muon, beta]


PARALLEL = {"two": 0.3, "threshold": 0.25, "stable": 0.2}


def store(results, run, accuracy, rows=500, seed=0):
    dice = random.Random(f"{run} {seed}")
    correct = [int(dice.random() < accuracy) for _ in range(rows)]
    file = run.file(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {
        **run._asdict(),
        "accuracy": sum(correct) / rows,
        "correct": "".join(map(str, correct)),
        "nats_per_token": 1 - accuracy,
        "curves": {"val/nelbo_nats_per_token": [[0, 5.0], [320, 0.5], [640, 1 - accuracy]]},
        "seconds": 60.0,
        **({"parallel": PARALLEL} if run.method == "standard_muon_80" else {}),
    }
    file.write_text(json.dumps(found))


@pytest.fixture
def results(tmp_path):
    """A study with known accuracies: count_pareto is the best."""
    for run in tuning(SETTINGS, METHODS):
        store(tmp_path, run, 0.6 if run.rate == "4e-3" else 0.3, 300)
    for run in tried(tmp_path, SETTINGS, METHODS):
        assert run.rate == "4e-3" and run.split == "val"
        store(tmp_path, run, 0.6, 300)
    for run in final(tmp_path, SETTINGS, METHODS, len(SEEDS)):
        assert run.rate == "4e-3"
        store(tmp_path, run, 0.7 if run.method == "count_pareto" else 0.4)
    for run in causes(tmp_path, SETTINGS, METHODS, len(SEEDS)):
        better = run.method in ("ppots_mirror_long", "autoregressive_quarter")
        store(tmp_path, run, 0.9 if better else 0.4)
    return tmp_path


def test_the_best_rate_is_of_the_validation_rows_and_the_test_rows_do_not_matter(results):
    assert {best_rate(results, task, family) for task in SETTINGS for family in TUNED_ON} == {
        "4e-3"
    }
    assert set(RATES) == {"2e-3", "4e-3", "8e-3", "16e-3"}
    assert Run("chain", "standard", 1, "4e-3", "val").file(results).is_file()


def test_the_report_is_the_same_bytes_and_finds_what_is_there(results, tmp_path, monkeypatch):
    texts, figures, before = [], [], ""
    for name in ("a", "b"):
        place = tmp_path / name
        place.mkdir()
        for page in ("study.md", "objectives.md"):
            shutil.copy(HERE.parents[1] / "docs" / page, place)
        monkeypatch.setattr(report, "DOCS", place)
        report.write(results)
        texts.append((place / "study.md").read_text())
        second = (place / "objectives.md").read_text()
        assert not texts[1:] or second == before
        before = second
        figures.append([(place / f"{x}.png").read_bytes() for x in report.FIGURES])
    assert texts[0] == texts[1] and figures[0] == figures[1]
    line, _ = [x for x in texts[0].splitlines() if x.startswith("| P-POTS FixedCount | +")]
    difference, half = (float(x) for x in line.split("|")[2].split(" ± "))
    assert abs(difference - 30) < half + 1 and 0.5 < half < 4
    assert "the best of ours is not below it | P-POTS FixedCount: +" in texts[0]
    assert "Muon" not in texts[0].split(report.MARKERS[0])[1]  # the second part has its own page
    table = second.split(report.MARKERS[0])[1]
    assert "| FixedCount, window (.4, 1), Muon | 32 | " in table and "| MIRROR |" not in table
    for text, change in (
        (texts[0], "twice the steps | chain"),
        (second, "a quarter of the steps |"),
    ):
        found = [x for x in text.splitlines() if change in x]
        assert len(found) == (1 if text is texts[0] else 2)
        assert all(abs(float(x.split("|")[5].split()[0]) - 50) < 5 for x in found)
    assert "a quarter of the steps" not in texts[0]
    written = [x for x in table.splitlines() if x.endswith("| 30.0 | 25.0 | 20.0 |")]
    assert len(written) == 3 and all("| Standard, Muon 0.8 | " in x for x in written)
    (line,) = [x for x in table.splitlines() if "| 0.7, 0.6 |" in x]
    assert line.startswith("| FixedCount, window (.4, 1), Muon 0.8 | 0.7, 0.6 | ")


def test_sign_flip_is_exact_and_holm_corrects():
    assert report.sign_flip([1.0] * 5) == 2 / 2**5
    assert report.sign_flip([1.0, -1.0]) == 1.0
    assert report.sign_flip([3.0, 1.0, -1.0, 1.0]) == (2 * (1 + comb(3, 1))) / 2**4
    assert report.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}


def test_stored_runs_hold_what_the_report_and_a_rerun_need():
    results = HERE / "results"
    files = sorted([*(results / "runs").rglob("*.json"), *(results / "causes").rglob("*.json")])
    for file in files:
        run = json.loads(file.read_text())
        assert Run(**{k: run[k] for k in Run._fields}).file(results) == file
        assert len(run["correct"]) == SIZES["test"]
        assert run["accuracy"] == pytest.approx(run["correct"].count("1") / SIZES["test"])
        assert {"config", "curves", "revision", "nats_per_token", "seconds"} <= run.keys()
        assert "HOME/" in run["config"] and "/tmp" not in run["config"]
