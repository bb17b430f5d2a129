"""mdm_generate: prompts from three places, any number of ranks, the live view, wrong inputs."""

import json
import sys

import pytest
import torch

from mdm_plugin.generation.live import MASK, LiveText
from mdm_plugin.models import ChatTokenizer
from tests.generation.test_replay import joined, page_data, played
from tests.recipes.test_full_finetune import TWO_RANKS

CONFIG = """
tokenizer:
  _component_: mdm_plugin.models.ChatTokenizer
  path: ${data_dir}
model:
  _component_: mdm_plugin.models.llada
  vocab_size: 320
  num_layers: 2
  num_heads: 2
  embed_dim: 32
  intermediate_dim: 64
  max_seq_len: 96
checkpointer:
  _component_: mdm_plugin.training.Checkpointer
  checkpoint_dir: ${run}
  output_dir: ${run}
decoding: {_component_: mdm_plugin.generation.Decoding}
sampler: {_component_: mdm_plugin.generation.Remasking}
max_new_tokens: 8
batch_size: 2
device: cpu
dtype: fp32
"""


@pytest.fixture
def generate(command, tune, tmp_path, data_dir):
    tune("max_steps_per_epoch=1", out="run")
    paths = f"data_dir: {data_dir}\nrun: {tmp_path / 'run/step_1'}\n"
    (tmp_path / "generate.yaml").write_text(paths + CONFIG)

    def run(*overrides, launch=(), **kwargs):
        arguments = (*launch, "mdm_generate", "--config", "generate.yaml", *overrides)
        return command("tune", "run", *arguments, **kwargs)

    return run


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_prompt_s_text_is_its_own_in_a_batch_on_two_ranks_sharded_and_alone(generate, tmp_path):
    texts = ["one", "a longer second prompt", "3", "4 + 4", "five"]
    rows = [{"prompt": t, "id": i} for i, t in enumerate(texts)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    warm = ("decoding.temperature=0.7", "sampler.order=random", "seed=5")
    done = generate("prompts=p.jsonl", "output=one.jsonl", *warm)
    assert "5 prompts" in done.stderr and "tokens/s" in done.stderr
    generate("prompts=p.jsonl", "output=two.jsonl", *warm, launch=TWO_RANKS)
    shards = ("data_parallel_shard_dim=2", "output=sharded.jsonl")
    generate("prompts=p.jsonl", *shards, *warm, launch=TWO_RANKS)
    one, *others = ((tmp_path / f"{x}.jsonl").read_text() for x in ("one", "two", "sharded"))
    assert others == [one, one]
    found = lines(one)
    assert [x["id"] for x in found] == [0, 1, 2, 3, 4]
    # The fourth prompt alone, with its own seed.
    alone = lines(generate("prompt=4 + 4", *warm[:2], "seed=8").stdout)
    assert alone[0]["completion"] == found[3]["completion"]
    (tmp_path / "p.txt").write_text("one\n\na longer second prompt\n")
    plain = lines(generate("prompts=p.txt", *warm).stdout)
    assert [x["completion"] for x in plain] == [x["completion"] for x in found[:2]]


def test_the_replay_of_two_ranks_is_one_page_of_all_prompts_that_ends_at_their_texts(
    generate, tmp_path
):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]
    rows = [{"prompt": "one"}, {"messages": turns}, {"prompt": "a third </script>"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ("prompts=p.jsonl", "replay=new/r.html", "batch_size=1")
    done = generate(*arguments, "output=o.jsonl", launch=TWO_RANKS)
    assert "; o.jsonl; new/r.html" in done.stderr
    replays = page_data(tmp_path / "new/r.html")
    texts = [x["completion"] for x in lines((tmp_path / "o.jsonl").read_text())]
    assert [joined(played(x, len(x["steps"]))) for x in replays] == texts
    assert [x["text"] for x in replays] == texts and all(x["length"] == 8 for x in replays)
    shown = ["one", "system: be brief\n\nuser: two", "a third </script>"]
    assert [x["prompt"] for x in replays] == shown


def test_a_prompt_may_hold_equals_signs_and_what_yaml_would_read_otherwise(generate):
    for text in ("7 - 2 + 9 =", "[1, 2] = ${x}", "007"):
        assert lines(generate(f"prompt={text}").stdout)[0]["prompt"] == text


def test_prompts_from_stdin(generate, command, tmp_path):
    done = command(
        "bash", "-c", "echo hello | tune run mdm_generate --config generate.yaml prompts=-"
    )
    assert lines(done.stdout)[0]["prompt"] == "hello"


def test_other_samplers_by_config(generate):
    for overrides in (
        ["sampler=mdm_plugin.generation.Threshold", "decoding.block_length=4"],
        ["sampler=mdm_plugin.generation.Stable", "decoding.cache=dual", "decoding.block_length=4"],
    ):
        assert lines(generate("prompt=3 + 4", *overrides).stdout)[0]["prompt"] == "3 + 4"


def test_the_live_view_shows_masks_and_writes_over_itself(tokenizer: ChatTokenizer, capsys):
    live = LiveText(tokenizer)
    ids = tokenizer.encode("3 + 4 = 7")
    half = torch.tensor([*ids[:3], tokenizer.mask_id, tokenizer.mask_id])
    assert live.text(half) == tokenizer.decode(ids[:3]) + 2 * MASK
    live.show(half[None])
    live.show(torch.tensor([[*ids, tokenizer.eos_id, tokenizer.eos_id]]))
    first, second = capsys.readouterr().err.split("\x1b[1A\r\x1b[J")
    assert MASK in first and second == "3 + 4 = 7\n"


WRONG = {
    "no prompt": ([], "prompt, prompts: give one of them"),
    "both": (["prompt=a", "prompts=p.jsonl"], "prompt, prompts: give one of them"),
    "no file": (["prompts=nowhere.txt"], "nowhere.txt does not exist"),
    "an empty file": (["prompts=empty.txt"], "has no prompts"),
    "bad JSON": (["prompts=bad.jsonl"], "bad.jsonl:2: not valid JSON"),
    "a row without a prompt": (["prompts=none.jsonl"], "none.jsonl:1: no text in 'prompt'"),
    "turns that are none": (["prompts=turns.jsonl"], "turns.jsonl:1: messages is not a list"),
    "not text": (["prompts=binary.txt"], "binary.txt is not UTF-8"),
    "the mask token": (["prompt=a <|mdm_mask|>"], "holds the mask token itself"),
    "too long": (["prompt=" + "abc " * 90], "are more than the model takes, 96"),
    "no tokens": (["prompt=a", "max_new_tokens=0"], "max_new_tokens: 0"),
    "a block that does not divide": (["prompt=a", "decoding.block_length=3"], "block_length 3"),
    "fewer steps than blocks": (
        ["prompt=a", "decoding.block_length=2", "decoding.steps=2"],
        "multiple of the 4 blocks",
    ),
    "more steps than tokens": (["prompt=a", "decoding.steps=9"], "steps is 9"),
    "no such order": (["prompt=a", "sampler.order=best"], "order is 'best'"),
    "no such cache": (["prompt=a", "decoding.cache=all"], "cache is 'all'"),
    "negative temperature": (["prompt=a", "decoding.temperature=-1"], "temperature is -1"),
    "no weights": (["prompt=a", "checkpointer.checkpoint_dir=null"], "name the weights to use"),
    "output exists": (["prompt=a", "output=empty.txt"], "exists: name another"),
    "replay exists": (["prompt=a", "replay=empty.txt"], "replay: empty.txt exists: name another"),
    "replay in a file": (["prompt=a", "replay=empty.txt/r.html"], "empty.txt/r.html cannot be"),
    "replay is a directory": (
        ["prompt=a", "replay=run", "overwrite=True"],
        "replay: run cannot be written: Is a directory",
    ),
    "output that cannot be written": (["prompt=a", "output=/proc/o"], "output: /proc/o cannot be"),
    "one file for both": (
        ["prompt=a", "replay=both", "output=both"],
        "output, replay, pairs: two of them are one file: name another",
    ),
    "an unknown sampler": (
        ["prompt=a", "sampler=mdm_plugin.generation.Best"],
        "cannot be imported",
    ),
}


@pytest.fixture
def in_process(tune, tmp_path, data_dir, monkeypatch, capsys):
    """The recipe called here, as its command would be: exit code and stderr."""
    import mdm_generate

    tune("max_steps_per_epoch=1", out="run")
    paths = f"data_dir: {data_dir}\nrun: {tmp_path / 'run/step_1'}\n"
    (tmp_path / "generate.yaml").write_text(paths + CONFIG)
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["x", "--config", "generate.yaml", *overrides])
        with pytest.raises(SystemExit) as stopped:
            mdm_generate.main()
        return stopped.value.code, capsys.readouterr().err

    return run


def test_each_wrong_input_is_one_line(in_process, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    (tmp_path / "none.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "turns.jsonl").write_text('{"messages": ["a"]}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for case, (overrides, expected) in WRONG.items():
        code, error = in_process(*overrides)
        assert code == 2, case
        assert error.startswith("error: ") and expected in error, (case, error)
        assert error.count("\n") == 1, (case, error)
    assert (tmp_path / "empty.txt").read_text() == "\n"


def test_samples_are_verified_and_become_preferences_on_any_ranks(generate, tmp_path):
    (tmp_path / "own_verifier.py").write_text(
        "def parity():\n"
        "    def verify(completion, row):\n"
        "        if len(completion) % 5 == 0: raise KeyError('unit')\n"
        "        return len(completion) % 2 == 0\n"
        "    return verify\n"
    )
    rows = [{"prompt": text, "id": i} for i, text in enumerate(("one", "4 + 4", "five"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ("prompts=p.jsonl", "samples=6", "decoding.temperature=1.0", "seed=3")
    own = ("verifier._component_=own_verifier.parity", "allow_components=[own_verifier]")
    kwargs = {"PYTHONPATH": str(tmp_path)}
    done = generate(*common, *own, "output=one.jsonl", "pairs=pairs.jsonl", **kwargs)
    found = lines((tmp_path / "one.jsonl").read_text())
    assert [(x["id"], x["sample"]) for x in found] == [(i, k) for i in range(3) for k in range(6)]
    assert len({x["completion"] for x in found}) > 12
    for x in found:
        size = len(x["completion"])
        assert x["right"] == (None if size % 5 == 0 else size % 2 == 0)
    if any(x["right"] is None for x in found):
        assert "verifier: 'unit'" in done.stderr
    pairs = lines((tmp_path / "pairs.jsonl").read_text())
    assert pairs and f"{len(pairs)} preferences: " in done.stderr
    for pair in pairs:
        assert pair["chosen"][0] == pair["rejected"][0] and pair["chosen"][0]["role"] == "user"
        sizes = [len(pair[x][-1]["content"]) for x in ("chosen", "rejected")]
        assert sizes[0] % 2 == 0 and sizes[1] % 2 == 1
    generate(*common, *own, "output=two.jsonl", "pairs=again.jsonl", launch=TWO_RANKS, **kwargs)
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "pairs.jsonl").read_text()
    generate("prompts=p.jsonl", "decoding.temperature=1.0", "seed=4", "output=other.jsonl")
    alone = lines((tmp_path / "other.jsonl").read_text())[0]["completion"]
    assert alone not in {x["completion"] for x in found if x["id"] == 0}  # seeds do not overlap
    for wrong, words in (
        (["samples=2"], "samples: 2 of a prompt would all be the same"),
        (["samples=0"], "samples: 0: use 1 or more"),
        (["pairs=x.jsonl", "samples=2", "decoding.temperature=1"], "pairs: a right and a wrong"),
    ):
        refused = generate("prompts=p.jsonl", *wrong, check=False)
        assert refused.returncode == 2 and words in refused.stderr
