"""Whether members that share weights should share passes too: what either way is expected to take. Pure functions."""

from collections.abc import Sequence
from dataclasses import replace

from .mixture import predict_leaders, predict_mixture, with_drafts
from .theory import Cost, best_turns, predict
from .turns import Turns


ALL, OWNER, ENOUGH = "all", "owner", "enough"  # must have scored a position; see `decoding.settling`


def seconds_per_token(
    turns: Turns,
    may_propose: Sequence[bool] | None,
    acceptance: Sequence[float],
    cost: Cost,
    rule: str = ALL,
    weights: Sequence[float] = (),
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
        rule (`str`): Who must score a position before its token is final: `"all"`, the position's `"owner"` (of a
            sampled mixture), or `"enough"` (of a greedy one).
        weights (`Sequence[float]`): Of the mixture: what each author's members have together.
        batch (`int`, defaults to 1): B.

    Example: three rows of one pass, and three members of a greedy product that take turns.

    >>> from hf_spec_ensemble.schedule.sharing import seconds_per_token
    >>> from hf_spec_ensemble.schedule.turns import Turns

    >>> seconds_per_token(Turns((0,), 0, 1), [True], [0.0], lambda author, width: 1.9)
    1.9
    >>> round(seconds_per_token(Turns((1, 1, 1), 0, 3), [True] * 3, [0.7] * 3, lambda author, width: 1.0), 2)
    1.6
    """
    if rule == OWNER:
        options = [turns]
        if may_propose is not None:
            nobody = tuple(int(may and i < turns.members) for i, may in enumerate(may_propose))
            options = with_drafts(replace(turns, lengths=nobody), may_propose)
        return min(predict_mixture(one, weights, acceptance, cost, batch).seconds_per_token for one in options)
    if may_propose is None:
        seconds = predict(turns, acceptance, cost).seconds_per_token
    else:
        seconds = best_turns(turns, acceptance, cost, may_propose)[1].seconds_per_token
    if rule == ENOUGH:
        seconds = min(seconds, predict_leaders(weights, cost).seconds_per_token)
    return seconds
