"""What a call that is over should have gained, by theory: from its acceptance and the costs measured in the process."""

from collections.abc import Sequence

from ..schedule.mixture import drafting, predict_mixture
from ..schedule.simulation import AllSettle, OwnerSettles, mean_of_runs
from ..schedule.theory import Cost, predict
from ..schedule.turns import Turns
from .authors import GeneratorAuthor
from .candidates import EnsembleCandidateGenerator
from .sharing import Readers


ROW_TOKENS = 256  # that are simulated: more of few texts, for less chance, and fewer of many


def expected_speedup(
    candidates_of: EnsembleCandidateGenerator, readers: Readers, lengths: Sequence[int]
) -> float | None:
    """
    Over the standard ensemble, inside passes, those over the prompt included.

    Args:
        candidates_of (`EnsembleCandidateGenerator`), readers (`Readers`): Of a call that is over.
        lengths (`Sequence[int]`, B): Tokens of its texts.

    Returns:
        `float` or `None`: `None` if costs are not known.
    """
    authors, turns, batch = candidates_of.authors, candidates_of.schedule.turns, len(lengths)

    def cost(i: int, width: int) -> float:
        return authors[i].costs.seconds(batch, width) or 0.0

    needed = (author for i, author in enumerate(authors) if i < turns.members or turns.lengths[i])
    one_by_one = [reader.costs.one_by_one(batch) for reader in readers.all[: turns.members]]
    if None in one_by_one or any(author.costs.measured(batch, 1) is None for author in needed):
        return None
    acceptance = [author.accepted / author.verified if author.verified else 0.0 for author in authors]
    expected = _seconds_per_token(candidates_of, readers, turns, acceptance, cost, lengths)
    patient = candidates_of.patient_share
    in_order = sum(cost(i, 1) for i in range(turns.members))
    speculative = (1 - patient) * expected + patient * in_order
    standard = sum(one_by_one)  # each member by itself, also where they shared passes
    prompt, steps = sum(author.prompt_seconds for author in authors), max(lengths)
    return (prompt + steps * standard) / (prompt + steps * speculative)


def _seconds_per_token(
    candidates_of: EnsembleCandidateGenerator,
    readers: Readers,
    turns: Turns,
    acceptance: list[float],
    cost: Cost,
    lengths: Sequence[int],
) -> float:
    """A formula's where there is one, else a simulation's."""
    drafter, coverage = candidates_of.authors[-1], 1.0
    if isinstance(drafter, GeneratorAuthor):
        if turns.lengths[drafter.index]:
            coverage = drafter.coverage
        elif drafter.habit[0]:  # decided for each draft
            length, coverage = drafter.habit
            turns = drafting(turns, drafter.index, length)
    rule = candidates_of.settling.rule(readers.groups)
    if len(lengths) == 1 and coverage == 1:
        if isinstance(rule, OwnerSettles):
            return predict_mixture(turns, rule.weights, acceptance, cost).seconds_per_token
        if isinstance(rule, AllSettle):
            return predict(turns, acceptance, cost).seconds_per_token
    some = [max(round(length * min(ROW_TOKENS / sum(lengths), 1)), 1) for length in lengths]
    return mean_of_runs(turns, acceptance, cost, some, rule, coverage, ROW_TOKENS).seconds_per_token
