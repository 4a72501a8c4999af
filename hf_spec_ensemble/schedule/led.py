"""A schedule that several processes follow together: they decide by measured times, which differ."""

from collections.abc import Sequence

import torch

from ..members.ranks import Ranks, Together
from .turns import Schedule, Situation


def led(schedule: Schedule, ranks: Ranks) -> Schedule:
    """A schedule that is the same in all processes."""
    return Led(schedule, ranks) if isinstance(ranks, Together) else schedule


class Led(Schedule):
    """
    A schedule that follows the first process's decisions. Each process keeps its own estimates: only decisions are
    sent, a few bytes each.

    Args:
        schedule (`Schedule`), ranks (`Together`).
    """

    def __init__(self, schedule: Schedule, ranks: Together):
        self.schedule, self.ranks = schedule, ranks

    @property
    def turns(self):
        return self.schedule.turns

    def _agree(self, *numbers: int) -> tuple[int, ...]:
        return tuple(self.ranks.agree(torch.tensor(numbers)).tolist())

    @property
    def patient(self):
        return bool(self._agree(self.schedule.patient)[0])

    def proposes(self, situation: Situation, confidence: Sequence[float | None]) -> int:
        return self._agree(self.schedule.proposes(situation, confidence))[0]

    def next(self, situation):
        return self._agree(*self.schedule.next(situation))

    def width(self, author, width):
        return self._agree(self.schedule.width(author, width))[0]

    def ran(self, author, seconds, width):
        self.schedule.ran(author, seconds, width)

    def judged(self, author, confidence, kept):
        self.schedule.judged(author, confidence, kept)

    def advanced(self, tokens, progress):
        self.schedule.advanced(tokens, progress)
