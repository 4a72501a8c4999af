"""Processors over several positions, padded rows, and the order of turns."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_spec_ensemble.ensemble.padded import Ragged, columns, pick, window
from hf_spec_ensemble.ensemble.processing import PositionwiseProcessor
from hf_spec_ensemble.schedule.turns import Situation, Turns


class ByRow(LogitsProcessor):
    """Depends on the row's number, its last token and its length."""

    stateless = True

    def __call__(self, input_ids, scores):
        row = torch.arange(len(scores))[:, None]
        return scores + 0.1 * row + 0.01 * input_ids[:, -1:] * torch.arange(scores.shape[1]) + input_ids.shape[1]


PROCESSORS = {
    "none": [],
    "warpers": [TemperatureLogitsWarper(0.5), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)],
    "typical": [TypicalLogitsWarper(0.9)],
    "penalties": [RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)],
    "mixed": [NoRepeatNGramLogitsProcessor(2), TopKLogitsWarper(5), ByRow()],
}


@pytest.mark.parametrize("name", PROCESSORS)
@given(seed=st.integers(0, 200))
def test_all_positions_at_once_equal_one_at_a_time(name, seed):
    generator = torch.Generator().manual_seed(seed)
    b, k, v = 3, 4, 8
    ids = torch.randint(v, (b, 20), generator=generator)
    first = torch.randint(4, 8, (b,), generator=generator).numpy()
    count = torch.randint(0, k + 1, (b,), generator=generator).numpy()
    logits = torch.randn(b, k, v, generator=generator)
    given_logits = logits.clone()
    processors = LogitsProcessorList(PROCESSORS[name])
    got = PositionwiseProcessor(processors)(logits, ids, first, count)
    assert torch.equal(logits, given_logits)
    for row in range(b):
        for j in range(int(count[row])):
            rows = ids[row, : first[row] + j].expand(b, -1)  # every row the same, so that the row's number is right
            expected = processors(rows, logits[row, j].expand(b, -1).clone())[row]
            torch.testing.assert_close(got[row, j], expected)


LENGTHS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)


@given(LENGTHS)
def test_ragged_rows_behave_like_lists(pairs):
    """put, drop_first and window, against Python lists; what follows `at` is overwritten."""
    batch = len(pairs)
    lists, ragged = [[] for _ in pairs], Ragged(batch)
    for step in range(3):
        count, dropped = np.array(pairs).T
        new = torch.arange(5.0) + 10 * step + 100 * torch.arange(batch)[:, None]
        first = count % 2
        at = np.array([max(len(row) - step, 0) for row in lists])
        ragged.put(at, new[:, :, None], first, count)
        for i, (have, start, n) in enumerate(zip(at, first, count)):
            lists[i] = lists[i][:have] + new[i, start : start + n].tolist()
        ragged.drop_first(dropped)
        lists = [row[n:] for row, n in zip(lists, dropped)]
        if any(row[1:] for row in lists):
            got = ragged.window(np.ones(batch, int), 3)
            assert got.shape == (batch, 3, 1)
            for i, row in enumerate(lists):
                there = row[1:4]
                assert got[i, : len(there), 0].tolist() == there


def test_pick_gives_the_columns_asked_for():
    padded = torch.arange(12).view(2, 6)
    assert pick(padded, columns(np.array([1, 3]), 2)).tolist() == [[1, 2], [9, 10]]
    for first in ([1, 3], [1, 1], [5, 5]):
        first = np.array(first)
        assert torch.equal(window(padded, first, 2), pick(padded, columns(first, 2)))


def _turns(lengths, first, passes=8, prompt=4):
    """Members of successive passes for one row in which nothing is ever rejected."""
    turns, n = Turns(lengths, first, members=len(lengths)), len(lengths)
    seen, total = [0] * n, prompt
    current, turn, order = None, 0, []
    for _ in range(passes):
        current, turn = turns.next(Situation(current, turn, lag=[[total - s] for s in seen]))
        order.append(current)
        seen[current] = total
        if lengths[current] or min(seen) == total:  # proposed, or drawn from r
            total += 1
    return order


def test_members_take_turns_and_the_one_that_lags_most_is_next():
    assert _turns((1, 1), first=1) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert _turns((1, 1, 1), first=2)[:6] == [2, 0, 1, 2, 0, 1]
    assert _turns((1, 3), first=1) == [1, 1, 1, 0, 1, 1, 1, 0]
    assert _turns((2, 2), first=0) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_member_of_length_zero_only_verifies():
    assert _turns((0, 3), first=1)[:4] == [1, 1, 1, 0]
    assert _turns((0, 0), first=0) == [0, 1, 0, 1, 0, 1, 0, 1]


def test_a_drafter_runs_before_every_members_turn():
    turns = Turns((1, 1, 2), first=0, members=2)
    assert turns.next(Situation(None, 0, lag=[[4], [4], [4]])) == (2, 1)
    assert turns.next(Situation(2, 1, lag=[[5], [5], [1]])) == (2, 2)
    assert turns.next(Situation(2, 2, lag=[[6], [6], [1]])) == (0, 1)
    assert turns.next(Situation(0, 1, lag=[[1], [7], [2]])) == (2, 1)
    assert turns.next(Situation(0, 1, lag=[[1], [7], [2]], open=[False])) == (1, 1)
    assert turns.next(Situation(0, 1, lag=[[0], [1], [0]])) == (1, 1), "it has read all, and did not propose"
