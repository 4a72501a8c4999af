"""The schedule for mixtures that are drawn by their components: who drafts for the owners, and how much."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..members.costs import PassCosts
from .auto import PLAN_AFTER, WIDEST, WORTHWHILE, Auto, Memory
from .theory import LENGTHS, LOOKUP_LENGTHS, Cost, Prediction
from .turns import Turns


def predict_mixture(
    turns: Turns, weights: Sequence[float], proposer: int | None, chance: float, cost: Cost
) -> Prediction:
    """
    Expected speed where only a position's owner has to score it. With length L, the proposer drafts L tokens, each kept
    with probability a; then the owners of these positions run, each once, until one token is replaced or, behind the
    drafts, drawn: T tokens, P(T >= t) = a^(t-1) for t <= L + 1. Member i owns one of the first t positions with
    probability 1 - (1 - w_i)^t. What it has not read when it runs grows by T a cycle.

    Args:
        turns (`Turns`): Its `lengths[proposer]` is L; of the N members, then drafters.
        weights (`Sequence[float]`, N): Of the mixture.
        proposer (`int`, *optional*): Who drafts; without one every token costs one pass of its owner.
        chance (`float`): a in [0, 1].
        cost (`Callable[[int, int], float]`): c_i(w) in seconds.

    Returns:
        `Prediction`.

    Example: two equal members.

    >>> from hf_spec_ensemble.schedule.mixture import predict_mixture
    >>> from hf_spec_ensemble.schedule.turns import Turns

    >>> predict_mixture(Turns((0, 0), 0, 2), [0.5, 0.5], None, 0.0, lambda author, width: 1.0).speedup
    2.0
    """
    length = 0 if proposer is None else turns.lengths[proposer]
    at_least = [chance**t for t in range(length + 1)]  # P(T >= t + 1)
    exactly = [now - then for now, then in zip(at_least, [*at_least[1:], 0.0])]  # P(T = t + 1)
    tokens = sum(at_least)
    runs, seconds = [0.0] * len(turns.lengths), 0.0
    if length:
        runs[proposer] = 1.0 if proposer == turns.at_once else float(length)
        seconds += runs[proposer] * cost(proposer, 1)
    for member, weight in enumerate(weights):
        if member == proposer and length:  # has scored all but the last position while it drafted
            own = exactly[length] * weight
        else:
            own = sum(p * (1 - (1 - weight) ** (t + 1)) for t, p in enumerate(exactly))
        if own > 0:
            width = (1 / own - 1) * tokens + length + 1 if member != proposer else length + 1
            runs[member] += own
            seconds += own * cost(member, max(round(width), 1))
    standard = sum(cost(member, 1) for member in range(turns.members))
    return Prediction(seconds / tokens, tuple(each / tokens for each in runs), standard * tokens / seconds)


@dataclass
class MixturePlan:
    """Who drafts, how much, and what that is worth."""

    turns: Turns
    proposer: int | None
    prediction: Prediction
    costs: list[list[float]]  # [A][w]: seconds per row
    known: dict[tuple[int, float], int] = field(default_factory=dict)  # best lengths, by author and chance


class AutoMixture(Auto):
    """
    Runs the member that most rows wait for. A member proposes what it has scored anyway; besides, one author drafts for
    the owners where the costs and the acceptance measured so far promise a gain. Arguments as for `Auto`.

    Args:
        weights (`Sequence[float]`, N): Of the mixture.
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
        weights: Sequence[float] = (),
    ):
        super().__init__(memory, costs, batch, members, may_propose, first, at_once, watches)
        self.weights = tuple(weights)
        self._ones = tuple(int(may and i < members) for i, may in enumerate(may_propose))
        self._start = Turns(self._ones, first, members, at_once, watches)

    def proposes(self, situation, confidence) -> int:
        author, plan = situation.current, self.memory.plan
        if not self.may_propose[author]:
            return 0
        if author != self.turns.at_once:
            return 1
        if plan is None:
            return 0
        sure = [self.memory.acceptance[author].chance(own) for own in confidence if own is not None]
        return self._best_length(plan, author, round(sum(sure) / len(sure), 2))

    def next(self, situation) -> tuple[int, int]:
        turns, current = self.turns, situation.current
        if turns.may_go_on(situation) and situation.turn < turns.lengths[current]:
            return current, situation.turn + 1
        if any(situation.pending):  # owners first: a draft behind drafts is less likely to be kept
            turns = replace(turns, lengths=self._ones, watches=False)
        return turns.hand_over(situation)

    def width(self, author, width) -> int:
        return self.costs[author].padded(self.batch, width)

    def _plan(self) -> None:
        memory = self.memory
        if any(costs.measured(self.batch, 1) is None for costs in self.costs[: self.members]):
            return
        tables = [
            [(costs.seconds(self.batch, max(w, 1)) or 0.0) / self.batch for w in range(WIDEST + 1)]
            for costs in self.costs
        ]
        plan = MixturePlan(self._start, None, self._prediction(self._start, None, tables), tables)
        for author in range(len(self.costs)):
            known = self.costs[author].measured(self.batch, 1) is not None
            if not self.may_propose[author] or not known:
                continue
            for length in LOOKUP_LENGTHS if author == self._start.at_once else LENGTHS[2:]:
                lengths = tuple(length if i == author else ones for i, ones in enumerate(self._ones))
                turns = replace(self._start, lengths=lengths)
                prediction = self._prediction(turns, author, tables)
                if prediction.seconds_per_token < (1 - WORTHWHILE) * plan.prediction.seconds_per_token:
                    plan = MixturePlan(turns, author, prediction, tables)
        memory.plan = plan
        memory.seconds, memory.passes = 0.0, 0
        memory.interval = min(2 * memory.interval, PLAN_AFTER[1])

    def _prediction(self, turns: Turns, proposer: int | None, tables: list[list[float]]) -> Prediction:
        chance = 0.0 if proposer is None else self.memory.acceptance[proposer].mean
        return predict_mixture(turns, self.weights, proposer, chance, _looked_up(tables))

    def _best_length(self, plan: MixturePlan, author: int, chance: float) -> int:
        def seconds(length: int) -> float:
            turns = replace(plan.turns, lengths=tuple(length if i == author else n for i, n in enumerate(self._ones)))
            return predict_mixture(turns, self.weights, author, chance, _looked_up(plan.costs)).seconds_per_token

        key = author, chance
        if key not in plan.known:
            plan.known[key] = min(LOOKUP_LENGTHS, key=seconds)
        return plan.known[key]


def _looked_up(tables: list[list[float]]) -> Cost:
    return lambda author, width: tables[author][min(width, WIDEST)]
