"""Rows that stay on disk: those in memory, tokenised once, and anew when they changed."""

import json
import os
import time
from pathlib import Path

import numpy
import pytest
import torch

from mdm_plugin.data import Rows, cache, chat_dataset, rows, text_dataset
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from tests import forks


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "rows"


def chat(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def entries(home: Path) -> set[str]:
    return {x.name for x in home.iterdir() if x.is_dir()}


def reading(monkeypatch) -> list[str]:
    """The texts that are tokenised from now on."""
    seen, encode = [], ChatTokenizer.encode
    monkeypatch.setattr(
        ChatTokenizer, "encode", lambda self, x: (seen.append(x), encode(self, x))[1]
    )
    return seen


def test_stored_rows_are_those_in_memory(tmp_path, monkeypatch):
    """Over many chunks: every row, any batch, the facts and the fingerprint."""
    monkeypatch.setattr(rows, "TOKENS_PER_CHUNK", 50)
    generator = numpy.random.default_rng(0)
    given = []
    for i in range(200):
        n = int(generator.integers(1, 30))
        given.append((generator.integers(0, 300, n).tolist(), (generator.random(n) < 0.5).tolist()))
        given[i][1][-1] = True
    held = Rows(given)
    stored_rows, _ = cache.cached({"x": 1}, lambda bad: (bad.write_text(""), (iter(given), str))[1])
    assert len(stored_rows._parts) > 30 and len(stored_rows) == 200
    assert stored_rows.facts == held.facts
    # The fingerprint of all tokens, all that is eligible, and where rows end, one after another.
    from hashlib import blake2b

    flat = numpy.concatenate([numpy.array(x, dtype=numpy.int32) for x, _ in given])
    may = numpy.concatenate([numpy.array(x) for _, x in given])
    ends = numpy.cumsum([0, *(len(x) for x, _ in given)])
    whole = blake2b(flat.tobytes() + may.tobytes() + ends.tobytes(), digest_size=16)
    assert stored_rows.facts.fingerprint == whole.hexdigest()
    for i in range(200):
        assert stored_rows[i].tokens.tolist() == given[i][0] == held[i].tokens.tolist()
        assert stored_rows[i].eligible.tolist() == given[i][1]
    for seed in range(10):
        index = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:17]
        for a, b in zip(stored_rows.padded(index, 31, 7), held.padded(index, 31, 7), strict=True):
            assert torch.equal(a, b)
        assert stored_rows.lengths_of(index).tolist() == [len(given[i][0]) for i in index]
        assert stored_rows.eligible_of(index).tolist() == [sum(given[i][1]) for i in index]
    import datasets

    stored = datasets.Dataset.from_file(str(next((cache.home() / "rows").glob("*/rows.arrow"))))
    assert stored[5]["tokens"] == given[5][0]


def test_a_second_start_reads_no_text(tokenizer, write_jsonl, home, monkeypatch):
    source = write_jsonl(chat("1 + 1", "2"), chat("1 + 2", "3"))
    first = chat_dataset(tokenizer, source=source)
    seen = reading(monkeypatch)
    second = chat_dataset(tokenizer, source=source)
    assert not seen and len(entries(home)) == 1
    assert second.facts == first.facts and second[1].tokens.tolist() == first[1].tokens.tolist()


def test_what_the_rows_depend_on_makes_another_entry(tokenizer, data_dir, write_jsonl, home):
    source = write_jsonl(chat("1 + 1", "2"))

    def count(tokenizer=tokenizer, **more):
        chat_dataset(tokenizer, source=source, **more)
        return len(entries(home))

    assert [count(), count()] == [1, 1]
    assert count(new_system_prompt="Add.") == 2
    assert count(train_on_input=True) == 3
    assert count(on_bad_row="skip") == 4
    assert count(ChatTokenizer(str(data_dir), max_seq_len=60)) == 5
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert count(ChatTokenizer(str(data_dir), chat_template=template)) == 6
    write_jsonl(chat("1 + 1", "3"))  # as long as before
    os.utime(source, ns=(0, 1))
    assert count() == 7
    write_jsonl({"text": "a"}, name="t.jsonl")
    text_dataset(tokenizer, source=str(Path(source).with_name("t.jsonl")))
    assert len(entries(home)) == 8


def test_skipped_rows_are_reported_and_listed_at_each_start(tokenizer, write_jsonl, tmp_path):
    source = write_jsonl(chat("1", "2", id=7), "{broken", chat("3", "4", id=7))
    for start in range(2):
        file = tmp_path / f"bad_{start}.jsonl"
        found = chat_dataset(tokenizer, source=source, on_bad_row="skip", bad_rows_file=str(file))
        assert "skipped 1 of 3 rows" in str(found) and "1 of 3 rows repeat the id" in str(found)
        listed = [json.loads(line) for line in file.read_text().splitlines()]
        assert [x["place"].rpartition("/")[2] for x in listed] == ["rows.jsonl:2"]


def test_beyond_the_limit_the_list_is_there_and_no_entry(tokenizer, write_jsonl, tmp_path, home):
    source = write_jsonl(chat("1", "2"), "{broken", "{worse")
    file = tmp_path / "bad.jsonl"
    with pytest.raises(UserError, match="beyond max_bad_rows, 1"):
        chat_dataset(
            *(tokenizer,), source=source, on_bad_row="skip", max_bad_rows=1, bad_rows_file=str(file)
        )
    assert len(file.read_text().splitlines()) == 2
    assert not entries(home)


def test_a_kill_while_it_is_written_leaves_no_half_entry(tokenizer, write_jsonl, home, monkeypatch):
    source = write_jsonl(chat("1 + 1", "2"))

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # a kill cleans up nothing
        with pytest.raises(Killed):
            chat_dataset(tokenizer, source=source)
    left = entries(home)
    assert len(left) == 1 and left.pop().endswith(".staging")
    assert len(chat_dataset(tokenizer, source=source)) == 1
    (orphan,) = home.glob("*.staging")
    os.utime(orphan, (0, 0))  # a day later, the next entry sweeps it away
    chat_dataset(tokenizer, source=source, train_on_input=True)
    assert len(entries(home)) == 2 and not orphan.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "batch", "no facts", "no list", "gone"])
def test_an_entry_that_is_not_as_it_was_written_is_made_anew(
    tokenizer, write_jsonl, home, damage, monkeypatch
):
    monkeypatch.setattr(rows, "TOKENS_PER_CHUNK", 20)
    source = write_jsonl(*(chat(f"{i}", str(i)) for i in range(20)))
    first = chat_dataset(tokenizer, source=source)
    (entry,) = (x for x in home.iterdir() if x.is_dir())
    file = entry / cache.ROWS
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "no facts":
        (entry / cache.FACTS).write_text("")
    elif damage == "no list":
        (entry / cache.BAD).unlink()
    else:
        import pyarrow

        ends, reader = [], pyarrow.ipc.open_stream(content)
        stream = pyarrow.BufferReader(content)
        reader = pyarrow.ipc.open_stream(stream)
        for _ in reader:
            ends.append(stream.tell())
        size = {"empty": 0, "cut": len(content) // 2, "batch": ends[2]}[damage]
        file.write_bytes(content[:size])
    seen = reading(monkeypatch)
    again = chat_dataset(tokenizer, source=source)
    assert seen and again.facts == first.facts and len(again) == 20
    assert (entry / cache.ROWS).read_bytes() == content


def test_a_tokenizer_of_another_class_makes_another_entry_or_is_refused(
    tokenizer, data_dir, write_jsonl
):
    class Upper(ChatTokenizer):
        def encode(self, text):
            return super().encode(text.replace("1", "2"))

    source = write_jsonl(chat("1", "1"))
    plain = chat_dataset(tokenizer, source=source)
    other = chat_dataset(Upper(str(data_dir)), source=source)
    assert plain[0].tokens.tolist() != other[0].tokens.tolist()

    class Stranger:
        mask_id, max_seq_len = 1, None

    with pytest.raises(UserError, match="tokenizer: Stranger is no ChatTokenizer: derive it"):
        chat_dataset(Stranger(), source=source)


def test_a_source_that_cannot_be_read_on_is_named(tokenizer, write_jsonl, monkeypatch):
    from mdm_plugin.data import sources

    def broken(file):
        yield f"{file}:1", chat("1", "2")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources, "_json", broken)
    with pytest.raises(UserError, match="source: cannot be read after 1 rows: Input/output error"):
        chat_dataset(tokenizer, source=write_jsonl(chat("1", "2")))


def test_streaming_is_refused_in_a_line(tokenizer, tmp_path):
    import datasets

    place = tmp_path / "parts"
    place.mkdir()
    datasets.Dataset.from_list([chat("1", "2")]).to_parquet(str(place / "train.parquet"))
    assert len(chat_dataset(tokenizer, source=str(place))) == 1
    with pytest.raises(UserError, match="leave streaming out"):
        chat_dataset(tokenizer, source=str(place), streaming=True)


def test_other_ranks_wait_for_the_first_and_get_its_error(
    tokenizer, write_jsonl, monkeypatch, tmp_path
):
    """The first rank of a machine reads, whoever comes first; its error is the one to show."""
    from concurrent.futures import ThreadPoolExecutor

    source = write_jsonl(chat("1", "2"), chat("3", "4"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with ThreadPoolExecutor(1) as pool:

        def second(source):
            with monkeypatch.context() as patch:
                patch.setenv("LOCAL_RANK", "1")
                waiting = pool.submit(chat_dataset, tokenizer, source=source)
                time.sleep(0.5)
                assert not waiting.done()
            return waiting

        waiting = second(source)
        found = chat_dataset(tokenizer, source=source)
        assert waiting.result(20).facts == found.facts
        bad = write_jsonl(chat("1", "2"), "{broken", name="bad.jsonl")
        waiting = second(bad)
        for line in ("own", "told"):
            with pytest.raises(UserError, match=r"bad.jsonl:2: not valid JSON"):
                chat_dataset(tokenizer, source=bad) if line == "own" else waiting.result(20)


def test_a_place_that_cannot_be_written_is_one_line(tokenizer, write_jsonl, monkeypatch):
    monkeypatch.setenv("MDM_PLUGIN_HOME", "/proc/nowhere")
    words = r"cannot be written to /proc/nowhere/rows: .*MDM_PLUGIN_HOME"
    with pytest.raises(UserError, match=words):
        chat_dataset(tokenizer, source=write_jsonl(chat("1", "2")))


def _open(arguments):
    directory, source, counter = arguments
    with open(counter, "a") as file:
        encode = ChatTokenizer.encode

        def counted(self, text):
            file.write("x")
            return encode(self, text)

        ChatTokenizer.encode = counted
        found = chat_dataset(ChatTokenizer(directory), source=source)
        ChatTokenizer.encode = encode
    return found.facts.fingerprint


@pytest.mark.slow
def test_one_of_several_processes_tokenises(data_dir, write_jsonl, tmp_path):
    source = write_jsonl(*(chat(f"{i} + 1", str(i + 1)) for i in range(50)))
    counter = tmp_path / "count"
    with forks.context.Pool(3) as pool:
        prints = pool.map(_open, [(str(data_dir), source, str(counter))] * 3, chunksize=1)
    assert len(set(prints)) == 1
    assert len(counter.read_text()) == 100  # two texts of each row, once
