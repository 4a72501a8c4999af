"""What a schedule is worth: expected tokens and seconds, from acceptance, costs and proposal lengths. Pure functions.

The model is that of Leviathan et al. (arXiv 2211.17192, section 3) carried over to alternating roles (Fu et al., arXiv
2502.01662, section 3): a proposal of author i is kept with probability a_i, independently of all else, and a pass of i
over w tokens takes c_i(w) seconds. As long as proposals are kept, a schedule is deterministic; after the first
rejection one token is drawn from r, all members lag equally, and everything starts again. So the run between two
rejections is a renewal cycle, and the time per token is its expected seconds over its expected tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .turns import Situation, Turns


Cost = Callable[[int, int], float]  # (author, tokens in the pass) -> seconds

LONGEST_RUN = 256  # passes after which what is left is cut off, should a schedule not have begun to repeat
LENGTHS = (0, 1, 2, 3, 4, 6, 8)  # the proposal lengths that `best_turns` tries
LOOKUP_LENGTHS = (0, 2, 4, 8, 16)  # and of a drafter whose proposals come all at once


@dataclass(frozen=True)
class Prediction:
    """
    What `predict` expects of a schedule, for one row.

    Args:
        seconds_per_token (`float`): Expected seconds inside the passes.
        runs_per_token (`tuple[float, ...]`): By author: forward passes, or calls of a drafter that is not a model.
        speedup (`float`): Over the standard ensemble, every member's c_i(1) for each token.
    """

    seconds_per_token: float
    runs_per_token: tuple[float, ...]
    speedup: float


def predict(turns: Turns, acceptance: Sequence[float], cost: Cost) -> Prediction:
    """
    Expected speed of a schedule.

    Args:
        turns (`Turns`): The schedule, of A authors.
        acceptance (`Sequence[float]`, A): a_i in [0, 1].
        cost (`Callable[[int, int], float]`): c_i(w) in seconds.

    Returns:
        `Prediction`.

    Example: two equal members that take turns, every second of ten proposals kept.

    >>> from hf_spec_ensemble.schedule.turns import Turns
    >>> from hf_spec_ensemble.schedule.theory import predict

    >>> round(predict(Turns((1, 1), first=0, members=2), [0.5, 0.5], lambda author, width: 1.0).seconds_per_token, 6)
    1.5
    """
    run = _Run(turns, acceptance, cost)
    start = Situation(None, 0, lag=[[1] for _ in turns.lengths])
    tokens, seconds = run.follow(start)
    standard = sum(cost(member, 1) for member in range(turns.members))
    return Prediction(
        seconds_per_token=seconds / tokens,
        runs_per_token=tuple(runs / tokens for runs in run.runs),
        speedup=standard * tokens / seconds,
    )


def best_turns(
    start: Turns,
    acceptance: Sequence[float],
    cost: Cost,
    may_propose: Sequence[bool],
    gain: float = 0.01,
) -> tuple[Turns, Prediction]:
    """
    The lengths and the first member of least `seconds_per_token`, by coordinate descent from `start`, from lengths of 1
    and from the standard ensemble, which it therefore never exceeds.

    Args:
        start (`Turns`): The schedule so far; another one must be faster by the share `gain`.
        acceptance, cost: As in `predict`.
        may_propose (`Sequence[bool]`, A): Authors whose length may be positive.

    Returns:
        `tuple[Turns, Prediction]`.
    """

    def seconds(turns: Turns) -> float:
        if turns not in known:
            known[turns] = predict(turns, acceptance, cost)
        return known[turns].seconds_per_token

    known: dict[Turns, Prediction] = {}
    authors = range(len(start.lengths))
    ones = replace(start, lengths=tuple(int(may) for may in may_propose))
    best = min((replace(start, lengths=(0,) * len(authors)), ones, start), key=seconds)
    improved = True
    while improved:
        before = best
        for author in authors:
            if may_propose[author]:
                tried = LOOKUP_LENGTHS if author == start.at_once else LENGTHS
                options = [replace(best, lengths=_put(best.lengths, author, length)) for length in tried]
                best = min((best, *options), key=seconds)
        best = min((best, *(replace(best, first=member) for member in range(start.members))), key=seconds)
        improved = seconds(best) < (1 - gain) * seconds(before)
    if seconds(best) > (1 - gain) * seconds(start):
        best = start
    return best, known[best]


def worth(
    turns: Turns,
    acceptance: Sequence[float],
    cost: Cost,
    rate: float,
    situation: Situation,
    chances: Sequence[float],
    act: str,
) -> float:
    """
    The expected value of the rest of a run: tokens - rate * seconds until the next rejection, when
    `turns` is followed after one given act. The difference between two acts says which is better: the relative values
    of average-reward dynamic programming, one step of policy improvement.

    Args:
        turns, acceptance, cost: As in `predict`.
        rate (`float`): Tokens per second to be had on average.
        situation (`Situation`): Of one row, just after a run of `situation.current`.
        chances (`Sequence[float]`): Probabilities that the row's pending proposals are kept, the one that is now made
            among them.
        act (`str`): `"propose"`, `"stop"` (hand over without a proposal), `"go_on"` (run again) or `"hand_over"`.

    Returns:
        `float`: Tokens.
    """
    run = _Run(turns, acceptance, cost, chances)
    tokens, seconds = run.follow(situation, act)
    return tokens - rate * seconds


def _put(lengths: tuple[int, ...], author: int, length: int) -> tuple[int, ...]:
    return (*lengths[:author], length, *lengths[author + 1 :])


class _Run:
    """
    Follows a schedule from a situation while all proposals are kept, weighing each step by how likely that is. Sooner
    or later the schedule repeats itself; the rest is a geometric series then.
    """

    def __init__(self, turns, acceptance, cost, chances=()):
        self.turns, self.cost = turns, cost
        self.acceptance = acceptance
        self.chances = list(chances)  # of the proposals pending
        self.runs = [0.0] * len(turns.lengths)

    def follow(self, situation: Situation, act: str | None = None) -> tuple[float, float]:
        """Expected tokens and seconds until the next rejection, or the next token drawn from r."""
        members = self.turns.members
        lag = [rows[0] for rows in situation.lag]
        at = Situation(situation.current, situation.turn, lag=[[unread] for unread in lag])
        survival, tokens, seconds = 1.0, 0.0, 0.0
        before = {}
        if act == "propose":  # its chance is the last of those given
            self._to_read(lag, 1)
        for _ in range(LONGEST_RUN):
            at.lag = [[unread] for unread in lag]
            if act in ("stop", "hand_over"):
                author, turn = self.turns.hand_over(at)
            elif act == "go_on":
                author, turn = at.current, at.turn + 1
            else:
                author, turn = self.turns.next(at)
            act = None
            at.current, at.turn = author, turn
            self.runs[author] += survival
            seconds += survival * self.cost(author, max(lag[author], 1))
            if author == self.turns.at_once:
                at.turn = length = self.turns.lengths[author]
                self.chances += [self.acceptance[author]] * length
                self._to_read(lag, length)
                continue
            lag[author] = 0
            scored = max(len(self.chances) + 1 - max(lag[:members]), 0)
            for chance in self.chances[:scored]:
                tokens += survival  # kept or replaced
                survival *= chance
            if scored > len(self.chances):  # all have scored the next position: its token is drawn from r
                return tokens + survival, seconds
            if survival == 0:
                break
            self.chances = self.chances[scored:]
            if self.turns.lengths[author] > 0:
                self._propose(at, lag)

            state = (author, turn, *lag, *self.chances)
            if state in before:
                then, had_tokens, had_seconds, had_runs = before[state]
                times = 1 / max(1 - survival / then, 1e-9)
                self.runs = [had + times * (runs - had) for runs, had in zip(self.runs, had_runs)]
                return had_tokens + times * (tokens - had_tokens), had_seconds + times * (seconds - had_seconds)
            before[state] = survival, tokens, seconds, list(self.runs)
        return tokens, seconds

    def _propose(self, at: Situation, lag: list[int]) -> None:
        self.chances.append(self.acceptance[at.current])
        self._to_read(lag, 1)

    def _to_read(self, lag: list[int], tokens: int) -> None:
        """So many more tokens are to be read, except by drafters that never are, or need not."""
        for author in range(len(lag)):
            if author < self.turns.members or (self.turns.lengths[author] and author != self.turns.at_once):
                lag[author] += tokens
