"""
A drafter's memory of text: which tokens followed earlier occurrences of the last tokens, after SuffixDecoding.

It learns from prompts and final tokens, and never runs a model. A draft needs the counts of a suffix tree along a few
paths only, so no tree is stored. A table tells where an n-gram stood, as in LZ77 compression, and a draft counts what
followed at these places: a token costs two entries to learn instead of one for each depth, and forgetting is to drop a
table. SuffixDecoding is Oliaro et al., https://arxiv.org/abs/2411.04975.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import index
from threading import Lock


ANCHORS = (1, 3)  # lengths of the n-grams in the table
NEWEST = 16  # places looked at for one n-gram: the latest
DEPTH = 16  # longest match that is told from a longer one
REACH = 3  # tokens drafted at most for each token that matched
DOUBT = 1.5  # weight of the unseen, for a match of one token; fitted to greedy texts
OTHERS = 0.25  # weight of a place in another text, against one in the text itself
LEAST = 0.15  # chance that all tokens of a draft are kept

Place = tuple[list[int], int]  # a text, and where in it the token stands that followed
Table = dict[tuple[int, ...], list[Place]]  # n-gram -> places where it had come just before, oldest first


class Suffixes:
    """
    A drafter that copies: it proposes what followed the last tokens where they stood before, in this text or in others.
    `generate(drafter=Suffixes())` uses it. Rows of a batch, and calls with the same object, learn from each other.

    Safe for any number of threads, each with its own texts.

    Args:
        max_tokens (`int`, defaults to 65,536): Tokens to remember, about 0.5 kB each. They are kept in two tables. When
            the newer table holds half of them, the older one is dropped. So between a half and all are remembered.

    Raises:
        `ValueError`: if `max_tokens` is less than 2.

    Example:

    >>> from hf_spec_ensemble.decoding.suffixes import Suffixes

    >>> suffixes = Suffixes()
    >>> first = suffixes.text([1, 2, 3, 4, 5, 6, 7])  # a prompt
    >>> first.extend([9, 1, 2, 3])  # tokens that are final
    >>> tokens, chances = first.draft()
    >>> tokens, [round(chance, 2) for chance in chances]
    ([4, 5, 6, 7, 9, 1, 2, 3], [0.67, 0.73, 0.77, 0.8, 0.82, 0.84, 0.86, 0.87])
    >>> first.draft(pending=[4, 5], most=2)[0]
    [6, 7]

    Another text draws on it too, with less confidence:

    >>> second = suffixes.text([8, 8, 2, 3, 4])
    >>> tokens, chances = second.draft(most=1)
    >>> tokens, round(chances[0], 2)
    ([5], 0.33)
    """

    def __init__(self, max_tokens: int = 65_536):
        if max_tokens < 2:
            raise ValueError(f"`max_tokens` is {max_tokens}, but must be at least 2: half of them fill a table.")
        self._half = max_tokens // 2
        self._room = self._half  # tokens that the newer table may still take
        self._age = 0  # how often a table was forgotten
        self._tables: tuple[Table, Table] = ({}, {})  # newer, older; replaced whole: other threads may be reading
        self._lock = Lock()  # of those who write

    def text(self, tokens: Iterable[int] = ()) -> "Text":
        """
        Begins a text, such as a row of a batch.

        Args:
            tokens (`Iterable[int]`, defaults to none): The prompt, without padding; as for [`Text.extend`].

        Returns:
            `Text`: It learns and drafts. What was learnt from it outlives it.
        """
        text = Text(self)
        text.extend(tokens)
        return text

    def _learn(self, text: "Text", tokens: list[int]) -> None:
        with self._lock:
            for token in tokens:
                if not self._room:
                    self._tables = ({}, self._tables[0])
                    self._room = self._half
                    self._age += 1
                if text._age != self._age:  # start again, so that the past can be forgotten; but keep what can match
                    text._before = text._tokens if text._age == self._age - 1 else []
                    text._tokens, text._age = text._tokens[-DEPTH:], self._age
                table, past = self._tables[0], text._tokens
                end = len(past)
                past.append(token)  # before it can be found
                place = (past, end)
                for n in ANCHORS:
                    if n <= end:
                        table.setdefault(tuple(past[end - n : end]), []).append(place)
                self._room -= 1

    def _places(self, ngram: tuple[int, ...]) -> list[Place]:
        """The latest places that this n-gram led to, oldest first."""
        newer, older = self._tables
        places = newer.get(ngram, [])[-NEWEST:]
        if len(places) < NEWEST and ngram in older:
            places = older[ngram][len(places) - NEWEST :] + places
        return places


class Text:
    """
    One text of [`Suffixes`], which makes it: its final tokens. One thread at a time may use it.
    """

    def __init__(self, suffixes: Suffixes):
        self._suffixes = suffixes
        self._tokens: list[int] = []  # that the newer table points into, and up to DEPTH before them
        self._before: list[int] = []  # that the older table points into
        self._age = suffixes._age

    def extend(self, tokens: Iterable[int]) -> None:
        """
        Learns that these tokens came next.

        Args:
            tokens (`Iterable[int]`, K): Final tokens: integers, or a NumPy array or tensor of them, of shape `[K]`.

        Raises:
            `ValueError`: if an array or tensor has another shape.
            `TypeError`: if a token is not an integer. Nothing is learned then.
        """
        self._suffixes._learn(self, _integers(tokens))

    def draft(self, pending: Iterable[int] = (), most: int = 16, least: float = LEAST) -> tuple[list[int], list[float]]:
        """
        Proposes what comes next. Learns nothing.

        For every suffix that was seen before, it follows the most frequent continuation. A token x that followed c of
        n times, where u different tokens did, is taken to be kept with probability

            p(x) = c / (n + 1.5 u / L)

        where L is how many tokens match, those drafted before x included. This is Witten and Bell's estimate (method C
        of prediction by partial matching), which has L = 1 and 1 for 1.5. Places in other texts count 1/4 in c and n.
        Only the latest 16 places of an n-gram are looked at. A path ends after three times as many tokens as the suffix
        has, or where it is likely to have gone wrong. The path with the highest expected number of tokens kept wins, of
        equals that of the longest suffix.

        Args:
            pending (`Iterable[int]`, P, defaults to none): Tokens after the final ones that are not final yet; of a
                kind that [`Text.extend`] takes.
            most (`int`, defaults to 16): Tokens wanted at most.
            least (`float`, defaults to 0.15): The draft ends before the probability that all its tokens are kept falls
                below this. Lower where a drafted token costs little to verify.

        Returns:
            `tuple[list[int], list[float]]`: K tokens, and for each the probability in (0, 1) that it is kept if those
            before it are. None, if no suffix was seen before.

        Raises:
            `ValueError`, `TypeError`: as [`Text.extend`].
        """
        context = [*self._tokens[-DEPTH:], *_integers(pending)][-DEPTH:]
        best, gain = ([], []), 0.0
        for matched, places in self._matches(context):
            bound = min(most, REACH * matched)
            if gain >= bound:
                break  # shorter suffixes may draft even less
            tokens, chances, expected = self._follow(places, matched, bound, least)
            if expected > gain:
                best, gain = (tokens, chances), expected
        return best

    def _matches(self, context: list[int]) -> Iterator[tuple[int, list[Place]]]:
        """Lengths of suffixes of the context that were seen, longest first, and the places that these led to."""
        limit = DEPTH + 1  # shorter ones are this n-gram's to find
        for n in reversed(ANCHORS):
            places = self._suffixes._places(tuple(context[-n:])) if n <= len(context) else []
            lengths = [_matched(text, place, context, n, limit) for text, place in places]
            for length in sorted(set(lengths), reverse=True):
                if length < limit:
                    yield length, [place for place, other in zip(places, lengths) if other >= length]
            limit = n

    def _follow(
        self, places: Sequence[Place], matched: int, bound: int, least: float
    ) -> tuple[list[int], list[float], float]:
        """Tokens along the most frequent path, the chance of each, and the expected number of tokens kept."""
        tokens, chances, kept, expected = [], [], 1.0, 0.0
        own, before = self._tokens, self._before
        while places and len(tokens) < bound:
            counts: dict[int, float] = {}
            for text, place in reversed(places):  # of equals, the latest comes first and wins
                token = text[place]
                counts[token] = counts.get(token, 0.0) + (1.0 if text is own or text is before else OTHERS)
            token = max(counts, key=counts.get)
            chance = counts[token] / (sum(counts.values()) + DOUBT * len(counts) / (matched + len(tokens)))
            kept *= chance
            if kept < least:
                break
            tokens.append(token)
            chances.append(chance)
            expected += kept
            places = [(text, place + 1) for text, place in places if text[place] == token and place + 1 < len(text)]
        return tokens, chances, expected


def _matched(text: list[int], place: int, context: list[int], n: int, limit: int) -> int:
    """How many tokens before the place are the context's last ones, of which n are known to be; `limit` at most."""
    most = min(limit, len(context), place)
    while n < most and text[place - n - 1] == context[-n - 1]:
        n += 1
    return n


def _integers(tokens: Iterable[int]) -> list[int]:
    shape = getattr(tokens, "shape", None)
    if shape is not None:
        if len(shape) != 1:
            raise ValueError(f"Tokens have shape {list(shape)}, but one text is wanted: give a row of them, [K].")
        tokens = tokens.tolist()  # many times faster than one by one
    return list(map(index, tokens))
