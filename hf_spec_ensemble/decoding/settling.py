"""
What settles a token: which members must have scored a position before its token can be final, and what is drawn from.

Each rule is an object with

- `scored(text, members) -> [B]`: how many positions from `text.final` on enough members have scored, without a gap,
- `asked(text, members) -> [N][B] or None`: whose scores each row waits for; `None` if for those of all,
- `target(context, members, count, form) -> [B, K, V]`: what is drawn from at the first `count[b]` of these, in the form
  of the drawing rule; the distribution takes note,
- `rule(groups)`: what the theory calls this rule, by what is known now, for groups of members that score together,
- `keep_rows(rows)`: goes on with these rows alone,
- `complete`: whether all members have scored what is settled,
- `blamed(members, row) -> peaks, evidence`: for `EnsembleDistribution.fault`, if nothing can be drawn,

where members are the `MemberScores` of the N members, and counts are numpy integers.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..config import EnsembleConfig
from ..ensemble.combine import mixture
from ..ensemble.wide import greatest_two
from ..schedule.simulation import AllSettle, EnoughSettle, OwnerSettles
from .drawing import Ancestral, Greedy
from .scores import Context, MemberScores
from .text import Text


# A lead that is greater by less than this, in units of float32's precision, may be one of rounding.
ROUNDING = 64

KNOWN = 64  # findings kept for a row


class All:
    """All members must have scored it: valid for every method and coupling."""

    complete = True  # what is drawn from is r

    def scored(self, text: Text, members: Sequence[MemberScores]) -> np.ndarray:
        return text.scored(np.minimum.reduce([one.seen for one in members]))

    def asked(self, text, members):
        return None

    def target(self, context: Context, members: Sequence[MemberScores], count: np.ndarray, form: str) -> torch.Tensor:
        text, width = context.text, int(count.max())
        evidence = [one.evidence.window(np.zeros_like(count), width) for one in members]
        return context.distribution.target(evidence, text.ids, text.place(text.final), count, form)

    def keep_rows(self, rows: np.ndarray) -> None:
        pass

    def rule(self, groups: Sequence[Sequence[int]]) -> AllSettle:
        return AllSettle(len(groups))

    def blamed(self, members: Sequence[MemberScores], row: int) -> tuple[list[float], list[torch.Tensor]]:
        peaks = [float(one.peaks.at(row, 0)) for one in members]
        return peaks, [one.evidence.at(row, 0) for one in members]


class Owner:
    """
    The position's owner must have scored it: the member that a mixture's token is drawn from. Owners are drawn before
    the text is, so that they do not depend on it, each with the probability of its weight (ancestral sampling).

    Args:
        drawing (`Ancestral`): Which draws the owners.
    """

    complete = False

    def __init__(self, drawing: Ancestral):
        self.drawing = drawing

    def scored(self, text, members):
        seen = np.stack([one.seen for one in members])  # [N, B]
        position = text.final[:, None] + np.arange(int(text.unverified.max()) + 1)  # [B, K]
        owner = self.drawing.owners(position)
        there = position <= np.take_along_axis(seen, owner.T, axis=0).T
        there &= position <= text.total[:, None]
        return there.cumprod(axis=1).sum(axis=1) * text.active

    def asked(self, text, members):
        owner = self.drawing.owners(text.final)
        return [(owner == i) & (one.seen < text.final) & text.active for i, one in enumerate(members)]

    def target(self, context, members, count, form):
        owner = self.drawing.owners(context.text.final[:, None] + np.arange(int(count.max())))
        r = _gathered(count, lambda row, j: members[owner[row, j]].evidence.at(row, j))
        context.distribution.note(r)
        return r

    def keep_rows(self, rows):
        pass

    def rule(self, groups):
        return OwnerSettles([sum(self.drawing.weights[i] for i in group) for group in groups])

    def blamed(self, members, row):
        owner = int(self.drawing.owners(members[0].context.text.final)[row])
        peaks = [float(one.peaks.at(row, 0)) if i == owner else 0.0 for i, one in enumerate(members)]
        return peaks, []


class OwnerAmongAll(All):
    """All members must, and the token is drawn from the position's owner: if r is needed at once."""

    def __init__(self, drawing: Ancestral):
        self._owner = Owner(drawing)

    def target(self, context, members, count, form):
        return self._owner.target(context, members, count, form)

    def blamed(self, members, row):
        return self._owner.blamed(members, row)


class Enough:
    """
    So many members that the rest cannot change the most probable token of a mixture: the best has a lead, in the
    weighted sum over those that have scored the position, of more than the others' weight. For greedy decoding.

    State: what was found out about pending positions, by row, and how often some members were enough.

    Args:
        weights (`Sequence[float]`, N): Of the mixture.
        batch (`int`): B.
    """

    complete = False

    def __init__(self, weights: Sequence[float], batch: int):
        self.weights = list(weights)
        self._known: list[dict[tuple[int, tuple[bool, ...], int], bool]] = [{} for _ in range(batch)]
        self._counts: dict[tuple[bool, ...], tuple[int, int]] = {}  # by who had scored: positions, and those settled

    def scored(self, text, members):
        count = np.zeros(text.batch, int)
        for row in np.flatnonzero(text.active).tolist():
            final, total = int(text.final[row]), int(text.total[row])
            while final + count[row] <= total and self._is_settled(text, members, row, int(count[row])):
                count[row] += 1
        return count

    def asked(self, text, members):
        missing = np.stack([one.seen < text.final for one in members]) & text.active  # [N, B]
        weight = np.where(missing, np.array(self.weights)[:, None], 0.0)
        return list(missing & (weight == weight.max(0)))

    def target(self, context, members, count, form):
        r = _gathered(count, lambda row, j: self._sum(members, row, j))
        context.distribution.note(r)
        return r

    def keep_rows(self, rows):
        self._known = [self._known[row] for row in rows.tolist()]

    def rule(self, groups):
        weights = [sum(self.weights[i] for i in group) for group in groups]
        chances = {have: (hits + 1) / (n + 2) for have, (n, hits) in self._counts.items()}
        return EnoughSettle(weights, {tuple(have[group[0]] for group in groups): p for have, p in chances.items()})

    @property
    def early(self) -> float | None:
        """How often members with more than half of the weight were enough, while others had not scored; `None` if there
        were none."""
        heavy = [
            counts
            for have, counts in self._counts.items()
            if sum(weight for weight, has in zip(self.weights, have) if has) > 0.5
        ]
        tried = sum(n for n, _ in heavy)
        return sum(hits for _, hits in heavy) / tried if tried else None

    def blamed(self, members, row):
        peaks = [float(one.peaks.at(row, 0)) if one.evidence.count(row) else 0.0 for one in members]
        return peaks, []

    def _is_settled(self, text: Text, members: Sequence[MemberScores], row: int, j: int) -> bool:
        have = tuple(one.evidence.count(row) > j for one in members)
        if all(have):
            return True
        if not any(have):
            return False
        position = int(text.final[row]) + j
        # The text before a position is told apart by who has run how often: evidence does not change without a pass
        key = position, have, sum(one.passes for one in members)
        known = self._known[row]
        if key not in known:
            if len(known) > KNOWN:
                known.clear()
            known[key] = self._leads(members, row, j, have)
            count, hits = self._counts.get(have, (0, 0))
            self._counts[have] = count + 1, hits + known[key]
        return known[key]

    def _leads(self, members: Sequence[MemberScores], row: int, j: int, have: tuple[bool, ...]) -> bool:
        """Whether the members that do not `have` scored a position could not change its token."""
        others = sum(weight for weight, has in zip(self.weights, have) if not has)
        if 2 * others >= sum(self.weights):
            return False  # whatever the lead
        first, second = greatest_two(self._sum(members, row, j))
        # In float32, however precise these are: the others' may be less so
        return first - second > others + ROUNDING * torch.finfo(torch.float32).eps

    def _sum(self, members: Sequence[MemberScores], row: int, j: int) -> torch.Tensor:
        """The weighted sum `[V]` over the members that have scored a position."""
        have = [i for i, one in enumerate(members) if one.evidence.count(row) > j]
        return mixture([members[i].evidence.at(row, j) for i in have], [self.weights[i] for i in have])


def _gathered(count: np.ndarray, vector) -> torch.Tensor:
    """`[B, K, V]` from `vector(row, j)` for j < `count[row]`; others are any."""
    rows = [[vector(row, j) for j in range(n)] for row, n in enumerate(count.tolist())]
    some, width = next(vectors[0] for vectors in rows if vectors), int(count.max())
    return torch.stack([vectors[j] if j < len(vectors) else some for vectors in rows for j in range(width)]).view(
        len(rows), width, -1
    )


def settling_rule(drawing: Greedy, config: EnsembleConfig, batch: int, complete: bool = False) -> All | Owner | Enough:
    """
    The rule that needs fewest scores; for a config of `for_members`, of the members alone.

    Args:
        complete (`bool`): Whether all members must have scored a position when its token becomes final.
    """
    if isinstance(drawing, Ancestral):
        return OwnerAmongAll(drawing) if complete else Owner(drawing)
    if isinstance(drawing, Greedy) and config.is_mixture and not complete:
        return Enough(config.weights, batch)
    return All()
