"""Whether speculation keeps up with the standard ensemble, whatever was predicted; else it pauses for a while."""

from threading import Lock


# Tokens of the standard ensemble that speculation may be behind before it pauses; and for each token that is proposed
# in one turn, since a turn is paid for before it brings something
DEBT = (1.25, 0.5)
CREDIT = 2.0  # and at most ahead: what it has gained before lets it be behind for longer
PROVEN = 32  # tokens without a pause after which the next one is a short one again
PAUSE = (48, 384)  # tokens for which speculation pauses, first and at most: the pauses double


class Pace:
    """
    Keeps account of what passes cost and what the standard ensemble would have needed for the same tokens, and says
    when to pause. So speculation loses a token or two for each pause, and half of its longest turn, whatever the text.

    State: the account, what is left of a pause, how long the next one is, and tokens since the last. Any number of
    threads may add and read.

    Example: passes that cost twice what they bring.

    >>> from hf_spec_ensemble.schedule.pace import Pace

    >>> pace = Pace()
    >>> for _ in range(2):
    ...     pace.ran(2.0)
    ...     pace.advanced(1.0, standard=1.0)
    >>> pace.pauses
    True
    """

    def __init__(self):
        self._lock = Lock()
        self._left = 0.0
        self._pause = PAUSE[0]
        self._seconds = 0.0  # since tokens were last counted
        self._debt = 0.0  # in tokens; below zero if ahead
        self._tokens = 0.0

    @property
    def pauses(self) -> bool:
        """Whether speculation should pause now."""
        return self._left > 0

    def begins(self) -> None:
        """A call begins, which does not pay for the last passes of the one before."""
        with self._lock:
            self._seconds = 0.0

    def ran(self, seconds: float) -> None:
        """A pass has cost so much."""
        with self._lock:
            self._seconds += seconds

    def advanced(self, tokens: float, standard: float | None, longest: int = 1) -> None:
        """
        A batch has come so many tokens nearer to its end.

        Args:
            standard (`float`, *optional*): Seconds that the standard ensemble takes for a token; `None` if that is not
                known.
            longest (`int`, defaults to 1): Tokens that are proposed in one turn at most.
        """
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
            if self._left > 0 or standard is None:
                self._left = max(self._left - tokens, 0.0)
                return
            self._tokens += tokens
            self._debt = max(self._debt + seconds / standard - tokens, -CREDIT)
            if self._tokens >= PROVEN:
                self._pause = PAUSE[0]
            if self._debt >= DEBT[0] + DEBT[1] * (longest - 1):
                self._left, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
                self._debt = self._tokens = 0.0
