"""What fixed turns are expected to do with the rows of a batch, which advance separately: passes without models.

`theory` has formulas for one row. Rows of a batch share passes, wait for each other's members, and the last one decides
when a batch ends, so that there is no formula; here the rules of the engine are followed for proposals that are kept by
chance."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from .theory import Cost, Prediction
from .turns import Situation, Turns


@dataclass
class Row:
    """
    One text. Positions count new tokens from 0; a member that has read `seen` of them has scored the position `seen`.

    Args:
        length (`int`): Tokens that the text will have.
        seen (`list[int]`, A): New tokens read by each author; -1 for a member that has the prompt's last one to read.
        final (`int`): Tokens that are final.
        pending (`list[int]`): Authors of the proposals behind these.
        drawn (`dict`): What was found out by chance about a position, and holds until its text changes.
    """

    length: int
    seen: list[int]
    final: int = 0
    pending: list[int] = field(default_factory=list)
    drawn: dict = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.final + len(self.pending)

    @property
    def active(self) -> bool:
        return self.final < self.length

    @property
    def open(self) -> bool:
        return self.active and self.total < self.length


class AllSettle:
    """A position is settled once all members have scored it."""

    def __init__(self, members: int):
        self.members = members

    def settled(self, row: Row, position: int, rng: Random) -> bool:
        return min(row.seen[: self.members]) >= position

    def waits(self, row: Row, rng: Random) -> list[bool] | None:
        """For whom the row waits; `None` if for all."""
        return None


class OwnerSettles:
    """
    A position is settled once its owner has scored it.

    Args:
        weights (`Sequence[float]`, N): How likely each member owns one.
    """

    def __init__(self, weights: Sequence[float]):
        self.weights, self.members = weights, len(weights)

    def settled(self, row, position, rng):
        return row.seen[self._owner(row, position, rng)] >= position

    def waits(self, row, rng):
        owner = self._owner(row, row.final, rng)
        return [i == owner for i in range(len(self.weights))]

    def _owner(self, row: Row, position: int, rng: Random) -> int:
        key = "owner", position
        if key not in row.drawn:
            row.drawn[key] = rng.choices(range(len(self.weights)), self.weights)[0]
        return row.drawn[key]


class EnoughSettle:
    """
    A position is settled once all members have scored it, or some of them, with a chance.

    Args:
        weights (`Sequence[float]`, N): Of the members: rows wait for the heaviest that is missing.
        chances (`dict[tuple[bool, ...], float]`): By who has scored a position, how likely these settle it.
    """

    def __init__(self, weights: Sequence[float], chances: dict[tuple[bool, ...], float]):
        self.weights, self.chances, self.members = weights, chances, len(weights)

    def settled(self, row, position, rng):
        have = tuple(row.seen[i] >= position for i in range(len(self.weights)))
        if all(have):
            return True
        key = "enough", position, have
        if key not in row.drawn:
            row.drawn[key] = rng.random() < self.chances.get(have, 0.0)
        return row.drawn[key]

    def waits(self, row, rng):
        missing = [row.seen[i] < row.final for i in range(len(self.weights))]
        most = max((weight for weight, lacks in zip(self.weights, missing) if lacks), default=None)
        return [lacks and weight == most for weight, lacks in zip(self.weights, missing)]


def simulate(
    turns: Turns,
    acceptance: Sequence[float],
    cost: Cost,
    lengths: Sequence[int],
    rule: AllSettle | OwnerSettles | EnoughSettle | None = None,
    coverage: float = 1.0,
    seed: int = 0,
) -> Prediction:
    """
    Expected speed for a batch: one run, by chance.

    Args:
        turns (`Turns`): The schedule, of A authors.
        acceptance (`Sequence[float]`, A): How likely each author's proposals are kept.
        cost (`Callable[[int, int], float]`): c_i(w): seconds of an author's pass over w tokens in each of the B rows.
        lengths (`Sequence[int]`, B): Tokens of the texts.
        rule (*optional*): What settles a token; by default all members do.
        coverage (`float`, defaults to 1): How likely a drafter whose proposals come all at once has any for a row.
        seed (`int`): Of the chances.

    Returns:
        `Prediction`: For each token of the longest text; `speedup` is over the standard ensemble's batch.

    Example: two equal members that never agree, sampled by components.

    >>> from hf_spec_ensemble.schedule.simulation import OwnerSettles, simulate
    >>> from hf_spec_ensemble.schedule.turns import Turns

    >>> one = simulate(Turns((0, 0), 0, 2), [0, 0], lambda author, width: 1.0, [100], OwnerSettles([0.5, 0.5]))
    >>> one.speedup
    2.0
    """
    rule, rng = rule or AllSettle(turns.members), Random(seed)
    authors = range(len(turns.lengths))
    rows = [Row(length, [-1 if i < turns.members else 0 for i in authors]) for length in lengths]
    runs, seconds, current, turn = [0] * len(authors), 0.0, None, 0
    while any(row.active for row in rows):
        gained = [_settle(row, rule, acceptance, rng) for row in rows if row.active]  # of all, so no generator
        if any(gained):
            continue
        if current is not None:
            _propose(rows, current, turn, turns, coverage, rng)
        current, turn = turns.next(_situation(rows, current, turn, turns, rule, rng))
        seconds += cost(current, _read(rows, current, turns, rule, rng))
        runs[current] += 1
    steps = max(lengths)
    standard = sum(cost(member, 1) for member in range(turns.members))
    return Prediction(seconds / steps, tuple(count / steps for count in runs), standard * steps / seconds)


def mean_of_runs(
    turns: Turns,
    acceptance: Sequence[float],
    cost: Cost,
    lengths: Sequence[int],
    rule: AllSettle | OwnerSettles | EnoughSettle,
    coverage: float,
    tokens: int,
) -> Prediction:
    """
    As `simulate`, with less chance: the mean of as many runs as make about so many `tokens` in all rows, one at least.
    """
    times = max(tokens // sum(lengths), 1)
    runs = [simulate(turns, acceptance, cost, lengths, rule, coverage, seed) for seed in range(times)]
    seconds = sum(run.seconds_per_token for run in runs) / times
    per_token = tuple(sum(counts) / times for counts in zip(*(run.runs_per_token for run in runs)))
    return Prediction(seconds, per_token, runs[0].speedup * runs[0].seconds_per_token / seconds)


def _settle(row: Row, rule, acceptance: Sequence[float], rng: Random) -> bool:
    """Verifies what can be; whether the row has gained anything."""
    gained = 0
    while row.active and row.final + gained <= row.total and rule.settled(row, row.final + gained, rng):
        replaced = gained == len(row.pending) or rng.random() >= acceptance[row.pending[gained]]
        gained += 1
        if replaced:  # or drawn, where nothing was proposed
            row.final += gained
            row.pending.clear()
            row.seen = [min(seen, row.final - 1) for seen in row.seen]
            row.drawn = {key: value for key, value in row.drawn.items() if key[0] == "owner"}
            return True
    row.final += gained
    del row.pending[:gained]
    return gained > 0


def _situation(rows: list[Row], current, turn, turns: Turns, rule, rng: Random) -> Situation:
    waits = [rule.waits(row, rng) for row in rows if row.active]
    return Situation(
        current,
        turn,
        lag=[[_unread(row, i, turns) for row in rows] for i in range(len(turns.lengths))],
        pending=[[(author, 1.0) for author in row.pending] for row in rows],
        open=[row.open for row in rows],
        waiting=None if waits[0] is None else [sum(row[i] for row in waits) for i in range(turns.members)],
    )


def _unread(row: Row, author: int, turns: Turns) -> int:
    if not row.active or author == turns.at_once:
        return 0
    return max(row.total - row.seen[author] - (row.total >= row.length), 0)


def _propose(rows: list[Row], author: int, turn: int, turns: Turns, coverage: float, rng: Random) -> None:
    length = turns.proposes(Situation(author, turn, lag=[]), [1.0] * len(rows))  # of who runs, whatever the lags
    for row in rows:
        room = row.length - row.total
        if not row.open:
            continue
        if author == turns.at_once:
            row.pending += [author] * (min(length, room) if rng.random() < coverage else 0)
        elif row.seen[author] == row.total:
            row.pending += [author] * min(length, room)


def _read(rows: list[Row], author: int, turns: Turns, rule, rng: Random) -> int:
    """Lets an author read; how many tokens wide its pass is."""
    unread = [_unread(row, author, turns) for row in rows]
    asked = [
        row.active and author < turns.members and (waits := rule.waits(row, rng)) is not None and waits[author]
        for row in rows
    ]
    most = max(n for n, wanted in zip(unread, asked) if wanted) if any(asked) else max(unread)
    for row, n in zip(rows, unread):
        row.seen[author] += min(n, most)
    return max(most, 1)
