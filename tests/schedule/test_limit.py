"""The limit of an ensemble's speed: no schedule that is tried beats it, and it is what the theory gives."""

from itertools import product

import pytest

from hf_spec_ensemble.schedule.limit import limit
from hf_spec_ensemble.schedule.mixture import predict_mixture
from hf_spec_ensemble.schedule.theory import predict
from hf_spec_ensemble.schedule.turns import Turns


def cost(author, width):
    return (1.0, 1.0, 0.1)[author] * (1 + 0.05 * (width - 1))


@pytest.mark.parametrize("acceptance", [(0.95, 0.95), (0.6, 0.8), (0.3, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("small", [False, True])
def test_no_lengths_are_faster_where_all_members_settle(acceptance, small):
    def costs(author, width):
        return cost(2 if small and author else author, width)

    best = limit(acceptance, costs, 2, [True, True])
    tried = [Turns(tuple(lengths), first, 2) for *lengths, first in product((0, 1, 2, 4, 8), (0, 1, 2, 4, 8), (0, 1))]
    least = min(predict(turns, acceptance, costs).seconds_per_token for turns in tried)
    assert best.seconds_per_token == pytest.approx(least, rel=0.02)
    assert best.speedup >= 1


def test_who_may_not_propose_does_not():
    assert limit([0.9, 0.9], cost, 2, [False, False]).speedup == pytest.approx(1)
    one = limit([0.9, 0.9], cost, 2, [True, False])
    assert 1 < one.speedup < limit([0.9, 0.9], cost, 2, [True, True]).speedup


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.8, 0.2]])
def test_mixtures_have_owners_for_whom_the_best_drafts(weights):
    alone = limit([0.0, 0.0], lambda author, width: 1.0, 2, [True, True], weights=weights)
    assert alone.speedup == pytest.approx(2)
    best = limit([0.5, 0.5, 0.9], cost, 2, [True] * 3, weights=weights)
    least = min(
        predict_mixture(Turns((0, 0, length), 0, 2), weights, [0.5, 0.5, 0.9], cost).seconds_per_token
        for length in range(9)
    )
    assert best.seconds_per_token == pytest.approx(least, rel=0.02) and best.speedup > 2
    assert limit([0.5, 0.5, 0.9], cost, 2, [True, True, False], weights=weights).speedup < best.speedup


@pytest.mark.parametrize("weights", [None, [0.5, 0.5]])
def test_a_drafter_that_is_often_silent_counts_where_it_is_not(weights):
    def seconds(drafted, may=True):
        made = limit([0.8, 0.8, 0.9], cost, 2, [True, True, may], 2, drafted, weights)
        assert made.seconds_per_token * made.speedup == pytest.approx(2)
        return made.seconds_per_token

    assert seconds(0.0) == pytest.approx(seconds(1.0, may=False)) and seconds(0.0) > 1.1 * seconds(1.0)
    assert seconds(0.25) == pytest.approx(0.25 * seconds(1.0) + 0.75 * seconds(0.0))
