"""Whether members share one tokenizer: their tokens are compared, of loaded tokenizers or of the files beside models.

Nothing is downloaded here, no code of a repository is run, and no file is read twice in a process.
"""

import filecmp
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..members.adapters import base_of


Tokens = dict[str, int]  # what a tokenizer knows, with ids
TOKENIZER = "tokenizer.json"

HOW = (
    "give the tokenizers of all, `tokenizer=...` and `assistant_tokenizer=...` (a list for several), and they are "
    "combined over the union of their tokens"
)

UNCOMPARED = (
    "The tokenizers of the members could not be compared, since not all have files beside the models: make sure that "
    "they share one."
)


class Origin(NamedTuple):
    """Where a model was loaded from."""

    name: str
    revision: str | None
    changed: int | None  # when its tokenizer's file was

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Origin | None":
        """`None` for a model that was made in memory, or by a name that no file can have."""
        name = getattr(model.config, "_name_or_path", None)
        if not name or not isinstance(name, (str, Path)):
            return None
        revision = getattr(model.config, "_commit_hash", None)
        try:
            file = _file(str(name), revision)
            return cls(str(name), revision, file and file.stat().st_mtime_ns)
        except OSError:
            return None


def check_beside(named: Sequence[tuple[PreTrainedModel, str]], shared: int) -> bool:
    """
    Compares the tokenizers' files beside models, as far as they are on this machine.

    Args:
        named (`list`): Models and what a message calls them, the main model first.
        shared (`int`): Ids that all models have; tokens beyond do not matter.

    Returns:
        `bool`: Whether all could be compared. Views of one base, and models of one folder, need not be.

    Raises:
        `ValueError`: for the first model whose tokens differ from the main model's, with an example.
    """
    (main, main_name), *others = named
    complete = True
    for model, name in others:
        if base_of(model) is base_of(main):
            continue
        origins = Origin.of(main), Origin.of(model)
        found = _compare(*origins, shared) if all(origins) else None
        complete &= found is not None
        if found:
            raise _error(found, *(f"{x} ({o.name!r})" for x, o in zip((main_name, name), origins)))
    return complete


def check_tokens(named: Sequence[tuple[Tokens | None, str]], shared: int) -> bool:
    """As `check_beside`, of tokens that are at hand; `None` where there are none."""
    (main, main_name), *others = named
    for tokens, name in others:
        if main is not None and tokens is not None and (found := differences(main, tokens, shared)):
            raise _error(found, main_name, name)
    return all(tokens is not None for tokens, _ in named)


def differences(one: Mapping[str, int], other: Mapping[str, int], shared: int) -> list[tuple[int, str, str]]:
    """
    Ids below `shared` that stand for different tokens, with both. What only one tokenizer knows is no difference.

    >>> from hf_spec_ensemble.decoding.vocabulary import differences

    >>> differences({"a": 0, "b": 1, "c": 2}, {"a": 0, "x": 1, "y": 3}, shared=4)
    [(1, 'b', 'x')]
    """
    if one == other:
        return []
    by_id = {i: token for token, i in other.items()}
    return sorted(
        (i, token, by_id[i]) for token, i in one.items() if i < shared and i in by_id and other.get(token) != i
    )


_kept: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> how many tokens it had, and these


def kept_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of a tokenizer, which are asked for once."""
    held = _kept.get(tokenizer)
    if held is None or held[0] != len(tokenizer):
        _kept[tokenizer] = held = len(tokenizer), tokenizer.get_vocab()
    return held[1]


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """The tokens of a tokenizer; `None` of one that transformers made from no files, as it does for some kinds."""
    tokens = tokenizer.get_vocab()
    ordinary = tokens.keys() - set(tokenizer.all_special_tokens) - tokenizer.get_added_vocab().keys()
    return tokens if len(ordinary) > 1 else None  # T5's has a blank


def _error(found: list[tuple[int, str, str]], main: str, other: str) -> ValueError:
    i, one, two = found[0]
    return ValueError(
        f"The members have different tokenizers: token {i} is {one!r} for {main} and {two!r} for {other}"
        f"{f', and {len(found) - 1} more differ' if found[1:] else ''}. An ensemble combines the probabilities of the "
        f"same tokens: use models that share one tokenizer, or {HOW}."
    )


@cache
def _compare(one: Origin, other: Origin, shared: int) -> list[tuple[int, str, str]] | None:
    """`differences` of what is beside two models; `None` if that cannot be told."""
    if one == other:
        return []
    files = [_file(origin.name, origin.revision) for origin in (one, other)]
    if all(files) and filecmp.cmp(*files, shallow=False):
        return []
    found = [_tokens_in(origin.name, origin.revision) for origin in (one, other)]
    return None if None in found else differences(*found, shared)


def _file(name: str, revision: str | None) -> Path | None:
    """The `tokenizer.json` of a folder, or of a repository that was downloaded."""
    if Path(name).is_dir():
        file = Path(name) / TOKENIZER
        return file if file.is_file() else None
    try:
        file = try_to_load_from_cache(name, TOKENIZER, revision=revision)
    except ValueError:  # neither a folder nor a repository's id
        return None
    return Path(file) if isinstance(file, str) else None


def _tokens_in(name: str, revision: str | None) -> Tokens | None:
    """The tokens beside a model. A `tokenizer.json` is read by itself: that takes far less than loading a tokenizer."""
    file = _file(name, revision)
    try:
        if file is None:
            where = dict(revision=revision or "main", local_files_only=True, trust_remote_code=False)
            return tokens_of(AutoTokenizer.from_pretrained(name, **where))
        text = file.read_text(encoding="utf-8")
        vocabulary, added = _value(text, "vocab"), _value(text, "added_tokens")
        if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        tokens = vocabulary | {token["content"]: token["id"] for token in added}
        return tokens if all(isinstance(i, int) for i in tokens.values()) else None
    except Exception:  # of whatever kind: a call does not fail because something beside a model is broken
        return None


def _value(text: str, key: str) -> Any:
    """What a key stands for where it comes first in a JSON text. The merges, most of a tokenizer, are not parsed."""
    found = re.search(rf'(?<!\\)"{key}"\s*:\s*', text)
    return json.JSONDecoder().raw_decode(text, found.end())[0]
