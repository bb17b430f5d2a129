"""What the quickstart's apprentice learns from, held to Python's own arithmetic."""

import json
import shutil
from pathlib import Path

from mdm_plugin.quickstart import prepare_block_apprentice
from mdm_plugin.quickstart.data import verify


def test_every_second_demonstration_is_the_sum_of_two_terms_and_wrong(data_dir, tmp_path):
    for name in ("train.jsonl", "tokenizer_config.json"):
        shutil.copy(Path(data_dir) / name, tmp_path)
    for name in ("autoregressive", "block_apprentice"):  # trained already
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    prepare_block_apprentice(str(tmp_path))
    rows = [json.loads(x) for x in (tmp_path / "train.jsonl").open()]
    shown = [json.loads(x) for x in (tmp_path / "demonstrations.jsonl").open()]
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
    written = (tmp_path / "demonstrations.jsonl").stat().st_mtime_ns
    prepare_block_apprentice(str(tmp_path))
    assert (tmp_path / "demonstrations.jsonl").stat().st_mtime_ns == written
