"""Who runs the next forward pass, and who may propose. Pure decisions from counts: nothing here sees a token.

This makes any schedule exact: whether a position is proposed, and by whom, is decided before its
token is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Situation:
    """
    What a schedule decides on. There are A authors, those that propose: the N members, then perhaps a drafter.
    Members that share passes are one here.

    Args:
        current (`int`, *optional*): The author that ran last; `None` before the first pass.
        turn (`int`): Its consecutive runs so far.
        lag (`list[list[int]]`, A x B): Tokens of each row that each author has not seen and has to read.
        pending (`list[list[tuple[int, float]]]`, B x any): Author and confidence of the proposals of each row that
            await verification. The confidence is the probability of the author's most probable token there.
        open (`list[bool]`, B): Whether another token may be proposed in this row.
        waiting (`list[int]`, N, *optional*): How many rows wait for each member's scores; `None` if all wait for all.
    """

    current: int | None
    turn: int
    lag: list[list[int]]
    pending: list[list[tuple[int, float]]] = field(default_factory=list)
    open: list[bool] = field(default_factory=lambda: [True])
    waiting: list[int] | None = None


class Schedule:
    """
    Decides who runs, who proposes and how wide a pass is, and is informed of the results.

    Subclasses define `proposes` and `next`; the rest does nothing unless overridden.
    """

    @property
    def patient(self) -> bool:
        """Whether positions should be final only when all members have scored them, as in the standard ensemble."""
        return False

    def proposes(self, situation: Situation, confidence: Sequence[float | None]) -> int:
        """
        How many tokens the author that ran last may propose in each row: 0, 1, or more if its proposals come all at
        once.

        Args:
            confidence (`Sequence[float]`, B): As in `Situation.pending`, of the proposals in question; `None` for rows
                in which none can be made.
        """
        raise NotImplementedError

    def next(self, situation: Situation) -> tuple[int, int]:
        """The author that runs now, and its consecutive runs with this one. Some member has something to read."""
        raise NotImplementedError

    def width(self, author: int, width: int) -> int:
        """How many tokens a row a pass should read that has `width` of them to read: as many, or padded to more."""
        return width

    def ran(self, author: int, seconds: float, width: int) -> None:
        """A pass over so many tokens in each row took so long; or a drafter that reads none, `width` 0."""

    def judged(self, author: int, confidence: float, kept: bool) -> None:
        """A proposal was verified."""

    def advanced(self, tokens: float, progress: float) -> None:
        """A round has ended, in which rows have gained so many tokens on average, and the batch has made such progress
        towards its end."""


@dataclass(frozen=True)
class Turns(Schedule):
    """
    The schedule of fixed proposal lengths: an author runs as often as its length, then the member that lags most takes
    over, with a drafter's turn before each member's. When all members lag alike, at the start and after every row had
    a token drawn from r, the first one begins again.

    Args:
        lengths (`tuple[int, ...]`): Proposal lengths, one for each of the A authors; 0 for one that never proposes.
            With zeros only this is the standard ensemble.
        first (`int`): The member that begins.
        members (`int`): N <= A.
        at_once (`int`, *optional*): The drafter, if there is one, whose proposals all come from one run and not from a
            pass for each.
        watches (`bool`): Whether that drafter costs almost nothing and so has its turn even with length 0, to measure
            how many tokens would have been accepted.

    Example:

    >>> from hf_spec_ensemble.schedule.turns import Situation, Turns

    >>> turns = Turns(lengths=(1, 1), first=1, members=2)
    >>> turns.next(Situation(None, 0, lag=[[4], [4]]))  # a prompt of 4 tokens, not seen
    (1, 1)
    >>> turns.next(Situation(1, 1, lag=[[5], [1]]))  # member 1 has proposed one
    (0, 1)
    """

    lengths: tuple[int, ...]
    first: int
    members: int
    at_once: int | None = None
    watches: bool = False

    @property
    def turns(self) -> "Turns":
        return self

    @property
    def occasional(self) -> int | None:
        """The drafter that has something to say only in places, if there is one: lengths are not chosen for it, but it
        drafts where that is worth more than what they give."""
        return self.at_once if self.watches else None

    def proposes(self, situation, confidence) -> int:
        length = self.lengths[situation.current]
        return length if situation.current == self.at_once else min(length, 1)

    def next(self, situation) -> tuple[int, int]:
        current, turn = situation.current, situation.turn
        if self.may_go_on(situation) and turn < self.lengths[current]:
            return current, turn + 1
        return self.hand_over(situation)

    def may_go_on(self, situation: Situation) -> bool:
        """Whether the author that ran last could run again to propose more."""
        current, lag = situation.current, situation.lag
        if current is None or current == self.at_once or (current < self.members and self._level(lag)):
            return False
        return self._reads(situation, current)

    def hand_over(self, situation: Situation) -> tuple[int, int]:
        """As `next`, when the author that ran last does not go on."""
        current, lag = situation.current, situation.lag
        if current is None or current < self.members:
            for drafter in range(self.members, len(lag)):
                if drafter == self.at_once:
                    has_turn = (self.lengths[drafter] or self.watches) and any(situation.open)
                else:
                    has_turn = self.lengths[drafter] and self._reads(situation, drafter)
                if has_turn:
                    return drafter, 1
        unread = [sum(rows) for rows in lag[: self.members]]
        waiting = situation.waiting or [0] * self.members
        order = [(waiting[i], unread[i], i == self.first, -i) for i in range(self.members)]
        return order.index(max(order)), 1

    def _reads(self, situation: Situation, author: int) -> bool:
        """Whether an author has something to read in a row in which it may propose then."""
        return any(unread > 0 and open_ for unread, open_ in zip(situation.lag[author], situation.open))

    def _level(self, lag: list[list[int]]) -> bool:
        return all(rows == lag[0] for rows in lag[1 : self.members])
