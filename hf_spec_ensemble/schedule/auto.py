"""The schedule that chooses who proposes and how many tokens, from measured costs and the proposers'
confidence."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from ..members.costs import PassCosts
from .acceptance import Acceptance
from .pace import Pace
from .simulation import AllSettle, EnoughSettle, OwnerSettles, simulate
from .theory import LOOKUP_LENGTHS, Cost, Prediction, best_turns, worth
from .turns import Schedule, Situation, Turns


ENOUGH_EVIDENCE = 8  # verified proposals before the first plan
LONGEST = 16  # proposals of one turn
PLAN_AFTER = (16, 256)  # passes, first and at most: the intervals double
CHANGED = 0.03  # difference of an acceptance, or relative one of a cost, that calls for a new plan
WORTHWHILE = 0.02  # share of speed that other lengths, and tokens that another run of the same author, must bring
PLANNING_SHARE = 0.01  # of the time inside passes that may be spent on planning
WIDEST = 64  # tokens in a pass; what more would cost is not told apart
BATCH_GAIN = 0.03  # that speculation in a batch must promise: about what its prediction is wrong by
SOONER = 4  # times sooner than a single row's a batch's first plan is made at most: its rows give evidence together
PROBING_SHARE = 0.02  # of the time inside passes that may be spent on passes wider than needed, to measure these
SIMULATED = (16, 48)  # rows, over all simulated batches, and their tokens, for a plan for a batch


@dataclass
class Plan:
    """Fixed lengths that are best on average, the rate they promise, and what single acts are worth under them."""

    turns: Turns
    prediction: Prediction
    acceptance: list[float]
    costs: list[list[float]]  # [A][w]: seconds per row
    patient: bool = False  # the standard ensemble's order is faster
    known: dict[tuple, tuple[float, ...]] = field(default_factory=dict)

    def differs(self, other: "Plan") -> bool:
        """Whether what is worth what may have changed."""
        return (
            self.turns != other.turns
            or self.patient != other.patient
            or any(abs(a - b) > CHANGED for a, b in zip(self.acceptance, other.acceptance))
            or any(
                abs(mine[w] - theirs[w]) > CHANGED * theirs[w]
                for mine, theirs in zip(self.costs, other.costs)
                for w in (1, 2, 4, 8)
            )
        )

    def worth(self, situation: Situation, chances: Sequence[float], act: str) -> float:
        rate = 1 / self.prediction.seconds_per_token
        return worth(self.turns, self.acceptance, looked_up(self.costs), rate, situation, chances, act)


@dataclass
class Memory:
    """What outlasts a call: one for every ensemble, way of drawing and batch size."""

    acceptance: list[Acceptance]
    pace: Pace = field(default_factory=Pace)
    plan: Plan | None = None
    seconds: float = 0.0  # inside passes, since the last plan
    passes: int = 0
    interval: int = PLAN_AFTER[0]  # passes until the next plan
    planning_seconds: float = 0.0  # that the last plan took
    pass_seconds: float = 0.0  # inside all passes, and what of this went into wider ones than needed
    probing_seconds: float = 0.0


class Auto(Schedule):
    """
    Chooses proposal lengths that maximise expected tokens per second.

    Two levels: a *plan*, the fixed lengths that `theory.best_turns` finds for the measured costs and the average
    acceptance, renewed now and then; and single *acts*, whether to propose at all and whether to propose one more,
    decided by what they are worth under the plan given the proposals' own chances. Where nothing is gained the plan is
    the standard ensemble. Until costs and acceptance are known, lengths are 1.

    The distribution of the output is that of any schedule: an act depends on measured times, on past tokens and on the
    proposer's distribution at a position, and never on the token drawn there before it is decided that it is proposed.
    Given all this, a token is drawn, verified and replaced as by any other schedule, so that each is distributed as r
    whatever the decision was.

    Args:
        memory (`Memory`): Of this ensemble; kept up to date.
        costs (`list[PassCosts]`, A): Of the authors.
        batch (`int`): B.
        members (`int`): N.
        may_propose (`Sequence[bool]`, A): Which authors may.
        first (`int`): The member that begins while nothing is known.
        at_once (`int`, *optional*), watches (`bool`): As in `Turns`.
        rule (`Callable[[], AllSettle]`, *optional*): Gives what settles a token, by what is known now; by default all
            members do.
    """

    def __init__(
        self,
        memory: Memory,
        costs: list[PassCosts],
        batch: int,
        members: int,
        may_propose: Sequence[bool],
        first: int,
        at_once: int | None = None,
        watches: bool = False,
        rule: Callable[[], AllSettle | OwnerSettles | EnoughSettle] | None = None,
    ):
        self.rule = rule or (lambda: AllSettle(members))
        self.memory, self.costs, self.batch = memory, costs, batch
        self.members, self.may_propose = members, tuple(may_propose)
        ones = [int(may) for may in may_propose]
        if at_once is not None:
            ones[at_once] = 0 if watches else LOOKUP_LENGTHS[1]
        self._start = Turns(tuple(ones), first, members, at_once, watches)
        self._longest = 1  # turn of this call; in a batch, whose rows hardly all lose one, it is not counted
        self._standard = Turns((0,) * len(ones), first, members, at_once)
        memory.pace.begins()

    @property
    def patient(self) -> bool:
        """
        In a batch where that is faster, as planned or as seen: rows that advance separately share passes less well. And
        while members read single tokens to find what that costs.
        """
        plan = self.memory.plan
        return (self.batch > 1 and (self._pauses or (plan is not None and plan.patient))) or self._takes_measure()

    @property
    def _pauses(self) -> bool:
        return self.memory.pace.pauses

    @property
    def turns(self) -> Turns:
        """The plan's lengths; before there is one, those of the start."""
        return self.memory.plan.turns if self.memory.plan else self._start

    def proposes(self, situation, confidence) -> int:
        author = situation.current
        if not self.may_propose[author] or self._pauses:
            return 0
        if author == self.turns.at_once:
            return self._length_at_once(situation, confidence)
        if self.memory.plan is None:
            return 1
        rows = [row for row, own in enumerate(confidence) if own is not None]
        return int(sum(self._gain_of_proposing(situation, row, confidence[row]) for row in rows) > 0)

    def next(self, situation) -> tuple[int, int]:
        if self._pauses or self.patient:
            return self._standard.hand_over(situation)
        turns = self.turns
        if turns.may_go_on(situation) and self._goes_on(situation):
            if self.batch == 1:
                self._longest = max(self._longest, situation.turn + 1)
            return situation.current, situation.turn + 1
        return turns.hand_over(situation)

    def _length_at_once(self, situation: Situation, confidence: Sequence[float | None]) -> int:
        if self.memory.plan is None:  # it is watched meanwhile, if that is free
            return 0 if self.turns.watches else self.turns.lengths[situation.current]
        chances = {
            row: self.memory.acceptance[situation.current].chance(own)
            for row, own in enumerate(confidence)
            if own is not None
        }
        return max(
            LOOKUP_LENGTHS,
            key=lambda length: sum(
                self._worth_of_draft(situation, row, chance, length) for row, chance in chances.items()
            ),
        )

    def width(self, author, width) -> int:
        costs, memory = self.costs[author], self.memory
        if self._takes_measure():
            return width
        probed = costs.to_probe(self.batch, width)
        if probed is None or self._pauses or self.patient:
            return costs.padded(self.batch, width)
        known = costs.measured(self.batch, width)
        if probed > width and known is not None:
            price = known * (probed / width - 1)  # at most: wider passes cost no more than in proportion
            if memory.probing_seconds + price > PROBING_SHARE * memory.pass_seconds:
                return costs.padded(self.batch, width)
            memory.probing_seconds += price
        return probed

    def ran(self, author, seconds, width) -> None:
        memory = self.memory
        memory.seconds += seconds
        memory.pass_seconds += seconds
        memory.passes += 1
        # What such a pass costs undisturbed, or the noise of single measurements would decide
        memory.pace.ran(min(seconds, self.costs[author].measured(self.batch, width)))

    def judged(self, author, confidence, kept) -> None:
        self.memory.acceptance[author].add(confidence, kept)

    def advanced(self, tokens, progress) -> None:
        for acceptance in self.memory.acceptance:
            acceptance.fade(tokens)
        memory = self.memory
        memory.pace.advanced(progress, self._standard_seconds(), self._longest)
        enough = memory.interval if memory.plan else memory.interval // min(self.batch, SOONER)
        if memory.passes >= enough and memory.planning_seconds <= PLANNING_SHARE * memory.seconds:
            self._plan()

    def _standard_seconds(self) -> float | None:
        """What a token costs the standard ensemble; `None` if that is not known."""
        costs = self.costs[: self.members]
        known = all(one.is_known(self.batch, 1) for one in costs)
        return sum(one.measured(self.batch, 1) for one in costs) if known else None

    def _plan(self) -> None:
        if not self._knows_enough():
            return
        memory, start = self.memory, time.perf_counter()
        tables = [
            [(costs.seconds(self.batch, max(w, 1)) or 0.0) / self.batch for w in range(WIDEST + 1)]
            for costs in self.costs
        ]
        memory.plan = self._best_plan(tables, [acceptance.mean for acceptance in memory.acceptance])
        memory.seconds, memory.passes = 0.0, 0
        memory.interval = min(2 * memory.interval, PLAN_AFTER[1])
        memory.planning_seconds = time.perf_counter() - start

    def _knows_enough(self) -> bool:
        """Whether a plan can be made."""
        evidence = sum(acceptance.evidence for acceptance in self.memory.acceptance)
        needed = [costs for i, costs in enumerate(self.costs) if i < self.members or self.may_propose[i]]
        known = all(costs.measured(self.batch, 1) is not None for costs in needed) and self._knows_width()
        return known and (self.memory.plan is not None or evidence >= ENOUGH_EVIDENCE)

    def _knows_width(self) -> bool:
        """Whether members' passes over several tokens were measured: in a batch these may cost in proportion."""
        return self.batch == 1 or all(costs.widest(self.batch) > 1 for costs in self.costs[: self.members])

    def _best_plan(self, tables: list[list[float]], acceptance: list[float]) -> Plan:
        """
        The plan for these costs `[A][w]`, in seconds per row, and probabilities `[A]` that proposals are kept; the
        former one where nothing has changed.
        """
        may_propose = [may and author != self._start.occasional for author, may in enumerate(self.may_propose)]
        turns, prediction = best_turns(self.turns, acceptance, looked_up(tables), may_propose, WORTHWHILE)
        prediction, patient = self._in_batch(turns, prediction, acceptance, looked_up(tables))
        plan, before = Plan(turns, prediction, acceptance, tables, patient), self.memory.plan
        return plan if before is None or plan.differs(before) else before

    def _in_batch(
        self, turns: Turns, prediction: Prediction, acceptance: Sequence[float], cost: Cost
    ) -> tuple[Prediction, bool]:
        """What a prediction for one row becomes in a batch, and whether the standard ensemble is faster."""
        if self.batch == 1:
            return prediction, False
        rows, tokens = min(self.batch, SIMULATED[0]), SIMULATED[1]
        runs = [
            simulate(turns, acceptance, cost, [tokens] * rows, self.rule(), seed=seed)
            for seed in range(max(SIMULATED[0] // rows, 1))
        ]
        prediction = sorted(runs, key=lambda run: run.speedup)[len(runs) // 2]
        return prediction, prediction.speedup < 1 + BATCH_GAIN

    def _takes_measure(self) -> bool:
        """Whether members should now read single tokens, as in the standard ensemble, to find what that costs."""
        return any(costs.to_probe(self.batch, 1) == 1 for costs in self.costs[: self.members])

    def _goes_on(self, situation: Situation) -> bool:
        plan, current, turn = self.memory.plan, situation.current, situation.turn
        if plan is None:
            return turn < self.turns.lengths[current]
        if turn >= LONGEST:
            return False
        rows = [row for row, unread in enumerate(situation.lag[current]) if unread and situation.open[row]]
        # Not for less than the errors of the costs: roles that alternate are as good as long turns, and vary less
        return sum(self._gain_of_going_on(situation, row) for row in rows) > WORTHWHILE * len(rows)

    def _gain_of_proposing(self, situation: Situation, row: int, confidence: float) -> float:
        """In tokens; linear in the chances of what is pending and of the proposal in question."""

        def values(plan: Plan, one_row: Situation, kept: list[float], lost: list[float]) -> tuple[float, ...]:
            if_lost = plan.worth(one_row, [*lost, 1.0], "propose") - plan.worth(one_row, lost, "stop") if lost else 0.0
            stop = plan.worth(one_row, kept, "stop")
            return if_lost, *(plan.worth(one_row, [*kept, fate], "propose") - stop for fate in (0.0, 1.0))

        chance = self.memory.acceptance[situation.current].chance(confidence)
        survival = self._survival(situation, row)
        if_lost, if_rejected, if_kept = self._known("propose", situation, row, values)
        return (1 - survival) * if_lost + survival * ((1 - chance) * if_rejected + chance * if_kept)

    def _gain_of_going_on(self, situation: Situation, row: int) -> float:
        def values(plan: Plan, one_row: Situation, kept: list[float], lost: list[float]) -> tuple[float, ...]:
            return tuple(
                plan.worth(one_row, fate, "go_on") - plan.worth(one_row, fate, "hand_over") for fate in (lost, kept)
            )

        survival = self._survival(situation, row)
        if_lost, if_kept = self._known("go_on", situation, row, values)
        return (1 - survival) * if_lost + survival * if_kept

    def _worth_of_draft(self, situation: Situation, row: int, chance: float, length: int) -> float:
        chance, survival = round(chance, 1), round(self._survival(situation, row), 1)

        def values(plan: Plan, one_row: Situation, kept: list[float], lost: list[float]) -> tuple[float, ...]:
            one_row.lag = [
                [unread + length] if author != one_row.current else [unread]
                for author, (unread,) in enumerate(one_row.lag)
            ]
            return (plan.worth(one_row, [*kept[:-1], *([survival] if kept else []), *[chance] * length], "hand_over"),)

        return self._known(("draft", length, chance, survival), situation, row, values)[0]

    def _known(self, question: Hashable, situation: Situation, row: int, values) -> tuple[float, ...]:
        """`values`, worked out once for every situation that a row is in under this plan."""
        plan, current = self.memory.plan, situation.current
        lag = tuple(unread[row] for unread in situation.lag)
        count = len(situation.pending[row])
        turn = min(situation.turn, plan.turns.lengths[current])
        key = (question, current, turn, lag, count)
        if key not in plan.known:
            one_row = Situation(current, turn, lag=[[unread] for unread in lag])
            kept = [1.0] * count
            plan.known[key] = values(plan, one_row, kept, [0.0, *kept[1:]] if count else [])
        return plan.known[key]

    def _survival(self, situation: Situation, row: int) -> float:
        """How likely everything that is pending in a row is kept."""
        acceptance = self.memory.acceptance
        return math.prod(acceptance[author].chance(confidence) for author, confidence in situation.pending[row])


def looked_up(tables: list[list[float]]) -> Cost:
    """Costs `[A][w]` as a function; what is wider than the table costs as much as its last entry."""
    return lambda author, width: tables[author][min(width, WIDEST)]
