"""Whether members that share weights should share passes too: what either way is expected to take. Pure functions."""

from collections.abc import Sequence
from dataclasses import replace

from .mixture import predict_leaders, predict_mixture, with_drafts
from .simulation import AllSettle, EnoughSettle, OwnerSettles
from .theory import Cost, best_turns, predict
from .turns import Turns


def seconds_per_token(
    turns: Turns,
    may_propose: Sequence[bool] | None,
    acceptance: Sequence[float],
    cost: Cost,
    rule: AllSettle | OwnerSettles | EnoughSettle,
    batch: int = 1,
) -> float:
    """
    Seconds inside passes for a token of each row, as the theory has them, with the proposal lengths that suit best. One
    author, a member or several that share passes, scores for each of the `turns.members`.

    Args:
        turns (`Turns`): The proposal lengths if these are given; else of lengths 1 or 0.
        may_propose (`Sequence[bool]`, A, *optional*): Who may propose how much as suits best; `None` if lengths are
            given.
        acceptance (`Sequence[float]`, A), cost (`Callable[[int, int], float]`): As in `theory.predict`, with the costs
            of passes over all rows.
        rule (`AllSettle`, `OwnerSettles` or `EnoughSettle`): What settles a token. Weights are those of what reads:
            what each author's members have together.
        batch (`int`, defaults to 1): B.

    Example: three rows of one pass, and three members of a greedy product that take turns.

    >>> from hf_spec_ensemble.schedule.sharing import seconds_per_token
    >>> from hf_spec_ensemble.schedule.simulation import AllSettle
    >>> from hf_spec_ensemble.schedule.turns import Turns

    >>> seconds_per_token(Turns((0,), 0, 1), [True], [0.0], lambda author, width: 1.9, AllSettle(1))
    1.9
    >>> three = Turns((1, 1, 1), 0, 3)
    >>> round(seconds_per_token(three, [True] * 3, [0.7] * 3, lambda author, width: 1.0, AllSettle(3)), 2)
    1.6
    """
    if isinstance(rule, OwnerSettles):
        options = [turns]
        if may_propose is not None:
            nobody = tuple(int(may and i < turns.members) for i, may in enumerate(may_propose))
            options = with_drafts(replace(turns, lengths=nobody), may_propose)
        return min(predict_mixture(one, rule.weights, acceptance, cost, batch).seconds_per_token for one in options)
    if may_propose is None:
        seconds = predict(turns, acceptance, cost).seconds_per_token
    else:
        seconds = best_turns(turns, acceptance, cost, may_propose)[1].seconds_per_token
    if isinstance(rule, EnoughSettle):
        seconds = min(seconds, predict_leaders(rule.weights, cost).seconds_per_token)
    return seconds
