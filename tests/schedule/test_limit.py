"""The limit of an ensemble's speed: no schedule that is tried beats it, and it is what the theory gives."""

from itertools import product

import pytest

from hf_spec_ensemble.schedule.limit import SIMULATED, limit
from hf_spec_ensemble.schedule.mixture import predict_mixture
from hf_spec_ensemble.schedule.simulation import AllSettle, EnoughSettle, OwnerSettles, mean_of_runs
from hf_spec_ensemble.schedule.theory import predict
from hf_spec_ensemble.schedule.turns import Turns


def cost(author, width):
    return (1.0, 1.0, 0.1)[author] * (1 + 0.05 * (width - 1))


@pytest.mark.parametrize("acceptance", [(0.95, 0.95), (0.6, 0.8), (0.3, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("small", [False, True])
def test_no_lengths_are_faster_where_all_members_settle(acceptance, small):
    def costs(author, width):
        return cost(2 if small and author else author, width)

    best = limit(acceptance, costs, AllSettle(2), [True, True])
    tried = [Turns(tuple(lengths), first, 2) for *lengths, first in product((0, 1, 2, 4, 8), (0, 1, 2, 4, 8), (0, 1))]
    least = min(predict(turns, acceptance, costs).seconds_per_token for turns in tried)
    assert best.seconds_per_token == pytest.approx(least, rel=0.02)
    assert best.speedup >= 1


def test_who_may_not_propose_does_not():
    assert limit([0.9, 0.9], cost, AllSettle(2), [False, False]).speedup == pytest.approx(1)
    one = limit([0.9, 0.9], cost, AllSettle(2), [True, False])
    assert 1 < one.speedup < limit([0.9, 0.9], cost, AllSettle(2), [True, True]).speedup


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.8, 0.2]])
def test_mixtures_have_owners_for_whom_the_best_drafts(weights):
    alone = limit([0.0, 0.0], lambda author, width: 1.0, OwnerSettles(weights), [True, True])
    assert alone.speedup == pytest.approx(2)
    best = limit([0.5, 0.5, 0.9], cost, OwnerSettles(weights), [True] * 3)
    least = min(
        predict_mixture(Turns((0, 0, length), 0, 2), weights, [0.5, 0.5, 0.9], cost).seconds_per_token
        for length in range(9)
    )
    assert best.seconds_per_token == pytest.approx(least, rel=0.02) and best.speedup > 2
    assert limit([0.5, 0.5, 0.9], cost, OwnerSettles(weights), [True, True, False]).speedup < best.speedup


@pytest.mark.parametrize("rule", [AllSettle(2), OwnerSettles([0.5, 0.5])])
def test_a_drafter_that_is_often_silent_counts_where_it_is_not(rule):
    def seconds(drafted, may=True):
        made = limit([0.8, 0.8, 0.9], cost, rule, [True, True, may], 2, drafted)
        assert made.seconds_per_token * made.speedup == pytest.approx(2)
        return made.seconds_per_token

    assert seconds(0.0) == pytest.approx(seconds(1.0, may=False)) and seconds(0.0) > 1.1 * seconds(1.0)
    assert seconds(0.25) == pytest.approx(0.25 * seconds(1.0) + 0.75 * seconds(0.0))


def test_rows_of_a_batch_wait_for_each_other():
    rule, owners = AllSettle(2), OwnerSettles([0.5, 0.5])
    one = limit([0.6, 0.6], cost, rule, [True, True])
    batch = limit([0.6, 0.6], cost, rule, [True, True], lengths=[40] * 8)
    assert 1 <= batch.speedup < one.speedup
    fixed = mean_of_runs(Turns((1, 1), 0, 2), [0.6, 0.6], cost, [40] * 8, rule, 1.0, SIMULATED)
    assert batch.seconds_per_token <= fixed.seconds_per_token
    assert limit([0.0, 0.0], cost, rule, [True, True], lengths=[40] * 8).speedup == pytest.approx(1)
    drawn = limit([0.0, 0.0], lambda author, width: 1.0, owners, [True, True], lengths=[40] * 8)
    assert 1 <= drawn.speedup < 1.6, "some row needs either member nearly always"


@pytest.mark.parametrize("length", [24, 200])
def test_a_greedy_mixture_need_not_hear_the_light_member(length):
    """Nor is the best of many schedules that were lucky in a short text."""
    early = EnoughSettle([0.7, 0.3], {(True, False): 0.8})
    best = limit([0.0, 0.0], lambda author, width: 1.0, early, [True, True], lengths=[length])
    assert best.speedup == pytest.approx(2 / 1.2, rel=0.05)
    assert limit([0.0, 0.0], cost, EnoughSettle([0.7, 0.3], {}), [True, True], lengths=[200]).speedup == pytest.approx(
        1
    )
