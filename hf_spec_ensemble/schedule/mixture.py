"""The schedule for mixtures that are drawn by their components: who drafts for the owners, and how much."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .auto import ENOUGH_EVIDENCE, WORTHWHILE, Auto, looked_up
from .theory import LENGTHS, LOOKUP_LENGTHS, Cost, Prediction
from .turns import Situation, Turns


DRAFT_GAIN = 0.1  # share of time that a draft must promise to save: samples follow a draft less than it hopes
MOST_SKIPPED = 32  # cycles that a member is taken to leave out at most

# Share of greedy tokens that members with more than half of a mixture's weight settle, as measured on real models
SETTLED = 0.77


def predict_mixture(
    turns: Turns, weights: Sequence[float], acceptance: Sequence[float], cost: Cost, batch: int = 1
) -> Prediction:
    """
    Expected speed where only a position's owner has to score it. With length L, the author of the longest proposals
    drafts L tokens, each kept with probability a; then the owners of these positions run, each once, until one token is
    replaced or, behind the drafts, drawn: T tokens, P(T >= t) = a^(t-1) for t <= L + 1. Member i owns one of the first
    t positions with probability 1 - (1 - w_i)^t. What it has to read grows by E[T] for each cycle that it leaves out.

    Of B rows each member serves those that it owns at once. Here all that own a row's next position run before any row
    goes on; in fact rows go on by themselves, which in large batches takes down to 0.6 of this.

    Args:
        turns (`Turns`): Of the N members, then drafters. A member of length 1 proposes what it has scored anyway, and
            drafts nothing.
        weights (`Sequence[float]`, N): Of the mixture.
        acceptance (`Sequence[float]`, A), cost (`Callable[[int, int], float]`): As in `theory.predict`.
        batch (`int`, defaults to 1): B. Costs are those of passes over all rows, and so are seconds per token.

    Returns:
        `Prediction`.

    Example: two equal members.

    >>> from hf_spec_ensemble.schedule.mixture import predict_mixture
    >>> from hf_spec_ensemble.schedule.turns import Turns

    >>> predict_mixture(Turns((0, 0), 0, 2), [0.5, 0.5], [0.0, 0.0], lambda author, width: 1.0).speedup
    2.0
    """
    drafted = [length if length > 1 or i >= turns.members else 0 for i, length in enumerate(turns.lengths)]
    length = max(drafted)
    proposer = drafted.index(length) if length else None
    chance = 0.0 if proposer is None else acceptance[proposer]
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
        own = 1 - (1 - own) ** batch
        if own > 0:
            runs[member] += own
            grows = 0.0 if length and member == proposer else tokens
            seconds += own * sum(p * cost(member, round(length + 1 + k * grows)) for k, p in _skipped(own))
    standard = sum(cost(member, 1) for member in range(turns.members))
    return Prediction(seconds / tokens, tuple(each / tokens for each in runs), standard * tokens / seconds)


def _skipped(chance: float) -> list[tuple[int, float]]:
    """How many cycles a member that runs in a cycle with this chance has left out before, with probabilities."""
    shares = [(1 - chance) ** k for k in range(MOST_SKIPPED)]
    return [(k, share / sum(shares)) for k, share in enumerate(shares)]


@dataclass(frozen=True)
class MixtureTurns(Turns):
    """
    As `Turns`; where something is pending its owners run first, since a draft behind drafts is less likely to be kept.

    Example: a drafter has had its turn, and does not have another.

    >>> from hf_spec_ensemble.schedule.mixture import MixtureTurns
    >>> from hf_spec_ensemble.schedule.turns import Situation

    >>> turns = MixtureTurns((1, 1, 4), first=0, members=2, at_once=2)
    >>> turns.next(Situation(0, 1, lag=[[0], [1], [0]], waiting=[0, 1]))
    (2, 1)
    >>> turns.next(Situation(0, 1, lag=[[0], [5], [0]], pending=[[(2, 0.9)] * 4], waiting=[0, 1]))
    (1, 1)
    """

    def hand_over(self, situation: Situation) -> tuple[int, int]:
        if not any(situation.pending):
            return super().hand_over(situation)
        ones = tuple(int(length > 0 and i < self.members) for i, length in enumerate(self.lengths))
        return Turns(ones, self.first, self.members, self.at_once).hand_over(situation)


def predict_leaders(weights: Sequence[float], cost: Cost, settled: float = SETTLED) -> Prediction:
    """
    Expected speed of a greedy mixture without drafts, where a token is final once its lead exceeds the others' weight.
    Members run in the order of their weights. Those with half of the weight or less settle nothing, those with more a
    share of the tokens, and all members all. What a member has not read grows until it runs.

    Args:
        weights (`Sequence[float]`, N): Of the mixture.
        cost (`Callable[[int, int], float]`): As in `theory.predict`.
        settled (`float`): That share.

    Returns:
        `Prediction`.

    Example: of 0.7 and 0.3 the second member runs for a quarter of the tokens.

    >>> from hf_spec_ensemble.schedule.mixture import predict_leaders

    >>> predict_leaders([0.7, 0.3], lambda author, width: 1.0, settled=0.75).runs_per_token
    (1.0, 0.25)
    """
    runs, before = [0.0] * len(weights), 0.0
    for member in sorted(range(len(weights)), key=lambda i: -weights[i]):
        runs[member] = 1.0 if before <= 0.5 else 1 - settled
        before += weights[member]
    seconds = sum(own * cost(member, max(round(1 / own), 1)) for member, own in enumerate(runs) if own > 0)
    standard = sum(cost(member, 1) for member in range(len(weights)))
    return Prediction(seconds, tuple(runs), standard / seconds)


def drafting(turns: Turns, author: int, length: int) -> Turns:
    """These turns, but that an author drafts so many tokens."""
    return replace(turns, lengths=(*turns.lengths[:author], length, *turns.lengths[author + 1 :]))


def with_drafts(turns: Turns, may_draft: Sequence[bool]) -> list[Turns]:
    """These turns, then those in which one author that may (`[A]`) drafts for the owners, by all lengths to try."""
    return [turns] + [
        drafting(turns, author, length)
        for author, may in enumerate(may_draft)
        for length in (LOOKUP_LENGTHS if author == turns.at_once else LENGTHS[2:])
        if may
    ]


@dataclass
class MixturePlan:
    """Who drafts, how much, and what that is worth."""

    turns: Turns
    prediction: Prediction
    acceptance: list[float]
    costs: list[list[float]]  # [A][w]: seconds per row
    patient: bool = False  # the standard ensemble's order is faster
    known: dict[float, int] = field(default_factory=dict)  # best lengths of the author that drafts at once, by chance


class AutoMixture(Auto):
    """
    Runs the member that most rows wait for. A member proposes what it has scored anyway; besides, one author drafts for
    the owners where the costs and the acceptance measured so far promise a gain.

    Args:
        weights (`Sequence[float]`, N): Of the mixture. The others as for `Auto`.
    """

    def __init__(self, *arguments, weights: Sequence[float], **more):
        super().__init__(*arguments, **more)
        self.weights = tuple(weights)
        ones = tuple(int(may and i < self.members) for i, may in enumerate(self.may_propose))
        start = self._start  # in which all drafters have turns, so that what they cost is found out
        self._start, self._undrafted = (
            MixtureTurns(lengths, start.first, self.members, start.at_once, start.watches)
            for lengths in (start.lengths, ones)
        )

    def proposes(self, situation, confidence) -> int:
        author, plan = situation.current, self.memory.plan
        if not self.may_propose[author]:
            return 0
        if author != self.turns.at_once:
            return 1
        if self._pauses:
            return 0
        if plan is None or self.memory.acceptance[author].evidence < ENOUGH_EVIDENCE:
            return 0 if self.turns.watches else self.turns.lengths[author]  # it is watched meanwhile
        sure = [self.memory.acceptance[author].chance(own) for own in confidence if own is not None]
        return self._best_length(plan, round(sum(sure) / len(sure), 2))

    def next(self, situation) -> tuple[int, int]:
        return self._standard.hand_over(situation) if self.patient else self.turns.next(situation)

    def width(self, author, width) -> int:
        costs = self.costs[author]
        if self._takes_measure() or costs.to_probe(self.batch, width) == width:
            return width
        return costs.padded(self.batch, width)

    def _takes_measure(self) -> bool:
        """In a batch; a single row's members soon read single tokens anyway, which are not padded then."""
        return self.batch > 1 and super()._takes_measure()

    def _knows_enough(self) -> bool:
        known = all(costs.measured(self.batch, 1) is not None for costs in self.costs[: self.members])
        return known and self._knows_width()

    def _best_plan(self, tables, acceptance) -> MixturePlan:
        known = [costs.measured(self.batch, 1) is not None for costs in self.costs]
        may_draft = [may and is_known for may, is_known in zip(self.may_propose, known)]
        best, *others = (self._plan_of(turns, acceptance, tables) for turns in with_drafts(self._undrafted, may_draft))
        for plan in others:
            if plan.prediction.seconds_per_token < (1 - WORTHWHILE) * best.prediction.seconds_per_token:
                best = plan
        best.prediction, best.patient = self._in_batch(best.turns, best.prediction, acceptance, looked_up(tables))
        return best

    def _plan_of(self, turns: Turns, acceptance: list[float], tables: list[list[float]]) -> MixturePlan:
        prediction = predict_mixture(turns, self.weights, acceptance, looked_up(tables))
        return MixturePlan(turns, prediction, acceptance, tables)

    def _best_length(self, plan: MixturePlan, chance: float) -> int:
        """How many tokens to draft at once, each kept with this chance."""
        author = self._start.at_once

        def seconds(length: int) -> float:
            acceptance = [chance if i == author else own for i, own in enumerate(plan.acceptance)]
            return self._plan_of(
                drafting(self._undrafted, author, length), acceptance, plan.costs
            ).prediction.seconds_per_token

        if chance not in plan.known:
            best = min(LOOKUP_LENGTHS, key=seconds)
            plan.known[chance] = best if seconds(best) < (1 - DRAFT_GAIN) * seconds(0) else 0
        return plan.known[chance]
