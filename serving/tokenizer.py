"""Text to token ids and back, from a checkpoint's tokenizer files.

Knows no model, no request and no transformers: the `tokenizers` package and plain JSON are all it reads with.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from serving.errors import ModelError

# "No limit" is written as int(1e30) by transformers, and as other absurd numbers by hand.
LONGEST_BELIEVABLE_LENGTH = 10**9
LONG_TEXT = 4096  # characters, from which on encoding takes milliseconds

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A fast tokenizer with what its configuration says about special tokens.

    Attributes:
        vocab_size: ids are below it, added tokens included.
        bos_token: its literal text, where there is one.
        eos_token: its literal text, where there is one.
        eos_token_id: the id of `eos_token`.
        special_ids: ids that `decode(..., skip_special_tokens=True)` leaves out.
        added_ids: ids that were added to the vocabulary by hand, special or not.
        model_max_length: what tokenizer_config.json says, None where it says "no limit".
        config: tokenizer_config.json as it is, {} where there is none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        _mark_special(backend, config)
        self._backend = backend
        self._token_texts: dict[int, str] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_ids: frozenset[int] = frozenset(added)
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_token: str | None = _content(config.get("bos_token"))
        self.eos_token: str | None = _content(config.get("eos_token"))
        self.eos_token_id: int | None = None if self.eos_token is None else backend.token_to_id(self.eos_token)
        self.model_max_length: int | None = _believable_length(config.get("model_max_length"))
        self.config: dict[str, Any] = config

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json and, where they exist, tokenizer_config.json and special_tokens_map.json.

        Raises:
            ModelError: tokenizer.json is missing, or a file is broken; the text names the file.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} is missing: a fast tokenizer is needed "
                "(`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one)"
            )
        config = _read_json(directory / "tokenizer_config.json")
        for role, token in _read_json(directory / "special_tokens_map.json").items():
            config.setdefault(role, token)
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing narrower
            raise ModelError(f"{path} is no tokenizer that can be read: {error}") from error
        return cls(backend, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; which special tokens are added is the tokenizer's own matter."""
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """(id, start, stop) of each token, in bytes of the text as UTF-8; (id, 0, 0) for tokens that were added."""
        encoding = self._encoding(text, add_special_tokens)
        if text.isascii():
            return [(token_id, *span) for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)]
        at = [0, *accumulate(len(character.encode()) for character in text)]
        return [
            (token_id, at[start], at[stop])
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        if len(text) < LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        # The package lets other threads run only while it encodes a batch, for which it has threads of its own.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; incomplete UTF-8 becomes U+FFFD, ids of no token are left out."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token on its own; a special token's literal text."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id])
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token given literally."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def to_json(self) -> str:
        """The text of a tokenizer.json, with what the configuration made special."""
        text: str = self._backend.to_str()
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of a generated text."""
        return token_id in self.special_ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _content(token: Any) -> str | None:
    """The literal text of a token that is written as a string or as {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _believable_length(length: Any) -> int | None:
    if isinstance(length, bool) or not isinstance(length, int | float):
        return None
    return int(length) if 0 < length < LONGEST_BELIEVABLE_LENGTH else None


def _mark_special(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Make special what the configuration calls so, as transformers does when it loads a tokenizer.

    Tokens outside the vocabulary are left alone: they would get ids that the model has no row for.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in _special_tokens(config) if token not in known]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in missing
            if backend.token_to_id(token) is not None
        ]
    )


def _special_tokens(config: dict[str, Any]) -> Iterator[str]:
    declared = [config.get(role) for role in SPECIAL_ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name)
        declared += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        declared += [token for token in decoder.values() if isinstance(token, dict) and token.get("special") is True]
    for token in declared:
        text = _content(token)
        if text:
            yield text
