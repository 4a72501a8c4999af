"""What sharing passes is worth, against simulation."""

import random

import pytest

from hf_spec_ensemble.schedule.mixture import predict_leaders, predict_mixture
from hf_spec_ensemble.schedule.sharing import seconds_per_token
from hf_spec_ensemble.schedule.simulation import AllSettle, EnoughSettle, OwnerSettles
from hf_spec_ensemble.schedule.turns import Turns


def passes_of_owners(weights, batch, rounds=4000):
    """Passes for a token of each row: the member that most rows wait for runs, and serves these."""
    rng, owners, served = random.Random(0), [], 0

    def owner():
        return rng.choices(range(len(weights)), weights)[0]

    owners = [owner() for _ in range(batch)]
    for _ in range(rounds):
        runs = max(range(len(weights)), key=owners.count)
        served += owners.count(runs)
        owners = [owner() if one == runs else one for one in owners]
    return rounds * batch / served


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.25] * 4, [0.6, 0.3, 0.1]])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_rows_of_a_mixture_wait_for_several_owners(weights, batch):
    """The prediction lets all rows wait for each other, as they do not: right to a factor for large batches."""
    predicted = predict_mixture(
        Turns((0,) * len(weights), 0, len(weights)), weights, [0.0] * len(weights), lambda author, width: 1.0, batch
    )
    simulated = passes_of_owners(weights, batch)
    assert 0.9 * simulated <= predicted.seconds_per_token <= 1.8 * simulated
    if batch == 1:
        assert predicted.seconds_per_token == pytest.approx(1) == simulated


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.2, 0.5, 0.3], [0.25] * 4])
def test_leaders_settle_most_tokens_alone(weights):
    def cost(author, width):
        return 1.0 + 0.1 * (width - 1)

    rng, seconds, unread, tokens = random.Random(0), 0.0, [0] * len(weights), 20_000
    for _ in range(tokens):
        seen, unread, alone = 0.0, [n + 1 for n in unread], rng.random() < 0.77
        for member in sorted(range(len(weights)), key=lambda i: -weights[i]):
            if seen > 0.5 and alone:
                break
            seconds, seen = seconds + cost(member, unread[member]), seen + weights[member]
            unread[member] = 0
    assert predict_leaders(weights, cost).seconds_per_token == pytest.approx(seconds / tokens, rel=0.05)


def both(rule, weights, together, drafter=None, batch=1):
    """Seconds for a token, of members that take turns and of one pass of this cost; a drafter costs nothing."""
    n, at_once = len(weights), None if drafter is None else len(weights)
    drafts = () if drafter is None else (0,)
    apart = seconds_per_token(
        Turns((1,) * n + drafts, 0, n, at_once), [True] * (n + len(drafts)), [0.7] * n + [drafter], one(n),
        rule(weights), batch,
    )  # fmt: skip
    shared = seconds_per_token(
        Turns((1, *drafts), 0, 1, None if drafter is None else 1), [True] * (1 + len(drafts)), [0.7, drafter],
        one(1, together), rule([1.0]), batch,
    )  # fmt: skip
    return apart, shared


def of_all(weights):
    return AllSettle(len(weights))


def enough(weights):
    return EnoughSettle(weights, {})


def one(members, seconds=1.0):
    return lambda author, width: seconds if author < members else 0.0


def test_what_sharing_is_worth():
    apart, shared = both(of_all, [1.5, -0.5], together=1.2)
    assert apart == pytest.approx(1.3) and shared == 1.2  # one pass, and another for what is rejected
    apart, shared = both(OwnerSettles, [0.5, 0.5], together=1.2)
    assert apart == pytest.approx(1) and shared == 1.2  # the owner alone
    apart, shared = both(OwnerSettles, [0.5, 0.5], together=1.2, drafter=0.9)
    assert shared < 0.7 * apart  # drafts are verified at once, and not by one owner after the other
    apart, shared = both(OwnerSettles, [0.25] * 4, together=1.2, batch=8)
    assert shared < 0.5 * apart  # rows of a batch have different owners
    apart, shared = both(enough, [0.7, 0.3], together=1.2)
    assert apart == pytest.approx(1.23)  # the heavier settles most alone


def test_given_lengths_are_kept():
    turns, cost = Turns((2, 1), 0, 2), one(2)
    given, chosen = (seconds_per_token(turns, may, [0.5, 0.5], cost, AllSettle(2)) for may in (None, [True] * 2))
    assert given > chosen
    mixture = dict(rule=OwnerSettles([0.5, 0.5]))
    assert seconds_per_token(turns, None, [0.1, 0.5], cost, **mixture) > 1.2
    assert seconds_per_token(turns, [True] * 2, [0.1, 0.5], cost, **mixture) == 1
