"""The union of several tokenizers: one vocabulary U for members of different families. Runs no model.

A token stands for a string of bytes. U has the main model's ids as they are, and then a number for every string that
only other members have. A member's distribution over U is its own, each token's probability at its string (GaC, Yu et
al., arXiv 2406.12585); after a token of U it reads its own tokens for that string.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch.nn.functional import pad

from .spelling import ROLES, Spelling
from .wide import columns


Key = tuple[str, str] | bytes  # what tokens are told apart by: a string, or what is special about them

KEPT = 8  # unions that are kept in a process


@dataclass(frozen=True)
class Vocabulary:
    """
    A member's tokens as a union needs them.

    Args:
        spelling (`Spelling`): Of its tokenizer, without tokens that the model does not know.
        size (`int`): V, the width of the model's logits.
        ends (`tuple[int, ...]`): Tokens that end a text; the first one stands for all in a union.
    """

    spelling: Spelling
    size: int
    ends: tuple[int, ...]

    def keys(self, i: int, main: bool = False) -> Iterator[Key]:
        """What a token may be found by in another vocabulary, the best first; nothing for one that does not exist."""
        spelling = self.spelling
        if i >= len(spelling.tokens) or spelling.tokens[i] is None:
            return
        if i in (self.ends[:1] if main else self.ends):
            yield "role", "eos"
        elif spelling.strings[i] is None:
            yield from (("role", role) for role in ROLES[1:] if spelling.roles.get(role) == i)
        if spelling.strings[i] is None:
            yield "special", spelling.tokens[i]
        elif spelling.strings[i]:
            yield spelling.strings[i]


@dataclass(frozen=True, eq=False)
class Map:
    """
    One member's way between its own tokens and U; made by `Map.of`.

    Args:
        width (`int`): W.
        size (`int`): V, of its own tokens.
        same (`int`): So many of the first u are its own tokens of these numbers; all of the main model's.
        index (`torch.LongTensor` `[n]`): For those after them its own token, or V where it has none. It has none of the
            rest.
        absent (`torch.LongTensor` `[m]`): Which of the first `same` its distribution is to have nothing for.
        more (`list[torch.LongTensor]`, each `[2, m]`): Pairs of u and a further token that stands for it.
        own (`list[list[int]]`, W), texts (`list[bytes]`, W): What it reads for u: its first own token, or where it has
            none this string.
        spelling (`Spelling`): Of its tokenizer.
        is_identity (`bool`): Whether U and its own tokens are the same.
    """

    width: int
    size: int
    same: int
    index: torch.Tensor
    absent: torch.Tensor
    more: list[torch.Tensor]
    own: list[list[int]] = field(repr=False)
    texts: list[bytes] = field(repr=False)
    spelling: Spelling
    is_identity: bool

    @classmethod
    def of(cls, vocabulary: Vocabulary, own: list[list[int]], texts: list[bytes]) -> "Map":
        """Of the tokens that stand for every u, the one that is read first."""
        width = len(own)
        same = next((u for u, ids in enumerate(own) if ids and ids[0] != u), width)
        same = min(same, vocabulary.size)
        known = max((u + 1 for u, ids in enumerate(own) if ids), default=0)
        pairs = [
            [(u, ids[k]) for u, ids in enumerate(own) if len(ids) > k] for k in range(1, max(map(len, own), default=0))
        ]
        return cls(
            width=width,
            size=vocabulary.size,
            same=same,
            index=torch.tensor([ids[0] if ids else vocabulary.size for ids in own[same:known]], dtype=torch.long),
            absent=torch.tensor([u for u, ids in enumerate(own[:same]) if not ids], dtype=torch.long),
            more=[torch.tensor(pair).T.contiguous() for pair in pairs],
            own=own,
            texts=texts,
            spelling=vocabulary.spelling,
            is_identity=width == vocabulary.size and all(ids == [u] for u, ids in enumerate(own)),
        )

    def with_only(self, kept: torch.Tensor) -> "Map":
        """The same where a distribution has only these `[W]` of U."""
        more = [pairs[:, kept[pairs[0]]] for pairs in self.more]
        absent = torch.cat([self.absent, (~kept[: self.same]).nonzero()[:, 0]])
        index = self.index.masked_fill(~kept[self.same :][: len(self.index)], self.size)
        is_identity = self.is_identity and bool(kept.all())
        return replace(self, index=index, absent=absent, more=more, is_identity=is_identity)

    def to(self, device: torch.device) -> "Map":
        """The same with its tables there; kept for the next call."""
        return self if self.index.device == device else _moved(self, device)

    def logits(self, own: torch.Tensor) -> torch.Tensor:
        """
        A member's logits over U.

        Args:
            own (`torch.Tensor` `[..., V]`): Over its own tokens, on the device of the tables. Not changed.

        Returns:
            `torch.Tensor` `[..., W]`: In float32 or better. Where several tokens stand for one string, their
            probabilities are added; where none does, it is -inf.
        """
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        logits = own[..., : self.same]
        if len(self.index):
            logits = torch.cat([logits, columns(pad(own, (0, 1), value=-torch.inf), self.index)], dim=-1)
        logits = pad(logits, (0, self.width - logits.shape[-1]), value=-torch.inf)  # a copy in any case
        logits.index_fill_(-1, self.absent, -torch.inf)
        for u, token in self.more:
            logits[..., u] = torch.logaddexp(logits[..., u], own[..., token])
        return logits

    @cached_property
    def most(self) -> int:
        """More tokens than this it reads for none of U: one for each byte of what it lacks."""
        return max((len(text) for own, text in zip(self.own, self.texts) if not own), default=1) or 1

    def read(self, u: int) -> tuple[int, ...]:
        """The member's own tokens for one of U."""
        own = self.own[u]
        return (own[0],) if own else self.spelling.write(self.texts[u])


@dataclass(frozen=True, eq=False)
class Union:
    """
    The vocabulary U of members with different tokenizers.

    Args:
        width (`int`): W, how many there are.
        main_width (`int`): How many of them, the first, are the main model's ids.
        maps (`tuple[Map, ...]`): One for each member and drafter, in the order they were given.
        common (`torch.LongTensor` `[C]`, *optional*): Those that all members have, if only these are decoded.
        strings (`list[bytes]`, W): What each reads, special tokens by their names.

    Example:

    >>> from hf_spec_ensemble.demo import FAMILY
    >>> from hf_spec_ensemble.ensemble.spelling import spelling_of
    >>> from hf_spec_ensemble.ensemble.union import Vocabulary, union_of
    >>> from transformers import AutoTokenizer

    >>> spelling = spelling_of(AutoTokenizer.from_pretrained(FAMILY / "reader"))
    >>> one = Vocabulary(spelling, len(spelling.tokens), (spelling.roles["eos"],))
    >>> union = union_of((one, one))
    >>> union.width == one.size, union.maps[1].is_identity
    (True, True)
    """

    width: int
    main_width: int
    maps: tuple[Map, ...]
    common: torch.Tensor | None
    strings: list[bytes] = field(repr=False)

    def in_common(self, ids: Sequence[int]) -> list[int]:
        """
        The same text in the tokens that all members have: what some lack is written by others, the longest first.

        Raises:
            `ValueError`: for a token that cannot be, as a special one that others have none for.
        """
        found, known = [], set(self.common.tolist())
        for u in ids:
            text, start = b"" if self.maps[0].spelling.strings[u] is None else self.strings[u], 0
            if u in known:
                found.append(u)
                continue
            while start < len(text) or not text:
                ends = (end for end in range(len(text), start, -1) if text[start:end] in self._common_texts)
                end = next(ends, None)
                if end is None:
                    raise ValueError(f"Not all members can write {self.strings[u]!r}: use method 'weighted'.")
                found.append(self._common_texts[text[start:end]])
                start = end
        return found

    @cached_property
    def _common_texts(self) -> dict[bytes, int]:
        special = self.maps[0].spelling.strings
        return {self.strings[u]: u for u in self.common.tolist() if special[u] is not None}

    def decode(self, ids: Sequence[int], **_) -> str:
        """The text of tokens of U, special ones by their names; called as a tokenizer's `decode`."""
        return b"".join(self.strings[i] for i in ids).decode(errors="replace")


@lru_cache(maxsize=KEPT)
def union_of(
    vocabularies: tuple[Vocabulary, ...], only_common: bool = False, drafting: frozenset[int] = frozenset()
) -> Union:
    """
    The union of members' vocabularies. It is kept, for the next call with the same tokenizers.

    Args:
        vocabularies (`tuple[Vocabulary, ...]`, N): The main model's first.
        drafting (`frozenset[int]`): Places of those that only draft: their strings do not count.
        only_common (`bool`, defaults to `False`): Whether members give nothing to strings that others lack: for
            methods that multiply or compare. U has the main model's ids alone then.

    Raises:
        `ValueError`: if no string is common to all.
    """
    main, members = vocabularies[0], [i for i in range(len(vocabularies)) if i not in drafting]
    number: dict[Key, int] = {}
    for i in (*main.spelling.by_string.values(), *range(main.size)):  # of equal strings, the one that is written
        for key in main.keys(i, main=True):
            number.setdefault(key, i)
    width, texts = main.size, _texts(main)
    if not only_common:
        for other in (vocabularies[i] for i in members[1:]):
            for string, i in other.spelling.by_string.items():
                if i not in other.ends and string not in number:
                    number[string] = width
                    texts.append(string)
                    width += 1
    owned = [_owned(vocabulary, number, width, i == 0) for i, vocabulary in enumerate(vocabularies)]
    maps = tuple(Map.of(vocabulary, own, texts) for vocabulary, own in zip(vocabularies, owned))
    if not only_common:
        return Union(width, main.size, maps, None, texts)
    kept = torch.tensor([all(owned[i][u] for i in members) for u in range(width)])
    if not kept.any():
        raise ValueError("The members' tokenizers have no token in common: use method 'weighted'.")
    return Union(width, main.size, tuple(x.with_only(kept) for x in maps), kept.nonzero()[:, 0], texts)


def _texts(main: Vocabulary) -> list[bytes]:
    """What each of the main model's ids reads."""
    pairs = zip(main.spelling.tokens, main.spelling.strings)
    texts = [(token or "").encode() if string is None else string for token, string in pairs]
    return texts + [b""] * (main.size - len(texts))


def _owned(vocabulary: Vocabulary, number: dict[Key, int], width: int, main: bool) -> list[list[int]]:
    """For every u the tokens of a member that stand for it, the one that it reads first."""
    own: list[list[int]] = [[] for _ in range(width)]
    preferred = vocabulary.spelling.by_string
    for i in range(vocabulary.size):
        keys = list(vocabulary.keys(i, main))
        u = next((number[key] for key in keys if key in number), None)
        pads = ("role", "pad") in keys and i not in vocabulary.ends
        if u is None or (pads and u == number.get(("role", "eos"))):  # by a name that means the end elsewhere
            continue
        first = (main and u == i) or (keys[-1] in preferred and preferred[keys[-1]] == i)
        if keys[0] == ("role", "eos"):
            first = i == vocabulary.ends[0]
        own[u].insert(0 if first else len(own[u]), i)
    return own


@lru_cache(maxsize=4 * KEPT)
def _moved(made: Map, device: torch.device) -> Map:
    more = [pairs.to(device) for pairs in made.more]
    return replace(made, index=made.index.to(device), absent=made.absent.to(device), more=more)
