import json
import shutil
from pathlib import Path

import pytest
from torchtune.data import Message

from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from tests.checkpoints import DREAM_TOKENS, write_tokenizer


def messages(*turns):
    return [Message(role=r, content=c, masked=r != "assistant") for r, c in turns]


def test_special_tokens_are_read_from_the_config(tokenizer):
    ids = [tokenizer.eos_id, tokenizer.mask_id]
    assert [tokenizer.tokenizer.id_to_token(i) for i in ids] == ["<|endoftext|>", "<|mdm_mask|>"]
    assert tokenizer.vocab_size > tokenizer.mask_id


def test_decode_stops_at_eos_and_round_trips(tokenizer):
    ids = tokenizer.encode("State the answer: 12 - 3 = 9\nAnswer: 9")
    assert (
        tokenizer.decode([*ids, tokenizer.eos_id, *ids])
        == "State the answer: 12 - 3 = 9\nAnswer: 9"
    )


def test_tokens_equal_the_rendered_conversation(tokenizer):
    """Turn by turn or in one piece: the same text."""
    turns = messages(("user", "2 + 2 ="), ("assistant", "Answer: 4"))
    ids, _ = tokenizer.tokenize_messages(turns)
    plain = [{"role": m.role, "content": m.text_content} for m in turns]
    rendered = tokenizer.render(plain, generation_prompt=False) + "<|endoftext|>"
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_is_a_torchtune_transform(tokenizer):
    sample = tokenizer({"messages": messages(("user", "a"), ("assistant", "b"))})
    assert len(sample["tokens"]) == len(sample["mask"])
    assert sample["mask"][0] and not sample["mask"][-1]


def test_a_template_runs_in_a_sandbox(data_dir):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = ChatTokenizer(str(data_dir), chat_template=template)
    with pytest.raises(UserError, match=r"chat_template: .*unsafe"):
        tokenizer.prompt([{"role": "user", "content": "a"}])


def test_a_template_may_refuse(data_dir):
    template = "{{ raise_exception('no system turns, please') }}"
    with pytest.raises(UserError, match="no system turns, please"):
        ChatTokenizer(str(data_dir), chat_template=template).prompt([])


def test_a_template_that_rewrites_earlier_turns_is_refused(data_dir):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = ChatTokenizer(str(data_dir), chat_template=template)
    with pytest.raises(UserError, match="changes the text of the turns before"):
        tokenizer.tokenize_messages(messages(("user", "a"), ("assistant", "b")))


def test_wrong_files_and_tokens_are_named(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.path: .*nowhere"):
        ChatTokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer.json"):
        ChatTokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"tokenizer.mask_token: '<MASK>' is not in the vocabulary"):
        ChatTokenizer(str(data_dir), mask_token="<MASK>")
    shutil.copy(data_dir / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.mask_token: not given"):
        ChatTokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{\n"eos_token": }')
    with pytest.raises(UserError, match=r"tokenizer_config.json:2: not valid JSON"):
        ChatTokenizer(str(tmp_path))


def test_tokens_given_as_objects_and_templates_in_a_file(data_dir, tmp_path):
    shutil.copy(data_dir / "tokenizer.json", tmp_path)
    settings = json.loads((data_dir / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    settings["mask_token"] = {"content": settings["mask_token"], "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(template)
    one, other = ChatTokenizer(str(data_dir)), ChatTokenizer(str(tmp_path))
    assert one.mask_id == other.mask_id
    turns = [{"role": "user", "content": "2 + 2 ="}]
    assert one.prompt(turns) == other.prompt(turns)


@pytest.fixture(scope="module")
def released(tmp_path_factory, data_dir):
    directory = tmp_path_factory.mktemp("released")
    write_tokenizer(directory, "Dream", [Path(__file__).read_text()], data_dir)
    return directory


TEXTS = [
    "It's a test: they'LL see, we've 1234 + 56 = 1290.\n\n  Two spaces,\ttabs\r\n and lines \n",
    "    def f(x):\n        return x != 'ab'\n\n\n",
    "Käse, naïve café, 数学题, смысл, 👩‍🔬!",
    "e\u0301 is composed",
    "<|im_start|>user\nhi<|im_end|>\n<|mask|><|mask|> <|endoftext|>",
    " ",
    "State the answer: 12 - 3 = 9\nAnswer: 9",
]


def test_vocab_json_and_merges_give_transformers_tokens(released):
    from transformers import Qwen2Tokenizer

    ours = ChatTokenizer(str(released))
    theirs = Qwen2Tokenizer(str(released / "vocab.json"), str(released / "merges.txt"))
    theirs.add_special_tokens({"additional_special_tokens": DREAM_TOKENS})
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.mask_id == theirs.convert_tokens_to_ids("<|mask|>") == ours.vocab_size - 1
    assert ours.eos_id == ours.pad_id == ours.mask_id - 3
    prompt = ours.prompt([{"role": "user", "content": "hi"}])
    assert prompt == theirs.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_such_a_tokenizer_is_the_same_when_it_was_saved_as_tokenizer_json(released, tmp_path):
    one = ChatTokenizer(str(released))
    one.save(tmp_path)
    other = ChatTokenizer(str(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file()
    assert [other.encode(x) for x in TEXTS] == [one.encode(x) for x in TEXTS]
    assert one.identity() == other.identity()


def test_files_of_a_tokenizer_that_are_not_understood_are_named(released, tmp_path):
    def refused(*, remove=None, **settings):
        for file in released.iterdir():
            shutil.copy(file, tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        if remove:
            (tmp_path / remove).write_text("")
        with pytest.raises(UserError) as error:
            ChatTokenizer(str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "tokenizer_class GPT2Tokenizer" in refused(tokenizer_class="GPT2Tokenizer")
    assert "no valid vocab.json and merges.txt" in refused(remove="vocab.json")
    added = {"5": {"content": "<|new|>"}}
    assert "'<|new|>' would get the id" in refused(added_tokens_decoder=added)
    assert "added_tokens_decoder: " in refused(added_tokens_decoder={"x": {"content": "a"}})
    assert "added_tokens_decoder: " in refused(added_tokens_decoder={"5": {"text": "a"}})
    assert "added_tokens_decoder: " in refused(added_tokens_decoder=["a"])
