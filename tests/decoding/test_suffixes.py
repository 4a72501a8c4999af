"""Drafts from the text itself: what a search through all texts gives, from what is final only, in bounded memory."""

import gc
import itertools
import random
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_spec_ensemble.decoding.suffixes import (
    ANCHORS,
    DEPTH,
    DOUBT,
    LEAST,
    NEWEST,
    OTHERS,
    REACH,
    Suffixes,
)


class Reference:
    """The same by its description: every draft searches all that was read, in the order in which it was read."""

    def __init__(self):
        self.texts: list[list[int]] = []
        self.read: list[tuple[int, int]] = []  # (text, place in it)

    def extend(self, b, tokens):
        for token in tokens:
            self.read.append((b, len(self.texts[b])))
            self.texts[b].append(token)

    def latest(self, ngram):
        n = len(ngram)
        return [(b, t) for b, t in self.read if t >= n and self.texts[b][t - n : t] == ngram][-NEWEST:]

    def draft(self, b, pending, most, least):
        context, best = [*self.texts[b], *pending], ([], [], 0.0)
        for length in range(min(DEPTH, len(context)), 0, -1):
            suffix = context[-length:]
            n = max(anchor for anchor in ANCHORS if anchor <= length)
            places = [(a, t) for a, t in self.latest(context[-n:]) if self.texts[a][max(t - length, 0) : t] == suffix]
            longer = context[-length - 1 :] if length < len(context) else None
            if length == DEPTH or any(self.texts[a][max(t - length - 1, 0) : t] != longer for a, t in places):
                path = self.follow(b, places, length, min(most, REACH * length), least)
                best = max(best, path, key=lambda path: path[2])  # of equals the first, which is the longer suffix's
        return best[:2]

    def follow(self, b, places, length, bound, least):
        tokens, chances = [], []
        while len(tokens) < bound:
            seen = [
                (a, self.texts[a][t + len(tokens)])
                for a, t in places
                if self.texts[a][t : t + len(tokens)] == tokens and t + len(tokens) < len(self.texts[a])
            ]
            if not seen:
                break
            weight = {x: sum(1 if a == b else OTHERS for a, y in seen if y == x) for _, x in seen}
            token = next(x for _, x in reversed(seen) if weight[x] == max(weight.values()))
            chance = weight[token] / (sum(weight.values()) + DOUBT * len(weight) / (length + len(tokens)))
            if np.prod([*chances, chance]) < least:
                break
            tokens.append(token)
            chances.append(chance)
        return tokens, chances, sum(np.cumprod(chances))


def words(most, size=40):
    return st.lists(st.integers(0, most), max_size=size)


# --- What is drafted ----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4).flatmap(
        lambda most: st.tuples(
            st.lists(words(most), min_size=1, max_size=3),  # prompts
            st.lists(st.tuples(st.integers(0, 2), words(most, 6), words(most, 4)), max_size=12),  # rows, new, pending
        )
    ),
    st.sampled_from([0, 1, 5, 16]),
    st.sampled_from([LEAST, 0.01, 0.5]),
)
def test_drafts_are_what_a_search_through_all_texts_gives(case, most, least):
    prompts, steps = case
    suffixes, reference = Suffixes(), Reference()
    texts = []
    for b, prompt in enumerate(prompts):
        texts.append(suffixes.text(prompt))
        reference.texts.append([])
        reference.extend(b, prompt)
    for b, tokens, pending in steps:
        b %= len(texts)
        texts[b].extend(tokens)
        reference.extend(b, tokens)
        drafted, chances = texts[b].draft(pending, most, least)
        expected = reference.draft(b, pending, most, least)
        assert drafted == expected[0] and chances == pytest.approx(expected[1])


def test_long_texts_too():
    """Longer than the places that are looked at, and matches deeper than those that are told apart."""
    rng = random.Random(0)
    suffixes, reference = Suffixes(), Reference()
    phrases = [[rng.randrange(6) for _ in range(rng.randrange(3, 30))] for _ in range(8)]
    texts = [suffixes.text() for _ in range(3)]
    reference.texts = [[], [], []]
    lengths = []
    for _ in range(200):
        b, phrase = rng.randrange(3), rng.choice(phrases)
        cut = rng.randrange(1, len(phrase) + 1)
        texts[b].extend(phrase[:cut])
        reference.extend(b, phrase[:cut])
        pending = phrase[cut : cut + rng.randrange(4)]
        tokens, chances = texts[b].draft(pending, 24, 0.05)
        expected = reference.draft(b, pending, 24, 0.05)
        assert tokens == expected[0] and chances == pytest.approx(expected[1])
        lengths.append(len(tokens))
    assert max(lengths) > 10 and len(set(lengths)) > 5


def test_it_stops_where_a_draft_hardly_pays():
    text = Suffixes().text([1, *range(10, 40), 1])
    assert text.draft()[0] == text.draft(least=0.0)[0] == list(range(10, 10 + REACH))
    assert text.draft(least=0.2)[0] == [10, 11]
    assert text.draft(least=0.5)[0] == []
    assert text.draft(range(10, 15), most=50, least=0.0)[0] == list(range(15, 15 + REACH * 6))
    assert text.draft(range(10, 15), most=2)[0] == [15, 16]
    assert text.draft(most=0) == text.draft(most=-1) == ([], [])


def test_more_evidence_more_confidence():
    chances = []
    for times in (1, 2, 4):
        text = Suffixes().text([*[1, 2, 3, 4, 5] * times, 9, 1, 2, 3])
        chances.append(text.draft(most=1)[1][0])
    assert chances == sorted(chances) and chances[0] < 0.7 and chances[-1] > 0.85
    divided = Suffixes().text([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3])
    tokens, chances = divided.draft(most=1, least=0.0)
    assert tokens == [5] and chances[0] < 0.5  # of equals, the latest


# --- What it may know ---------------------------------------------------------------------------------------------


def test_it_knows_nothing_of_the_token_that_it_is_about():
    """Tokens that never repeat cannot be drafted, unless one has been seen already."""
    suffixes = Suffixes()
    texts = [suffixes.text([2 * b, 2 * b + 1]) for b in range(2)]
    for token in range(10, 400, 2):
        for b, text in enumerate(texts):
            assert text.draft() == ([], [])
            assert text.draft([token + b]) == ([], [])
            text.extend([token + b])


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), words(2), st.integers(1, 60))
def test_what_comes_later_changes_no_draft(tokens, pending, cut):
    """Drafts made on the way are those of an object that has read no further."""
    text, drafts = Suffixes().text(tokens[:1]), []
    for token in tokens[1:]:
        drafts.append(text.draft(pending))
        text.extend([token])
    cut = min(cut, len(drafts))
    assert drafts[cut - 1] == Suffixes().text(tokens[:cut]).draft(pending)


@given(words(2), words(2), words(2))
def test_nothing_is_learned_from_pending_tokens_and_drafts(tokens, pending, other):
    suffixes, plain = Suffixes(), Suffixes()
    text, plain_text = suffixes.text(tokens), plain.text(tokens)
    for length in range(len(pending)):
        text.draft(pending[:length])
    assert text.draft() == plain_text.draft()
    assert suffixes.text(other).draft() == plain.text(other).draft()


# --- What is shared -----------------------------------------------------------------------------------------------


def test_rows_and_calls_share_what_they_read():
    suffixes = Suffixes()
    first, second = suffixes.text([1, 2]), suffixes.text([7, 1, 2, 3])
    assert second.draft() == ([], [])
    first.extend([3, 4, 5])
    assert second.draft(least=0.0)[0] == [4, 5]
    del first
    assert suffixes.text([2, 3]).draft(least=0.0)[0] == [4, 5]
    assert Suffixes().text([2, 3]).draft(least=0.0)[0] == []  # another object has read nothing


@pytest.mark.parametrize(("others", "wins"), [(3, 5), (5, 6)])
def test_a_text_trusts_itself_more(others, wins):
    suffixes = Suffixes()
    text = suffixes.text([1, 2, 3, 5, 1, 2, 3])
    for _ in range(others):
        suffixes.text([1, 2, 3, 6])
    assert text.draft(most=1, least=0.0)[0] == [wins]


def test_nothing_runs_from_one_text_into_another():
    suffixes = Suffixes()
    suffixes.text([1, 2])
    suffixes.text([3, 4])
    assert suffixes.text([2]).draft(least=0.0) == ([], [])


@pytest.mark.parametrize("max_tokens", [100_000, 200])
def test_threads(max_tokens):
    """Nothing is lost, and nothing breaks while tables are forgotten."""
    suffixes = Suffixes(max_tokens)

    def work(seed):
        rng, drafted = random.Random(seed), 0
        for _ in range(5):
            text = suffixes.text([rng.randrange(5) for _ in range(20)])
            for _ in range(60):
                tokens, chances = text.draft([rng.randrange(5)])
                assert len(tokens) == len(chances) and all(0 < chance < 1 for chance in chances)
                drafted += len(tokens)
                text.extend(rng.randrange(5) for _ in range(3))
        return drafted

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert min(pool.map(work, range(8))) > 0
    finally:
        sys.setswitchinterval(interval)
    if max_tokens > 8 * 5 * 200:
        assert suffixes._room == max_tokens // 2 - 8 * 5 * 200
        assert places(suffixes) == 8 * 5 * sum(200 - n for n in ANCHORS)
    else:
        assert places(suffixes) <= len(ANCHORS) * max_tokens


def test_one_thread_writes_at_a_time():
    class Slow(dict):  # lets other threads run in the middle of learning a token
        def setdefault(self, *entry):
            time.sleep(1e-4)
            return super().setdefault(*entry)

    suffixes, table = Suffixes(200), Slow()
    suffixes._tables = (table, {})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: suffixes.text(range(seed, seed + 50)), range(8)))
    assert sum(map(len, table.values())) == 2 * sum(50 - n for n in ANCHORS)  # two texts fill it, one after the other


# --- What is forgotten --------------------------------------------------------------------------------------------


def places(suffixes):
    return sum(len(found) for table in suffixes._tables for found in table.values())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_memory_is_bounded(rows, step):
    suffixes, counter = Suffixes(200), itertools.count()
    texts = [suffixes.text() for _ in range(rows)]
    for _ in range(3000 // step):
        for text in texts:
            text.extend(itertools.islice(counter, step))
            assert places(suffixes) <= len(ANCHORS) * 200
            held = {id(past): len(past) for table in suffixes._tables for found in table.values() for past, _ in found}
            assert sum(held.values()) <= 200 + 2 * rows * DEPTH
            assert len(text._tokens) <= 100 + DEPTH


def test_a_table_that_is_forgotten_is_freed():
    class Tokens(list):  # a list that can be watched
        pass

    suffixes = Suffixes(20)
    text = suffixes.text()
    text._tokens = Tokens()
    watch = weakref.ref(text._tokens)
    text.extend(range(10))
    text.extend(range(10, 20))
    assert watch() is not None
    text.extend([20])
    gc.collect()
    assert watch() is None


def test_the_latest_is_remembered_and_the_oldest_forgotten():
    suffixes = Suffixes(200)
    text = suffixes.text(range(1000))
    for ago in range(2, 95):
        tokens = text.draft(range(1000 - ago - 4, 1000 - ago), most=1)[0]
        assert tokens == [1000 - ago], ago
    for ago in range(202, 1000, 50):
        assert text.draft([1000 - ago], least=0.0) == ([], [])


def test_a_match_reaches_across_what_was_forgotten():
    """The confidence in a match in the text itself is the same, wherever a table ends."""
    phrase = list(range(1, 13))
    for padding in range(100, 200):
        text = Suffixes(200).text([*range(1000, 1000 + padding), *phrase, 99, *phrase[:-1]])
        tokens, chances = text.draft(most=1)
        assert tokens == [12] and chances == pytest.approx([1 / (1 + DOUBT / 11)])


def test_what_another_text_forgot_is_not_taken_for_its_own():
    """A text that was not used while two tables were dropped has no entries in them."""
    suffixes = Suffixes(200)
    text = suffixes.text([0])
    suffixes.text([*range(1000, 1250), 1, 2, 3, 4])
    text.extend([1, 2, 3])
    assert text.draft(most=1)[1] == [OTHERS / (OTHERS + DOUBT / 3)] and text._before == []


# --- What it takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [list, tuple, iter, np.array, torch.tensor, lambda x: np.array(x, np.int32), lambda x: map(torch.tensor, x)],
)
def test_tokens_of_any_kind(kind):
    text, plain = Suffixes().text(kind([1, 2, 3, 4])), Suffixes().text([1, 2, 3, 4])
    text.extend(kind([5, 1]))
    plain.extend([5, 1])
    drafted = text.draft(kind([2]))
    assert drafted == plain.draft([2]) and drafted[0] == [3, 4, 5, 1]
    assert all(type(token) is int for token in drafted[0])


def test_empty_and_short_texts():
    suffixes = Suffixes()
    text = suffixes.text()
    assert text.draft() == text.draft([1]) == ([], [])
    text.extend([])
    text.extend([1])
    assert text.draft() == text.draft([1]) == ([], [])
    text.extend([1])
    assert text.draft(least=0.0)[0] == [1]
    assert suffixes.text().draft([1], least=0.0)[0] == [1]


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        (torch.tensor([[1, 2]]), ValueError, r"shape \[1, 2\]"),
        (np.array(1), ValueError, r"shape \[\]"),
        ([1, 2.5], TypeError, "float"),
        (torch.tensor([1.0]), TypeError, "float"),
        ([[1, 2]], TypeError, "list"),
    ],
)
def test_what_is_no_text_is_refused(tokens, error, said):
    suffixes = Suffixes()
    text = suffixes.text()
    for refuses in (text.extend, text.draft, suffixes.text):
        with pytest.raises(error, match=said):
            refuses(tokens)
    assert places(suffixes) == 0 and text._tokens == []


def test_a_bound_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="`max_tokens` is 1, but must be at least 2"):
        Suffixes(1)
