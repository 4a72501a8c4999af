"""Texts as tokens, of which some count. Reads data and tokenizes; never touches a model."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..decoding.families import prompt_ids, text_ids
from ..ensemble.spelling import special_ids


CHARACTER = 4  # bytes at most, and tokens
FORMS = (
    "a string, a pair of a prompt and its answer, a list of chat messages that ends with the assistant's, or a row "
    "(`dict`) whose `columns` hold one of these"
)


@dataclass(frozen=True)
class Text:
    """
    Args:
        ids (`tuple[int, ...]`): All tokens, the prompt's first.
        first (`int`): The tokens from here on count; >= 1, since nothing predicts the first one.
        size (`int`): Bytes of what counts, in UTF-8.
        prompts (`tuple[tuple[int, ...], ...]`): Of members with tokenizers of their own: what they read before that.
    """

    ids: tuple[int, ...]
    first: int
    size: int
    prompts: tuple[tuple[int, ...], ...] = ()

    @property
    def count(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.first


def texts_of(
    given: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: str | Sequence[str] | None = None,
    chat_template: bool = False,
    max_length: int | None = None,
    limit: int | None = None,
    others: Sequence[PreTrainedTokenizerBase] = (),
) -> list[Text]:
    """
    Tokenizes texts. What counts is in the main model's tokens; before it, members with tokenizers of their own read the
    same text, or the same turns by their own chat template.

    Args:
        given (iterable): Strings, pairs, lists of messages, or rows, as of a `datasets.Dataset`.
        tokenizer (`PreTrainedTokenizerBase`): The members', or the main model's.
        columns (`str` or pair of `str`, *optional*): The fields of rows: of the texts, or of prompts and answers.
        chat_template (`bool`): Whether pairs are put through the chat template, as a user's and an assistant's turn.
        max_length (`int`, *optional*): Longer texts lose their last tokens, with a warning.
        limit (`int`, *optional*): The members' positions. Longer texts are refused.
        others (`Sequence[PreTrainedTokenizerBase]`, N - 1): Of the other members, where these have their own.

    Raises:
        `TypeError`: if a text has none of these forms.
        `ValueError`: if there are no texts, or one is empty, has an empty answer or is too long.
    """
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"The texts must be a list or a dataset, each {FORMS}, but are {str(given)[:80]!r}.")
    names = [columns] if isinstance(columns, str) else columns
    if names is not None and (not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"`columns` must be a name or two, of prompts and answers, but are {columns!r}.")
    if limit is not None and max_length is not None and max_length > limit:
        raise ValueError(f"`max_length` ({max_length}) is more than the members' positions ({limit}): lower it.")
    texts = []
    for number, item in enumerate(given):
        where = f"Text {number}"
        item = _of_row(item, names, where)
        texts.append(_tokenized(item, tokenizer, chat_template, where, others))
    if not texts:
        raise ValueError("There are no texts to fit on: give some tens at least.")
    return _cut(texts, tokenizer, max_length, limit)


def _of_row(item: Any, columns: Sequence[str] | None, where: str) -> Any:
    if not isinstance(item, Mapping):
        return item
    if columns is None:
        raise ValueError(f"{where} is a row with the fields {sorted(item)}: say which to read with `columns`.")
    missing = [name for name in columns if name not in item]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}, of `columns`: its fields are {sorted(item)}.")
    return item[columns[0]] if len(columns) == 1 else tuple(item[name] for name in columns)


def _tokenized(
    item: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool,
    where: str,
    others: Sequence[PreTrainedTokenizerBase],
) -> Text:
    if isinstance(item, str):
        if not item.strip():
            raise ValueError(f"{where} is empty.")
        ids = tokenizer(item)["input_ids"]
        first = 1
        if others and not _size(tokenizer, ids[:1]):  # others may have no token that begins a text
            first = 2
        if len(ids) <= first:
            raise ValueError(f"{where} ({item[:40]!r}) has one token only, which nothing predicts.")
        text = Text(tuple(ids), first, max(1, len(item.encode()) - _size(tokenizer, ids[:first])))
        return _read_by(others, text, tokenizer)
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item):
        prompt, answer = item
        if not answer.strip():
            raise ValueError(f"{where} has an empty answer: only answers count, so leave it out.")
        if not chat_template:
            if not prompt:
                raise ValueError(f"{where} has an empty prompt: give texts without prompts as strings.")
            text = _text(tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"], answer)
            return _read_by(others, text, tokenizer)
        item = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if isinstance(item, list) and item and all(isinstance(turn, Mapping) and "role" in turn for turn in item):
        text = _chat(item, tokenizer, where)
        return replace(text, prompts=tuple(tuple(prompt_ids(other, item[:-1])) for other in others))
    raise TypeError(f"{where} must be {FORMS}, but is {str(item)[:80]!r}.")


def _read_by(others: Sequence[PreTrainedTokenizerBase], text: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
    """With what other members read before what counts: as when it is decoded, its text in their own tokens."""
    if not others:
        return text
    for first in range(text.first, min(text.first + CHARACTER, len(text.ids) - 1) + 1):
        before = tokenizer.decode(text.ids[:first], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not before.endswith("\ufffd"):  # a part of a character, which others cannot read
            break
    return replace(text, first=first, prompts=tuple(tuple(text_ids(other, before)) for other in others))


def _chat(turns: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> Text:
    """The last turn counts, with the token that ends it, but nothing that the template adds after it."""
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: give pairs of a prompt and its answer, or set one.")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(f"{where} must end with a turn of the assistant, after another's: that turn counts.")
    answer = turns[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{where} has an empty answer: only answers count, so leave it out.")
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    text = _text(prompt, whole, answer)
    special = special_ids(tokenizer)
    ends = [place for place in range(text.first, len(whole)) if whole[place] in special]
    return replace(text, ids=text.ids[: ends[-1] + 1]) if ends else text


def _text(prompt: list[int], whole: list[int], answer: str) -> Text:
    """A token that has letters of both belongs to the answer, and so does all after it."""
    same = 0
    while same < min(len(prompt), len(whole) - 1) and prompt[same] == whole[same]:
        same += 1
    return Text(tuple(whole), max(1, same), len(answer.encode()))


def _cut(
    texts: list[Text], tokenizer: PreTrainedTokenizerBase, max_length: int | None, limit: int | None
) -> list[Text]:
    long = max(range(len(texts)), key=lambda i: len(texts[i].ids))
    if max_length is None:
        if limit is not None and len(texts[long].ids) > limit:
            raise ValueError(
                f"Text {long} has {len(texts[long].ids)} tokens, but the members have {limit} positions: leave it out, "
                f"or cut long texts with `max_length={limit}`."
            )
        return texts
    cut = []
    for number, text in enumerate(texts):
        if text.first >= max_length:
            raise ValueError(
                f"Text {number} has {text.first} tokens before what counts, so that `max_length` ({max_length}) leaves "
                "nothing of that: raise it, or leave the text out."
            )
        if len(text.ids) > max_length:
            ids = text.ids[:max_length]
            text = replace(text, ids=ids, size=max(1, _size(tokenizer, ids[text.first :])))
        cut.append(text)
    number = sum(len(text.ids) > max_length for text in texts)
    if number:
        warnings.warn(f"{number} of {len(texts)} texts are cut to {max_length} tokens.", stacklevel=4)
    return cut


def _size(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    return len(tokenizer.decode(list(ids), skip_special_tokens=True).encode())


def split(texts: list[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """
    Splits off a part at random, which is the same for a seed.

    Returns:
        `tuple[list[Text], list[Text]]`: To fit on, and held out; each has one at least, and keeps the order.

    Raises:
        `ValueError`: if there is only one text, or the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"`held_out` must be a share between 0 and 1, or texts, but is {share!r}.")
    if len(texts) < 2:
        raise ValueError("One text cannot be split: give more, or other texts as `held_out`.")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    out = set(order[: min(len(texts) - 1, max(1, round(share * len(texts))))])
    return [text for i, text in enumerate(texts) if i not in out], [texts[i] for i in sorted(out)]
