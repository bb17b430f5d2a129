"""A tokenizer from Hugging Face files, with the chat template rendered.

torchtune 0.6.1 reads tokenizer.json but renders no chat template; this one renders it in
jinja2's sandbox, because a template comes with downloaded weights and is code.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import torchtune
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torchtune.data import Message

from mdm_plugin.errors import UserError
from mdm_plugin.models.vocabulary import VOCABULARY, read_vocabulary


class ChatTokenizer:
    """tokenizer.json and tokenizer_config.json of a directory, as torchtune's recipes use them.

    Dream's has vocab.json and merges.txt in the place of tokenizer.json.

    Each assistant turn is tokenised apart from the text before it, so that a prompt's tokens in
    training are those that generation will start from.

    Args:
        path: the directory, or tokenizer.json itself.
        mask_token: the mask token's text; None for tokenizer_config.json's ``mask_token``.
        eos_token: likewise. Ends every row, and fills batches where the config asks for it.
        pad_token: likewise; None there too means ``eos_token``. Never attended to.
        chat_template: a jinja2 template in place of tokenizer_config.json's.
        add_mask_token: add ``mask_token`` to the vocabulary if it is not there, at the next id: for
            an autoregressive model's tokenizer. It is saved with the checkpoints.
        max_seq_len: rows are cut to this many tokens by the dataset, which says how many; None
            for no limit.

    Attributes:
        mask_id, eos_id, pad_id: token ids.
        vocab_size: number of token ids, added tokens included.

    Raises:
        UserError: if a file is missing or not valid, or a token is not in the vocabulary.
    """

    def __init__(
        self,
        path: str,
        mask_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        max_seq_len: int | None = None,
        add_mask_token: bool = False,
    ) -> None:
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        self.settings = self._settings(file.with_name("tokenizer_config.json"))
        self.tokenizer = _read(file, self.settings)
        self.mask_token_added = False
        if add_mask_token:
            if mask_token is None:
                raise UserError("tokenizer.add_mask_token: give its text: mask_token: <|mask|>")
            self.mask_token_added = bool(self.tokenizer.add_special_tokens([mask_token]))
            self.settings["mask_token"] = mask_token
        self.mask_id = self._id(file, "mask_token", mask_token)
        self.eos_id = self._id(file, "eos_token", eos_token)
        self.pad_id = self._id(file, "pad_token", pad_token, default=self.eos_id)
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_seq_len = max_seq_len
        self._bos = self.settings.get("bos_token") or ""
        if isinstance(self._bos, Mapping):
            self._bos = self._bos["content"]
        self._source = chat_template or self.settings.get("chat_template")
        if not isinstance(self._source, str | None):
            raise UserError(
                f"tokenizer.chat_template: {file.parent}/tokenizer_config.json names several: "
                "give the one to use"
            )
        self._template = _template(self._source) if self._source else None

    def _id(self, file: Path, name: str, given: str | None, default: int | None = None) -> int:
        """The id of a special token: of the text given, else of tokenizer_config.json's."""
        text = given or self.settings.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        if text is None:
            if default is not None:
                return default
            raise UserError(
                f"tokenizer.{name}: not given, and {file.parent} names none in "
                "tokenizer_config.json: set it"
            )
        found = self.tokenizer.token_to_id(text)
        if found is None:
            raise UserError(f"tokenizer.{name}: {text!r} is not in the vocabulary of {file}")
        return found

    def identity(self) -> str:
        """A hash of all that the tokens of a conversation depend on, the code included."""
        ids = (self.mask_id, self.eos_id, self.max_seq_len)
        releases = (tokenizers.__version__, jinja2.__version__, torchtune.__version__)
        found = sha256(
            json.dumps([self.tokenizer.to_str(), ids, self._source, self._bos, releases]).encode()
        )
        for kind in type(self).__mro__[:-1]:
            found.update(f"{kind.__module__}.{kind.__qualname__}".encode())
            found.update(Path(inspect.getfile(kind)).read_bytes())
        return found.hexdigest()

    @staticmethod
    def _settings(file: Path) -> dict[str, Any]:
        if not file.is_file():
            return {}
        try:
            settings = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
        template = file.with_name("chat_template.jinja")  # where newer releases keep it
        if "chat_template" not in settings and template.is_file():
            settings["chat_template"] = template.read_text()
        return settings

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as they are now, an added token included.

        Raises:
            OSError: if they cannot be written.
        """
        self.tokenizer.save(str(directory / "tokenizer.json"))
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it is; special tokens written out in it become their ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` up to the first EOS, without special tokens."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        """``messages`` ({role, content} each) as the chat template writes them.

        Raises:
            UserError: if there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise UserError(
                "tokenizer.chat_template: not given, and tokenizer_config.json has none: set it, "
                "or use mdm_plugin.data.text_dataset for text without turns"
            )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=generation_prompt,
                bos_token=self._bos,
                eos_token=self.tokenizer.id_to_token(self.eos_id),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"tokenizer.chat_template: {_line(error)}") from error

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids after which the model writes the next assistant turn."""
        return self.encode(self.render(messages, generation_prompt=True))

    def tokenize_messages(
        self, messages: list[Message], *, add_eos: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and, for each, whether it is masked *out* of the loss.

        torchtune's protocol. A message's own ``masked`` says whether its turn is a prompt.

        Raises:
            UserError: if the template rewrites earlier turns when one is added (then no
                prompt seen in generation equals the one in training).
        """
        turns = [{"role": m.role, "content": m.text_content} for m in messages]
        ids: list[int] = []
        masked: list[bool] = []

        def add(text: str, is_prompt: bool) -> None:
            new = self.encode(text)
            ids.extend(new)
            masked.extend([is_prompt] * len(new))

        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                if not message.masked:  # train_on_input: its turn is text to be learnt
                    whole = self.render(turns[: i + 1], generation_prompt=False)
                    add(self._after(done, whole), False)
                    done = whole
                continue
            before = self.render(turns[:i], generation_prompt=True)
            whole = self.render(turns[: i + 1], generation_prompt=False)
            add(self._after(done, before), True)
            add(self._after(before, whole), message.masked)
            done = whole
        if add_eos and (not ids or ids[-1] != self.eos_id):
            ids.append(self.eos_id)
            masked.append(messages[-1].masked)
        return ids, masked

    @staticmethod
    def _after(start: str, whole: str) -> str:
        if not whole.startswith(start):
            raise UserError(
                "tokenizer.chat_template: adding a turn changes the text of the turns before it; "
                "use a template that only appends"
            )
        return whole[len(start) :]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """torchtune's transform: adds ``tokens`` and ``mask`` to a sample with ``messages``."""
        tokens, mask = self.tokenize_messages(sample["messages"], add_eos=not inference)
        return {**sample, "tokens": tokens, "mask": mask}


def _read(file: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the older files where that is not there."""
    if not file.is_file():
        if file.with_name(VOCABULARY).is_file():
            return read_vocabulary(file.parent, settings)
        raise UserError(f"tokenizer.path: {file} does not exist")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"tokenizer.path: {file} is not a tokenizer.json: {_line(error)}"
        ) from error


def _template(source: str) -> jinja2.Template:
    """A chat template, in jinja2's sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"tokenizer.chat_template: {_line(error)}") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
