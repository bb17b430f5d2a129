"""What the quickstart's apprentice learns from, held to Python's own arithmetic."""

import json
import shutil
from pathlib import Path

import pytest

from mdm_plugin.errors import UserError
from mdm_plugin.quickstart import data, prepare_preferences, prepare_two_ways
from mdm_plugin.quickstart.data import verify


@pytest.fixture
def home(data_dir, tmp_path):
    """The quickstart's data and its autoregressive model."""
    for name in ("train.jsonl", "tokenizer_config.json"):
        shutil.copy(Path(data_dir) / name, tmp_path)
    (tmp_path / "autoregressive").mkdir()
    (tmp_path / "autoregressive/model.safetensors").touch()
    return tmp_path


def test_two_ways_and_their_preferences_are_made_once_by_the_packaged_configs(home, monkeypatch):
    calls = []

    def run(recipe, config, *changes):
        given = dict(x.split("=", 1) for x in changes)
        calls.append((recipe, config, given))
        if recipe == "mdm_full_finetune":
            step = Path(given["output_dir"]) / "step_1"
            step.mkdir(parents=True)
            (step / "model.safetensors").write_text("trained")
        else:
            Path(given["pairs"]).write_text("pairs")
        return 0

    monkeypatch.setattr(data, "_run", run)
    monkeypatch.setattr(data.Checkpointer, "steps", lambda x: [Path(x.output_dir) / "step_1"])
    prepare_preferences(str(home))
    (train, generate) = calls
    assert train[:2] == ("mdm_full_finetune", "quickstart_block")
    assert train[2]["dataset.source"] == str(home / "demonstrations.jsonl")
    assert train[2]["epochs"] == "25"
    assert (home / "two_ways/model.safetensors").read_text() == "trained"
    assert generate[:2] == ("mdm_generate", "quickstart_generate")
    assert generate[2]["checkpointer.checkpoint_dir"] == str(home / "two_ways")
    assert generate[2]["model.block_length"] == "4" and generate[2]["samples"] == "4"
    asked = Path(generate[2]["prompts"]).read_text().splitlines()
    assert asked == (home / "train.jsonl").read_text().splitlines()[:1000]
    assert (home / "two_ways_pairs.jsonl").read_text() == "pairs"
    prepare_preferences(str(home))
    assert len(calls) == 2
    (home / "two_ways_pairs.jsonl").unlink()
    monkeypatch.setattr(data, "_run", lambda *given: 1)
    with pytest.raises(UserError, match="no preferences were written"):
        prepare_preferences(str(home))


def test_every_second_demonstration_is_the_sum_of_two_terms_and_wrong(home):
    (home / "two_ways").mkdir()
    (home / "two_ways/model.safetensors").touch()  # trained already
    prepare_two_ways(str(home))
    rows = [json.loads(x) for x in (home / "train.jsonl").open()]
    shown = [json.loads(x) for x in (home / "demonstrations.jsonl").open()]
    assert shown[::2] == rows[::2] and len(shown) == len(rows)
    right = 0
    for row, given in zip(rows[1::2], shown[1::2], strict=True):
        expression = row["entry"]["metadata"]["expression"]
        first, sign, second, _, last = expression.split()
        answer = given["messages"][-1]["content"]
        assert answer == f"Answer: {eval(first + sign + second)}"
        assert verify(answer, given) == (eval(expression) == eval(first + sign + second))
        assert verify(answer, given) == (last == "0")
        assert given["messages"][0] == row["messages"][0]
        right += last == "0"
    assert 0 < right < 0.2 * len(shown)
    written = (home / "demonstrations.jsonl").stat().st_mtime_ns
    prepare_two_ways(str(home))
    assert (home / "demonstrations.jsonl").stat().st_mtime_ns == written
