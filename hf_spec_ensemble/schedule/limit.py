"""How fast an ensemble could be on this machine: the best that costs and acceptance allow. Pure functions."""

from collections.abc import Sequence
from dataclasses import replace

from .mixture import drafting, predict_mixture, with_drafts
from .simulation import AllSettle, EnoughSettle, OwnerSettles, mean_of_runs
from .theory import LENGTHS, Cost, Prediction, best_turns
from .turns import Turns


SIMULATED = 2048  # tokens of each schedule: the best of many that were simulated for few would be a lucky one


def limit(
    acceptance: Sequence[float],
    cost: Cost,
    rule: AllSettle | OwnerSettles | EnoughSettle,
    may_propose: Sequence[bool],
    at_once: int | None = None,
    drafted: float = 1.0,
    lengths: Sequence[int] = (1,),
) -> Prediction:
    """
    The speed of the best proposal lengths for these costs and this acceptance, with no time outside the passes.

    For one row it is the limit of the theory in `schedule.theory`, or for mixtures drawn by their components of the one
    in `schedule.mixture`. For the rows of a batch, and for greedy mixtures that some members settle, there are no
    formulas: then it is the best of a few dozen fixed schedules, the standard ensemble among them, each followed by
    `schedule.simulation`. What it is not:

    - Acceptance is one number for each author, the same at every position. A schedule that proposes only where an
      author is sure has measured a higher one than the author has elsewhere, and then the limit is too high; and one
      that knows where to propose can be faster than all fixed schedules.
    - It is what is expected. Whom a sampled mixture draws from is chance, and a short text may be lucky.
    - Passes that read late tokens without giving logits cost less than `cost` says.

    A drafter whose proposals come all at once has something to say only in places. `drafted` is the share of tokens
    that stood where it had proposed one. In the formulas these cost what tokens do if it always drafts, the others what
    they do without it.

    Args:
        acceptance (`Sequence[float]`, A): In [0, 1], of the N members, then of drafters.
        cost (`Callable[[int, int], float]`): c_i(w), the seconds of a pass of author i over w tokens in each row.
        rule (`AllSettle`, `OwnerSettles` or `EnoughSettle`): What settles a token.
        may_propose (`Sequence[bool]`, A): Which authors may.
        at_once (`int`, *optional*): The drafter whose proposals all come from one run.
        drafted (`float`, defaults to 1): Of that drafter, in [0, 1].
        lengths (`Sequence[int]`, B, defaults to one row): Tokens of the texts; of one alone the length says nothing
            where there is a formula.

    Returns:
        `Prediction`: For each token of the longest text.

    Example: two equal members, drawn by their components, and two that both score every token.

    >>> from hf_spec_ensemble.schedule.limit import limit
    >>> from hf_spec_ensemble.schedule.simulation import AllSettle, OwnerSettles

    >>> limit([0.9, 0.9], lambda author, width: 1.0, OwnerSettles([0.5, 0.5]), [True, True]).speedup
    2.0
    >>> round(limit([0.9, 0.9], lambda author, width: 1.0, AllSettle(2), [True, True]).speedup, 2)
    1.82
    """
    standard = Turns((0,) * len(acceptance), 0, rule.members, at_once)
    if len(lengths) > 1 or isinstance(rule, EnoughSettle):
        options = [
            mean_of_runs(turns, acceptance, cost, lengths, rule, drafted, SIMULATED)
            for turns in _candidates(standard, acceptance, cost, may_propose)
        ]
        return min([*options, _in_step(standard, cost)], key=_seconds)

    def best(may: Sequence[bool]) -> Prediction:
        if isinstance(rule, OwnerSettles):
            options = (predict_mixture(turns, rule.weights, acceptance, cost) for turns in with_drafts(standard, may))
            return min(options, key=_seconds)
        return best_turns(standard, acceptance, cost, may, gain=0.0)[1]

    always = best(may_propose)
    if at_once is None:
        return always
    never = best([may and author != at_once for author, may in enumerate(may_propose)])
    return _in_turns(always, never, drafted)


def _candidates(standard: Turns, acceptance: Sequence[float], cost: Cost, may_propose: Sequence[bool]) -> list[Turns]:
    """
    Schedules to try: nothing proposed, what all members score anyway, one author alone, what is best for one row; each
    by itself and behind a drafter whose proposals come at once.
    """
    at_once = standard.at_once
    own = [may and author != at_once for author, may in enumerate(may_propose)]
    drafters = [may and author == at_once for author, may in enumerate(may_propose)]
    tried = [standard, replace(standard, lengths=tuple(int(may and i < standard.members) for i, may in enumerate(own)))]
    tried += [drafting(standard, i, length) for i, may in enumerate(own) if may for length in LENGTHS[1:]]
    tried.append(best_turns(standard, acceptance, cost, own, gain=0.0)[0])
    return list(dict.fromkeys(option for turns in tried for option in with_drafts(turns, drafters)))


def _in_step(standard: Turns, cost: Cost) -> Prediction:
    """Every member reads every token, as in the standard ensemble, whatever the batch."""
    each = [float(i < standard.members) for i in range(len(standard.lengths))]
    return Prediction(sum(cost(i, 1) for i in range(standard.members)), tuple(each), 1.0)


def _seconds(prediction: Prediction) -> float:
    return prediction.seconds_per_token


def _in_turns(one: Prediction, other: Prediction, share: float) -> Prediction:
    """What is to be expected of a share of tokens made one way, and the rest the other way."""
    seconds = share * one.seconds_per_token + (1 - share) * other.seconds_per_token
    runs = (share * a + (1 - share) * b for a, b in zip(one.runs_per_token, other.runs_per_token))
    return Prediction(seconds, tuple(runs), one.speedup * one.seconds_per_token / seconds)
