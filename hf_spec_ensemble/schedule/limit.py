"""How fast an ensemble could be on this machine: the best that costs and acceptance allow. Pure functions."""

from collections.abc import Sequence

from .mixture import predict_mixture, with_drafts
from .theory import Cost, Prediction, best_turns
from .turns import Turns


def limit(
    acceptance: Sequence[float],
    cost: Cost,
    members: int,
    may_propose: Sequence[bool],
    at_once: int | None = None,
    drafted: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Prediction:
    """
    The speed of the best proposal lengths for these costs and this acceptance, with no time outside the passes.

    It is the limit of the theory in `schedule.theory`, or for mixtures drawn by their components of the one in
    `schedule.mixture`, and these are what it is not:

    - Acceptance is one number for each author, the same at every position. A schedule that proposes only where an
      author is sure has measured a higher one than the author has elsewhere, and then the limit is too high.
    - All members score every token, unless there are `weights`. A greedy mixture that is settled by some of them can be
      faster than the limit.
    - A pass of an owner costs what one of average width does. Where c(w) rises in a step, the average over widths is
      less, and the limit is too low.
    - It is for one row. With the costs of a batch it is an upper bound: rows advance separately, and a pass serves only
      those that wait for it.
    - Passes that read late tokens without giving logits cost less than `cost` says.

    A drafter whose proposals come all at once has something to say only in places. `drafted` is the share of tokens
    that stood where it had proposed one. These cost what tokens do if it always drafts, the others what they do
    without it.

    Args:
        acceptance (`Sequence[float]`, A): In [0, 1], of the N members, then of drafters.
        cost (`Callable[[int, int], float]`): c_i(w), the seconds of a pass of author i over w tokens.
        members (`int`): N.
        may_propose (`Sequence[bool]`, A): Which authors may.
        at_once (`int`, *optional*): The drafter whose proposals all come from one run.
        drafted (`float`, defaults to 1): Of that drafter, in [0, 1].
        weights (`Sequence[float]`, N, *optional*): Of a mixture whose tokens are settled by their owners. By default
            all members settle a token.

    Returns:
        `Prediction`.

    Example: two equal members, drawn by their components, and two that both score every token.

    >>> from hf_spec_ensemble.schedule.limit import limit

    >>> limit([0.9, 0.9], lambda author, width: 1.0, 2, [True, True], weights=[0.5, 0.5]).speedup
    2.0
    >>> round(limit([0.9, 0.9], lambda author, width: 1.0, 2, [True, True]).speedup, 2)
    1.82
    """

    def best(may: Sequence[bool]) -> Prediction:
        nothing = Turns((0,) * len(acceptance), 0, members, at_once)
        if weights is None:
            return best_turns(nothing, acceptance, cost, may, gain=0.0)[1]
        options = (predict_mixture(turns, weights, acceptance, cost) for turns in with_drafts(nothing, may))
        return min(options, key=lambda prediction: prediction.seconds_per_token)

    always = best(may_propose)
    if at_once is None:
        return always
    never = best([may and author != at_once for author, may in enumerate(may_propose)])
    return _in_turns(always, never, drafted)


def _in_turns(one: Prediction, other: Prediction, share: float) -> Prediction:
    """What is to be expected of a share of tokens made one way, and the rest the other way."""
    seconds = share * one.seconds_per_token + (1 - share) * other.seconds_per_token
    runs = (share * a + (1 - share) * b for a, b in zip(one.runs_per_token, other.runs_per_token))
    return Prediction(seconds, tuple(runs), one.speedup * one.seconds_per_token / seconds)
