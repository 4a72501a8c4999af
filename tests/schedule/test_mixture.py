"""The theory of mixtures that are drawn by their components, against simulation; and what its schedule decides."""

import random

import pytest

from hf_spec_ensemble.members.costs import PassCosts
from hf_spec_ensemble.schedule.acceptance import Acceptance
from hf_spec_ensemble.schedule.auto import Memory
from hf_spec_ensemble.schedule.mixture import AutoMixture, predict_mixture
from hf_spec_ensemble.schedule.turns import Situation, Turns


def simulate(weights, drafter, length, chance, cost, tokens=20_000):
    """Seconds a token: a drafter drafts, then the owners of the positions run, each once, until a token is replaced."""
    rng, seconds, done = random.Random(0), 0.0, 0
    unread = [0] * len(weights)
    while done < tokens:
        seconds += length * cost(drafter, 1)
        drafted, gained, ran = length, 0, set()
        while True:
            owner = rng.choices(range(len(weights)), weights)[0]
            if owner not in ran:
                seconds += cost(owner, unread[owner] + drafted + 1)
                ran.add(owner)
                unread[owner] = 0
            gained += 1
            if gained > drafted or rng.random() > chance:
                break
        unread = [0 if i in ran else n + gained for i, n in enumerate(unread)]
        done += gained
    return seconds / done


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.8, 0.2], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("length,chance", [(0, 0.0), (3, 0.7), (6, 0.9)])
def test_the_prediction_is_what_a_simulation_gives(weights, length, chance):
    def cost(author, width):
        return 0.05 if author == len(weights) else 1.0 + 0.1 * (width - 1)

    n = len(weights)
    turns = Turns((*[0] * n, length), 0, n)
    predicted = predict_mixture(turns, weights, [*[0.0] * n, chance], cost)
    simulated = simulate(weights, n, length, chance, cost)
    assert predicted.seconds_per_token == pytest.approx(simulated, rel=0.05)
    if not length:
        assert sum(predicted.runs_per_token) == pytest.approx(1)


def schedule(costs_of, acceptance, weights=(0.5, 0.5)):
    costs = []
    for seconds in costs_of:
        costs.append(PassCosts())
        for width in (1, 2, 4, 8, 16):
            costs[-1].add(1, width, seconds * (1 + 0.05 * (width - 1)))
    memory = Memory([Acceptance() for _ in costs], passes=100)
    for _ in range(100):
        for one, chance in zip(memory.acceptance, acceptance):
            one.add(0.9, random.Random(0).random() < chance)
    made = AutoMixture(memory, costs, 1, len(weights), [True] * len(costs), 0, weights=weights)
    made.advanced(1, 1)
    return made


def test_a_cheap_model_drafts_for_the_owners_and_a_dear_one_does_not():
    assert schedule([1.0, 1.0, 0.05], [0.9, 0.9, 0.9]).turns.lengths[2] >= 3
    assert schedule([1.0, 1.0, 1.0], [0.9, 0.9, 0.9]).turns.lengths == (1, 1, 0)
    assert schedule([1.0, 1.0], [0.9, 0.9]).turns.lengths == (1, 1)


def test_the_member_that_rows_wait_for_runs():
    turns = schedule([1.0, 1.0], [0.9, 0.9])
    for asked in (0, 1):
        waiting = [int(i == asked) for i in range(2)]
        assert turns.next(Situation(1, 1, lag=[[9], [1]], pending=[[]], waiting=waiting)) == (asked, 1)
