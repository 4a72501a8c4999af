"""What the tokens of a tokenizer stand for, as bytes, and which of its tokens write given bytes. Runs no model.

Tokenizers spell bytes in their own ways: byte-level BPE has a character for each byte, SentencePiece writes spaces as
U+2581 and bytes that it has no character for as `<0x0A>`, WordPiece marks what continues a word. Each is undone here.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase


PUNCTUATION = ".", "?", "!", ","  # to which decoders of word pieces put no space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
ROLES = ("eos", "pad", "bos")  # of special tokens; a token with several has the first

_kept: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> tokens it had and were asked for, its roles -> spelling


@dataclass(frozen=True, eq=False)
class Spelling:
    """
    What a tokenizer's tokens stand for.

    Args:
        tokens (`list[str | None]`): By id, as the tokenizer names them; `None` where it has no token.
        strings (`list[bytes | None]`): By id, what they stand for; `None` for special tokens, which are no text.
        roles (`dict[str, int]`): The special tokens that end a text ("eos"), pad it ("pad") or begin it ("bos").
        by_string (`dict[bytes, int]`): For each string its token: of several, the one that is no single byte by name.
    """

    tokens: list[str | None]
    strings: list[bytes | None]
    roles: dict[str, int]
    by_string: dict[bytes, int]
    _backend: Any = field(repr=False)
    _spell: Callable[[bytes], str | None] = field(repr=False)
    _known: dict[bytes, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def write(self, string: bytes) -> tuple[int, ...]:
        """
        The tokens that stand for these bytes within a text: one, if there is one, else those that the tokenizer finds.
        Bytes that are no characters are not decoded for that. What the tokenizer has no tokens for is written as its
        unknown token.

        Raises:
            `ValueError`: if there is no such token.
        """
        if string not in self._known:
            own = self.by_string.get(string)
            self._known[string] = (own,) if own is not None else self._written(string)
        return self._known[string]

    def _written(self, string: bytes) -> tuple[int, ...]:
        text = _text(string)
        if text is not None:  # as the tokenizer does it, unless it puts a space before it, or changes it
            ids = self._plain.encode(text, add_special_tokens=False).ids
            if self.spells(ids, string):
                return tuple(ids)
        spelled = self._spell(string)
        if spelled is not None:
            ids = [token.id for token in self._backend.model.tokenize(spelled)]
            if self.spells(ids, string):
                return tuple(ids)
        return self._longest_first(string)

    @property
    def _plain(self) -> Any:
        """The backend, as long as no call of the tokenizer has left padding or truncation on it."""
        is_plain = self._backend.truncation is None and self._backend.padding is None
        return self._backend if is_plain else self._copy

    @cached_property
    def _copy(self) -> Any:
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    def spells(self, ids: list[int], string: bytes) -> bool:
        """Whether these tokens are text, and this one."""
        parts = [self.strings[i] if i < len(self.strings) else None for i in ids]
        return None not in parts and b"".join(parts) == string

    def _longest_first(self, string: bytes) -> tuple[int, ...]:
        ids, start = [], 0
        while start < len(string):
            ends = (end for end in range(len(string), start, -1) if string[start:end] in self.by_string)
            end = next(ends, None)
            if end is not None:
                ids.append(self.by_string[string[start:end]])
            elif "unk" not in self.roles:
                raise ValueError(f"A tokenizer has no tokens for the bytes {string!r}, and none for the unknown.")
            elif ids[-1:] != [self.roles["unk"]]:  # one for what stands together
                ids.append(self.roles["unk"])
            start = end or start + 1
        return tuple(ids)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = {} if backend is None else backend.get_added_tokens_decoder()
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def spelling_of(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> Spelling:
    """
    The spelling of a tokenizer, made once for each.

    Args:
        size (`int`, *optional*): V: only tokens below this, as many as a model knows. By default all.

    Raises:
        `ValueError`: for one that is not of the `tokenizers` library, or that spells bytes in a way not known here.

    Example:

    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from hf_spec_ensemble.ensemble.spelling import spelling_of
    >>> from transformers import AutoTokenizer

    >>> spelling = spelling_of(AutoTokenizer.from_pretrained(FAMILY / "reader"))
    >>> b"".join(spelling.strings[i] for i in spelling.write(" déjà vu".encode())).decode()
    ' déjà vu'
    >>> len(spelling.write(b"\\xc3")), len(spelling.write(" a".encode()))
    (1, 1)
    """
    held, key = _kept.setdefault(tokenizer, {}), (len(tokenizer), size, *_roles(tokenizer).items())
    if key not in held:
        held[key] = _spelling_of(tokenizer, size)
    return held[key]


def _spelling_of(tokenizer: PreTrainedTokenizerBase, size: int | None) -> Spelling:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"A {type(tokenizer).__name__} does not tell which bytes its tokens stand for: members with different "
            "tokenizers need those of the `tokenizers` library (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    string_of, spell = _ways(backend, type(tokenizer).__name__)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        tokens[i] = token
    tokens, special = tokens[:size], special_ids(tokenizer)
    strings = [None if token is None or i in special else string_of(token) for i, token in enumerate(tokens)]
    by_string: dict[bytes, int] = {}
    for i, string in enumerate(strings):
        if string and (string not in by_string or BYTE.fullmatch(tokens[by_string[string]])):
            by_string[string] = i
    roles = {role: i for role, i in _roles(tokenizer).items() if i is not None and i < len(tokens)}
    return Spelling(tokens, strings, roles, by_string, backend, spell)


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {role: getattr(tokenizer, f"{role}_token_id") for role in (*ROLES, "unk")}


def _ways(backend: Any, name: str) -> tuple[Callable[[str], bytes], Callable[[bytes], str | None]]:
    """How a tokenizer writes bytes: from a token to these, and from these to what its model splits into tokens."""
    steps = _steps(backend.decoder)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _of_byte_level, lambda string: "".join(map(_characters().__getitem__, string))
    if "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        return lambda token: _of_word_piece(token, prefix), lambda string: None
    if steps and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        space = next((step["replacement"] for step in steps if step["type"] == "Metaspace"), None)
        replaced = {
            step["pattern"]["String"]: step["content"]
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        } | ({space: " "} if space else {})

        def string_of(token: str) -> bytes:
            if "ByteFallback" in kinds and (byte := BYTE.fullmatch(token)):
                return bytes([int(byte[1], 16)])
            for written, meant in replaced.items():
                token = token.replace(written, meant)
            return token.encode()

        def spell(string: bytes) -> str | None:
            text = _text(string)
            for written, meant in replaced.items():
                text = text and text.replace(meant, written)
            return text

        return string_of, spell
    raise ValueError(
        f"A {name} decodes its tokens by {sorted(kinds)}, of which is not known which bytes they stand for: members "
        "with different tokenizers need byte-level BPE, SentencePiece or WordPiece."
    )


def _steps(decoder: Any) -> list[dict]:
    """A decoder's steps, one after the other."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _of_byte_level(token: str) -> bytes:
    """As the `tokenizers` library decodes it: what is not spelled in bytes, as an added token, stands for itself."""
    table = _bytes()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


def _of_word_piece(token: str, prefix: str) -> bytes:
    if token in PUNCTUATION:
        return token.encode()
    return (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode()


@cache
def _characters() -> list[str]:
    """The character of each byte in byte-level BPE (GPT-2's): printable ones their own, the others from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in own else next(others) for byte in range(256)]


@cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_characters())}


def _text(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None
