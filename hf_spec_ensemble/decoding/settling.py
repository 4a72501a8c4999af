"""What settles a token: which members must have scored a position before its token can be final."""

from collections.abc import Sequence

import numpy as np

from ..members.member import Member
from .text import Text


class All:
    """All members must: right for every method and every way of drawing."""

    def scored(self, text: Text, members: Sequence[Member]) -> np.ndarray:
        """How many positions `[B]` from `text.final` on enough of the members have scored, without a gap."""
        return text.scored(np.minimum.reduce([member.seen for member in members]))
