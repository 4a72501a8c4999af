"""A speculative ensemble without models: proposals are kept by chance, passes cost what they are said to cost.

It follows the rules of the engine with its own bookkeeping, to test the theory and the scheduler against."""

import random
from collections.abc import Callable

from hf_spec_ensemble.schedule.turns import Schedule, Situation


def simulate(
    schedule: Schedule,
    members: int,
    confidences: list[Callable[[random.Random], float]],
    chance: Callable[[int, float], float],
    cost: Callable[[int, int], float],
    tokens: int,
    seed: int = 0,
) -> float:
    """
    Seconds per token of one row.

    Args:
        confidences: For each author, what draws the confidence of its next proposal.
        chance: The probability that an author's proposal of a confidence is kept.
        cost: Seconds of an author's pass over so many tokens.
    """
    rng = random.Random(seed)
    seen, verified, total = [0] * len(confidences), 1, 1
    pending: list[tuple[int, float]] = []
    current, turn, seconds = None, 0, 0.0

    def situation():
        return Situation(current, turn, [[total - read] for read in seen], [list(pending)])

    while verified <= tokens:
        current, turn = schedule.next(situation())
        width = schedule.width(current, total - seen[current])
        took = cost(current, width)
        seconds += took
        schedule.ran(current, took, width)
        seen[current] = total

        scored = max(min(seen[:members]) + 1 - verified, 0)  # positions that can be verified
        gained, drawn = 0, scored > len(pending)
        for author, confidence in pending[:scored]:
            kept = rng.random() < chance(author, confidence)
            schedule.judged(author, confidence, kept)
            gained += 1
            if not kept:
                drawn = True
                break
        else:
            gained += drawn
        verified += gained
        pending = [] if drawn else pending[gained:]
        if drawn:
            total = verified
            seen = [min(read, verified - 1) for read in seen]
        if gained:
            schedule.advanced(gained, gained)
        if not drawn:
            confidence = confidences[current](rng)
            if schedule.proposes(situation(), [confidence]):
                pending.append((current, confidence))
                total += 1
    return seconds / (verified - 1)
