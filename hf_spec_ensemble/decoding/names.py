"""Names of members and drafters: in errors, in traces, and as keys of measurements."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedModel

from ..members.adapters import AdapterView
from .suffixes import Suffixes


EARLIER_TEXT = "earlier text"  # which a `Suffixes` copies from


def kept_name(thing: Any) -> str | None:
    """The key of measurements of a drafter or a method, which does not keep the object alive."""
    return thing if isinstance(thing, str) or thing is None else getattr(thing, "__qualname__", type(thing).__name__)


def names_of(authors: list, prompts: Sequence[Any] = ()) -> list[str]:
    """
    Readable names of models and drafters, all different: the last of a folder's or repository's, with a view's adapter;
    for some of them, their own prompts are given.
    """
    names = [f"{_name(author)}, own prompt" if own else _name(author) for author, own in zip_longest(authors, prompts)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _name(author: Any) -> str:
    path = getattr(getattr(author, "config", None), "_name_or_path", None)
    if isinstance(author, Suffixes):
        return EARLIER_TEXT
    if not isinstance(author, AdapterView):
        return _last(path) if path else kept_name(author)
    return f"{_last(path) if path else type(author.base).__name__}:{author.adapter}"


def _last(path: str) -> str:
    return PurePath(path).name or path


def titles_of(models: list[PreTrainedModel], members: Sequence[int]) -> list[str]:
    """Names for errors of these members, given by their places in `[model, *assistant_models]`."""
    places = ["the main model" if i == 0 else f"assistant model {i}" for i in members]
    paths = [getattr(models[i].config, "_name_or_path", None) for i in members]
    return [
        f"{place} ({type(models[i]).__name__}{f' {path!r}' if path else ''})"
        for place, i, path in zip(places, members, paths)
    ]
