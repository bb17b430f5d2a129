"""Tokenizers that come without a tokenizer.json: Dream's, which is Qwen2's.

A released Dream checkpoint has vocab.json and merges.txt, and code of its own to read them, which
is not run here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mdm_plugin.errors import UserError

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
# Where Qwen2 cuts a text before its bytes are merged: transformers' PRETOKENIZE_REGEX of Qwen2.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_vocabulary(directory: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of vocab.json, merges.txt and the added tokens of ``settings``.

    Args:
        directory: with the two files.
        settings: of tokenizer_config.json.

    Raises:
        UserError: if it is not of a class whose rules are known, a file is not valid, or an added
            token would get another id than it has.
    """
    kind, file = settings.get("tokenizer_class"), directory / "tokenizer_config.json"
    if kind not in _CLASSES:
        raise UserError(
            f"tokenizer.path: {directory} has no tokenizer.json, and {file.name} says "
            f"tokenizer_class {kind}: vocab.json and merges.txt are read for {', '.join(_CLASSES)}"
        )
    try:
        model = BPE.from_file(str(directory / VOCABULARY), str(directory / MERGES))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        raise UserError(
            f"tokenizer.path: {directory}: no valid vocab.json and merges.txt: {reason}"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    try:
        for number, token in _added(settings):
            tokenizer.add_tokens([token])
            if (found := tokenizer.token_to_id(token.content)) != number:
                raise ValueError(f"{token.content!r} would get the id {found}, and not {number}")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: added_tokens_decoder: {error}") from error
    return tokenizer


def _added(settings: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Ids and tokens, in the order of the ids: the one that is added next gets the next id."""
    listed = settings.get("added_tokens_decoder", {}).items()
    return sorted(((int(i), AddedToken(**x)) for i, x in listed), key=lambda pair: pair[0])
