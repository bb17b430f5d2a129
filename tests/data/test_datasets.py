import json

import pytest
import torch

from mdm_plugin.data import (
    GlobalBatches,
    Padding,
    Split,
    chat_dataset,
    instruct_dataset,
    preference_dataset,
    text_dataset,
)
from mdm_plugin.data.holdout import hold_out
from mdm_plugin.data.preferences import paired
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer

GOOD = {
    "messages": [
        {"role": "user", "content": "4 + 5 ="},
        {"role": "assistant", "content": "Answer: 9"},
    ]
}


def row(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def texts(tokenizer, row):
    """Prompt and response of a row, as text with special tokens."""
    decode = tokenizer.tokenizer.decode
    keep = {"skip_special_tokens": False}
    return (
        decode(row.tokens[~row.eligible].tolist(), **keep),
        decode(row.tokens[row.eligible].tolist(), **keep),
    )


def test_the_response_alone_is_eligible_and_ends_with_eos(tokenizer, write_jsonl):
    data = chat_dataset(tokenizer, source=write_jsonl(GOOD))
    prompt, response = texts(tokenizer, data[0])
    assert prompt == "<|user|>4 + 5 =<|end|><|assistant|>"
    assert response == "Answer: 9<|end|><|endoftext|>"


def test_a_prompt_in_training_has_the_tokens_that_generation_starts_from(tokenizer, data_dir):
    data = chat_dataset(tokenizer, source=str(data_dir / "val.jsonl"))
    rows = [json.loads(line) for line in (data_dir / "val.jsonl").open()]
    for i in range(20):
        assert data[i].prompt.tolist() == tokenizer.prompt(rows[i]["messages"][:-1])


def test_every_assistant_turn_is_a_response(tokenizer, write_jsonl):
    turns = row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    data = chat_dataset(tokenizer, source=write_jsonl(turns))
    prompt, response = texts(tokenizer, data[0])
    assert prompt == "<|user|>a<|end|><|assistant|><|user|>c<|end|><|assistant|>"
    assert response == "b<|end|>d<|end|><|endoftext|>"


def test_train_on_input_makes_the_user_s_turns_eligible(tokenizer, write_jsonl):
    data = chat_dataset(tokenizer, source=write_jsonl(GOOD), train_on_input=True)
    prompt, response = texts(tokenizer, data[0])
    assert prompt == "<|assistant|>"
    assert response == "<|user|>4 + 5 =<|end|>Answer: 9<|end|><|endoftext|>"


def test_sharegpt_and_instruct_rows_give_the_same_tokens(tokenizer, write_jsonl):
    chat = chat_dataset(tokenizer, source=write_jsonl(GOOD))
    share = {
        "conversations": [
            {"from": "human", "value": "4 + 5 ="},
            {"from": "gpt", "value": "Answer: 9"},
        ]
    }
    shared = chat_dataset(
        tokenizer, source=write_jsonl(share, name="s.jsonl"), conversation_style="sharegpt"
    )
    pair = write_jsonl({"question": "4 + 5 =", "reply": "Answer: 9"}, name="i.jsonl")
    columns = {"input": "question", "output": "reply"}
    instruct = instruct_dataset(tokenizer, source=pair, column_map=columns)
    assert chat[0].tokens.tolist() == shared[0].tokens.tolist() == instruct[0].tokens.tolist()
    assert chat[0].eligible.tolist() == shared[0].eligible.tolist() == instruct[0].eligible.tolist()


def test_plain_text_is_eligible_throughout(tokenizer, write_jsonl):
    data = text_dataset(tokenizer, source=write_jsonl({"text": "4 + 5 = 9"}))
    assert data[0].eligible.all()
    assert data[0].tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(data[0].tokens.tolist()) == "4 + 5 = 9"


def test_json_parquet_and_saved_datasets_give_the_rows_of_jsonl(tokenizer, write_jsonl, tmp_path):
    import datasets

    rows = [GOOD, row(("user", "1 + 1 ="), ("assistant", "Answer: 2"))]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    jsonl = write_jsonl(*rows)
    prints = {
        chat_dataset(tokenizer, **arguments).facts.fingerprint
        for arguments in (
            {"source": jsonl},
            {"source": "json", "data_files": jsonl},
            {"source": str(tmp_path / "rows.json")},
            {"source": str(tmp_path / "rows.parquet")},
            {"source": "parquet", "data_files": [str(tmp_path / "rows.parquet")]},
            {"source": str(tmp_path / "saved")},
        )
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not valid JSON"),
        ("[1, 2]", "a row is an object"),
        (json.dumps({"text": "x"}), "no list 'messages'"),
        (json.dumps({"a\nb": "x"}), r"no list .messages. \(columns: a b\)"),
        (json.dumps({"messages": [{"role": "user"}]}), r"messages\[0\] is not"),
        (json.dumps({"messages": [{"role": "user", "content": None}]}), r"messages\[0\] is not"),
        (json.dumps(row(("user", "a"), ("user", "b"))), "no assistant turn|consecutive user"),
        (json.dumps(row(("user", "a"), ("assistant", " "))), "assistant turn is empty"),
        (json.dumps(row(("assistant", "a"), ("user", "b"))), "before expected user"),
        (json.dumps(row(("user", "a"), ("assistant", "<|mdm_mask|>"))), "the mask token itself"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line_or_skipped_and_counted(
    tokenizer, write_jsonl, line, reason
):
    source = write_jsonl(GOOD, line, GOOD)
    with pytest.raises(UserError, match=rf"rows.jsonl:2: .*({reason})"):
        chat_dataset(tokenizer, source=source)
    data = chat_dataset(tokenizer, source=source, on_bad_row="skip")
    assert len(data) == 2
    assert data.facts.report.startswith("skipped 1 of 3 rows")


def test_invalid_utf8_is_named_with_file_and_line(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: not valid UTF-8"):
        chat_dataset(tokenizer, source=str(file))


def test_truncation_says_how_much_it_cut(data_dir, write_jsonl):
    long = row(("user", "a"), ("assistant", "one two three four five six seven"))
    whole = ChatTokenizer(str(data_dir))
    n = len(chat_dataset(whole, source=write_jsonl(long))[0].tokens)
    short = ChatTokenizer(str(data_dir), max_seq_len=n - 3)
    data = chat_dataset(short, source=write_jsonl(long, GOOD, name="two.jsonl"))
    assert data.facts.report == f"cut 1 of 2 rows to {n - 3} tokens: 3 tokens are lost"
    assert len(data[0].tokens) == n - 3
    # A cut answer has not ended: no EOS is put in its place.
    assert data[0].tokens[-1] != short.eos_id


def test_a_row_whose_whole_response_is_cut_is_refused(data_dir, write_jsonl):
    short = ChatTokenizer(str(data_dir), max_seq_len=3)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*max_seq_len 3 leaves none"):
        chat_dataset(short, source=write_jsonl(GOOD))


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl"])
def test_missing_and_empty_files_are_named(tokenizer, tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=name):
        chat_dataset(tokenizer, source=str(tmp_path / name))


def test_a_truncated_parquet_file_is_named(tokenizer, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"rows.parquet: not a valid Parquet file"):
        chat_dataset(tokenizer, source=str(tmp_path / "rows.parquet"))


def test_all_rows_skipped_is_an_error(tokenizer, write_jsonl):
    with pytest.raises(UserError, match="all 2 rows were skipped"):
        chat_dataset(tokenizer, source=write_jsonl("x", "y"), on_bad_row="skip")


def test_packed_text_fills_every_row_and_loses_no_token(tokenizer, data_dir, write_jsonl):
    documents = ["4 + 5 = 9", "1 + 2 = 3\n3 + 3 = 6", "7", "8 - 3 = 5"]
    source = write_jsonl(*({"text": x} for x in documents))
    plain = text_dataset(tokenizer, source=source)
    short = ChatTokenizer(str(data_dir), max_seq_len=7)
    packed = text_dataset(short, source=source, packed=True)
    flat = [[t for r in rows for t in r.tokens.tolist()] for rows in (plain, packed)]
    assert flat[0] == flat[1]
    lengths = [len(r.tokens) for r in packed]
    assert set(lengths[:-1]) == {7} and 0 < lengths[-1] <= 7
    assert all(r.eligible.all() for r in packed) and not packed.facts.report
    with pytest.raises(UserError, match=r"set tokenizer\.max_seq_len"):
        text_dataset(tokenizer, source=source, packed=True)


def test_answers_to_a_prompt_become_preferences_of_right_over_wrong():
    turns = [{"role": "user", "content": "2 + 2 ="}]
    answers, right = ["4", "5", "4", "6", "four", " ", "7"], [1, 0, 1, 0, 1, 0, 0]
    rows = paired(turns, answers, [bool(x) for x in right])
    found = [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]
    assert found == [("4", "5"), ("four", "6")]
    assert all(row[x][:-1] == turns for row in rows for x in ("chosen", "rejected"))
    assert paired(turns, ["4", "4"], [True, True]) == []


def test_preferences_are_pairs_of_rows_with_one_prompt(tokenizer, data_dir, write_jsonl):
    turns = [{"role": "user", "content": "2 + 2 ="}]
    answers = [{"role": "assistant", "content": x} for x in ("4", "5")]
    chosen, rejected = ([*turns, x] for x in answers)
    file = write_jsonl(
        {"chosen": chosen, "rejected": rejected},
        {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"},
        {"prompt": turns, "chosen": answers[:1], "rejected": answers[1:]},
    )
    rows = preference_dataset(tokenizer, source=file)
    assert rows.facts.together == 2 and str(rows).startswith("3 preferences")
    for i in range(0, 6, 2):
        good, bad = rows[i], rows[i + 1]
        assert torch.equal(good.prompt, bad.prompt) and torch.equal(good.tokens, rows[0].tokens)
        assert "4" in tokenizer.decode(good.tokens[good.eligible].tolist())
        assert "5" in tokenizer.decode(bad.tokens[bad.eligible].tolist())
    batches = GlobalBatches(rows, Split(2), Padding(0), seed=3)
    for step in range(3):
        indices = batches.row_indices(step)
        assert indices[0] % 2 == 0 and indices[1] == indices[0] + 1
    train, held = hold_out(rows, 0.4, seed=0)
    assert (len(train), len(held)) == (4, 2) and held.facts.together == 2
